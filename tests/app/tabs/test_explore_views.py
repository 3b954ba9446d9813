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
from app.tabs.explore import CLASSES, COLOURS, GRID, MAP, MISTAKES, ONE, VIEWS, Asked, Explored, View, from_query
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
def explored(context: AppContext) -> Explored:
    return Explored(context)


def view(explored: Explored, **asked: Any) -> View:
    return View(explored, Asked("wares", **asked), 20)


def ids(shown: str) -> list[str]:
    return re.findall(r'data-id="([^"]+)"', shown)


def test_the_pages_of_the_grid_together_show_every_image_once(explored: Explored) -> None:
    asked = view(explored)
    leaves = [asked.grid(number) for number in range(1, 13)]
    assert [name for leaf in leaves for name in ids(leaf.shown)] == [f"p{row}" for row in range(N)]
    assert [(leaf.is_first, leaf.is_last) for leaf in (leaves[0], leaves[5], leaves[11])] == [
        (True, False), (False, False), (False, True),
    ]  # fmt: skip
    assert leaves[1].place == "page 2 of 12 · 21 to 40 of 230"
    assert asked.grid(99).number == 12


def test_a_drawn_order_is_its_seeds(explored: Explored) -> None:
    one = [ids(view(explored, shuffle=True, seed=seed).grid(1).shown) for seed in (1, 1, 2)]
    assert one[0] == one[1] != one[2]
    assert sorted(view(explored, shuffle=True, seed=9).order) == [*range(N)]


@pytest.mark.parametrize("seed", [-1, 2**32, None, "1", [1], True, float("nan"), float("inf")])
def test_a_seed_that_is_none_is_refused(explored: Explored, seed: object) -> None:
    with pytest.raises(UserError, match="whole number from 0"):
        _ = view(explored, shuffle=True, seed=seed).order


def test_a_image_is_shown_with_its_place_and_all_that_is_known(explored: Explored) -> None:
    asked = view(explored, class_name="<b>vase</b>")
    rows = asked.rows.tolist()
    first, second = asked.one(rows[0]), asked.one(asked.turned(rows[0], 1))
    assert first.place == f"1 of {len(rows)}"
    assert (first.is_first, second.is_first) == (True, False)
    assert f"p{rows[1]}" in second.shown
    assert "<b>" not in first.shown
    assert "&lt;b&gt;vase&lt;/b&gt;" in first.shown
    assert asked.turned(rows[-1], 1) == rows[-1]
    assert asked.one(rows[-1]).is_last
    other = next(row for row in range(N) if row not in rows)
    assert asked.one(other).place == "not among the filtered images"
    assert view(explored).page_with(45) == 3
    assert asked.page_with(other) == 1


def test_filters_that_leave_nothing_are_told_everywhere(explored: Explored) -> None:
    rare = {"class_name": "<b>vase</b>", "attributes": ["colour: (not known)", "size: l"]}
    nothing = next(
        asked for split in ("val", "test", "train") if not len((asked := view(explored, split=split, **rare)).rows)
    )
    assert nothing.grid(1).place == nothing.one(None).place == "no images"
    assert nothing.turned(None, 1) is None
    drawn = nothing.colours(lambda names, _: names)
    for shown in (nothing.grid(1).shown, nothing.one(None).shown, nothing.classes(), drawn):
        assert "No image is left by the filters" in shown
    assert nothing.mistakes(1).place == "no images"
    points, _ = nothing.map(None)
    assert set(points["shown"]) == {0}  # type: ignore[call-overload]


