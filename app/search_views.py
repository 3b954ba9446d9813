"""What the tab Search shows: a line on what was found, cards, details of one picture, and the address of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import urlencode

from app.cards import Card
from app.picture_address import picture_url
from app.searching import RANKERS, SCORES, Request, Result, ResultPage
from app.served_gallery import ServedGallery
from retrieval.schema import CONFIDENCE, LABEL, PREDICTED
from retrieval.search.searcher import Query
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

_LARGE = 640
"""Longest side in pixels of the picture in the details."""

_FILTER = "only."
"""Prefix of a filter's name in an address, so that a task may be called ``q``."""

STYLE = """
.search-said p { margin: 2px 0; } .search-said .found, .search-said .none { font-size: 16px; font-weight: 600; }
.search-said .scores, .search-said .note, .search-details dt {
  color: color-mix(in srgb, var(--body-text-color) 72%, transparent); font-variant-numeric: tabular-nums; }
.search-said a { color: inherit; text-decoration: underline; }
.search-said .wrong { border-left: 3px solid var(--error-text-color, #b91c1c); padding-left: 10px; }
.search-said p, .search-details p, .search-details dd, .search-details h3 { overflow-wrap: anywhere; }
.search-details { display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-start; }
.search-details img { width: min(100%, 360px); max-height: 420px; object-fit: contain; border-radius: 10px; margin: 0;
  background: var(--background-fill-secondary); }
.search-details div { flex: 1 1 240px; min-width: 0; } .search-details h3 { margin: 0 0 6px; font-weight: 600; }
.search-details dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 14px; margin: 8px 0 0; }
.search-details dd { margin: 0; }
""".strip()


def said_html(page: ResultPage) -> str:
    """What was found, with mean and top score, or that nothing matches; then notes and the address of this search."""
    notes = "".join(f'<p class="note">Note: {escape(note)}</p>' for note in page.notes)
    took = f"{page.fitting:,} pictures searched in {1000 * page.seconds:.0f} ms"
    if page.results and page.top is not None and page.mean is not None:
        first, last = page.results[0].rank, page.results[-1].rank
        found = f'<p class="found">Results {first:,} to {last:,} for {escape(asked(page.request.query))}</p>'
        if page.weakness:
            found += f'<p class="none">No clear match: these are only the nearest</p><p>{escape(page.weakness)}</p>'
        scores = (
            f'<p class="scores">Top score {page.top:.4f} · mean of these {len(page.results)}: {page.mean:.4f} '
            f"({SCORES[page.ranker]}) · ranked by {RANKERS[page.ranker]} · {took}</p>"
        )
    else:
        found = f'<p class="none">No match for {escape(asked(page.request.query))}</p>'
        scores = f'<p class="scores">{_why_none(page)} · ranked by {RANKERS[page.ranker]} · {took}</p>'
    link = address_of(page.request)
    own = f'<p class="note"><a href="{escape(link)}">Link to this search</a></p>' if link else ""
    return f'<div class="search-said" role="status">{found}{scores}{notes}{own}</div>'


def wrong_html(message: str) -> str:
    """Why a search could not be done."""
    return f'<div class="search-said" role="alert"><p class="wrong">{escape(message)}</p></div>'


def asked(query: Query) -> str:
    """The query in words."""
    if query.text is not None:
        return f"“{query.text.strip()}”"
    return "the picture that was given" if query.image is not None else f"pictures like {query.like}"


def cards_of(page: ResultPage, chosen: str = "") -> list[Card]:
    """A card for each result.

    Args:
        page: of results.
        chosen: id of the picture whose details are shown.
    """
    return [
        Card(
            gallery=page.request.gallery,
            sample_id=result.sample_id,
            title=_title(result),
            lines=[f"{result.rank:,}. score {result.score:.4f}", *_attributes(result.row)],
            selected=result.sample_id == chosen,
        )
        for result in page.results
    ]


