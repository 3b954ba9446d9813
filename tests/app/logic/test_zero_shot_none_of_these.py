"""Tests of "none of these": what else images are compared with, and when one of that fits better."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.logic.zero_shot import COMMON, Others, Verdict, ask, candidates, is_named
from app.state.context import AppContext
from app.widgets.page import upload_of


@pytest.mark.parametrize(
    ("name", "label", "named"),
    [
        ("mug", "Mugs", True),
        ("water bottle", "a bottle", True),
        ("water bottle", "water bottle", True),
        ("water bottle", "red water", False),
        ("mug", "blue mug", True),
        ("mug", "cup", False),
        ("mug", "", False),
    ],
)
def test_what_a_label_names(name: str, label: str, named: bool) -> None:
    assert is_named(name, label) is named


def test_own_classes_are_compared_and_common_things_where_there_are_none(
    context: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = context.run("pairs")
    assert candidates(run) == [name.replace("_", " ") for name in run.tasks["class"]]
    monkeypatch.setattr(run, "tasks", {})
    assert candidates(run) == list(COMMON)


def test_the_verdict_is_the_zero_shot_classification_among_labels_and_others(
    context: AppContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, gallery = context.run("pairs"), context.gallery("pairs")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    ids = gallery.metadata.column("id").to_pylist()[:12]
    images = [Image.open(upload_of(gallery, sample_id)).convert("RGB") for sample_id in ids]
    classes = candidates(run)
    labels, others = [classes[0], "Teapot"], classes[1:]
    found = ask(run, images, labels, ["a photo of a {}."], others=Others())
    vectors = run.encode_images(images)
    texts = run.encode_labels([[f"a photo of a {name}."] for name in [*labels, *others]])
    best = (vectors @ texts.T).argmax(axis=1)
    assert [one.verdict.none_of_these for one in found] == [bool(at >= 2) for at in best.tolist()]
    for one, at in zip(found, best.tolist(), strict=True):
        if at >= 2:
            assert one.verdict.other == others[at - 2]
            assert 0 < one.verdict.share <= 1
            assert one.verdict.text.startswith(f"None of these: more like “{others[at - 2]}”")
        else:
            assert one.verdict.text == ""


def test_where_all_classes_are_labels_nothing_else_can_fit_better(context: AppContext) -> None:
    run = context.run("pairs")
    image = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    [found] = ask(run, [image], candidates(run), ["{}"], others=Others())
    assert found.verdict == Verdict()
