"""Tests of what the tab Explore makes of events; the browser's tests show that it looks like it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import gradio as gr
import pytest

from app.server import blocks_of
from app.state.context import AppContext
from app.tabs.explore import CLASSES, COLOURS, GRID, MAP, MISTAKES, ONE, Choices, build
from tests.app.explored_gallery import N, explored_gallery

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
        values |= {"method": "PCA", "compared": [], "shuffle": False, "seed": 0} | asked
        given = [page, current, *(values[field] for field in FIELDS)]
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
def tab(tmp_path_factory: pytest.TempPathFactory) -> Tab:
    return Tab(AppContext({}, {"wares": explored_gallery(tmp_path_factory.mktemp("tab") / "gallery")}))


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


def test_a_image_opens_from_a_grid_and_leads_to_its_neighbours(tab: Tab) -> None:
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
    values = ["wares", "", "", [], MAP, "class", "PCA", [], False, 0]
    points = tab.named(tab.handlers["draw"](gr.Progress(), None, *values))["explore-map"]
    assert len(points["ids"]) == N


HOSTILE = [["mug"], {"a": 1}, 3, 2.5, "x" * 5000, "../../etc/passwd", "' OR 1=1", None, b"mug", float("nan")]


def test_hostile_calls_are_answered_or_refused_and_never_fail(tab: Tab) -> None:
    calls = list(itertools.product(["change_filter", "go_forward"], FIELDS, HOSTILE, (GRID, ONE, CLASSES, MISTAKES)))
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
