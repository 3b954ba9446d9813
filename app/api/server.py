"""The endpoints of the API with their responses, batching across requests, and the server that they run in."""

from __future__ import annotations

import asyncio
import math
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, Generic, TypeVar
from urllib.parse import urlencode

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, File, Form, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from app.api.guard import ApiGuard, Metrics, Settings, error_response
from app.logic.uploads import UploadError
from app.logic.zero_shot import Others, compare, distinct_labels, distinct_templates
from app.security import RefusedError
from app.state.exports import ServedExport
from app.state.galleries import ServedGallery
from app.state.runs import ServedModel
from retrieval.schema import LABEL, PREDICTED, shortened
from vitrail.console import without_nan
from vitrail.errors import UserError
from vitrail.predictions import ImagePrediction, TaskPrediction
from vitrail.types import kind_of


class Error(BaseModel):
    """Why a request was refused, in one line."""

    error: str


class Choice(BaseModel):
    """A class or label with its probability."""

    label: str
    confidence: float


class TaskResult(BaseModel):
    """What is predicted for one image in one task; fields that do not belong to its kind are null."""

    kind: str = Field(description="single_label, multi_label, ordinal or regression")
    label: str | None = Field(default=None, description="predicted class; null where several are equally probable")
    confidence: float | None = Field(default=None, description="probability of the predicted class")
    calibrated: bool = Field(default=False, description="whether confidences are calibrated")
    top_k: list[Choice] = Field(default=[], description="most probable classes, best first")
    labels: list[Choice] | None = Field(default=None, description="of multi_label: all predicted labels")
    value: float | None = Field(default=None, description="of regression: the predicted number")
    deviation: float | None = Field(
        default=None, description="of regression: its standard deviation, where there is one"
    )
    decision: str | None = Field(
        default=None, description="what is predicted at the run's operating point, if it has one"
    )

    @classmethod
    def of(cls, one: TaskPrediction, top_k: int) -> TaskResult:
        """Make it of a prediction."""
        if one.kind == "regression":
            return cls(kind=one.kind, value=one.value, deviation=one.deviation)
        several = one.kind == "multi_label"
        return cls(
            kind=one.kind,
            label=None if several else one.label or None,
            confidence=None if several else one.confidence,
            calibrated=one.calibrated,
            top_k=_choices(one.top_k(top_k)),
            labels=_choices(one.labels) if several else None,
            decision=one.decision,
        )


class ImageResult(BaseModel):
    """Predictions for one image."""

    image: str = Field(description="name of the uploaded file")
    tasks: dict[str, TaskResult]
    unknown: bool | None = Field(
        default=None, description="whether it is unlike the training images; null if that is unknown"
    )
    caption: str | None = Field(default=None, description="that the model has written; null if it writes none")

    @classmethod
    def of(cls, name: str, found: ImagePrediction | None, top_k: int, caption: str | None) -> ImageResult:
        """Make it of a prediction, None of a model without classes, and of a caption."""
        if found is None:
            return cls(image=name, tasks={}, caption=caption)
        tasks = {task: TaskResult.of(one, top_k) for task, one in found.tasks.items()}
        return cls(image=name, tasks=tasks, unknown=found.unknown, caption=caption)


class Classified(BaseModel):
    """One result per image, in their order."""

    predictions: list[ImageResult]


class Embedded(BaseModel):
    """Vectors of unit length, one per image and one per text, in their order."""

    images: list[list[float]]
    texts: list[list[float]]


class Likeness(BaseModel):
    """A label of the request with its probability among all of them, and the cosine of image and label."""

    label: str
    confidence: float
    similarity: float


class ZeroShotResult(BaseModel):
    """Labels of the request for one image, best first."""

    image: str
    labels: list[Likeness]
    none_of_these: bool = Field(description="whether something else fits the image better than every label")
    other: str | None = Field(default=None, description="what fits best of everything that is not among the labels")


class ZeroShotResults(BaseModel):
    """One result per image, in their order."""

    predictions: list[ZeroShotResult]


class Found(BaseModel):
    """An image of the gallery."""

    id: str
    score: float = Field(description="cosine of its vector and the query's")
    image_url: str = Field(description="address of the image, relative to the server")
    metadata: dict[str, Any] = Field(description="caption, split, labels and predictions of the image")


class SearchResults(BaseModel):
    """Images of the gallery, best first."""

    results: list[Found]


class Task(BaseModel):
    """A task of the model."""

    kind: str
    classes: list[str]


