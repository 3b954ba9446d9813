"""The tab Search: by words, by a picture, or like a picture of the gallery; filters, pages, details.

A session keeps what was asked last, so that pages and changed filters go on with it, whatever stands in the box by now.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from app.cards import cards_html
from app.context import AppContext
from app.messages import one_line, told
from app.page_load import on_page_load
from app.picture_input import Given, paths_of
from app.search_layout import ANY_RANKER, lay_out
from app.search_views import cards_of, details_html, from_address, gallery_in, said_html, wrong_html
from app.searching import Request, Searching
from app.served_gallery import ServedGallery
from retrieval.search.searcher import Query
from vitrail.errors import UserError

Values = dict[Any, Any]
"""New values by component."""

# Whoever opens a picture far down in the results is led to its details, and back.
_TO_DETAILS = """() => setTimeout(() => {
  document.getElementById('search-details')?.scrollIntoView({block: 'nearest'});
  document.getElementById('search-more-like')?.focus({preventScroll: true});
}, 50)"""
_TO_CARD = """() => {
  const shown = document.querySelector('#search-details h3')?.textContent;
  for (const card of document.querySelectorAll('#search-grid button.card')) if (card.dataset.id === shown) card.focus();
}"""
_TO_TOP = "() => document.getElementById('search-said')?.scrollIntoView({block: 'nearest'})"
# In a narrow window results stand below the options.
_TO_RESULTS = (
    """() => { if (innerWidth < 700) document.getElementById('search-said')?.scrollIntoView({block: 'start'}); }"""
)


def build(context: AppContext) -> None:
    """Puts the tab's components where the caller stands."""
    if not context.galleries:
        gr.Markdown("No gallery is served. Start with `--gallery FOLDER`, or `--run RUN`, whose pictures are indexed.")
        return
    _Tab(context).listen()


