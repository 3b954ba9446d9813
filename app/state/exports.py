"""An ONNX export as it is served: by ONNX Runtime, on machines without PyTorch too."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.logic.uploads import upload_errors
from app.state.context import Limits
from app.state.runs import FEATURES, ServedModel
from datamodules.loading.decode import check_header
from experiments.export.predict_onnx import Model, PredictError
from vitrail.errors import UserError
from vitrail.runs import Run
from vitrail.types import kind_of

ONNX_FILES = ("model.onnx", "image.onnx")
"""One of them is in the folder of an ONNX export."""


class ServedExport(ServedModel):
    """A model that ``vitrail export --format onnx`` wrote.

    Args:
        path: folder of the export.
        name: by which users and requests know it; that of its run by default.
        threads: of the processor; 0 for all cores.

    Raises:
        UserError: there is no export in the folder, or it is damaged.
    """

    def __init__(self, path: Path | str, name: str = "", threads: int = 0) -> None:
        run = Run(path)
        try:
            self._model = Model(path, threads)
        except PredictError as error:
            raise UserError(str(error)) from error
        about = self._model.metadata
        self.path, self.name = run.path, name or str(about["run"])
        self.kind = "dual encoder" if about["text"] else "classifier"
        self.tasks, self.kinds = about["tasks"], about.get("kinds", {})
        self.thresholds, self.weights = about.get("thresholds", {}), about["weights"]
        self.temperatures, self._calibration = run.temperatures, run.output_calibration
        self._points, self._detector = run.operating_points, run.detector
        calibrated = {*self.temperatures, *self._calibration.labels}
        lacking = [task for task in self.tasks if task not in calibrated and kind_of(self.kinds, task) != "regression"]
        self.notes = [f"Confidences of {', '.join(lacking)} are not calibrated."] if lacking else []

    def outputs(self, images: Sequence[NDArray[np.uint8]]) -> dict[str, NDArray[np.float32]]:
        """See ``ServedModel``."""
        found = self._model(np.stack(images))
        features = {FEATURES: found["image_features"]} if "image_features" in found else {}
        return {task: found[f"logits_{task}"] for task in self.tasks} | {"": found["image_embedding"], **features}

    def read(self, content: bytes, name: str, limits: Limits) -> NDArray[np.uint8]:
        """See ``ServedModel``."""
        with upload_errors(name, limits):
            check_header(content, limits.upload_pixels)
            return self._model.decoded(io.BytesIO(content))

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """See ``ServedModel``."""
        self.check_texts()
        return self._model.encode_texts(texts)

    @property
    def logit_scale(self) -> float:
        """See ``ServedModel``."""
        self.check_texts()
        text: dict[str, Any] = self._model.metadata["text"]
        if "logit_scale" not in text:
            raise UserError(f"{self.name}: was exported by an older version, without its logit scale; export it again")
        return float(text["logit_scale"])
