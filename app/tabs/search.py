"""The tab Search: by text, by an image, or like an image of the gallery; filters, pages, details.

A session keeps the latest search, so that pages and changed filters go on with it, whatever is in the box by now.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from app.logic.search import RANKERS, SCORES, Request, Result, ResultPage, Searching
from app.state.context import AppContext
from app.state.galleries import ServedGallery
from app.widgets.page import (
    Card,
    Uploads,
    card_grid,
    cards_html,
    image_upload,
    image_url,
    links_html,
    on_page_load,
    one_line,
    paths_of,
    report_errors,
)
from retrieval.schema import CONFIDENCE, LABEL, PREDICTED, prediction_of, value_text
from retrieval.search.searcher import FORMER_RANKERS, Query
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

_LARGE = 640
"""Longest side in pixels of the image in the details."""

_PAGE = "at-page"
"""Number of the page in a link; Gradio has a meaning of its own for ``page``, and fails on numbers."""

_FILTER = "only."
"""Prefix of a filter's name in a link, so that a task may be called ``q``."""

_STYLE = """
.search-status p { margin: 2px 0; }
.search-status .found, .search-status .none { font-size: 16px; font-weight: 600; }
.search-status .scores, .search-status .note, .search-details dt {
  color: color-mix(in srgb, var(--body-text-color) 72%, transparent); font-variant-numeric: tabular-nums; }
.search-status a { color: inherit; text-decoration: underline; }
.search-status .wrong { border-left: 3px solid var(--error-text-color, #b91c1c); padding-left: 10px; }
.search-status p, .search-details p, .search-details dd, .search-details h3 { overflow-wrap: anywhere; }
.search-details { display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-start; }
.search-details img { width: min(100%, 360px); max-height: 420px; object-fit: contain; border-radius: 10px; margin: 0;
  background: var(--background-fill-secondary); }
.search-details div { flex: 1 1 240px; min-width: 0; } .search-details h3 { margin: 0 0 6px; font-weight: 600; }
.search-details dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 14px; margin: 8px 0 0; }
.search-details dd { margin: 0; }
""".strip()

_AUTOMATIC = "automatic"
"""Choice of the ranker that suits gallery and query."""

Values = dict[Any, Any]
"""New values by component."""

# An image far down in the results leads to its details, and back.
_TO_DETAILS = """() => setTimeout(() => {
  document.getElementById('search-details')?.scrollIntoView({block: 'nearest'});
  document.getElementById('search-more-like')?.focus({preventScroll: true});
}, 50)"""
_TO_CARD = """() => {
  const shown = document.querySelector('#search-details h3')?.textContent;
  for (const card of document.querySelectorAll('#search-grid button.card')) if (card.dataset.id === shown) card.focus();
}"""
_TO_TOP = "() => document.getElementById('search-status')?.scrollIntoView({block: 'nearest'})"
# In a narrow window results are below the options.
_TO_RESULTS = (
    """() => { if (innerWidth < 700) document.getElementById('search-status')?.scrollIntoView({block: 'start'}); }"""
)


def build(context: AppContext) -> None:
    """Lay out the tab and connect it."""
    if not context.galleries:
        gr.Markdown("No gallery is served. Start with `--gallery FOLDER`, or `--run RUN`, whose images are indexed.")
        return
    _Tab(context)


def status_html(page: ResultPage) -> str:
    """Return what was found, with mean and top score, or that nothing matches; then notes and a link to this search."""
    notes = "".join(f'<p class="note">Note: {escape(note)}</p>' for note in page.notes)
    query = escape(query_text(page.request.query))
    if page.results and page.top is not None:
        found = f'<p class="found">Results {page.results[0].rank:,} to {page.results[-1].rank:,} for {query}</p>'
        if page.unmatched:
            named = " and ".join(f"“{escape(word)}”" for word in page.unmatched)
            found += f'<p class="none">Nothing clearly matches {named}; these are the nearest images.</p>'
        mean = f"mean of these {len(page.results)}: {page.mean:.4f}"
        scores = f"Top score {page.top:.4f} · {mean} ({SCORES[page.ranker]})"
    else:
        found, scores = f'<p class="none">No match for {query}</p>', _why_none(page)
    took = f"{page.fitting:,} images searched in {1000 * page.seconds:.0f} ms"
    link = address_of(page.request)
    own = f'<p class="note"><a class="address" href="{escape(link)}">Link to this search</a></p>' if link else ""
    return (
        f'<div class="search-status" role="status">{found}'
        f'<p class="scores">{scores} · ranked by {RANKERS[page.ranker]} · {took}</p>{notes}{own}</div>'
    )


