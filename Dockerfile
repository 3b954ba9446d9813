# Vitrail for CPUs, or with --build-arg DEVICE=cuda for NVIDIA GPUs; docs/install.md shows how to build and run it.
ARG DEVICE=cpu

FROM python:3.11-slim AS build
# Address of a package index with PyTorch's wheels for CPUs, which are smaller by gigabytes than the regular ones.
ARG TORCH_INDEX=""
ARG EXTRAS=app,export,heic,serve,sweeps,tensorboard,mlflow
# Commit of the sources, for run.json: .git is not copied.
ARG REVISION=""
WORKDIR /source
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY app ./app
COPY callbacks ./callbacks
COPY datamodules ./datamodules
COPY evaluation ./evaluation
COPY experiments ./experiments
COPY lightning_modules ./lightning_modules
COPY retrieval ./retrieval
COPY vitrail ./vitrail
RUN python -m venv /opt/vitrail \
    && if [ -n "$TORCH_INDEX" ]; then \
         PIP_INDEX_URL="$TORCH_INDEX" /opt/vitrail/bin/pip install --no-cache-dir --no-deps -c constraints.txt torch torchvision; \
       fi \
    && VITRAIL_REVISION="$REVISION" /opt/vitrail/bin/pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"

FROM python:3.11-slim AS cpu
ENV NVIDIA_VISIBLE_DEVICES=void

FROM python:3.11-slim AS cuda
# The driver's libraries are mounted by NVIDIA's container toolkit, CUDA's come with PyTorch's wheel.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${DEVICE}
# USER and HOME hold for any --user, also one that the container does not know.
ENV PATH=/opt/vitrail/bin:$PATH HOME=/workspace USER=vitrail VITRAIL_CACHE=/workspace/.cache/vitrail
COPY --from=build /opt/vitrail /opt/vitrail
RUN useradd --uid 1000 --home-dir /workspace --create-home vitrail
USER vitrail
WORKDIR /workspace
EXPOSE 7860
ENTRYPOINT ["vitrail"]
CMD ["--help"]
