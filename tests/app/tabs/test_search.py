from __future__ import annotations

import html
import re
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from app.state.context import AppContext
from app.tabs.search import Values, _Tab, build
from tests.support.galleries import MeaningRun, served_small
from vitrail.errors import UserError

NOTHING_CHOSEN: list[list[str]] = [[], [], [], []]
"""Values of the filters class, colour, material and split."""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> _Tab:
    folder, run = tmp_path_factory.mktemp("tab"), MeaningRun()
    both = served_small(folder / "both", "both", run)
    words = served_small(
        folder / "words", "words", run, encodes_text=False, predicts={"class": ["bag"]}, labels=["colour"]
    )
    with gr.Blocks():
        return _Tab(AppContext({}, {"both": both, "words": words}))


def options(
    gallery: object = "both", ranker: object = "automatic", words: object = None, count: object = 3
) -> list[Any]:
    return [gallery, ranker, words, count, *NOTHING_CHOSEN]


def said(tab: _Tab, values: Values) -> str:
    return html.unescape(re.sub("<[^>]*>", "", values[tab.status]))


def shown(tab: _Tab, values: Values) -> list[str]:
    return re.findall('data-id="([^"]*)"', values[tab.grid])


def by_link(tab: _Tab, address: str) -> Values:
    from starlette.datastructures import QueryParams

    return tab.open_link(SimpleNamespace(query_params=QueryParams(address)))  # type: ignore[arg-type]


def test_search_turn_and_change_options(tab: _Tab) -> None:
    parts = tab
    first = tab.by_text("blue bag", *options())
    assert "Results 1 to 3 for “blue bag”" in said(tab, first)
    assert len(shown(tab, first)) == 3
    assert not first[parts.back].interactive
    second = tab.turn(1)(first[parts.last])
    assert "Results 4 to 6" in said(tab, second)
    assert not set(shown(tab, first)) & set(shown(tab, second))
    back = tab.turn(-1)(second[parts.last])
    assert shown(tab, back) == shown(tab, first)
    # Another option starts at the first page again, with the query that was asked, not with what the box says by now.
    filtered = tab.again(second[parts.last], *options()[:4], ["sneakers"], [], [], [])
    assert "Results 1 to 3 for “blue bag”" in said(tab, filtered)
    assert set(shown(tab, filtered)) <= {"p3", "p8", "p9", "p10", "p11"}
    last = tab.turn(1)(filtered[parts.last])
    assert len(shown(tab, last)) == 2
    assert not last[parts.forward].interactive


def test_more_like_a_result(tab: _Tab) -> None:
    found = tab.by_text("blue bag", *options())
    event = SimpleNamespace(value=shown(tab, found)[1])
    details = tab.open(found[tab.last], event)  # type: ignore[arg-type]
    assert details[tab.opened] == event.value
    assert event.value in details[tab.image]
    like = tab.by_opened(details[tab.opened], *options())
    assert f"images like {event.value}" in said(tab, like)
    assert event.value not in shown(tab, like)
    with pytest.raises(UserError, match="there is no image"):
        tab.open(found[tab.last], SimpleNamespace(value="../../etc/passwd"))  # type: ignore[arg-type]


def test_a_mistake_is_said_and_can_be_mended(tab: _Tab) -> None:
    wrong = tab.by_text("blue bag", *options("words", "vector"))
    assert "has no text encoder; choose text" in said(tab, wrong)
    assert shown(tab, wrong) == []
    mended = tab.again(wrong[tab.last], *options("words", "text"))
    assert "for “blue bag”" in said(tab, mended)
    assert "the query is empty" in said(tab, tab.by_text(" ", *options()))


def test_another_gallery_has_choices_of_its_own(tab: _Tab) -> None:
    before = tab.by_text("blue bag", *options())
    after = tab.change_gallery(before[tab.last], *options("words"))
    filters = tab.filters
    assert {name: bool(after[part].visible) for name, part in filters.items()} == {
        "class": True,
        "colour": True,
        "material": False,
        "split": True,
    }
    assert [value for _, value in after[tab.fields].choices] == ["predicted", "gallery:both", "label", "caption"]
    assert "ranked by text" in said(tab, after)


def test_a_link_is_the_whole_search(tab: _Tab) -> None:
    found = by_link(tab, "tab=search&q=black+bag&gallery=both&ranker=hybrid&count=2&page=2&only.colour=black")
    parts = tab
    assert "Results 3 to 4 for “black bag”" in said(tab, found)
    assert "ranked by both · 7 images" in said(tab, found)
    assert (found[parts.gallery], found[parts.text], found[parts.count]) == ("both", "black bag", 2)
    assert found[parts.filters["colour"]].value == ["black"]
    assert found[parts.ranker].value == "hybrid"
    again = by_link(tab, re.findall(r'href="\?([^"]*)"', html.unescape(found[parts.status]))[0])
    assert shown(tab, again) == shown(tab, found)
    assert tab.status not in by_link(tab, "tab=explore&q=bag&gallery=nowhere")


def test_a_link_may_only_choose_the_gallery(tab: _Tab) -> None:
    chosen = by_link(tab, "tab=search&gallery=words")
    assert chosen[tab.gallery] == "words"
    assert not chosen[tab.filters["material"]].visible
    assert tab.status not in chosen
    assert "not served here; choose one of: both, words" in said(tab, by_link(tab, "tab=search&gallery=nowhere"))


HOSTILE: list[Any] = [
    None, "", " ", "x" * 100_000, "\ud800", "' OR 1=1 --", "../../etc/passwd", "<script>", -1, 0, 10**30, 1.5,
    float("nan"), float("inf"), True, [], ["x"], [["x"]], [None], {}, {"path": "/etc/passwd"},
]  # fmt: skip


@pytest.mark.parametrize("place", range(9))
def test_whatever_a_request_says_is_answered_or_refused_in_one_line(tab: _Tab, place: int) -> None:
    for value in HOSTILE:
        given: list[Any] = ["blue bag", *options()]
        given[place] = value
        try:
            answer = said(tab, tab.by_text(*given))
        except UserError as error:
            answer = str(error)
        assert answer
        assert "\n" not in answer
        assert len(answer) < 2_500
    assert "Results 1 to 3" in said(tab, tab.by_text("blue bag", *options()))


@pytest.mark.parametrize(
    "name", ["q", "like", "gallery", "ranker", "words", "count", "page", "only.colour", "only.path"]
)
def test_whatever_an_address_says_is_answered(tab: _Tab, name: str) -> None:
    from urllib.parse import urlencode

    for value in HOSTILE:
        pairs = [("tab", "search"), ("q", "bag"), (name, str(value).encode(errors="replace").decode()[:5_000])]
        values = by_link(tab, urlencode(pairs))
        assert tab.last in values


def test_without_a_gallery_the_way_out_is_said() -> None:
    with gr.Blocks() as blocks:
        build(AppContext({}, {}))
    (said_,) = [block for block in blocks.blocks.values() if isinstance(block, gr.Markdown)]
    assert "--gallery" in str(said_.value)
