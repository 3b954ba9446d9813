"""Tests of the bars of classes.

Tests of the densities of classes' colours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from app.logic.explore import Explorer, Filter
from app.state.galleries import NOT_KNOWN, ServedGallery
from app.widgets.charts import MOST_CLASSES, PANELS, ClassColours, bars_html, colour_figure
from datamodules.loading.decode import ValueRange, read_image
from evaluation.dataset.sections import LEVELS
from retrieval.gallery import Gallery
from tests.app.explored_gallery import CLASSES, HUES, UNREADABLE, explored_gallery
from tests.support.galleries import identity, image_rows, vectors
from vitrail.errors import UserError


def counts(**columns: list[int]) -> pd.DataFrame:
    return pd.DataFrame(columns, index=["mug", '<img src=x onerror="alert(1)">', "bowl", "cap"])


def test_bars_are_as_long_as_their_counts_longest_first() -> None:
    shown = bars_html(counts(train=[3, 8, 0, 1], test=[1, 2, 0, 0]), "class")
    bars = re.findall(r"<button.*?</button>", shown)
    assert [re.search(r'data-place="(\d)"', bar)[1] for bar in bars] == ["0", "1", "2"]  # type: ignore[index]
    widths = [[float(width) for width in re.findall(r"width: ([\d.]+)%", bar)] for bar in bars]
    assert widths == [[80, 20], [30, 10], [10]]
    assert [re.search(r'bar-count">(\d+)', bar)[1] for bar in bars] == ["10", "4", "1"]  # type: ignore[index]
    assert "3 of 4 values of class occur" in shown
    assert "is 66.7% of these images" in shown
    assert 'title="mug: train 3, test 1"' in shown


def test_not_all_and_no_unknown_value_is_the_most_frequent() -> None:
    known = counts(train=[3, 8, 2, 1])
    shown = bars_html(pd.concat([known, pd.DataFrame({"train": [20]}, index=[NOT_KNOWN])]), "class")
    # A class that no image of the gallery has is not among its values, so it is unknown whether these are all.
    assert "4 values of class occur; the most frequent, &lt;img" in shown
    assert f"is {8 / 34:.1%} of these images" in shown
    assert "All" not in shown
    nothing = pd.DataFrame({"train": [20]}, index=[NOT_KNOWN])
    assert "No value of class is known of these images." in bars_html(nothing, "class")


def test_names_never_become_markup() -> None:
    shown = bars_html(counts(train=[3, 8, 2, 1]), "class")
    assert "<img" not in shown
    assert shown.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt;") == 4  # value, title, name and note
    assert "the most frequent, &lt;img" in shown


def test_no_images_are_reported() -> None:
    assert "No image is left by the filters." in bars_html(counts(train=[0, 0, 0, 0]), "class")


@pytest.mark.parametrize("split", ["train", "holdout"])
def test_any_split_has_a_colour(split: str) -> None:
    shown = bars_html(counts(**{split: [1, 2, 3, 4]}), "class")
    assert len(re.findall(r"background: #[0-9a-f]{6}", shown)) == 5  # four bars and the key


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedGallery:
    return explored_gallery(tmp_path_factory.mktemp("colours") / "gallery", n=60)


@pytest.fixture(scope="module")
def colours(served: ServedGallery, explorer: Explorer) -> ClassColours:
    return ClassColours(served, explorer)


def test_hues_lie_where_the_images_were_painted(colours: ClassColours, explorer: Explorer) -> None:
    seen: list[str] = []

    def progress(names: Iterable[str]) -> Iterable[str]:
        for name in names:
            seen.append(name)
            yield name

    curves, missing = colours.densities(Filter(), "class", CLASSES, progress)
    assert [*curves] == seen == CLASSES
    for name, values in curves.items():
        assert values.shape == (3, LEVELS)
        peak = (values[0].argmax() + 0.5) / LEVELS
        assert abs((peak - HUES[name] + 0.5) % 1 - 0.5) < 0.02, name
        assert values.mean(axis=1) == pytest.approx([1, 1, 1], rel=1e-6)
        assert (values[1].argmax() + 0.5) / LEVELS == pytest.approx(0.9, abs=0.03)
        assert 0.35 < np.average((np.arange(LEVELS) + 0.5) / LEVELS, weights=values[2]) < 0.95
    broken = explorer.value_of(UNREADABLE, "class")
    assert missing == [f"{broken}: 1 of its images cannot be read."]


def test_a_figure_is_computed_once(served: ServedGallery, explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def recorded(source: Path | bytes, name: str, value_range: ValueRange) -> torch.Tensor:
        read.append(name)
        return read_image(source, name, value_range)

    monkeypatch.setattr("app.widgets.charts.read_image", recorded)
    fresh = ClassColours(served, explorer)
    chosen = explorer.filter("train")
    one, _ = fresh.densities(chosen, "class", ["mug", "cap"])
    count = len(read)
    assert set(read) == {explorer.ids[row] for row in explorer.find(chosen) if explorer.value_of(row, "class") in one}
    again, _ = fresh.densities(chosen, "class", ["cap", "mug"])
    assert len(read) == count
    assert all(np.array_equal(one[name], again[name]) for name in one)
    fresh.densities(Filter(), "class", ["mug"])
    assert len(read) > count


def test_the_most_frequent_classes_come_by_default(colours: ClassColours, explorer: Explorer) -> None:
    chosen = explorer.filter(attributes=["size: s"])
    counts = explorer.counts(explorer.find(chosen), "colour").sum(axis=1)
    names = colours.default_classes(chosen, "colour")
    assert [counts[name] for name in names] == sorted(counts[counts > 0], reverse=True)[:6]


def test_classes_without_images_are_named(colours: ClassColours, explorer: Explorer) -> None:
    chosen = explorer.filter(class_name="mug")
    curves, missing = colours.densities(chosen, "class", ["mug", "cap"])
    assert [*curves] == ["mug"]
    assert missing[-1] == "cap: no image is left by the filters."


@pytest.mark.parametrize("name", ["teapot", "", 3, None, ["mug"], "x" * 999])
def test_a_class_that_there_is_not_is_refused(colours: ClassColours, name: str) -> None:
    with pytest.raises(UserError, match="class: has no value") as said:
        colours.densities(Filter(), "class", ["mug", name])
    assert len(str(said.value)) < 200


def test_more_classes_than_can_be_distinguished_are_refused(colours: ClassColours) -> None:
    with pytest.raises(UserError, match=f"at most {MOST_CLASSES}"):
        colours.densities(Filter(), "class", ["mug"] * (MOST_CLASSES + 1))


def test_the_figure_has_every_curve_within_its_panel_and_no_foreign_markup(colours: ClassColours) -> None:
    curves, _ = colours.densities(Filter(), "class", CLASSES)
    figure = colour_figure(curves, "class")
    assert "<b>" not in figure
    assert figure.count("&lt;b&gt;vase&lt;/b&gt;</li>") == 1
    assert len(set(re.findall(r'stroke="(#\w+)"', figure))) == len(CLASSES)
    lines = re.findall(r'points="([^"]+)"', figure)
    assert len(lines) == len(PANELS) * len(CLASSES)
    for line in lines:
        points = np.array([pair.split(",") for pair in line.split()], float)
        assert (np.diff(points[:, 0]) > 0).all()
        assert 0 <= points[:, 0].min() <= points[:, 0].max() <= 320
        assert 0 <= points[:, 1].min() <= points[:, 1].max() <= 170
    # The highest curve of each panel reaches its top.
    heights = [float(y) for line in lines for _, y in (pair.split(",") for pair in line.split())]
    assert min(heights) < 10


def test_files_are_read_and_those_that_are_gone_are_reported(tmp_path: Path) -> None:
    made_by = identity(encodes_text=False, labels=["class"], predicts={})
    names = [str(tmp_path / f"{name}.png") for name in ("red", "gone", "torn")]
    Image.new("RGB", (9, 5), (200, 10, 10)).save(names[0])
    (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:50])
    gallery = Gallery.create(str(tmp_path / "gallery"), made_by)
    with gallery.writing() as writer:
        writer.add(image_rows(made_by, ["p0", "p1", "p2"], vectors(3), path=names, label_class=["mug"] * 3))
    served = ServedGallery(tmp_path / "gallery", "files", data_roots=[tmp_path])
    curves, missing = ClassColours(served, Explorer(served)).densities(Filter(), "class", ["mug"])
    assert missing == ["mug: 2 of its images cannot be read."]
    assert curves["mug"][2].argmax() == 200
    (tmp_path / "red.png").unlink()
    curves, missing = ClassColours(served, Explorer(served)).densities(Filter(), "class", ["mug"])
    assert (curves, missing) == ({}, ["mug: 3 of its images cannot be read."])
