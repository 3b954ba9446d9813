"""A trained run as the application serves it: loaded once, safe to use from several threads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from vitrail.errors import UserError
from vitrail.predictions import ImagePrediction, image_predictions
from vitrail.runs import Run, read_temperatures
from vitrail.types import UNKNOWN

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from datamodules.loading.decode import ValueRange
    from evaluation.saliency import Method
    from evaluation.saliency.overlays import Explained
    from lightning_modules.base import VisionTask
    from retrieval.search.encoder import QueryEncoder
    from retrieval.search.searcher import Reading

Kind = Literal["classifier", "dual encoder"]

_LOGGER = logging.getLogger("vitrail.app")
_AT_A_TIME = 16
"""Images that go through the network together: what bounds the memory."""


class ServedRun:
    """The best checkpoint of a run, with the temperatures that were fitted for it.

    It is an ``Encoder`` of ``retrieval.search.searcher`` too. One thread at a time is inside the network, because
    saliency maps watch its layers.

    Args:
        path: run directory.
        name: by which users and requests know it; experiment and run directory by default.
        device: to compute on; a GPU by default where there is one.

    Attributes:
        path: run directory.
        name: by which users and requests know it.
        kind: ``classifier`` or ``dual encoder``.
        tasks: class names of each task that it predicts, the main one first.
        temperatures: by task, as ``python -m evaluation calibrate`` fitted them.
        notes: what users should know of it, one line each; where there is no calibration this says so.

    Raises:
        UserError: if the directory is no run, or has no best checkpoint that can be read safely.
    """

    def __init__(self, path: Path | str, name: str = "", device: str = "") -> None:
        import torch

        from lightning_modules.dual_encoder import DualEncoder

        files = Run(path)
        self.path = files.path
        self.name = name or files.name
        self._model: VisionTask = files.load_model(device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.kind: Kind = "dual encoder" if isinstance(self._model, DualEncoder) else "classifier"
        found = getattr(self._model, "tasks", {})
        self.tasks: dict[str, list[str]] = {task: list(classes) for task, classes in found.items()}
        self.notes: list[str] = []
        self.temperatures = self._read_temperatures()
        self._lock = threading.RLock()

    def predict(self, images: Sequence[Image | torch.Tensor]) -> list[ImagePrediction]:
        """Probabilities of all classes of all tasks, of each image, or of what ``prepared`` made of it.

        Raises:
            UserError: if the model knows no classes, or puts out something that is not finite.
        """
        if not self.tasks:
            raise UserError(f"{self.name}: its data have no classes; ask it for labels of your own under Zero-shot")
        if not images:
            return []
        return image_predictions([""] * len(images), self._outputs(images), self.tasks, self.temperatures)

    def encode_images(self, images: Sequence[Image | torch.Tensor]) -> NDArray[np.float32]:
        """Vectors of one image or more, as the run's galleries hold them.

        Returns:
            float32 ``(N, D)``, of unit length.

        Raises:
            UserError: as ``predict``.
        """
        return self._outputs(images)[""]

    def encode_image(self, path: Path) -> NDArray[np.float32]:
        """See ``retrieval.search.searcher.Encoder``."""
        with self._lock:
            return self._queries.encode_image(path)

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """Vectors of texts, as they are.

        Returns:
            float32 ``(Q, D)``, of unit length.

        Raises:
            UserError: if the model reads no texts.
        """
        with self._lock:
            return self._queries.encode_texts(texts)

    def encode_labels(self, prompts: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        """Vectors of labels: the mean of their prompts' vectors, as the classes of a dual encoder are made.

        Args:
            prompts: of each of C labels one or more.

        Returns:
            float32 ``(C, D)``, of unit length.

        Raises:
            UserError: if the model reads no texts.
        """
        flat = self.encode_texts([prompt for texts in prompts for prompt in texts])
        starts = np.cumsum([0, *(len(texts) for texts in prompts[:-1])])
        means = np.add.reduceat(flat, starts) / np.array([[len(texts)] for texts in prompts], np.float32)
        labels: NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return labels

    def reading(self, text: str) -> Reading:
        """What the model reads of a text.

        Raises:
            UserError: if it reads no texts.
        """
        with self._lock:
            return self._queries.reading(text)

    @property
    def logit_scale(self) -> float:
        """What a dual encoder multiplies cosines by to get logits.

        Raises:
            UserError: if the model compares nothing with texts.
        """
        if self.kind != "dual encoder":
            raise UserError(f"{self.name}: is a {self.kind} and reads no texts; choose a dual encoder")
        return float(cast("Any", self._model).objective.logit_scale()[0].detach())

    @cached_property
    def weights(self) -> str:
        """SHA-256 of the weights, hexadecimal, by which a gallery knows its model."""
        return self._model.weights_digest()

    def saliency(self, image: Image | torch.Tensor, task: str, label: str, method: Method = "gradcam") -> Explained:
        """Where in an image the model sees a class.

        Args:
            image: any, or what ``prepared`` made of one.
            task: whose class; of a dual encoder empty for a text of your own.
            label: a class of the task, or the text.
            method: Grad-CAM, or attention rollout, which is the same for all classes.

        Returns:
            The image as the model sees it, with one map.

        Raises:
            UserError: if the model knows no such task or class, or the method does not go with its network.
        """
        from evaluation.saliency.overlays import explain_classes, explain_texts

        images = self._pixels([image])
        with self._lock:
            if not task:
                return explain_texts(self._model, [label], images, [""], method=method)[0]
            self._check_class(task, label)
            shown = self.tasks[task].index(label)
            return explain_classes(self._model, task, images, [""], [UNKNOWN], method=method, shown=shown)[0]

    def _check_class(self, task: str, label: str) -> None:
        if task not in self.tasks:
            raise UserError(f"task {task!r}: {self.name} has {', '.join(self.tasks) or 'none'}; choose one of them")
        if label not in self.tasks[task]:
            raise UserError(f"class {label!r}: {self.name} knows no such {task}; choose one that it knows")

    def _read_temperatures(self) -> dict[str, float]:
        try:
            found = read_temperatures(self.path)
        except UserError as error:
            # It must be told, and must not keep the model from being looked at. The browser sees no path.
            _LOGGER.warning("%s", error)
            self.notes.append(f"Confidences are not calibrated: {Run.CALIBRATION} is damaged or of another checkpoint.")
            return {}
        if lacking := [task for task in self.tasks if task not in found]:
            self.notes.append(
                f"Confidences of {', '.join(lacking)} are not calibrated (python -m evaluation calibrate)."
            )
        return found

    @cached_property
    def _queries(self) -> QueryEncoder:
        from retrieval.schema import identity_of
        from retrieval.search.encoder import QueryEncoder

        identity = identity_of(self._model, str(self.path), self._model.input_options, [])
        return QueryEncoder(self._model, identity)

    def prepared(self, pixels: torch.Tensor) -> torch.Tensor:
        """An image as the model takes it, which is all that needs to be kept of it.

        Args:
            pixels: uint8 ``(3, H, W)``, RGB.

        Returns:
            uint8 ``(3, size, size)``, made as those that the model was evaluated on.
        """
        from datamodules.loading.transforms import eval_transform

        made: torch.Tensor = eval_transform(self._model.input_options)(pixels)
        return made.clone()

    @property
    def value_range(self) -> ValueRange:
        """How images with more than 8 bits a channel are read for the model."""
        return self._model.input_options.get("value_range", "auto")

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

    def _outputs(self, images: Sequence[Image | torch.Tensor]) -> dict[str, NDArray[np.float32]]:
        """Logits ``(N, C)`` by task, and under the empty name the vectors ``(N, D)``; N is at least 1."""
        import torch

        parts: dict[str, list[torch.Tensor]] = {}
        for start in range(0, len(images), _AT_A_TIME):
            pixels = self._pixels(images[start : start + _AT_A_TIME])
            with self._lock, torch.inference_mode():
                batch = {"image": pixels.to(self._model.device), "sample_id": torch.arange(len(pixels))}
                batch["sample_id"] = batch["sample_id"].to(self._model.device)
                outputs = cast("Any", self._model).predict_step(batch, 0)
            for name, values in {**outputs["logits"], "": outputs["image_embedding"]}.items():
                parts.setdefault(name, []).append(values.float().cpu())
        joined = {name: torch.cat(values).numpy() for name, values in parts.items()}
        if not all(np.isfinite(values).all() for values in joined.values()):
            raise UserError(f"{self.name}: puts out values that are not finite; has it diverged? choose another run")
        return joined