class _Tab:
    """Components and handlers."""

    def __init__(self, context: AppContext) -> None:
        self._context = context
        self._searching = Searching(context)
        self._first = next(iter(context.galleries))
        self._parts = lay_out(context, self._words(context.gallery(self._first)))

    def listen(self) -> None:
        """Lets components answer to what people do."""
        parts = self._parts
        shown = parts.shown
        asked = gr.on([parts.text.submit, parts.ask.click], told(self.by_text), [parts.text, *parts.options], shown)
        asked.then(js=_TO_RESULTS)
        parts.pictures.change(told(self.by_picture), [parts.pictures, parts.last, *parts.options], shown)
        chosen_from = (parts.words, *parts.filters.values())
        changed = [parts.ranker.input, *(part.input for part in chosen_from)]
        gr.on([*changed, parts.count.release], told(self.again), [parts.last, *parts.options], shown)
        choices = [*shown, parts.ranker, parts.words, *parts.filters.values()]
        parts.gallery.input(told(self.other_gallery), [parts.last, *parts.options], choices)
        for button, by in ((parts.back, -1), (parts.on, 1)):
            button.click(told(self._turning(by)), [parts.last], shown).then(js=_TO_TOP)
        chosen = [parts.details, parts.picture, parts.opened]
        parts.grid.select(told(self.opened), [parts.last], chosen).success(js=_TO_DETAILS)
        closed = {parts.details: gr.Column(visible=False), parts.opened: ""}
        parts.close.click(lambda: closed, None, chosen, js=_TO_CARD)
        like = parts.more_like.click(told(self.by_opened), [parts.opened, *parts.options], [*shown, parts.text])
        like.then(js=_TO_TOP)
        on_page_load(told(self.linked), [*choices, parts.gallery, parts.text, parts.count])

    def by_text(self, text: object, *options: object) -> Values:
        """Looks for words."""
        return self._answer(lambda: self._request(Query(text=_text(text)), options))

    def by_picture(self, given: Given, last: Request | None, *options: object) -> Values:
        """Looks for pictures like the one that was given last; taking it away changes nothing else."""
        if not given:
            return {self._parts.last: last}
        return self._answer(lambda: self._request(Query(image=paths_of(given)[-1]), options))

    def by_opened(self, opened: str, *options: object) -> Values:
        """Looks for pictures like the one whose details are shown."""
        return self._answer(lambda: self._request(Query(like=opened), options)) | {self._parts.text: ""}

    def again(self, last: Request | None, *options: object) -> Values:
        """The same search with other options, from its first page on."""
        if last is None:
            return {self._parts.last: None}
        return self._answer(lambda: self._request(last.query, options))

    def other_gallery(self, last: Request | None, name: object, *options: object) -> Values:
        """The same search in another gallery, which has choices of its own."""
        gallery = self._context.gallery(name)
        count = _whole(options[2], "results")
        shown = {self._parts.last: None}
        if last is not None:
            shown = self._answer(lambda: Request(gallery.name, last.query, count=count))
        return self._choices(gallery) | shown

    def opened(self, last: Request | None, event: gr.SelectData) -> Values:
        """Details of a picture that was found."""
        gallery = self._context.gallery(last.gallery if last is not None else self._first)
        parts, sample_id = self._parts, str(event.value)
        return {
            parts.picture: details_html(gallery, sample_id),
            parts.details: gr.Column(visible=True),
            parts.opened: sample_id,
        }

    def linked(self, request: gr.Request) -> Values:
        """What the address asks for; what it asks wrongly is said."""
        parts = self._parts
        parameters = request.query_params
        pairs = parameters.multi_items() if hasattr(parameters, "multi_items") else list(parameters.items())
        try:
            asked = from_address(pairs, self._first, self._context.limits.results)
            name = asked.gallery if asked is not None else gallery_in(pairs)
            if not name:
                return {parts.last: None}
            gallery = self._context.gallery(name)
        except UserError as error:
            return {parts.last: None, parts.said: wrong_html(one_line(str(error)))}
        if asked is None:
            return self._choices(gallery) | {parts.gallery: name, parts.last: None}
        choices = self._choices(gallery, asked.ranker, asked.words, asked.filters)
        text = asked.query.text or ""
        own = {parts.gallery: asked.gallery, parts.text: text, parts.count: asked.count}
        return choices | own | self._answer(lambda: asked)

    def _turning(self, by: int) -> Callable[[Request | None], Values]:
        def turned(last: Request | None) -> Values:
            if last is None:
                raise UserError("there is no search to leaf through; search first")
            return self._answer(lambda: replace(last, page=last.page + by))

        return turned

    def _request(self, query: Query, options: tuple[object, ...]) -> Request:
        """A search as the components ask for it; whatever they say is checked here or where it is used."""
        gallery, ranker, words, count, *chosen = options
        filters = {name: _values(values) for name, values in zip(self._parts.filters, chosen, strict=True)}
        return Request(
            gallery=self._context.gallery(gallery).name,
            query=query,
            ranker="" if ranker in (None, ANY_RANKER) else str(ranker),
            words=str(words or ""),
            filters={name: values for name, values in filters.items() if values},
            count=_whole(count, "results"),
        )

    def _answer(self, asked: Callable[[], Request]) -> Values:
        """What a search changes; a mistake of the user is said where the results would stand."""
        parts = self._parts
        closed = {parts.details: gr.Column(visible=False), parts.opened: "", parts.picture: ""}
        request = None
        try:
            request = asked()
            page = self._searching.search(request)
        except UserError as error:
            # What was asked stays: another ranker or gallery may be able to answer it.
            hidden = {parts.leafing: gr.Row(visible=False), parts.grid: "", parts.last: request}
            return closed | hidden | {parts.said: wrong_html(one_line(str(error)))}
        first = page.request.page == 1
        return closed | {
            parts.said: said_html(page),
            parts.grid: cards_html(cards_of(page), label="Results, best first"),
            parts.leafing: gr.Row(visible=page.more or not first),
            parts.back: gr.Button(interactive=not first),
            parts.on: gr.Button(interactive=page.more),
            parts.last: page.request,
        }

    def _words(self, gallery: ServedGallery) -> list[tuple[str, str]]:
        return [(label, value) for value, label in self._searching.word_choices(gallery.name).items()]

    def _choices(
        self,
        gallery: ServedGallery,
        ranker: str = "",
        words_from: str = "",
        filters: Mapping[str, Sequence[str]] | None = None,
    ) -> Values:
        """What can be chosen in a gallery, with what a search has chosen of it."""
        parts = self._parts
        words = self._words(gallery)
        known = [value for _, value in words]
        chosen = words_from if words_from in known else next(iter(known), None)
        values: Values = {
            parts.ranker: gr.Radio(value=ranker or ANY_RANKER),
            parts.words: gr.Dropdown(choices=words, value=chosen, visible=len(words) > 1),
        }
        for name, part in parts.filters.items():
            choices = gallery.choices.get(name, [])
            picked = [value for value in (filters or {}).get(name, ()) if value in choices]
            values[part] = gr.Dropdown(choices=choices, value=picked, multiselect=True, visible=bool(choices))
        return values


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UserError("the query is no text; say what to look for in words")
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
