"""Whether an image is unlike those that a model was trained on: scores, and the threshold that a run keeps.

Every score is higher for images like the training images. ``vitrail ood RUN`` fits what it needs on the training
split, chooses a threshold that a stated share of the validation images reaches, and keeps both in
``checkpoints/ood.safetensors``. Images below the threshold are predicted as unknown.

============  ==================================================================================================
msp           largest probability (Hendrycks & Gimpel, ICLR 2017); of multi-label tasks that of any label
max_logit     largest logit (Hendrycks et al., Scaling Out-of-Distribution Detection, ICML 2022)
energy        log of the sum of the exponentials of the logits (Liu et al., NeurIPS 2020); of multi-label tasks the
              sum over labels (Wang et al., NeurIPS 2021)
mahalanobis   minus the squared distance of the features to the nearest class mean, in units of the covariance
              within classes (Lee et al., NeurIPS 2018), which is shrunk (Ledoit & Wolf, 2004): few training images
              would leave it singular
knn           cosine to the k-th nearest training image (Sun et al., ICML 2022)
vim           energy minus the length of the features outside of their principal subspace, scaled to the logits
              (Wang et al., ViM, CVPR 2022)
mcm           largest softmax of the cosines to the class prompts (Ming et al., NeurIPS 2022), of dual encoders
============  ==================================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitrail.errors import UserError
from vitrail.files import write_atomically
from vitrail.predictions import ImagePrediction
from vitrail.types import TaskKind

if TYPE_CHECKING:
    import torch

OF_LOGITS = ("msp", "max_logit", "energy", "mcm")
OF_FEATURES = ("mahalanobis", "knn", "vim")
METHODS = (*OF_LOGITS, *OF_FEATURES)

_KEY = "vitrail.ood"
_ROWS = 1024
"""Images whose distances to all training images are in memory at a time."""


@dataclass(frozen=True)
class Detector:
    """A score of images and the threshold that was chosen for it.

    Attributes:
        method: one of ``METHODS``.
        task: whose logits are used.
        kind: of the task.
        threshold: images with a lower score are unknown.
        rate: share of the validation images that the threshold was chosen to keep.
        arrays: float32, what was fitted.
        facts: plain values: ``checkpoint_sha256``, and how many images it was fitted on.
    """

    method: str
    task: str
    kind: TaskKind
    threshold: float
    rate: float
    arrays: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def scores(
        self, logits: NDArray[np.floating[Any]], features: NDArray[np.floating[Any]] | None
    ) -> NDArray[np.float64]:
        """Return the scores of N images, float64 ``(N,)``.

        Args:
            logits: ``(N, C)``, of the task.
            features: ``(N, D)``, of the image backbone; needed by the methods ``OF_FEATURES``.
        """
        return scores_of(self.method, logits, features, self.arrays, self.kind)

    @property
    def needs_features(self) -> bool:
        """Whether ``scores`` needs the backbone's features."""
        return self.method in OF_FEATURES


def scores_of(
    method: str,
    logits: NDArray[np.floating[Any]],
    features: NDArray[np.floating[Any]] | None,
    arrays: Mapping[str, NDArray[np.float32]],
    kind: TaskKind = "single_label",
) -> NDArray[np.float64]:
    """Return the scores of a method, float64 ``(N,)``; see ``Detector.scores``."""
    from scipy.special import expit, logsumexp, softmax

    outputs = logits.astype(np.float64)
    several = kind == "multi_label"
    match method:
        case "msp":
            found = (expit(outputs) if several else softmax(outputs, axis=1)).max(axis=1)
        case "max_logit":
            found = outputs.max(axis=1)
        case "energy":
            found = np.logaddexp(0, outputs).sum(axis=1) if several else logsumexp(outputs, axis=1)
        case "mcm":
            found = softmax(outputs / float(arrays["scale"]), axis=1).max(axis=1)
        case _:
            if features is None:
                raise ValueError(f"{method} needs features")
            found = _OF_FEATURES[method](features.astype(np.float64), outputs, arrays)
    scores: NDArray[np.float64] = found
    return scores


def _mahalanobis(
    features: NDArray[np.float64], logits: NDArray[np.float64], arrays: Mapping[str, NDArray[np.float32]]
) -> NDArray[np.float64]:
    from scipy.spatial.distance import cdist

    distances = cdist(features @ arrays["whitening"], arrays["means"], "sqeuclidean")
    nearest: NDArray[np.float64] = distances.min(axis=1)
    return -nearest


def _nearest(
    features: NDArray[np.float64], logits: NDArray[np.float64], arrays: Mapping[str, NDArray[np.float32]]
) -> NDArray[np.float64]:
    bank, place = arrays["bank"], int(arrays["neighbours"])
    parts = [
        np.partition(unit(features[start : start + _ROWS]) @ bank.T, -place, axis=1)[:, -place]
        for start in range(0, len(features), _ROWS)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def _vim(
    features: NDArray[np.float64], logits: NDArray[np.float64], arrays: Mapping[str, NDArray[np.float32]]
) -> NDArray[np.float64]:
    from scipy.special import logsumexp

    outside = np.linalg.norm((features - arrays["origin"]) @ arrays["outside"], axis=1)
    scores: NDArray[np.float64] = logsumexp(logits, axis=1) - float(arrays["scale"]) * outside
    return scores


_OF_FEATURES = {"mahalanobis": _mahalanobis, "knn": _nearest, "vim": _vim}


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rows of unit length."""
    scaled: NDArray[np.float64] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return scaled


def write_detector(path: Path, detector: Detector) -> None:
    """Write a detector atomically, as safetensors."""
    from safetensors.numpy import save_file

    plain = {name: value for name, value in vars(detector).items() if name != "arrays"}
    arrays = {name: np.array(values, dtype=np.float32, order="C") for name, values in detector.arrays.items()}
    with write_atomically(path) as partial:
        save_file(arrays, partial, metadata={_KEY: json.dumps({**plain, "facts": dict(detector.facts)})})


def read_detector(path: Path) -> Detector:
    """Read what ``write_detector`` wrote.

    Raises:
        UserError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            content = json.loads((file.metadata() or {})[_KEY])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
        detector = Detector(**content, arrays=arrays)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: no detector of unknown images ({error}); run `vitrail ood` or `vitrail export` again"
        ) from error
    if detector.method not in METHODS or not np.isfinite(detector.threshold):
        raise UserError(f"{path}: method {detector.method!r} or its threshold is not known; run `vitrail ood` again")
    return detector


def outputs_with_features(
    model: Any, batch: Mapping[str, torch.Tensor], *, features: bool
) -> tuple[Any, NDArray[np.float32] | None]:
    """Return a task's outputs for a batch and the features of its image backbone, in one pass where it can.

    Args:
        model: a ``lightning_modules.VisionTask``.
        batch: ``image`` and ``sample_id`` on the model's device.
        features: whether they are needed.
    """
    if not features:
        return model.predict_step(batch, 0), None
    found = model.image_features(batch["image"])
    return model.predict_step({**batch, "features": {"image": found}}, 0), found.float().cpu().numpy()


def marked(
    predictions: Sequence[ImagePrediction],
    detector: Detector,
    logits: Mapping[str, NDArray[np.float32]],
    features: NDArray[np.float32] | None,
) -> list[ImagePrediction]:
    """Return predictions that know whether their image is unknown."""
    unknown = detector.scores(logits[detector.task], features) < detector.threshold
    return [replace(one, unknown=is_unknown) for one, is_unknown in zip(predictions, unknown.tolist(), strict=True)]