def wrong_html(message: str) -> str:
    """Return why a search was not possible."""
    return f'<div class="search-status" role="alert"><p class="wrong">{escape(message)}</p></div>'


def query_text(query: Query) -> str:
    """Return the query in words."""
    if query.text is not None:
        return f"“{query.text.strip()}”"
    return "the uploaded image" if query.image is not None else f"images like {query.like}"


def cards_of(page: ResultPage) -> list[Card]:
    """Return a card for each result."""
    return [
        Card(
            page.request.gallery,
            result.sample_id,
            _title(result),
            [f"{result.rank:,}. score {result.score:.4f}", *_attributes(result.row)],
        )
        for result in page.results
    ]


def details_html(gallery: ServedGallery, sample_id: str, links: str = "") -> str:
    """Return an image of a gallery in full, with its metadata; raise ``UserError`` where there is no such image.

    Args:
        gallery: that has it.
        sample_id: of the image; untrusted.
        links: to what else can be done with it, as HTML.
    """
    row = gallery.row(sample_id)
    lines = [(task, _label_and_prediction(row, task)) for task in gallery.tasks]
    lines += [("split", row["split"]), ("group", row["group"])]
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in lines if text)
    caption = f"<p>{escape(row['caption'])}</p>" if row["caption"] else ""
    image = escape(image_url(gallery.name, sample_id, _LARGE))
    return (
        f'<div class="search-details"><img src="{image}" alt="{escape(row["caption"] or sample_id)}">'
        f"<div><h3>{escape(sample_id)}</h3>{caption}<dl>{listed}</dl>{links}</div></div>"
    )


def address_of(request: Request) -> str:
    """Return a link to the search; empty for an uploaded image, which no link can contain."""
    query = request.query
    if query.image is not None:
        return ""
    parameters: list[tuple[str, str]] = [("tab", "search"), ("gallery", request.gallery)]
    parameters.append(("q", query.text) if query.text is not None else ("like", str(query.like)))
    parameters += [(name, value) for name, value in (("ranker", request.ranker), ("words", request.fields)) if value]
    parameters += [(name, str(number)) for name, number in (("count", request.count), (_PAGE, request.page))]
    parameters += [(f"{_FILTER}{name}", value) for name, values in request.filters.items() for value in values]
    return f"?{urlencode(parameters)}"


def from_address(parameters: Sequence[tuple[str, str]], gallery: str, count: int) -> Request | None:
    """Read the search in a link; None where it has none.

    Args:
        parameters: of the link, in order.
        gallery: where it names none.
        count: results on a page where it names none.

    Raises:
        UserError: a number is not one, or the query cannot be answered.
    """
    given = dict(parameters)
    if not _is_search(given) or not (given.get("q") or given.get("like")):
        return None
    filters: dict[str, list[str]] = {}
    for name, value in parameters:
        if name.startswith(_FILTER):
            filters.setdefault(name.removeprefix(_FILTER), []).append(value)
    ranker = given.get("ranker", "")
    return Request(
        gallery=given.get("gallery") or gallery,
        query=Query(like=given["like"]) if given.get("like") else Query(text=given["q"]),
        ranker=FORMER_RANKERS.get(ranker, ranker),
        fields=given.get("words", ""),
        filters=filters,
        count=_number(given, "count", count),
        page=_number(given, _PAGE, 1),
    )


def _is_search(given: Mapping[str, str]) -> bool:
    return given.get("tab", "").lower() == "search"


def _number(given: Mapping[str, str], name: str, default: int) -> int:
    text = given.get(name) or str(default)
    # Longer ones are not a page either, and Python would refuse to read them.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise UserError(f"{name}={text[:20]}: must be a whole number in the link")
    return int(text)