@pytest.mark.parametrize("task", ["class", "colour"])
def test_mistakes_name_target_prediction_and_confidence(explored: Explored, task: str) -> None:
    asked = view(explored, task=task)
    found = asked.explorer.mistakes(asked.rows, task)
    leaf = asked.mistakes(1)
    assert ids(leaf.shown) == [f"p{row}" for row in found.rows[:20].tolist()]
    confidences = [float(value) for value in re.findall(r"confidence ([\d.]+)", leaf.shown)]
    assert confidences == sorted(confidences, reverse=True)
    titles = [unescape(title) for title in re.findall(r'card-title">([^<]+)', leaf.shown)]
    assert titles == [f"target: {asked.explorer.mistake(row, task)[0]}" for row in found.rows[:20].tolist()]
    assert f"{len(found.rows)} of {found.judged} answers on {task} are wrong" in leaf.said
    assert "learned from" in leaf.said
    assert "learned from" not in view(explored, task=task, split="test").mistakes(1).said


def test_a_class_among_the_bars_leads_to_its_images(explored: Explored) -> None:
    assert view(explored, view=CLASSES).narrowed("mug") == Asked("wares", "mug", view=GRID)
    asked = view(explored, view=CLASSES, task="colour", attributes=["colour: red", "size: s"])
    narrowed = asked.narrowed("green, dark")
    assert narrowed.attributes == ["size: s", "colour: green, dark"]
    for value in ("teapot", ["mug"], None, "", 3):
        with pytest.raises(UserError, match="choose one of the list"):
            asked.narrowed(value)


@pytest.mark.parametrize(
    "asked",
    [
        Asked("wares"),
        Asked("photos", view=MAP),
        Asked("wares", "<b>vase</b>", "val", ["colour: green, dark", "colour: red", "size: s"], MISTAKES),
        Asked("wares", "mug", view=ONE),
    ],
)
def test_the_link_leads_to_the_same_images(explored: Explored, asked: Asked) -> None:
    before = View(explored, asked, 20)
    found = re.search(r'href="\?([^"]+)"', before.totals())
    assert found
    query = parse_qsl(unescape(found[1]))
    assert dict(query)["tab"] == "explore"
    after = View(explored, from_query(explored, query, "wares"), 20)
    assert (after.explorer.name, after.chosen, after.asked.view) == (asked.gallery, before.chosen, asked.view)


@pytest.mark.parametrize(
    "query",
    [
        [("gallery", "../../etc")], [("view", "Everything")], [("split", "holdout")], [("class", "teapot")],
        [("class", "bowl,mug")], [("colour", "blue"), ("colour", "purple")], [("class", "<script>" * 500)],
    ],
)  # fmt: skip
def test_an_address_that_asks_for_what_there_is_not_is_refused(
    explored: Explored, query: list[tuple[str, str]]
) -> None:
    with pytest.raises(UserError, match="choose one of"):
        from_query(explored, query, "wares")


def test_what_an_address_says_of_other_tabs_is_none_of_ours(explored: Explored) -> None:
    assert from_query(explored, [("q", "mug"), ("ranker", "clip")], "wares") == Asked(
        "wares", attributes=[], task="class"
    )


def test_a_gallery_without_classes_says_so(explored: Explored) -> None:
    asked = View(explored, Asked("photos"), 20)
    assert ids(asked.grid(1).shown) == [f"p{row}" for row in range(12)]
    for shown in (asked.classes(), asked.colours(lambda each, _: each)):
        assert "neither labels nor predictions" in shown
    assert "not both labels and predictions" in asked.mistakes(1).said
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
        ONE: lambda: shown.one(shown.turned(None, 0)),
        CLASSES: shown.classes,
        COLOURS: lambda: shown.colours(lambda names, _: names),
        MAP: lambda: shown.map(None),
        MISTAKES: lambda: shown.mistakes(1),
    }
    return shows[shown.asked.view]()


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(("field", "kind"), [(field, kind) for field, kinds in LOOKED_AT.items() for kind in kinds])
def test_what_there_is_not_is_refused_in_one_line(explored: Explored, field: str, kind: str, value: Any) -> None:
    asked = replace(Asked("wares", view=kind), **{field: value})
    with pytest.raises(UserError) as refused:
        answer(View(explored, asked, 20))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
