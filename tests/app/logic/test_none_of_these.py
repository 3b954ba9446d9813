"""Tests of "none of these": the share of false alarms that it promises, and what counts as showing a label."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from app.logic.none_of_these import ALPHA, FEWEST, Background, Backgrounds
from app.state.context import AppContext

SHOWN = {
    "class": ["food_bottle", "soap_bottle", "mug", "mug", "wrist_watch", None],
    "colour": ["blue", "red", "blue", "green", None, "blue"],
}


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return found


@pytest.mark.parametrize(
    ("labels", "remaining"),
    [
        (["mug"], [0, 1, 4, 5]),
        (["Mugs", "a bottle"], [4, 5]),
        # People leave out what kind of bottle it is.
        (["water bottle"], [2, 3, 4, 5]),
        (["blue"], [1, 3, 4]),
        # Both must hold; of the last one the class is not known.
        (["blue mug"], [0, 1, 3, 4, 5]),
        (["red or blue thing"], [3, 4]),
        # Nothing is known to show it.
        (["cup", "teapot"], [0, 1, 2, 3, 4, 5]),
        (["mug", "bottle", "watch"], [5]),
    ],
)
def test_what_shows_a_label_is_no_background(labels: list[str], remaining: list[int]) -> None:
    background = Background(np.zeros((6, 2), np.float32), SHOWN)
    assert np.flatnonzero(background.showing_none_of(labels)).tolist() == remaining


def test_the_p_value_is_the_share_of_images_that_are_as_similar() -> None:
    rng = np.random.default_rng(0)
    vectors, texts = unit(rng.normal(size=(50, 8))), unit(rng.normal(size=(3, 8)))
    kinds = ["cap" if row < 40 else "mug" for row in range(50)]
    background = Background(vectors, {"class": kinds})
    best = np.array([-1.0, 0.2, 0.5, 1.0])
    verdicts = background.verdicts(best, ["mug", "lamp", "cup"], texts)
    usual = (vectors[:40] @ texts.T).max(axis=1)
    for value, verdict in zip(best, verdicts, strict=True):
        assert verdict.p_value == pytest.approx((1 + sum(usual >= value)) / 41)
        assert verdict.none_of_these == (verdict.p_value > ALPHA)
        assert verdict.count == 40
    assert verdicts[0].text.startswith("None of these")
    assert verdicts[-1].text.startswith("One of these")


def test_an_image_that_is_as_similar_as_a_background_image_counts_it() -> None:
    vectors = unit(np.random.default_rng(1).normal(size=(30, 4)))
    text = vectors[:1]
    [verdict] = Background(vectors, {}).verdicts(np.array([float(vectors[0] @ text[0])]), ["x"], text)
    assert verdict.p_value == pytest.approx(2 / 31)


def test_images_that_show_none_are_recognized_in_the_promised_share() -> None:
    # Over many backgrounds: the promise is about the draw of both the background and the image.
    rng = np.random.default_rng(2)
    said_one, count = 0, 0
    for _ in range(400):
        vectors, texts = unit(rng.normal(size=(99 + 20, 6))), unit(rng.normal(size=(4, 6)))
        best = (vectors[99:] @ texts.T).max(axis=1).astype(np.float64)
        verdicts = Background(vectors[:99], {}).verdicts(best, list("abcd"), texts)
        said_one += sum(verdict.none_of_these is False for verdict in verdicts)
        count += len(verdicts)
    # 8,000 images, 20 with each background: the standard error is 0.005 (beta-binomial).
    assert said_one / count == pytest.approx(ALPHA, abs=0.015)


def test_an_image_of_a_label_is_not_called_none_of_these() -> None:
    rng = np.random.default_rng(3)
    texts = unit(rng.normal(size=(2, 16)))
    vectors = unit(rng.normal(size=(200, 16)))
    images = unit(texts + 0.1 * rng.normal(size=(2, 16)))
    best = (images @ texts.T).max(axis=1).astype(np.float64)
    assert [v.none_of_these for v in Background(vectors, {}).verdicts(best, ["a", "b"], texts)] == [False, False]


@pytest.mark.parametrize("background", [Background(), Background(np.full((FEWEST - 1, 4), 0.5, np.float32), {})])
def test_with_too_few_images_nothing_is_said(background: Background) -> None:
    [verdict] = background.verdicts(np.array([0.9]), ["a"], np.full((1, 4), 0.5, np.float32))
    assert verdict.none_of_these is None
    assert math.isnan(verdict.p_value)
    assert f"{FEWEST} are needed" in verdict.text


def test_the_fewest_images_suffice() -> None:
    vectors = np.tile(np.array([[1.0, 0.0]], np.float32), (FEWEST, 1))
    text = np.array([[0.0, 1.0]], np.float32)
    [verdict] = Background(vectors, {}).verdicts(np.array([0.5]), ["a"], text)
    assert verdict.p_value == pytest.approx(ALPHA)
    assert verdict.none_of_these is False


def test_a_gallery_gives_what_was_not_trained_on(context: AppContext) -> None:
    gallery = context.gallery("pairs")
    splits = gallery.metadata.column("split").to_pylist()
    background = Background.of(gallery)
    assert len(background) == sum(split != "train" for split in splits)
    classes = gallery.metadata.column("label_class").to_pylist()
    expected = sum(split != "train" and name != "mug" for split, name in zip(splits, classes, strict=True))
    assert background.showing_none_of(["mug"]).sum() == expected


def test_each_run_has_the_background_of_its_own_gallery(context: AppContext) -> None:
    backgrounds = Backgrounds(context)
    first = backgrounds.of(context.run("pairs"))
    assert len(first) == len(Background.of(context.gallery("pairs")))
    assert backgrounds.of(context.run("pairs")) is first
    without = Backgrounds(AppContext(context.runs, {"quickstart": context.gallery("quickstart")}))
    assert len(without.of(context.run("pairs"))) == 0