def _why_none(page: ResultPage) -> str:
    if not page.fitting:
        return "no image fits the filters" if page.request.filters else "the gallery is empty"
    if page.top is not None:
        return f"there are no results from {(page.request.page - 1) * page.request.count + 1:,} on"
    return "nothing that fits the filters matches" if any(page.request.filters.values()) else "nothing matches"


def _title(result: Result) -> str:
    """The caption, or the class (the true one where it is known), or the id."""
    row = result.row
    label = row.get(f"{LABEL}{LABEL_TASK}") or row.get(f"{PREDICTED}{LABEL_TASK}")
    return row["caption"] or value_text(label) or result.sample_id


def _attributes(row: Mapping[str, Any]) -> list[str]:
    """The true labels in a line where the model predicts others, and the predicted ones, marked as such."""
    lines = []
    for prefix, mark in ((LABEL, "labels: "), (PREDICTED, "model: ")):
        named = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
        # A number says little without its name.
        values = [
            f"{task} {value_text(one)}" if isinstance(one, float) else value_text(one) for task, one in named.items()
        ]
        if values := [value for value in values if value]:
            lines.append(f"{mark}{', '.join(values)}")
    return lines[1:] if len({line.partition(": ")[2] for line in lines}) == 1 < len(lines) else lines


def _label_and_prediction(row: Mapping[str, Any], task: str) -> str:
    label, found = row.get(f"{LABEL}{task}"), prediction_of(row, task)
    if found is None:
        return value_text(label)
    if not isinstance(found.value, str):
        return " · ".join(filter(None, [value_text(label), f"predicted: {found}"]))
    predicted = found.value
    confidence = f"{row.get(f'{CONFIDENCE}{task}') or 0:.0%}"
    if label == predicted:
        return f"{label} (the model agrees, {confidence})"
    prediction = f"predicted: {predicted} ({confidence})"
    return prediction if label is None else f"{label} · {prediction}"


def _example(gallery: ServedGallery) -> str:
    """A query that finds something, taken from the gallery's first image."""
    for column in ("caption", "text"):
        for text in gallery.metadata.column(column).slice(0, 1).to_pylist():
            if text:
                return f"for example: {text.replace('_', ' ')}"
    return "what to look for, in words"


