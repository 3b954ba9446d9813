"""Tests of what the dataset browser shows for what was chosen."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from typing import Any
from urllib.parse import parse_qsl

import pytest

from app.state.context import AppContext
from app.state.galleries import ServedGallery
from app.tabs.explore import CLASSES, COLOURS, GRID, MAP, MISTAKES, ONE, VIEWS, Choices, Explorers, View, from_query
from tests.app.explored_gallery import N, explored_gallery
from tests.support.galleries import small_gallery
from vitrail.errors import UserError


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> AppContext:
    folder = tmp_path_factory.mktemp("views")
    small_gallery(folder / "photos", labels=[], predicts={}, encodes_text=False)
    wares = explored_gallery(folder / "gallery")
    return AppContext({}, {"wares": wares, "photos": ServedGallery(folder / "photos", "photos", data_roots=[folder])})


@pytest.fixture(scope="module")
def explorers(context: AppContext) -> Explorers:
    return Explorers(context)


def view(explorers: Explorers, **asked: Any) -> View:
    return View(explorers, Choices("wares", **asked), 20)


def ids(shown: str) -> list[str]:
    return re.findall(r'data-id="([^"]+)"', shown)


def test_the_pages_of_the_grid_together_show_every_image_once(explorers: Explorers) -> None:
    asked = view(explorers)
    leaves = [asked.grid(number) for number in range(1, 13)]
    assert [name for leaf in leaves for name in ids(leaf.html)] == [f"p{row}" for row in range(N)]
    assert [(leaf.is_first, leaf.is_last) for leaf in (leaves[0], leaves[5], leaves[11])] == [
        (True, False), (False, False), (False, True),
    ]  # fmt: skip
    assert leaves[1].place == "page 2 of 12 · 21 to 40 of 230"
    assert asked.grid(99).number == 12


def test_a_drawn_order_is_its_seeds(explorers: Explorers) -> None:
    one = [ids(view(explorers, shuffle=True, seed=seed).grid(1).html) for seed in (1, 1, 2)]
    assert one[0] == one[1] != one[2]
    assert sorted(view(explorers, shuffle=True, seed=9).order) == [*range(N)]


@pytest.mark.parametrize("seed", [-1, 2**32, None, "1", [1], True, float("nan"), float("inf")])
def test_a_seed_that_is_none_is_refused(explorers: Explorers, seed: object) -> None:
    with pytest.raises(UserError, match="whole number from 0"):
        _ = view(explorers, shuffle=True, seed=seed).order


def test_a_image_is_shown_with_its_place_and_all_that_is_known(explorers: Explorers) -> None:
    asked = view(explorers, class_name="<b>vase</b>")
    rows = asked.rows.tolist()
    first, second = asked.one(rows[0]), asked.one(asked.next_row(rows[0], 1))
    assert first.place == f"1 of {len(rows)}"
    assert (first.is_first, second.is_first) == (True, False)
    assert f"p{rows[1]}" in second.html
    assert "<b>" not in first.html
    assert "&lt;b&gt;vase&lt;/b&gt;" in first.html
    assert asked.next_row(rows[-1], 1) == rows[-1]
    assert asked.one(rows[-1]).is_last
    other = next(row for row in range(N) if row not in rows)
    assert asked.one(other).place == "not among the filtered images"
    assert view(explorers).page_with(45) == 3
    assert asked.page_with(other) == 1


def test_filters_that_leave_nothing_are_told_everywhere(explorers: Explorers) -> None:
    rare = {"class_name": "<b>vase</b>", "attributes": ["colour: (not known)", "size: l"]}
    nothing = next(
        asked for split in ("val", "test", "train") if not len((asked := view(explorers, split=split, **rare)).rows)
    )
    assert nothing.grid(1).place == nothing.one(None).place == "no images"
    assert nothing.next_row(None, 1) is None
    drawn = nothing.colours(lambda names, _: names)
    for shown in (nothing.grid(1).html, nothing.one(None).html, nothing.classes(), drawn):
        assert "No image is left by the filters" in shown
    assert nothing.mistakes(1).place == "no images"
    points, _ = nothing.map(None)
    assert set(points["shown"]) == {0}  # type: ignore[call-overload]


@pytest.mark.parametrize("task", ["class", "colour"])
def test_mistakes_name_target_prediction_and_confidence(explorers: Explorers, task: str) -> None:
    asked = view(explorers, task=task)
    found = asked.explorer.mistakes(asked.rows, task)
    leaf = asked.mistakes(1)
    assert ids(leaf.html) == [f"p{row}" for row in found.rows[:20].tolist()]
    confidences = [float(value) for value in re.findall(r"confidence ([\d.]+)", leaf.html)]
    assert confidences == sorted(confidences, reverse=True)
    titles = [unescape(title) for title in re.findall(r'card-title">([^<]+)', leaf.html)]
    assert titles == [f"target: {asked.explorer.mistake(row, task)[0]}" for row in found.rows[:20].tolist()]
    assert f"{len(found.rows)} of {found.evaluated} predictions of {task} are wrong" in leaf.note
    assert "trained on" in leaf.note
    assert "trained on" not in view(explorers, task=task, split="test").mistakes(1).note


def test_a_class_among_the_bars_leads_to_its_images(explorers: Explorers) -> None:
    assert view(explorers, view=CLASSES).narrowed("mug") == Choices("wares", "mug", view=GRID)
    asked = view(explorers, view=CLASSES, task="colour", attributes=["colour: red", "size: s"])
    narrowed = asked.narrowed("green, dark")
    assert narrowed.attributes == ["size: s", "colour: green, dark"]
    for value in ("teapot", ["mug"], None, "", 3):
        with pytest.raises(UserError, match="choose one of the list"):
            asked.narrowed(value)


@pytest.mark.parametrize(
    "asked",
    [
        Choices("wares"),
        Choices("photos", view=MAP),
        Choices("wares", "<b>vase</b>", "val", ["colour: green, dark", "colour: red", "size: s"], MISTAKES),
        Choices("wares", "mug", view=ONE),
    ],
)
def test_the_link_leads_to_the_same_images(explorers: Explorers, asked: Choices) -> None:
    before = View(explorers, asked, 20)
    found = re.search(r'href="\?([^"]+)"', before.totals())
    assert found
    query = parse_qsl(unescape(found[1]))
    assert dict(query)["tab"] == "explore"
    after = View(explorers, from_query(explorers, query, "wares"), 20)
    assert (after.explorer.name, after.filter, after.choices.view) == (asked.gallery, before.filter, asked.view)


@pytest.mark.parametrize(
    "query",
    [
        [("gallery", "../../etc")], [("view", "Everything")], [("split", "holdout")], [("class", "teapot")],
        [("class", "bowl,mug")], [("colour", "blue"), ("colour", "purple")], [("class", "<script>" * 500)],
    ],
)  # fmt: skip
def test_an_address_that_asks_for_what_there_is_not_is_refused(
    explorers: Explorers, query: list[tuple[str, str]]
) -> None:
    with pytest.raises(UserError, match="one of"):
        from_query(explorers, query, "wares")


def test_what_an_address_says_of_other_tabs_is_none_of_ours(explorers: Explorers) -> None:
    assert from_query(explorers, [("q", "mug"), ("ranker", "clip")], "wares") == Choices(
        "wares", attributes=[], task="class"
    )


def test_a_gallery_without_classes_says_so(explorers: Explorers) -> None:
    asked = View(explorers, Choices("photos"), 20)
    assert ids(asked.grid(1).html) == [f"p{row}" for row in range(12)]
    for shown in (asked.classes(), asked.colours(lambda each, _: each)):
        assert "neither labels nor predictions" in shown
    assert "no labels and predictions that can be compared" in asked.mistakes(1).note
    points, said = asked.map(3)
    assert (points["names"], points["selected"]) == (["image"], 3)
    assert said.startswith("12 images by PCA")


HOSTILE = [["teapot"], {"a": 1}, 3, "x" * 9999, "../../etc/passwd", b"mug", 1.5, float("nan")]

LOOKED_AT = {"gallery": VIEWS, "class_name": VIEWS, "split": VIEWS, "attributes": VIEWS, "view": (GRID,)}
"""Views that look at each field, and so have to refuse what it cannot be."""

LOOKED_AT |= {"task": (CLASSES, COLOURS, MAP, MISTAKES), "method": (MAP,), "compared": (COLOURS,)}


def answer(shown: View) -> object:
    """What a view shows, as the tab asks for it."""
    shows: dict[str, Callable[[], object]] = {
        GRID: lambda: shown.grid(1),
        ONE: lambda: shown.one(shown.next_row(None, 0)),
        CLASSES: shown.classes,
        COLOURS: lambda: shown.colours(lambda names, _: names),
        MAP: lambda: shown.map(None),
        MISTAKES: lambda: shown.mistakes(1),
    }
    return shows[shown.choices.view]()


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(("field", "kind"), [(field, kind) for field, kinds in LOOKED_AT.items() for kind in kinds])
def test_what_there_is_not_is_refused_in_one_line(explorers: Explorers, field: str, kind: str, value: Any) -> None:
    asked = replace(Choices("wares", view=kind), **{field: value})
    with pytest.raises(UserError) as refused:
        answer(View(explorers, asked, 20))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