class Limits(BaseModel):
    """What one request may have at most."""

    bytes: int
    pixels: int
    images: int
    text: int = Field(description="characters of a text")
    labels: int
    top_k: int


class ModelInfo(BaseModel):
    """What is served."""

    name: str
    kind: str
    engine: str
    tasks: dict[str, Task]
    gallery_images: int | None = Field(default=None, description="images of the gallery; null without one")
    limits: Limits
    notes: list[str]


class Health(BaseModel):
    """The server answers, and its model is loaded."""

    status: str = "ready"
    model: str


def _choices(ranked: list[tuple[str, float]]) -> list[Choice]:
    return [Choice(label=label, confidence=share) for label, share in ranked if not math.isnan(share)]


Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Collects items while the model works on others.

    A batch begins as soon as the model is free, with all that waits by then: so a single client never waits for
    others, and the busier the server is, the larger its batches.

    Args:
        infer: gets some items and returns as many results.
        size: items of a batch at most.
        executor: of the model; one thread, since a second batch would only slow the first one down.
    """

    def __init__(self, infer: Callable[[list[Item]], Sequence[Result]], size: int, executor: Executor) -> None:
        self._infer, self._size, self._executor = infer, size, executor
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._running: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Return the results of items, which may be of several batches; raise what the model raised for one."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Result]] = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._running is None or self._running.done():
            self._running = loop.create_task(self._run())
        found = await asyncio.gather(*futures, return_exceptions=True)
        results: list[Result] = []
        for one in found:
            if isinstance(one, BaseException):
                raise one
            results.append(one)
        return results

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            try:
                results = await loop.run_in_executor(self._executor, self._infer, [item for item, _ in batch])
            except Exception as error:  # whatever it is, it belongs to those who wait
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():  # its request may have ended
                    future.set_result(result)


TOP_K = 100
"""Most classes or search results of one request."""

_SIDE = 1024
_SHOWN = ("caption", "group", "split")
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error} for status in (400, 401, 404, 413, 415, 422, 429, 503)
}

Images = Annotated[list[UploadFile], File(description="image files")]
TopK = Annotated[int, Form(ge=1, le=TOP_K)]


class Service:
    """What the endpoints do.

    Args:
        model: that predicts.
        gallery: of the model's vectors, for the search.
        settings: batch size and limits.
        metrics: that are counted.
    """

    def __init__(self, model: ServedModel, gallery: ServedGallery | None, settings: Settings, metrics: Metrics) -> None:
        self._model, self._gallery, self._limits = model, gallery, settings.limits
        self._metrics, self._others = metrics, Others()
        self._network = ThreadPoolExecutor(1, "model")
        self._readers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "reader")
        self._batcher = Batcher(self._infer, settings.batch, self._network)
        metrics.waiting.set_function(lambda: len(self._batcher))

    def close(self) -> None:
        """End the threads, once what they do is done."""
        self._network.shutdown()
        self._readers.shutdown()

    async def health(self) -> Health:
        """Return 200 once the model is loaded."""
        return Health(model=self._model.name)

    async def metrics(self) -> Response:
        """Counts and durations, in the text format of Prometheus."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def model(self) -> ModelInfo:
        """What is served: tasks, classes, limits."""
        limits, model = self._limits, self._model
        return ModelInfo(
            name=model.name,
            kind=model.kind,
            engine="onnx" if isinstance(model, ServedExport) else "torch",
            tasks={task: Task(kind=kind_of(model.kinds, task), classes=names) for task, names in model.tasks.items()},
            gallery_images=None if self._gallery is None else len(self._gallery),
            limits=Limits(
                bytes=limits.upload_bytes,
                pixels=limits.upload_pixels,
                images=limits.images,
                text=limits.text,
                labels=limits.labels,
                top_k=TOP_K,
            ),
            notes=model.notes,
        )

    async def classify(self, images: Images, top_k: TopK = 5) -> Classified:
        """Predict every task of the model for each image, as `vitrail predict` does."""
        if not self._model.writes_captions:
            self._model.check_classes()
        read = await self._pixels(images)
        found = await self._batcher.submit(read)
        captions: Sequence[str | None] = [None] * len(read)
        if self._model.writes_captions:
            captions = await self._in_network(lambda: self._model.captions(read))
        return Classified(
            predictions=[
                ImageResult.of(_name(upload), prediction, top_k, caption)
                for upload, (prediction, _), caption in zip(images, found, captions, strict=True)
            ]
        )

    async def embed(
        self,
        images: Annotated[list[UploadFile], File(description="image files")] = [],  # noqa: B006 -- FastAPI copies it
        texts: Annotated[list[str], Form(description="texts, for a dual encoder")] = [],  # noqa: B006
    ) -> Embedded:
        """Return the vectors of images and of texts; the dot product of two of them is their cosine."""
        if not images and not texts:
            raise UserError("images, texts: there are none; give one or more")
        vectors = [vector.tolist() for _, vector in await self._inferred(images)] if images else []
        return Embedded(images=vectors, texts=(await self._texts(texts)).tolist() if texts else [])

    async def zero_shot(
        self,
        images: Images,
        labels: Annotated[list[str], Form(description="one field per label")],
        templates: Annotated[list[str], Form(description="prompts, each with {} in place of the label")] = [],  # noqa: B006
    ) -> ZeroShotResults:
        """Compare each image with labels of the request, by a dual encoder."""
        self._model.check_texts()
        names = distinct_labels(labels, self._limits).names
        prompts = distinct_templates(templates or ["a photo of a {}."], self._limits)
        vectors = np.stack([vector for _, vector in await self._inferred(images)])
        found = await self._in_network(lambda: compare(self._model, vectors, names, prompts, others=self._others))
        return ZeroShotResults(
            predictions=[
                ZeroShotResult(
                    image=_name(upload),
                    labels=[
                        Likeness(label=label, confidence=share, similarity=cosine)
                        for label, share, cosine in one.ranked()
                    ],
                    none_of_these=one.verdict.none_of_these,
                    other=one.verdict.other or None,
                )
                for upload, one in zip(images, found, strict=True)
            ]
        )

    async def search(
        self,
        image: Annotated[UploadFile | None, File(description="an image file, or …")] = None,
        text: Annotated[str, Form(description="… a text, for a dual encoder")] = "",
        where: Annotated[str, Form(description="a filter, such as split = 'test' and predicted_class = 'mug'")] = "",
        top_k: TopK = 10,
    ) -> SearchResults:
        """Find the images of the gallery that are most similar to a text or an image."""
        gallery = self._opened()
        if (image is None) == (not text.strip()):
            raise UserError("image, text: give one of them")
        _check_length("where", where, self._limits.text)
        if image is not None:
            [(_, vector)] = await self._inferred([image])
        else:
            [vector] = await self._texts([text])
        query = shortened(vector[None], gallery.identity.dim)

        def find() -> list[Found]:
            hits = gallery.gallery.nearest(query, top_k, where)[0]
            rows = gallery.rows([hit.id for hit in hits])
            return [_found(hit.id, hit.score, row) for hit, row in zip(hits, rows, strict=True)]

        return SearchResults(results=await asyncio.to_thread(find))

    async def image(
        self,
        id: Annotated[str, Query(max_length=2_000, description="of a search result")],  # noqa: A002 -- of the address
        side: Annotated[int, Query(ge=16, le=_SIDE, description="longest side in pixels")] = 512,
    ) -> Response:
        """Return an image of the gallery as JPEG."""
        gallery = self._opened()
        try:
            # The id is looked up in the gallery, never made part of a path.
            content = await asyncio.get_running_loop().run_in_executor(self._readers, gallery.jpeg, id, side)
        except UserError:  # the reason may name a file
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such image") from None
        return Response(content, media_type="image/jpeg")

    def _infer(self, images: list[Any]) -> list[tuple[ImagePrediction | None, NDArray[np.float32]]]:
        self._metrics.batches.observe(len(images))
        outputs = self._model.outputs(images)
        predictions: Sequence[ImagePrediction | None] = [None] * len(images)
        if self._model.tasks:
            predictions = self._model.predictions(outputs)
        return list(zip(predictions, outputs[""], strict=True))

    async def _inferred(
        self, uploads: Sequence[UploadFile]
    ) -> list[tuple[ImagePrediction | None, NDArray[np.float32]]]:
        """Predictions, None for a model without classes, and vectors of uploaded files."""
        return await self._batcher.submit(await self._pixels(uploads))

    async def _pixels(self, uploads: Sequence[UploadFile]) -> list[Any]:
        """Uploaded files as the model takes them."""
        if len(uploads) > self._limits.images:
            raise UserError(f"images: {len(uploads)} are too many at once; send {self._limits.images} or fewer")
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(self._readers, self._read, one) for one in uploads))

    def _read(self, upload: UploadFile) -> Any:
        # Here, and not when the request comes in: so no more files are in memory than are decoded at once.
        return self._model.read(upload.file.read(), _name(upload), self._limits)

    async def _texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self._model.check_texts()
        if len(texts) > self._limits.labels:
            raise UserError(f"texts: {len(texts)} are too many at once; send {self._limits.labels} or fewer")
        for text in texts:
            if not text.strip():
                raise UserError("texts: one is empty; leave it out")
            _check_length("text", text, self._limits.text)
        return await self._in_network(lambda: self._model.encode_texts(list(texts)))

    async def _in_network(self, compute: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._network, compute)

    def _opened(self) -> ServedGallery:
        if self._gallery is None:
            raise RefusedError(HTTPStatus.NOT_FOUND, "no gallery is served; start the server with --gallery G")
        return self._gallery


