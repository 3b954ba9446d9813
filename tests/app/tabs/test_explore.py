"""Tests of what the tab Explore shows for choices, and of its handlers; the browser tests show how it looks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from html import unescape
from typing import Any
from urllib.parse import parse_qsl

import gradio as gr
import pytest

from app.server import blocks_of
from app.state.context import AppContext
from app.state.galleries import ServedGallery
from app.tabs.explore import (
    CLASSES,
    COLOURS,
    GRID,
    MAP,
    MISTAKES,
    ONE,
    VIEWS,
    Choices,
    Explorers,
    View,
    build,
    from_query,
)  # fmt: skip
from tests.app.explored_gallery import N, explored_gallery
from tests.support.galleries import small_gallery
from vitrail.errors import UserError

FIELDS = list(Choices.__dataclass_fields__)


class Tab:
    """The handlers by name, called as the page does."""

    def __init__(self, context: AppContext) -> None:
        self.blocks = blocks_of(context, [("Explore", build)])
        self.handlers: dict[str, Callable[..., Any]] = {
            str(function.name): function.fn for function in self.blocks.fns.values() if function.fn is not None
        }

    def ask(self, handler: str, page: int = 1, current: str | None = None, *, event: Any = None, **asked: Any) -> Any:
        """What a handler answers, by ``elem_id`` or label of the component."""
        values: dict[str, Any] = {
            "gallery": "wares",
            "view": GRID,
            "class_name": "",
            "split": "",
            "attributes": [],
            "task": "class",
        }
        values |= {"method": "PCA", "compared": [], "other": "", "shuffle": False, "seed": 0} | asked
        given = [page, current, *(values[field] for field in FIELDS)]
        if handler == "draw":
            given[0] = gr.Progress()
        return self.named(self.handlers[handler](*([] if event is None else [event]), *given))

    def named(self, answer: dict[Any, Any]) -> dict[str, Any]:
        """An answer by name of its components."""
        return {
            getattr(part, "elem_id", None) or f"{type(part).__name__}{part._id}": said for part, said in answer.items()
        }


def wanted(answer: dict[str, Any]) -> str:
    """Which figure an answer asks for."""
    (asked,) = [said for name, said in answer.items() if name.startswith("State") and isinstance(said, str)]
    return str(asked)


def chosen(value: Any) -> gr.SelectData:
    return gr.SelectData(None, {"index": 0, "value": value})


@pytest.fixture(scope="module")
def tab(context: AppContext) -> Tab:
    return Tab(context)


def test_no_handler_is_offered_as_an_interface(tab: Tab) -> None:
    assert tab.blocks.get_api_info()["named_endpoints"] == {}
    changing = {
        "open_link",
        "change_gallery",
        "change_filter",
        "change_view",
        "change_task",
        "go_back",
        "go_forward",
        "draw",
    }
    assert changing | {"open_image", "open_class"} <= set(tab.handlers)


def test_pages_turn_and_end_at_both_ends(tab: Tab) -> None:
    places = [tab.ask("go_forward", page)["explore-place"]["value"] for page in (1, 11, 12, 400)]
    assert [place.split(" of ")[0].split()[-1] for place in places] == ["2", "12", "12", "12"]
    assert tab.ask("go_back", 1)["explore-previous"] == {**gr.update(interactive=False)}
    assert tab.ask("go_forward", 11)["explore-next"] == {**gr.update(interactive=False)}


def test_an_image_opens_from_a_grid_and_leads_to_its_neighbours(tab: Tab) -> None:
    opened = tab.ask("open_image", event=chosen("p44"), view=MISTAKES)
    assert opened["explore-view"]["value"] == ONE
    assert opened["explore-place"]["value"] == f'<p role="status">45 of {N}</p>'
    assert "id=p44&amp;" in opened["explore-focus"]["value"]
    turned = tab.ask("go_forward", current="p44", view=ONE)
    assert "id=p45&amp;" in turned["explore-focus"]["value"]
    # Back in the grid, its page is shown.
    assert "page 3 of" in tab.ask("change_view", current="p44", view=GRID)["explore-place"]["value"]


def test_another_filter_begins_at_the_first_image(tab: Tab) -> None:
    shown = tab.ask("change_filter", 9, "p44", view=ONE, class_name="mug")
    assert shown["explore-place"]["value"].startswith('<p role="status">1 of ')


def test_another_tasks_values_are_compared(tab: Tab) -> None:
    shown = tab.ask("change_task", view=COLOURS, task="colour", compared=["mug"])["explore-compared"]
    assert (shown["choices"], shown["value"], shown["visible"]) == (
        ["blue", "green, dark", "red", "(not known)"],
        [],
        True,
    )


def test_a_bar_narrows_the_filter(tab: Tab) -> None:
    opened = tab.ask("open_class", event=chosen("mug"), view=CLASSES)
    assert opened["explore-class"]["value"] == "mug"
    assert opened["explore-view"]["value"] == GRID
    assert opened["explore-totals"]["value"].count(f"of {N} images") == 1


def test_the_figures_that_take_long_are_drawn_by_their_own_event(tab: Tab) -> None:
    asked = tab.ask("change_view", view=MAP)
    assert asked["explore-map"] == {**gr.update(visible=True)}
    assert wanted(asked) == wanted(tab.ask("change_view", view=MAP))
    assert wanted(asked) != wanted(tab.ask("change_view", view=MAP, method="t-SNE"))
    assert len(tab.ask("draw", view=MAP)["explore-map"]["ids"]) == N


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


@pytest.mark.parametrize("seed", [-1, 2**32, None, "1", [1], True, float("nan"), float("inf")])
def test_a_seed_that_is_none_is_refused(explorers: Explorers, seed: object) -> None:
    with pytest.raises(UserError, match="whole number from 0"):
        _ = view(explorers, shuffle=True, seed=seed).order


def test_an_image_is_shown_with_its_place_and_all_that_is_known(explorers: Explorers) -> None:
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


def test_filters_that_leave_nothing_are_reported_everywhere(explorers: Explorers) -> None:
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


def test_what_an_address_says_of_other_tabs_is_ignored(explorers: Explorers) -> None:
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


HOSTILE = [["mug"], {"a": 1}, 3, 2.5, "x" * 5000, "../../etc/passwd", "' OR 1=1", None, b"mug", float("nan")]


def test_hostile_calls_are_answered_or_refused_and_never_fail(tab: Tab) -> None:
    calls = list(itertools.product(["change_filter", "go_forward", "draw"], FIELDS, HOSTILE, VIEWS))
    refused = [error for call in calls if (error := outcome(tab, *call)) is not None]
    # "Failed" would be an error of ours.
    assert {error.title for error in refused} == {"Not possible"}
    assert max(len(error.message) for error in refused) < 600
    assert len(calls) > len(refused) > 150


def outcome(tab: Tab, handler: str, field: str, value: Any, view: str) -> gr.Error | None:
    """What the browser would show of a call's failure."""
    asked: dict[str, Any] = {"view": view, "shuffle": True, field: value}
    try:
        tab.ask(handler, **asked)
    except gr.Error as error:
        return error
    return None


@pytest.mark.parametrize("value", [*HOSTILE, "p999"])
@pytest.mark.parametrize("handler", ["open_image", "open_class"])
def test_hostile_choices_are_refused(tab: Tab, handler: str, value: object) -> None:
    with pytest.raises(gr.Error) as refused:
        tab.ask(handler, event=chosen(value))
    assert refused.value.title == "Not possible"


def test_without_galleries_the_tab_says_how_to_get_one() -> None:
    blocks = blocks_of(AppContext({}, {}), [("Explore", build)])
    said = [block.value for block in blocks.blocks.values() if isinstance(block, gr.Markdown)]
    assert ["--gallery" in text for text in said] == [True]
