"""Tests of the tab Search: what it shows, what its links lead to, and its handlers."""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlencode

import gradio as gr
import pytest
from starlette.datastructures import QueryParams

from app.logic.search import Request, Result, ResultPage, Searching
from app.state.context import AppContext
from app.tabs.search import (
    Values,
    _Tab,
    address_of,
    build,
    cards_of,
    details_html,
    from_address,
    query_text,
    status_html,
    wrong_html,
)  # fmt: skip
from retrieval.search.searcher import Query
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


def test_a_result_that_the_label_found_is_marked_as_labelled(tab: _Tab) -> None:
    found = tab.by_text("bag", *options("both", "text", "all", count=4))
    text = html.unescape(re.sub("<[^>]*>", "|", found[tab.grid]))
    assert "labels: bag, blue, plastic" in text
    assert "model: sneakers, blue, plastic" in text


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
    assert [value for _, value in after[tab.fields].choices] == ["all", "predicted", "gallery:both", "label", "caption"]
    assert "ranked by text" in said(tab, after)


def test_a_link_is_the_whole_search(tab: _Tab) -> None:
    found = by_link(tab, "tab=search&q=black+bag&gallery=both&ranker=hybrid&count=2&at-page=2&only.colour=black")
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
    "name", ["q", "like", "gallery", "ranker", "words", "count", "at-page", "only.colour", "only.path"]
)
def test_whatever_an_address_says_is_answered(tab: _Tab, name: str) -> None:
    for value in HOSTILE:
        pairs = [("tab", "search"), ("q", "bag"), (name, str(value).encode(errors="replace").decode()[:5_000])]
        values = by_link(tab, urlencode(pairs))
        assert tab.last in values


def test_without_a_gallery_the_hint_is_shown() -> None:
    with gr.Blocks() as blocks:
        build(AppContext({}, {}))
    (said_,) = [block for block in blocks.blocks.values() if isinstance(block, gr.Markdown)]
    assert "--gallery" in str(said_.value)


MARKUP = "<img src=x onerror=alert(1)> \"'&"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> AppContext:
    return AppContext({}, {"small": served_small(tmp_path_factory.mktemp("views") / "g", run=MeaningRun())})


@pytest.fixture(scope="module")
def page(small: AppContext) -> ResultPage:
    return Searching(small).search(Request("small", Query(text="blue bag"), count=4, page=2))


def test_what_was_found_is_said(page: ResultPage) -> None:
    said = html.unescape(status_html(page))
    assert "Results 5 to 8 for “blue bag”" in said
    mean = sum(result.score for result in page.results) / 4
    assert f"Top score {page.top:.4f} · mean of these 4: {mean:.4f} (cosine)" in said
    assert "ranked by vectors · 12 images searched in" in said
    assert 'role="status"' in said


def test_no_match_is_said(page: ResultPage) -> None:
    nothing = dataclasses.replace(page, results=[], top=None, fitting=12, notes=["nothing is known"])
    said = html.unescape(status_html(nothing))
    assert "No match for “blue bag”" in said
    assert "nothing matches" in said
    assert "Note: nothing is known" in said
    filtered = dataclasses.replace(page.request, filters={"colour": ["blue"]})
    assert "no image fits the filters" in status_html(dataclasses.replace(nothing, request=filtered, fitting=0))
    assert "there are no results from 5 on" in status_html(dataclasses.replace(page, results=[]))


def test_words_without_a_match_are_shown(page: ResultPage) -> None:
    shown = html.unescape(status_html(dataclasses.replace(page, unmatched=["zebra", "violet"])))
    assert "Results 5 to 8 for “blue bag”" in shown
    assert "Nothing clearly matches “zebra” and “violet”; these are the nearest images." in shown


def test_nothing_is_code(page: ResultPage) -> None:
    request = dataclasses.replace(page.request, query=Query(text=MARKUP), filters={MARKUP: [MARKUP]})
    hostile = dataclasses.replace(page, request=request, notes=[MARKUP], unmatched=[MARKUP])
    shown = [status_html(hostile), status_html(dataclasses.replace(hostile, results=[])), wrong_html(MARKUP)]
    for text in shown:
        assert "<img" not in text
        assert MARKUP in html.unescape(text)


def test_cards_say_rank_score_and_answers(page: ResultPage) -> None:
    cards = cards_of(page)
    assert [card.sample_id for card in cards] == [result.sample_id for result in page.results]
    first = page.results[0]
    assert cards[0].title == first.row["caption"]
    assert cards[0].lines[0] == f"5. score {first.score:.4f}"
    assert first.row["predicted_class"] in cards[0].lines[1]
    bare = dataclasses.replace(page, results=[Result("x", 1, 0.5, {"caption": "", "label_class": None})])
    assert [(card.title, list(card.lines)) for card in cards_of(bare)] == [("x", ["1. score 0.5000"])]


def test_details_say_label_and_answer(small: AppContext) -> None:
    shown = details_html(small.galleries["small"], "p3")
    assert "bag · predicted: sneakers (55%)" in shown
    assert "blue (the model agrees, 55%)" in shown
    assert "<h3>p3</h3>" in shown
    with pytest.raises(UserError, match="there is no image"):
        details_html(small.galleries["small"], MARKUP)


@pytest.mark.parametrize(
    "request_",
    [
        Request("small", Query(text="a “mug” & more=1 ü")),
        Request("other/gallery", Query(like="images/p 1.jpg"), "text", "caption", count=7, page=3),
        Request("small", Query(text="bag"), filters={"q": ["a", "b"], "colour": ["blue"]}),
    ],
)
def test_an_address_leads_to_the_same_search(request_: Request) -> None:
    address = address_of(request_)
    assert from_address(parse_qsl(address.removeprefix("?")), "small", 20) == request_


def test_addresses_by_hand() -> None:
    assert from_address([("tab", "search"), ("q", "mug")], "small", 20) == Request("small", Query(text="mug"))
    old = from_address([("tab", "search"), ("q", "mug"), ("ranker", "tfidf")], "small", 20)
    assert old == Request("small", Query(text="mug"), "text")
    assert from_address([("tab", "explore"), ("q", "mug")], "small", 20) is None
    assert from_address([("tab", "search")], "small", 20) is None
    assert from_address([("tab", "search"), ("q", "")], "small", 20) is None
    for wrong in ("x", "-1", "1.5", "²", "9" * 5000):
        with pytest.raises(UserError, match="must be a whole number"):
            from_address([("tab", "search"), ("q", "mug"), ("at-page", wrong)], "small", 20)


def test_an_image_from_outside_has_no_address(page: ResultPage) -> None:
    request = Request("small", Query(image=Path("photo.png")))
    assert address_of(request) == ""
    assert "Link to this search" not in status_html(dataclasses.replace(page, request=request))
    assert query_text(request.query) == "the uploaded image"