def details_html(gallery: ServedGallery, sample_id: str) -> str:
    """A picture of a gallery in full, with all that is said about it.

    Raises:
        UserError: if there is no such picture.
    """
    row = gallery.row(sample_id)
    lines = [(task, _said(row, task)) for task in gallery.tasks]
    lines += [("split", row["split"]), ("group", row["group"])]
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in lines if text)
    caption = f"<p>{escape(row['caption'])}</p>" if row["caption"] else ""
    image = escape(picture_url(gallery.name, sample_id, _LARGE))
    description = escape(row["caption"] or sample_id)
    return (
        f'<div class="search-details"><img src="{image}" alt="{description}">'
        f"<div><h3>{escape(sample_id)}</h3>{caption}<dl>{told}</dl></div></div>"
    )


def address_of(request: Request) -> str:
    """Address that leads to the search; empty for a picture from outside, which no address holds."""
    query = request.query
    if query.image is not None:
        return ""
    given: list[tuple[str, str]] = [("tab", "search"), ("gallery", request.gallery)]
    given.append(("q", query.text) if query.text is not None else ("like", str(query.like)))
    given += [(name, value) for name, value in (("ranker", request.ranker), ("words", request.words)) if value]
    given += [(name, str(number)) for name, number in (("count", request.count), ("page", request.page))]
    given += [(f"{_FILTER}{name}", value) for name, values in request.filters.items() for value in values]
    return f"?{urlencode(given)}"


def from_address(parameters: Sequence[tuple[str, str]], gallery: str, count: int) -> Request | None:
    """The search that an address asks for; None where it asks for none.

    Args:
        parameters: of the address, in order.
        gallery: where it names none.
        count: results on a page where it names none.

    Raises:
        UserError: for a number that is none, and a query that cannot be answered.
    """
    given = dict(parameters)
    if not _is_search(given) or not (given.get("q") or given.get("like")):
        return None
    filters: dict[str, list[str]] = {}
    for name, value in parameters:
        if name.startswith(_FILTER):
            filters.setdefault(name.removeprefix(_FILTER), []).append(value)
    return Request(
        gallery=given.get("gallery") or gallery,
        query=Query(like=given["like"]) if given.get("like") else Query(text=given["q"]),
        ranker=given.get("ranker", ""),
        words=given.get("words", ""),
        filters=filters,
        count=_number(given, "count", count),
        page=_number(given, "page", 1),
    )


def gallery_in(parameters: Sequence[tuple[str, str]]) -> str:
    """The gallery that an address chooses for the search, whether it asks for one or not; empty for none."""
    given = dict(parameters)
    return given.get("gallery", "") if _is_search(given) else ""


def _is_search(given: Mapping[str, str]) -> bool:
    return given.get("tab", "").lower() == "search"


def _number(given: Mapping[str, str], name: str, default: int) -> int:
    text = given.get(name) or str(default)
    # Longer ones are no page either, and Python would refuse to read them.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise UserError(f"{name}={text[:20]}: must be a whole number in the address")
    return int(text)


def _why_none(page: ResultPage) -> str:
    if not page.fitting:
        return "no picture fits the filters" if page.request.filters else "the gallery is empty"
    if page.top is not None:
        return f"there are no results from {(page.request.page - 1) * page.request.count + 1:,} on"
    return "nothing that fits the filters matches" if any(page.request.filters.values()) else "nothing matches"


def _title(result: Result) -> str:
    """The caption, else the class, else the id."""
    row = result.row
    label = row.get(f"{PREDICTED}{LABEL_TASK}") or row.get(f"{LABEL}{LABEL_TASK}")
    return row["caption"] or label or result.sample_id


def _attributes(row: Mapping[str, Any]) -> list[str]:
    """What the model says in a line, or where it says nothing, what the labels say."""
    for prefix in (PREDICTED, LABEL):
        if told := [str(value) for name, value in row.items() if name.startswith(prefix) and value]:
            return [("model: " if prefix == PREDICTED else "") + ", ".join(told)]
    return []


def _said(row: Mapping[str, Any], task: str) -> str:
    """Label and answer of a task."""
    label, answer = row.get(f"{LABEL}{task}"), row.get(f"{PREDICTED}{task}")
    if answer is None:
        return label or ""
    sure = f"{row.get(f'{CONFIDENCE}{task}') or 0:.0%} sure"
    if label == answer:
        return f"{label} (the model agrees, {sure})"
    told = f"{answer}, says the model ({sure})"
    return told if label is None else f"{label} · {told}"
