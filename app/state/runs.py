"""A trained run as the application serves it: loaded once, safe to use from several threads."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from app.state.context import Limits, SingleFlightCache
from vitrail.errors import UserError
from vitrail.ood import Detector, marked, outputs_with_features
from vitrail.predictions import ImagePrediction, OperatingPoint, OutputCalibration, image_predictions
from vitrail.runs import Run, read_calibration, read_run_detector
from vitrail.types import TaskKind, TextReading, kind_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from datamodules.loading.decode import ValueRange
    from evaluation.saliency import Method
    from evaluation.saliency.overlays import Explained

Kind = Literal["classifier", "dual encoder"]

FEATURES = "\0features"
"""Stands next to the names of tasks, none of which has it."""

_LOGGER = logging.getLogger("vitrail.app")
_KEPT = 32
"""Sets of labels whose vectors are kept."""

_BATCH = 16
"""Images that pass through the network together, which bounds the memory."""


class ServedModel(ABC):
    """A trained model with the calibration that was fitted for it, safe to use from several threads.

    Attributes:
        name: by which users and requests know it.
        path: its directory.
        kind: ``classifier`` or ``dual encoder``.
        tasks: class names of each task that it predicts, the main one first.
        kinds: kinds of the tasks that are not single-label.
        thresholds: of multi-label tasks, of each label.
        temperatures: by task, as ``python -m evaluation calibrate`` fitted them.
        weights: SHA-256 of the weights, hexadecimal, by which a gallery knows its model.
        notes: what users should know of it, one line each; where there is no calibration they report it.
    """

    name: str
    path: Path
    kind: Kind
    tasks: dict[str, list[str]]
    kinds: dict[str, TaskKind]
    thresholds: Mapping[str, Sequence[float]]
    temperatures: dict[str, float]
    notes: list[str]
    weights: Any
    _calibration: OutputCalibration
    _detector: Detector | None
    _points: Mapping[str, OperatingPoint]

    @abstractmethod
    def outputs(self, images: Sequence[Any]) -> dict[str, NDArray[np.float32]]:
        """Logits ``(N, C)`` by task, and under the empty name the vectors ``(N, D)``; N is at least 1.

        Where the detector of unknown images needs them, the backbone's features too.
        """

    @abstractmethod
    def read(self, content: bytes, name: str, limits: Limits) -> Any:
        """Return an image as the model takes it, from the content of a file.

        Raises:
            UploadError: it is too large, not an image of a known format, or damaged.
        """

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """Return vectors of texts, as they are: float32 ``(Q, D)``, of unit length."""

    @property
    @abstractmethod
    def logit_scale(self) -> float:
        """What a dual encoder multiplies cosines by to get logits."""

    def predict(self, images: Sequence[Any]) -> list[ImagePrediction]:
        """Predict all tasks of each image, or of what ``read`` or ``prepared`` made of it.

        ``Run.predict`` reads and scales images itself; here uploads are small already, and threads share the network.

        Raises:
            UserError: the model has no classes, or its outputs are not finite.
        """
        self.check_classes()
        return self.predictions(self.outputs(images)) if images else []

    def predictions(self, outputs: Mapping[str, NDArray[np.float32]]) -> list[ImagePrediction]:
        """Return what outputs mean: calibrated, at the operating points, and unknown images marked."""
        found = image_predictions(
            [self.name] * len(outputs[""]),
            outputs,
            self.tasks,
            self.temperatures,
            self.kinds,
            self.thresholds,
            self._calibration,
        )
        found = [one.decided(self._points) for one in found]
        return found if self._detector is None else marked(found, self._detector, outputs, outputs.get(FEATURES))

    @property
    def writes_captions(self) -> bool:
        """Whether it writes a caption for each image."""
        return False

    def captions(self, images: Sequence[Any]) -> list[str]:
        """Return the caption of each of one image or more, for a model that writes them."""
        raise NotImplementedError

    def encode_images(self, images: Sequence[Any]) -> NDArray[np.float32]:
        """Return vectors of one image or more as in the run's galleries: float32 ``(N, D)``, of unit length."""
        return self.outputs(images)[""]

    def encode_labels(self, prompts: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        """Return the mean vector of each label's prompts, as the classes of a dual encoder are made.

        Args:
            prompts: of each of C labels one or more.

        Returns:
            float32 ``(C, D)``, of unit length; read-only, since the latest are kept.
        """
        key = tuple(map(tuple, prompts))
        return self._labels.get(key, lambda: self._mean_vectors(prompts))

    @cached_property
    def _labels(self) -> SingleFlightCache[NDArray[np.float32]]:
        return SingleFlightCache(_KEPT)

    def _mean_vectors(self, prompts: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        flat = self.encode_texts([prompt for texts in prompts for prompt in texts])
        starts = np.cumsum([0, *(len(texts) for texts in prompts[:-1])])
        means = np.add.reduceat(flat, starts) / np.array([[len(texts)] for texts in prompts], np.float32)
        labels: NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)
        labels.flags.writeable = False
        return labels

    def check_classes(self) -> None:
        """Raise ``UserError`` for a model without classes."""
        if not self.tasks:
            raise UserError(f"{self.name}: its data have no classes; ask it for labels of your own under Zero-shot")

    def check_texts(self) -> None:
        """Raise ``UserError`` for a model without a text encoder."""
        if self.kind != "dual encoder":
            raise UserError(f"{self.name}: a {self.kind} has no text encoder; choose a dual encoder")


class ServedRun(ServedModel):
    """The best checkpoint of a run, or an export of its weights.

    One thread at a time is inside the network, because saliency maps hook into its layers.

    Args:
        path: run directory.
        name: by which users and requests know it; experiment and run directory by default.
        device: to compute on; a GPU by default where there is one.

    Raises:
        UserError: the directory is not a run, or has no best checkpoint that can be read safely.
    """

    def __init__(self, path: Path | str, name: str = "", device: str = "") -> None:
        from lightning_modules.dual_encoder import DualEncoder

        run = Run(path)
        self.path, self.name = run.path, name or run.name
        self._model = run.load_model(device=device) if device else run.model
        self.kind: Kind = "dual encoder" if isinstance(self._model, DualEncoder) else "classifier"
        self.tasks = {task: list(classes) for task, classes in getattr(self._model, "tasks", {}).items()}
        self.kinds: dict[str, TaskKind] = dict(getattr(self._model, "task_kinds", {}))
        self.thresholds = getattr(self._model, "thresholds", {})
        self.notes: list[str] = []
        self.temperatures, self._calibration = self._read_calibration(run)
        self._points = run.operating_points if self.temperatures or self._calibration != OutputCalibration() else {}
        self._detector = self._read_detector(run)
        self._lock = threading.RLock()

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """Return vectors of texts, as they are: float32 ``(Q, D)``, of unit length."""
        import torch

        self.check_texts()
        with self._lock, torch.inference_mode():
            vectors: NDArray[np.float32] = self._model.encode_text(texts).float().cpu().numpy()
        return vectors

    def reading(self, text: str) -> TextReading:
        """Return what the model's tokenizer reads of a text."""
        self.check_texts()
        with self._lock:
            reading: TextReading = self._model.towers.tokenizer.reading(text)
            return reading

    @property
    def logit_scale(self) -> float:
        """What a dual encoder multiplies cosines by to get logits."""
        self.check_texts()
        return float(self._model.objective.logit_scale()[0].detach())

    @property
    def writes_captions(self) -> bool:
        """See ``ServedModel``."""
        return getattr(self._model, "captioner", None) is not None

    def captions(self, images: Sequence[Image | torch.Tensor]) -> list[str]:
        """See ``ServedModel``; at most 16 images pass through the network together."""
        import torch

        found: list[str] = []
        for start in range(0, len(images), _BATCH):
            pixels = self._pixels(images[start : start + _BATCH])
            with self._lock, torch.inference_mode():
                found += self._model.captions_of(pixels.to(self._model.device))
        return found

    @cached_property
    def weights(self) -> str:
        """SHA-256 of the weights, hexadecimal, by which a gallery knows its model."""
        return str(self._model.weights_digest())

    @cached_property
    def methods(self) -> list[Method]:
        """Saliency methods that go with its network."""
        from evaluation.saliency import check_method

        found: list[Method] = []
        for method in ("gradcam", "rollout"):
            with suppress(UserError):
                check_method(self._model, method)
                found.append(method)
        return found

    @property
    def value_range(self) -> ValueRange:
        """How images with more than 8 bits a channel are read for the model."""
        chosen: ValueRange = self._model.input_options.get("value_range", "auto")
        return chosen

    def saliency(self, image: Image | torch.Tensor, task: str, label: str, method: Method = "gradcam") -> Explained:
        """Return where in an image the model attends to for a class.

        Args:
            image: any, or what ``prepared`` made of one.
            task: whose class; of a dual encoder empty for a text of your own.
            label: a class or label of the task, of a regression task ``higher`` or ``lower``, or the text.
            method: Grad-CAM, or attention rollout, which is the same for all classes.

        Raises:
            UserError: the model has no such task or class, or the method does not go with its network.
        """
        from evaluation.saliency import explainable
        from evaluation.saliency.overlays import explain_task, explain_texts

        images = self._pixels([image])
        if task and task not in self.tasks:
            raise UserError(f"task {task!r}: {self.name} has {', '.join(self.tasks) or 'none'}; choose one of them")
        names = explainable(self._model, task) if task else []
        if task and label not in names:
            raise UserError(f"class {label!r}: {self.name} has no such {task}; choose one of its classes")
        with self._lock:
            if not task:
                return explain_texts(self._model, [label], images, [""], method=method)[0]
            return explain_task(self._model, task, images, [""], method=method, shown=names.index(label))[0]

    def prepared(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return an image as the model takes it, which is all of it that needs to be kept.

        Args:
            pixels: uint8 ``(3, H, W)``, RGB.

        Returns:
            uint8 ``(3, size, size)``, made as those that the model was evaluated on.
        """
        from datamodules.loading.transforms import eval_transform

        made: torch.Tensor = eval_transform(self._model.input_options)(pixels)
        return made.clone()

    def _read_calibration(self, run: Run) -> tuple[dict[str, float], OutputCalibration]:
        try:
            exported = (self.path / Run.EXPORT).is_file()
            found, of_outputs = (run.temperatures, run.output_calibration) if exported else read_calibration(self.path)
        except UserError as error:
            # It must be reported, but must not keep the model from being served. The browser gets no path.
            _LOGGER.warning("%s", error)
            self.notes.append(f"Confidences are not calibrated: {Run.CALIBRATION} is damaged or of another checkpoint.")
            return {}, OutputCalibration()
        calibrated = {*found, *of_outputs.labels}
        if lacking := [one for one in self.tasks if one not in calibrated and kind_of(self.kinds, one) != "regression"]:
            self.notes.append(
                f"Confidences of {', '.join(lacking)} are not calibrated (python -m evaluation calibrate)."
            )
        return found, of_outputs

    def _read_detector(self, run: Run) -> Detector | None:
        try:
            return read_run_detector(self.path) if (self.path / Run.OOD).is_file() else run.detector
        except UserError as error:
            _LOGGER.warning("%s", error)
            self.notes.append(f"Unknown images are not recognised: {Run.OOD} is damaged or of another checkpoint.")
            return None

    def read(self, content: bytes, name: str, limits: Limits) -> torch.Tensor:
        """See ``ServedModel``."""
        from app.logic.uploads import read_pixels

        return self.prepared(read_pixels(content, limits, self.value_range, name))

    def _pixels(self, images: Sequence[Image | torch.Tensor]) -> torch.Tensor:
        """uint8 ``(N, 3, size, size)`` of images, or of what ``prepared`` made of them."""
        import torch

        return torch.stack(
            [
                one
                if isinstance(one, torch.Tensor)
                else self.prepared(torch.from_numpy(np.array(one.convert("RGB"))).permute(2, 0, 1))
                for one in images
            ]
        )

    def outputs(self, images: Sequence[Image | torch.Tensor]) -> dict[str, NDArray[np.float32]]:
        """See ``ServedModel``; at most 16 images pass through the network together."""
        import torch

        parts: dict[str, list[torch.Tensor]] = {}
        for start in range(0, len(images), _BATCH):
            pixels = self._pixels(images[start : start + _BATCH])
            batch: dict[str, Any] = {"image": pixels, "sample_id": torch.arange(len(pixels))}
            with self._lock, torch.inference_mode():
                moved = {key: one.to(self._model.device) for key, one in batch.items()}
                needed = self._detector is not None and self._detector.needs_features
                outputs, features = outputs_with_features(self._model, moved, features=needed)
            others = {} if features is None else {FEATURES: torch.from_numpy(features)}
            for name, values in {**outputs["logits"], "": outputs["image_embedding"], **others}.items():
                parts.setdefault(name, []).append(values.float().cpu())
        joined = {name: torch.cat(values).numpy() for name, values in parts.items()}
        if not all(np.isfinite(values).all() for values in joined.values()):
            raise UserError(f"{self.name}: its outputs are not finite; has it diverged? choose another run")
        return joined