def build_app(model: ServedModel, gallery: ServedGallery | None, settings: Settings) -> ASGIApp:
    """Make the whole application, with the guard in front of it."""
    metrics = Metrics()
    service = Service(model, gallery, settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPIOffline(
        redoc_url=None,
        title=f"Vitrail: {model.name}",
        description='Predictions of a trained model. Errors are `{"error": "one line"}`.',
        version="1",
        lifespan=lifespan,
        responses=_ERRORS,
        # So that the page of the documentation offers to enter the token; the guard checks it.
        dependencies=[Depends(HTTPBearer(auto_error=False))] if settings.token else [],
    )
    app.get("/health")(service.health)
    app.get("/metrics", response_class=Response)(service.metrics)
    app.get("/v1/model")(service.model)
    app.post("/v1/classify")(service.classify)
    app.post("/v1/embed")(service.embed)
    app.post("/v1/zero-shot")(service.zero_shot)
    app.post("/v1/search")(service.search)
    app.get("/v1/image", response_class=Response)(service.image)
    document = app.openapi()
    _offer_files(document)
    paths = list(document["paths"])
    for kind in (UserError, RefusedError, RequestValidationError, StarletteHTTPException, Exception):
        app.add_exception_handler(kind, _refusal)
    return ApiGuard(app, settings, metrics, paths)


def _offer_files(part: Any) -> None:
    """Mark files as Swagger UI knows them: of the newer mark it makes a field for text."""
    if isinstance(part, dict) and part.pop("contentMediaType", None) == "application/octet-stream":
        part["format"] = "binary"
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _offer_files(value)


def serve(app: ASGIApp, listening: socket.socket, settings: Settings) -> None:
    """Serve on a bound socket until the process is asked to end; requests that run then are completed."""
    uvicorn.Server(server_config(app, settings)).run(sockets=[listening])


def server_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """Bound the connections of the server, and how long it waits for requests at the end."""
    return uvicorn.Config(
        app,
        log_level="warning",
        # Of connections, most of which are idle; requests are bounded by the guard.
        limit_concurrency=16 * settings.queue,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=30,
        server_header=False,
        proxy_headers=False,
    )


def _refusal(_: Request, error: Exception) -> Response:
    """One line and the status that belongs to an error."""
    cause: BaseException | None = error
    while cause is not None:  # FastAPI calls whatever happens while a body is read a bad request
        if isinstance(cause, RefusedError | UploadError):
            return error_response(cause.status, str(cause))
        cause = cause.__cause__
    if isinstance(error, UserError):
        return error_response(422, str(error))
    if isinstance(error, RequestValidationError):
        lines = (f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()[:5])
        return error_response(422, "; ".join(lines))
    if isinstance(error, StarletteHTTPException):
        line = (
            "there is nothing at this address; /docs lists what there is" if error.status_code == 404 else error.detail
        )
        return error_response(error.status_code, line)
    return error_response(500, "internal error; the reason is in the server's log")


def _found(sample_id: str, score: float, row: dict[str, Any]) -> Found:
    shown = {key: row[key] for key in row if key in _SHOWN or key.startswith((LABEL, PREDICTED, "confidence_"))}
    address = f"/v1/image?{urlencode({'id': sample_id})}"
    return Found(id=sample_id, score=score, image_url=address, metadata=without_nan(shown))


def _check_length(what: str, text: str, longest: int) -> None:
    if len(text) > longest:
        raise UserError(f"{what}: {len(text)} characters are too many; send {longest} or fewer")


def _name(upload: UploadFile) -> str:
    return upload.filename or "image"
