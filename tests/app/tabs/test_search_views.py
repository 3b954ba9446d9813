from __future__ import annotations

import dataclasses
import html
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from app.logic.search import Request, Result, ResultPage, Searching
from app.state.context import AppContext
from app.tabs.search import address_of, cards_of, details_html, from_address, query_text, status_html, wrong_html
from retrieval.search.searcher import Query
from tests.support.galleries import MeaningRun, served_small
from vitrail.errors import UserError

HOSTILE = "<img src=x onerror=alert(1)> \"'&"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> AppContext:
    return AppContext({}, {"small": served_small(tmp_path_factory.mktemp("views") / "g", run=MeaningRun())})


@pytest.fixture(scope="module")
def page(context: AppContext) -> ResultPage:
    return Searching(context).search(Request("small", Query(text="blue bag"), count=4, page=2))


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


def test_a_weak_match_is_said(page: ResultPage) -> None:
    said = html.unescape(status_html(dataclasses.replace(page, weakness="Captions are nearer.")))
    assert "Results 5 to 8 for “blue bag”" in said
    assert "No clear match: these are only the nearest" in said
    assert "Captions are nearer." in said


def test_nothing_is_code(page: ResultPage) -> None:
    request = dataclasses.replace(page.request, query=Query(text=HOSTILE), filters={HOSTILE: [HOSTILE]})
    hostile = dataclasses.replace(page, request=request, notes=[HOSTILE], weakness=HOSTILE)
    shown = [status_html(hostile), status_html(dataclasses.replace(hostile, results=[])), wrong_html(HOSTILE)]
    for text in shown:
        assert "<img" not in text
        assert HOSTILE in html.unescape(text)


def test_cards_say_rank_score_and_answers(page: ResultPage) -> None:
    cards = cards_of(page)
    assert [card.sample_id for card in cards] == [result.sample_id for result in page.results]
    first = page.results[0]
    assert cards[0].title == first.row["caption"]
    assert cards[0].lines[0] == f"5. score {first.score:.4f}"
    assert first.row["predicted_class"] in cards[0].lines[1]
    bare = dataclasses.replace(page, results=[Result("x", 1, 0.5, {"caption": "", "label_class": None})])
    assert [(card.title, list(card.lines)) for card in cards_of(bare)] == [("x", ["1. score 0.5000"])]


def test_details_say_label_and_answer(context: AppContext) -> None:
    shown = details_html(context.galleries["small"], "p3")
    assert "bag · predicted: sneakers (55%)" in shown
    assert "blue (the model agrees, 55%)" in shown
    assert "<h3>p3</h3>" in shown
    with pytest.raises(UserError, match="there is no image"):
        details_html(context.galleries["small"], HOSTILE)


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
            from_address([("tab", "search"), ("q", "mug"), ("page", wrong)], "small", 20)


def test_a_image_from_outside_has_no_address(page: ResultPage) -> None:
    request = Request("small", Query(image=Path("photo.png")))
    assert address_of(request) == ""
    assert "Link to this search" not in status_html(dataclasses.replace(page, request=request))
    assert query_text(request.query) == "the uploaded image"
