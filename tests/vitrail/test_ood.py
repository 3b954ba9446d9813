from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vitrail.errors import UserError
from vitrail.ood import Detector, marked, read_detector, scores_of, write_detector
from vitrail.predictions import ImagePrediction, TaskPrediction

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(7, 4)).astype(np.float32) * 3
TENSOR = torch.from_numpy(LOGITS).double()


@pytest.mark.parametrize(
    ("method", "kind", "wanted"),
    [
        ("msp", "single_label", TENSOR.softmax(dim=1).amax(dim=1)),
        ("msp", "multi_label", TENSOR.sigmoid().amax(dim=1)),
        ("max_logit", "single_label", TENSOR.amax(dim=1)),
        ("energy", "ordinal", TENSOR.logsumexp(dim=1)),
        ("energy", "multi_label", torch.nn.functional.softplus(TENSOR).sum(dim=1)),
        ("mcm", "single_label", (TENSOR / 20).softmax(dim=1).amax(dim=1)),
    ],
)
def test_scores_of_logits_are_those_of_torch(method: str, kind: str, wanted: torch.Tensor) -> None:
    found = scores_of(method, LOGITS, None, {"scale": np.array(20, np.float32)}, kind)  # type: ignore[arg-type]

    assert found == pytest.approx(wanted.numpy())


def test_a_detector_is_read_as_it_was_written(tmp_path: Path) -> None:
    arrays = {"bank": np.eye(3, dtype=np.float32)[:, ::-1], "neighbours": np.array(2, np.float32)}
    detector = Detector("knn", "class", "single_label", 0.75, 0.9, arrays, {"val": 12, "checkpoint_sha256": None})
    path = tmp_path / "ood.safetensors"

    write_detector(path, detector)

    again = read_detector(path)
    assert {**vars(again), "arrays": None} == {**vars(detector), "arrays": None}
    features = RNG.normal(size=(5, 3))
    assert np.array_equal(again.scores(LOGITS[:5], features), detector.scores(LOGITS[:5], features))
    assert [file.name for file in tmp_path.iterdir()] == ["ood.safetensors"]


def test_files_that_are_no_detectors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    write_detector(tmp_path / "strange", Detector("guess", "class", "single_label", 0.5, 0.9))
    write_detector(tmp_path / "open", Detector("msp", "class", "single_label", float("nan"), 0.9))

    for name, message in {
        "text": "no detector",
        "strange": "'guess'",
        "open": "threshold",
        "none": "no detector",
    }.items():
        with pytest.raises(UserError, match=message):
            read_detector(tmp_path / name)


def test_images_below_the_threshold_are_unknown() -> None:
    answer = TaskPrediction(["bag", "cap"], np.array([0.1, 0.9]))
    images = [ImagePrediction(name, {"class": answer}) for name in ("a.png", "b.png", "c.png")]
    logits = {"class": np.array([[0, 0.4], [0, 0.5], [0, 0.6]], np.float32)}

    found = marked(images, Detector("max_logit", "class", "single_label", 0.5, 0.9), logits, None)

    assert [one.unknown for one in found] == [True, False, False]
    assert found[0].label == "cap"
    assert repr(found[0]) == "<a.png: unknown; class: cap 90%>"
    assert found[0].row() == {"image": "a.png", "class": "cap", "class_confidence": 0.9, "unknown": True, "error": None}
    assert "unknown" not in images[0].row()