class _Tab:
    """Components and handlers. Every search gets ``_options``, filters last, and changes ``_outputs``."""

    def __init__(self, context: AppContext) -> None:
        self._context = context
        self._searching = Searching(context)
        self._first = next(iter(context.galleries))
        self._lay_out()
        self._listen()

    def _lay_out(self) -> None:
        first, limits = self._context.galleries[self._first], self._context.limits
        names = dict.fromkeys(name for gallery in self._context.galleries.values() for name in gallery.choices)
        plain: dict[str, Any] = {"css_template": _STYLE, "js_on_load": None, "apply_default_css": False}
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                self.text = gr.Textbox(
                    label="Search for", placeholder=_example(first), max_length=limits.text, elem_id="search-text"
                )
                self.button = gr.Button("Search", variant="primary", elem_id="search-button")
                with gr.Accordion("By an image", open=False, elem_id="search-by-image"):
                    self.images = image_upload(self._context, "search-image")
                self.gallery = gr.Dropdown(
                    list(self._context.galleries), value=first.name, elem_id="search-gallery",
                    label="Gallery (and the model that made it)",
                )  # fmt: skip
                rankers = [(_AUTOMATIC, _AUTOMATIC), *((label, name) for name, label in RANKERS.items())]
                self.ranker = gr.Radio(rankers, value=_AUTOMATIC, label="Ranked by", elem_id="search-ranker")
                fields = self._field_choices(first)
                chosen = fields[0][1] if fields else None
                self.fields = gr.Dropdown(fields, value=chosen, label="Search text in", visible=len(fields) > 1)
                self.count = gr.Slider(1, limits.results, value=limits.results, step=1, label="Results on a page")
                with gr.Accordion("Filters", open=False, elem_id="search-filters"):
                    self.filters = {name: _filter(name, first.choices.get(name, [])) for name in names}
            with gr.Column(scale=3, min_width=300):
                self.status = gr.HTML("", elem_id="search-status", **plain)
                with gr.Column(visible=False, elem_id="search-details") as self.details:
                    self.image = gr.HTML("", **plain)
                    with gr.Row():
                        self.more_like = gr.Button("More like this", variant="primary", elem_id="search-more-like")
                        self.close = gr.Button("Close", elem_id="search-close")
                self.grid = card_grid(elem_id="search-grid", label="Results, best first")
                with gr.Row(visible=False) as self.pagination:
                    self.back = gr.Button("Previous page", elem_id="search-back")
                    self.forward = gr.Button("Next page", elem_id="search-next")
        self.last, self.opened = gr.State(None), gr.State("")
        self._options: list[Any] = [self.gallery, self.ranker, self.fields, self.count, *self.filters.values()]
        self._outputs: list[Any] = [
            self.status, self.grid, self.pagination, self.back, self.forward, self.details, self.image, self.last,
            self.opened,
        ]  # fmt: skip

    def _listen(self) -> None:
        outputs, options = self._outputs, self._options
        # The last of several requests counts; by default, those that come while one is being answered would be dropped.
        last: dict[str, Any] = {"trigger_mode": "always_last"}
        asked = gr.on(
            [self.text.submit, self.button.click], report_errors(self.by_text), [self.text, *options], outputs, **last
        )
        asked.then(js=_TO_RESULTS)
        self.images.change(report_errors(self.by_image), [self.images, self.last, *options], outputs)
        changed = [part.input for part in options if part not in (self.gallery, self.count)]
        gr.on([*changed, self.count.release], report_errors(self.again), [self.last, *options], outputs, **last)
        choices = [*outputs, self.ranker, self.fields, *self.filters.values()]
        self.gallery.input(report_errors(self.change_gallery), [self.last, *options], choices, **last)
        for button, by in ((self.back, -1), (self.forward, 1)):
            button.click(report_errors(self.turn(by)), [self.last], outputs).then(js=_TO_TOP)
        details = [self.details, self.image, self.opened]
        self.grid.select(report_errors(self.open), [self.last], details).success(js=_TO_DETAILS)
        closed = {self.details: gr.Column(visible=False), self.opened: ""}
        self.close.click(lambda: closed, None, details, js=_TO_CARD)
        like = self.more_like.click(report_errors(self.by_opened), [self.opened, *options], [*outputs, self.text])
        like.then(js=_TO_TOP)
        on_page_load(report_errors(self.open_link), [*choices, self.gallery, self.text, self.count])

    def by_text(self, text: object, *options: object) -> Values:
        """Search for a text."""
        return self._search(lambda: self._request(Query(text=_text(text)), options))

    def by_image(self, uploads: Uploads, last: Request | None, *options: object) -> Values:
        """Search for images like the latest upload; removing it changes nothing else."""
        if not uploads:
            return {self.last: last}
        return self._search(lambda: self._request(Query(image=paths_of(uploads)[-1]), options))

    def by_opened(self, opened: str, *options: object) -> Values:
        """Search for images like the one whose details are shown."""
        return self._search(lambda: self._request(Query(like=opened), options)) | {self.text: ""}

    def again(self, last: Request | None, *options: object) -> Values:
        """Repeat the search with other options, from its first page on."""
        if last is None:
            return {self.last: None}
        return self._search(lambda: self._request(last.query, options))

    def change_gallery(self, last: Request | None, name: object, *options: object) -> Values:
        """Repeat the search in another gallery, which has choices of its own."""
        gallery = self._context.gallery(name)
        count = _whole(options[2], "results")
        found = {self.last: None}
        if last is not None:
            found = self._search(lambda: Request(gallery.name, last.query, count=count))
        return self._choices(gallery) | found

    def turn(self, by: int) -> Callable[[Request | None], Values]:
        """Return a handler that shows another page."""

        def turned(last: Request | None) -> Values:
            if last is None:
                raise UserError("there is no search to page through; search first")
            return self._search(lambda: replace(last, page=last.page + by))

        return turned

    def open(self, last: Request | None, event: gr.SelectData) -> Values:
        """Show details of a result."""
        gallery = self._context.gallery(last.gallery if last is not None else self._first)
        sample_id = str(event.value)
        html = details_html(gallery, sample_id, links_html(gallery.name, sample_id, self._context))
        return {self.image: html, self.details: gr.Column(visible=True), self.opened: str(event.value)}

    def open_link(self, request: gr.Request) -> Values:
        """Show what a link asks for; a wrong one is reported."""
        pairs = request.query_params.multi_items()
        given = dict(pairs)
        try:
            asked = from_address(pairs, self._first, self._context.limits.results)
            name = asked.gallery if asked is not None else given.get("gallery", "") if _is_search(given) else ""
            if not name:
                return {self.last: None}
            gallery = self._context.gallery(name)
        except UserError as error:
            return {self.last: None, self.status: wrong_html(one_line(str(error)))}
        if asked is None:
            return self._choices(gallery) | {self.gallery: name, self.last: None}
        own = {self.gallery: name, self.text: asked.query.text or "", self.count: asked.count}
        return self._choices(gallery, asked) | own | self._search(lambda: asked)

    def _request(self, query: Query, options: tuple[object, ...]) -> Request:
        """A search by the components' values, which are checked here or where they are used."""
        gallery, ranker, fields, count, *chosen = options
        filters = {name: _values(values) for name, values in zip(self.filters, chosen, strict=True)}
        return Request(
            gallery=self._context.gallery(gallery).name,
            query=query,
            ranker="" if ranker in (None, _AUTOMATIC) else str(ranker),
            fields=str(fields or ""),
            filters={name: values for name, values in filters.items() if values},
            count=_whole(count, "results"),
        )

    def _search(self, asked: Callable[[], Request]) -> Values:
        """What a search changes; the user's mistakes are reported in place of the results."""
        closed = {self.details: gr.Column(visible=False), self.opened: "", self.image: ""}
        request = None
        try:
            request = asked()
            page = self._searching.search(request)
        except UserError as error:
            # The request is kept: another ranker or gallery may be able to answer it.
            hidden = {self.pagination: gr.Row(visible=False), self.grid: "", self.last: request}
            return closed | hidden | {self.status: wrong_html(one_line(str(error)))}
        first = page.request.page == 1
        return closed | {
            self.status: status_html(page),
            self.grid: cards_html(cards_of(page), label="Results, best first"),
            self.pagination: gr.Row(visible=page.more or not first),
            self.back: gr.Button(interactive=not first),
            self.forward: gr.Button(interactive=page.more),
            self.last: page.request,
        }

    def _field_choices(self, gallery: ServedGallery) -> list[tuple[str, str]]:
        return [(label, value) for value, label in self._searching.text_fields(gallery.name).items()]

    def _choices(self, gallery: ServedGallery, asked: Request | None = None) -> Values:
        """What can be chosen in a gallery, with what a search has chosen of it."""
        asked = asked or Request(gallery.name, Query(like=""))
        fields = self._field_choices(gallery)
        known = [value for _, value in fields]
        chosen = asked.fields if asked.fields in known else next(iter(known), None)
        values: Values = {
            self.ranker: gr.Radio(value=asked.ranker or _AUTOMATIC),
            self.fields: gr.Dropdown(choices=fields, value=chosen, visible=len(fields) > 1),
        }
        for name, part in self.filters.items():
            choices = gallery.choices.get(name, [])
            picked = [value for value in asked.filters.get(name, ()) if value in choices]
            values[part] = gr.Dropdown(choices=choices, value=picked, multiselect=True, visible=bool(choices))
        return values


def _filter(name: str, choices: list[str]) -> gr.Dropdown:
    return gr.Dropdown(
        choices, value=[], multiselect=True, label=name, visible=bool(choices), elem_id=f"search-only-{name}"
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UserError("the query is not a text; describe what to look for")
    return value


def _values(value: object) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UserError("filters: choose values from their lists")
    return value


def _whole(value: object, name: str) -> int:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value != int(value):
        raise UserError(f"{name}: must be a whole number")
    return int(value)
