"""Tests of classifying uploads: several files, two models, broken files, and saliency maps."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from app.logic.classify import METHODS, classify, saliency_of
from app.logic.uploads import read_uploads
from app.state.context import AppContext, Limits
from app.state.runs import ServedRun
from datamodules.loading.decode import ValueRange
from datamodules.loading.transforms import eval_transform
from evaluation.saliency.overlays import overlay
from vitrail.errors import UserError


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """An image, a broken one, and another image."""
    noise = np.random.default_rng(0).integers(0, 255, (2, 40, 60, 3), dtype=np.uint8)
    paths = [tmp_path / name for name in ("first.png", "broken.jpg", "last.jpg")]
    Image.fromarray(noise[0]).save(paths[0])
    paths[1].write_bytes(b"\xff\xd8\xff no image")
    Image.fromarray(noise[1]).save(paths[2])
    return paths


def test_a_broken_file_does_not_keep_the_others_from_being_classified(context: AppContext, files: list[Path]) -> None:
    first, broken, last = classify(context, files, ["quickstart"])
    assert broken.predictions == {}
    assert "broken.jpg" in broken.upload.problem
    run = context.run("quickstart")
    for one in (first, last):
        assert one.upload.image is not None
        [expected] = run.predict([one.upload.image])
        for task, answer in one.predictions["quickstart"].tasks.items():
            np.testing.assert_allclose(answer.probabilities, expected.tasks[task].probabilities, atol=1e-6)
    assert first.upload.name == "first.png"


def test_two_models_answer_side_by_side(context: AppContext, files: list[Path]) -> None:
    [one] = classify(context, files[:1], ["pairs", "quickstart"])
    assert list(one.predictions) == ["pairs", "quickstart"]
    assert list(one.predictions["pairs"].tasks) == ["class"]
    [same] = classify(context, files[:1], ["pairs", "pairs"])
    assert list(same.predictions) == ["pairs"]


def test_only_broken_files_are_reported(context: AppContext, files: list[Path]) -> None:
    [one] = classify(context, files[1:2], ["quickstart"])
    assert one.upload.problem
    assert one.predictions == {}


def test_no_image_and_too_many_are_refused(files: list[Path]) -> None:
    with pytest.raises(UserError, match="there is no image yet"):
        read_uploads([], Limits(), [])
    with pytest.raises(UserError, match="17 images are too many at once; leave 16"):
        read_uploads([files[0]] * 17, Limits(), [])
    assert len(read_uploads([files[0]] * 16, Limits(), [])) == 16


def test_unknown_runs_are_refused(context: AppContext, files: list[Path]) -> None:
    with pytest.raises(UserError, match="not served"):
        classify(context, files, ["../quickstart"])


def test_where_a_class_is_seen(context: AppContext, files: list[Path]) -> None:
    run = context.run("quickstart")
    [upload] = read_uploads(files[:1], Limits(), [run])
    assert upload.image is not None
    best = run.predict([upload.image])[0].tasks["class"].top_k(1)[0][0]
    seen = saliency_of(run, upload, "class", best, "Grad-CAM")
    explained = run.saliency(upload.image, "class", best)
    np.testing.assert_array_equal(seen.overlay, overlay(explained.image, explained.heats[0].values))
    np.testing.assert_array_equal(seen.image, explained.image)
    assert best in seen.caption


def test_what_cannot_be_shown_is_refused(context: AppContext, files: list[Path]) -> None:
    run = context.run("quickstart")
    uploads = read_uploads(files, Limits(), [run])
    with pytest.raises(UserError, match="must be one of Grad-CAM, Attention rollout"):
        saliency_of(run, uploads[0], "class", "mug", "magic")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        saliency_of(run, uploads[1], "class", "mug", "Grad-CAM")
    # A convolutional network has no attention.
    with pytest.raises(UserError, match="rollout"):
        saliency_of(run, uploads[0], "class", "mug", "Attention rollout")
    with pytest.raises(UserError, match="has no text encoder"):
        saliency_of(run, uploads[0], "", "a mug", next(iter(METHODS)))


class Taking:
    """What reading uploads needs of a run."""

    def __init__(self, name: str, value_range: ValueRange = "auto") -> None:
        self.name, self.value_range = name, value_range

    def prepared(self, pixels: torch.Tensor) -> torch.Tensor:
        return eval_transform({"size": 32})(pixels).clone()  # type: ignore[no-any-return]  # of a module


@pytest.mark.slow
def test_sixteen_large_uploads_are_not_held_together(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (3000, 3000), (200, 20, 20)).save(path)
    whole = 3 * 3000 * 3000
    runs = [cast("ServedRun", Taking(name)) for name in ("one", "two")]
    tracemalloc.start()
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: read_uploads([path] * 16, Limits(), runs), range(2)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * whole, "one at a time, for all requests"
    for upload in both[0] + both[1]:
        assert upload.image is not None
        assert max(upload.image.size) <= 512
        assert {name: made.shape for name, made in upload.inputs.items()} == {"one": (3, 32, 32), "two": (3, 32, 32)}
        assert upload.inputs["one"].untyped_storage().nbytes() == 3 * 32 * 32


def test_each_run_gets_deep_images_in_its_own_range(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((40, 40), 1000, np.uint16)).save(path)
    runs = [cast("ServedRun", Taking(name, chosen)) for name, chosen in (("low", [0, 1000]), ("high", [0, 2000]))]
    [upload] = read_uploads([path], Limits(), runs)
    assert int(upload.inputs["low"].min()) == 255
    assert int(upload.inputs["high"].max()) == 128
    [unknown] = read_uploads([path], Limits(), [cast("ServedRun", Taking("none"))])
    assert "of unknown range; save it as JPEG or PNG" in unknown.problem
    assert unknown.image is None
