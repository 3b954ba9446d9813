"""The tab Explore: the images of a gallery, by filters, one by one, by class, by colour, on a map, and mistakes.

Everything is computed from the current choices (``View``); a session only keeps its page and its image. What takes long
(map and colours) is requested by an event of its own, so that paging never waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, wraps
from html import escape
from typing import Any, NamedTuple
from urllib.parse import urlencode

import gradio as gr
import numpy as np
from numpy.typing import NDArray

from app.logic.explore import (
    Explorer,
    Filter,
    Page,
    corrected,
    corrections_file,
    page_of,
    read_corrections,
    shuffled,
    step,
)
from app.state.context import AppContext, SingleFlightCache, shortened
from app.widgets.charts import (
    ClassColours,
    ImageMap,
    bars_html,
    checked_method,
    class_bars,
    colour_figure,
    lay_out,
    map_points,
    map_view,
    methods,
)
from app.widgets.page import Card, card_grid, cards_html, image_url, links_html, one_line, report_errors
from vitrail.errors import UserError

GRID, ONE, CLASSES, COLOURS, MAP, MISTAKES = "Grid", "One image", "Classes", "Colours", "Map", "Mistakes"
COMPARE = "Compare models"
VIEWS = (GRID, ONE, CLASSES, COLOURS, MAP, MISTAKES, COMPARE)
_PAGED = (GRID, MISTAKES, COMPARE)

_ALL = ""
"""Value of a choice that does not filter."""

_COLUMNS = 4
_SIDE = 1024
_LARGEST_SEED = 2**32 - 1
_EMPTY = "No image is left by the filters; remove one of them."

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Passes items on and shows progress, with a description."""

Changes = dict[Any, dict[str, Any]]
"""By component the properties that change."""

# Gradio passes its own to a handler that has one as a default.
_PROGRESS = gr.Progress()


class Explorers:
    """What is computed of each gallery, when it is first needed."""

    def __init__(self, context: AppContext) -> None:
        self._context = context
        count = len(context.galleries)
        self._explorers: SingleFlightCache[Explorer] = SingleFlightCache(count)
        self._colours: SingleFlightCache[ClassColours] = SingleFlightCache(count)
        self._peers: SingleFlightCache[list[str]] = SingleFlightCache(count)
        self._maps: SingleFlightCache[ImageMap] = SingleFlightCache(len(methods()) * count)

    def explorer(self, name: object) -> Explorer:
        """Return the metadata of a gallery; raise ``UserError`` where it is not served."""
        gallery = self._context.gallery(name)
        return self._explorers.get(gallery.name, lambda: Explorer(gallery))

    def peers(self, name: object) -> list[str]:
        """Return the galleries of other models that have images of this one, and predict a task that its model does."""
        explorer = self.explorer(name)

        def found() -> list[str]:
            others = (self.explorer(other) for other in self._context.galleries if other != explorer.name)
            tasks = set(explorer.predicted_tasks())
            return [one.name for one in others if tasks & set(one.predicted_tasks()) and explorer.shares_images(one)]

        return self._peers.get(explorer.name, found)

    def links(self, name: str, sample_id: str) -> str:
        """Return links to what else can be done with an image, as HTML."""
        return links_html(name, sample_id, self._context)

    def colours(self, name: object) -> ClassColours:
        """Return the colours of a gallery's classes."""
        gallery = self._context.gallery(name)
        return self._colours.get(gallery.name, lambda: ClassColours(gallery, self.explorer(name)))

    def image_map(self, name: object, method: object) -> ImageMap:
        """Return a gallery's map by a projection."""
        gallery, explorer, known = self._context.gallery(name), self.explorer(name), checked_method(method)
        return self._maps.get((gallery.name, known), lambda: lay_out(gallery.gallery, explorer.ids, known))


@dataclass(frozen=True)
class Choices:
    """What the user has chosen; every value is untrusted and checked before it is used.

    Attributes:
        gallery: its name.
        class_name: value of the main task, empty for all.
        split: empty for all.
        attributes: such as ``colour: blue``.
        view: one of ``VIEWS``.
        task: whose values are counted, drawn and evaluated.
        method: of the map.
        compared: classes whose colours are drawn; none for the most frequent ones.
        other: gallery whose model is compared; empty for the first that can be.
        shuffle: whether the order is random.
        seed: of the order.
    """

    gallery: Any
    class_name: Any = ""
    split: Any = ""
    attributes: Any = ()
    view: Any = GRID
    task: Any = ""
    method: Any = "PCA"
    compared: Any = ()
    other: Any = ""
    shuffle: Any = False
    seed: Any = 0


class Shown(NamedTuple):
    """A page of images or a single one as HTML, its place in words, the number of the page, and a note as HTML."""

    html: str
    place: str
    is_first: bool = True
    is_last: bool = True
    number: int = 1
    note: str = ""


class View:
    """What is shown for some choices, ``page_size`` images on a page; raises ``UserError`` for what does not exist."""

    def __init__(self, explorers: Explorers, choices: Choices, page_size: int) -> None:
        self._explorers, self._size = explorers, page_size
        self.explorer = explorers.explorer(choices.gallery)
        self.choices = choices
        if choices.view not in VIEWS:
            raise UserError(f"view: must be one of {', '.join(VIEWS)}; got {shortened(repr(choices.view))}")
        self.filter: Filter = self.explorer.filter(choices.split, choices.class_name, choices.attributes)
        self.rows = self.explorer.find(self.filter)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Rows in the order in which images are shown."""
        if not self.choices.shuffle:
            return self.rows
        seed = self.choices.seed
        if isinstance(seed, bool) or not isinstance(seed, (int, float)) or not 0 <= seed <= _LARGEST_SEED:
            raise UserError(
                f"seed: must be a whole number from 0 to {_LARGEST_SEED:,}; got {shortened(repr(seed), 40)}"
            )
        return shuffled(self.rows, int(seed))

    @property
    def task(self) -> str:
        """Chosen task, by default the main one."""
        task = self.choices.task or self.explorer.main
        if not isinstance(task, str) or task not in self.explorer.facets:
            known = ", ".join(self.explorer.facets)
            raise UserError(f"task: choose one of the list ({known}); got {shortened(repr(task))}")
        return task

    @property
    def values(self) -> tuple[str, ...]:
        """Values of the task; none where the gallery has no tasks."""
        return self.explorer.facets[self.task].values if self.explorer.main else ()

    def totals(self, number: int = 1, row: int | None = None) -> str:
        """Return how many images the filter leaves, with a link to what is shown.

        Args:
            number: of the page.
            row: of the image that is open.
        """
        query = [("tab", "explore"), ("gallery", self.explorer.name), ("view", str(self.choices.view))]
        query += [("task", self.task)] if self.explorer.main and self.task != self.explorer.main else []
        query += [("at-page", str(number))] if number > 1 and self.choices.view in _PAGED else []
        query += [("other", str(self.choices.other))] if self.choices.other and self.choices.view == COMPARE else []
        query += [("image", self.explorer.ids[row])] if row is not None and self.choices.view == ONE else []
        query += [("split", self.filter.split)] if self.filter.split else []
        for task, values in self.filter.values:
            query += [("class" if task == self.explorer.main else task, value) for value in values]
        link = f'<a class="address" href="?{escape(urlencode(query))}">Link to this view</a>'
        return f'<p role="status"><strong>{escape(self.explorer.totals(self.rows))}</strong> {link}</p>'

    def grid(self, number: int) -> Shown:
        """Return a page of images."""
        page = page_of(self.order, number, self._size)
        cards = [self._card(row) for row in page.rows.tolist()]
        html = cards_html(cards, _COLUMNS, label="Images of the gallery", empty=_EMPTY)
        return _shown(html, page, len(self.order))

    def page_with(self, row: int | None) -> int:
        """Return the number of the page with an image; 1 where it is on none."""
        found = np.flatnonzero(self.order == row) if row is not None else self.order[:0]
        return int(found[0]) // self._size + 1 if len(found) else 1

    def next_row(self, row: int | None, by: int) -> int | None:
        """Return the row of the image that many steps after another; None where there are no images."""
        return int(self.order[step(self.order, row, by)]) if len(self.order) else None

    def one(self, row: int | None) -> Shown:
        """Return a single image with all that is known of it, and its place in the order."""
        if row is None:
            return Shown(_missing(_EMPTY), "no images")
        links = self._explorers.links(self.explorer.name, self.explorer.ids[row])
        facts = self.explorer.facts(row)
        main = self.explorer.main
        description = f"{self.explorer.value_of(row, main)}: {facts['id']}" if main else facts["id"]
        lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
        address = image_url(self.explorer.name, facts["id"], _SIDE)
        html = (
            f'<figure class="focus"><img src="{escape(address)}" alt="{escape(description)}">'
            f"<figcaption><dl>{lines}</dl>{links}</figcaption></figure>"
        )
        found = np.flatnonzero(self.order == row)
        if not len(found):
            return Shown(html, "not among the filtered images", is_last=not len(self.order))
        place, count = int(found[0]), len(self.order)
        return Shown(html, f"{place + 1:,} of {count:,}", place == 0, place == count - 1)

    def classes(self) -> str:
        """Return a bar chart of how many images each class has."""
        if not self.explorer.main:
            return _missing("The gallery has neither labels nor predictions, so there are no classes to count.")
        is_labelled = self.explorer.facets[self.task].labelled
        origin = "the data's labels" if is_labelled else "predicted labels; the data have no labels"
        return _note(f"By {origin}.") + bars_html(self.explorer.counts(self.rows, self.task), self.task)

    def colours(self, progress: Progress) -> str:
        """Return densities of hue, saturation and value of some classes."""
        if not self.explorer.main:
            return _missing("The gallery has neither labels nor predictions, so there are no classes to compare.")
        colours, task = self._explorers.colours(self.explorer.name), self.task
        if not isinstance(self.choices.compared or (), (list, tuple)):
            raise UserError("classes to compare: must be a list of names; choose some of the list")
        names = list(self.choices.compared or ()) or colours.default_classes(self.filter, task)
        curves, missing = colours.densities(self.filter, task, names, lambda each: progress(each, "reading images"))
        lines = "".join(_missing(line) for line in missing)
        return (colour_figure(curves, task) if curves else "") + (lines or ("" if curves else _missing(_EMPTY)))

    def map(self, row: int | None) -> tuple[dict[str, object], str]:
        """Return the map's points, and a note about it."""
        placed = self._explorers.image_map(self.explorer.name, self.choices.method)
        task = self.task if self.explorer.main else ""
        note = f"{placed.text} by {self.choices.method} of the vectors from {self.explorer.made_by}."
        if self.choices.method != "PCA":
            note += " Distances between far clusters and the sizes of clusters mean nothing."
        note += " Images that the filters leave out are grey." if len(self.rows) < len(self.explorer) else ""
        return map_points(self.explorer, placed, self.rows, task, row), note

    def mistakes(self, number: int) -> Shown:
        """Return a page of mistakes, the most confident first."""
        if not self.explorer.evaluated_tasks():
            return Shown("", "no mistakes", note=_missing("There are no labels and predictions that can be compared."))
        task = self.task
        found = self.explorer.mistakes(self.rows, task)
        page = page_of(found.rows, number, self._size)
        cards = [self._mistake(row, task) for row in page.rows.tolist()]
        share = f" ({len(found.rows) / found.evaluated:.1%})" if found.evaluated else ""
        note = (
            f"{len(found.rows):,} of {found.evaluated:,} predictions of {task} are wrong{share}; the most confident "
            "first. Confidence is the network's own, before calibration."
        )
        if self.filter.split in ("", "train") and "train" in self.explorer.splits:
            note += " The model may have been trained on some of these images."
        html = cards_html(cards, _COLUMNS, label="Mistakes of the model", empty="There are no mistakes here.")
        return _shown(html, page, len(found.rows), _note(note, "status"))

    def compared(self, number: int) -> Shown:
        """Return a page of images for which two models predict different values."""
        peers = self._explorers.peers(self.explorer.name)
        if not peers:
            line = "No second model with predictions for these images is served; add one with --run."
            return Shown("", "no images", note=_missing(line))
        name = self.choices.other or peers[0]
        if name not in peers:
            raise UserError(f"compare with: choose one of {', '.join(peers)}; got {shortened(repr(name))}")
        other, task = self._explorers.explorer(name), self.task
        found = self.explorer.disagreements(self.rows, task, other)
        page = page_of(found.rows, number, self._size)
        cards = [self._disagreement(row, task, other) for row in page.rows.tolist()]
        note = f"{self.explorer.name} and {name} differ in {task} for {len(found.rows):,} of {found.compared:,} images."
        if found.labelled:
            one, two = (f"{right / found.labelled:.1%}" for right in found.right)
            note += f" Right on the labelled {found.labelled:,}: {one} and {two}."
        html = cards_html(cards, _COLUMNS, label="Images on which the models differ", empty="They differ on none.")
        return _shown(html, page, len(found.rows), _note(note, "status"))

    def narrowed(self, value: object) -> Choices:
        """Return the choices after a click on the bar of a class: its images."""
        task = self.task
        if not isinstance(value, str) or value not in self.explorer.facets[task].values:
            raise UserError(f"{task}: has no value {shortened(repr(value))}; choose one of the list")
        if task == self.explorer.main:
            return replace(self.choices, class_name=value, view=GRID)
        others = [other for other in self.choices.attributes or () if not other.startswith(f"{task}: ")]
        return replace(self.choices, attributes=[*others, f"{task}: {value}"], view=GRID)

    def _card(self, row: int) -> Card:
        explorer = self.explorer
        values = [explorer.value_of(row, task) for task in explorer.facets if task != explorer.main]
        lines = [" · ".join(values)] if values else []
        title = explorer.value_of(row, explorer.main) if explorer.main else explorer.ids[row]
        return Card(explorer.name, explorer.ids[row], title, [*lines, explorer.split_of(row)])

    def _disagreement(self, row: int, task: str, other: Explorer) -> Card:
        sample_id, lines, label = self.explorer.ids[row], [], ""
        for explorer in (self.explorer, other):
            label, predicted, confidence = explorer.prediction(sample_id, task)
            lines.append(f"{explorer.name}: {predicted} ({confidence:.2f}){' ✓' if predicted == label else ''}")
        return Card(
            self.explorer.name, sample_id, f"target: {label or 'not known'}", [*lines, self.explorer.split_of(row)]
        )

    def _mistake(self, row: int, task: str) -> Card:
        label, predicted, confidence = self.explorer.mistake(row, task)
        lines = [f"prediction: {predicted}", f"confidence {confidence:.2f}", self.explorer.split_of(row)]
        return Card(self.explorer.name, self.explorer.ids[row], f"target: {label}", lines)


def from_query(explorers: Explorers, query: Sequence[tuple[str, str]], first: str) -> Choices:
    """Read the choices in a link, such as ``?tab=explore&split=test&class=mug&colour=blue&colour=red``.

    Args:
        explorers: the galleries.
        query: parameters of the link, one may occur several times.
        first: name of the gallery where the link names none.

    Raises:
        UserError: the gallery does not have such a value.
    """
    single = dict(query)
    explorer = explorers.explorer(single.get("gallery", first))
    attributes = [f"{task}: {value}" for task, value in query if task in explorer.facets and task != explorer.main]
    class_name, split, view = single.get("class", ""), single.get("split", ""), single.get("view", GRID)
    choices = Choices(
        explorer.name,
        class_name,
        split,
        attributes,
        view,
        single.get("task", explorer.main),
        other=single.get("other", ""),
    )
    return View(explorers, choices, 1).choices


def _shown(html: str, page: Page, of: int, note: str = "") -> Shown:
    last = page.first + len(page.rows) - 1
    place = f"page {page.number:,} of {page.pages:,} · {page.first:,} to {last:,} of {of:,}" if of else "no images"
    return Shown(html, place, page.number == 1, page.number == page.pages, page.number, note)


def _note(line: str, role: str = "note") -> str:
    return f'<p class="explore-note" role="{role}">{escape(line)}</p>'


def _missing(line: str) -> str:
    return f'<p class="explore-missing" role="status">{escape(line)}</p>'


_STYLE = """
.focus { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; margin: 0; align-items: flex-start; }
.focus img { flex: 1 1 18rem; width: 100%; max-width: 34rem; max-height: 70vh; min-height: 12rem; margin: 0;
  object-fit: contain; border-radius: 10px; background: var(--background-fill-secondary); }
.focus figcaption { flex: 1 1 16rem; }
.focus dl { display: grid; grid-template-columns: auto 1fr; gap: .35rem 1rem; margin: 0; }
.focus dt { color: var(--body-text-color-subdued); }
p { margin: .2rem 0; }
a { text-decoration: underline; margin-left: .6rem; white-space: nowrap; }
.focus dd { margin: 0; overflow-wrap: anywhere; }
.explore-panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; }
.explore-panels figure { margin: 0; }
.explore-panels svg { display: block; width: 100%; height: 170px; }
.explore-panels figcaption { text-align: center; font-size: .9rem; }
.explore-strip { border-radius: 3px; }
.explore-legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; list-style: none; margin: .8rem 0 0; padding: 0; }
.explore-legend li { margin: 0; overflow-wrap: anywhere; }
.explore-dot { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 50%; }
.explore-note { color: var(--body-text-color-subdued); }
"""


def build(context: AppContext) -> None:
    """Lay out the tab and connect it."""
    if not context.galleries:
        gr.Markdown("No gallery is served; start with `--gallery FOLDER`, or with `--run RUN` to have one made.")
        return
    _Tab(context)


def _html(name: str, **options: Any) -> gr.HTML:
    return gr.HTML(
        "", css_template=_STYLE, js_on_load=None, elem_id=f"explore-{name}", apply_default_css=False, **options
    )


def _all_and(values: Sequence[str], what: str) -> list[tuple[str, str]]:
    return [(f"all {what}", _ALL), *((value, value) for value in values)]


class _Tab:
    """Components and handlers.

    Attributes:
        chosen: components by field of ``Choices``.
        page: number of the page, from 1.
        current: name of the image that is open.
        wanted: changes when a figure that takes long is requested.
    """

    def __init__(self, context: AppContext) -> None:
        self._first = next(iter(context.galleries))
        self._explorers = Explorers(context)
        self._size = context.limits.page
        self._lay_out(list(context.galleries), self._explorers.explorer(self._first))
        self._listen()

    def _lay_out(self, galleries: list[str], explorer: Explorer) -> None:
        chosen = self._filters(galleries, explorer)
        self.totals = _html("totals")
        chosen["view"] = gr.Radio(list(VIEWS), value=GRID, label="Show", elem_id="explore-view")
        task = explorer.main or None
        chosen["task"] = gr.Radio(list(explorer.facets), value=task, label="By", visible=False, elem_id="explore-task")
        chosen["method"] = gr.Radio(methods(), value=methods()[0], label="Projection", visible=False)
        chosen["compared"] = gr.Dropdown(
            list(explorer.classes), value=[], multiselect=True, visible=False, elem_id="explore-compared",
            label="Values to compare (none: the most frequent ones)",
        )  # fmt: skip
        peers = self._explorers.peers(self._first)
        chosen["other"] = gr.Dropdown(
            peers, value=next(iter(peers), None), label="Compare with", visible=False, elem_id="explore-other"
        )
        narrow: dict[str, Any] = {"scale": 0, "min_width": 120}
        with gr.Row(visible=False, elem_id="explore-pagination") as self.pagination:
            button: dict[str, Any] = {"size": "sm", **narrow}
            self.back = gr.Button("← Previous", elem_id="explore-previous", elem_classes=["key-previous"], **button)
            self.forward = gr.Button("Next →", elem_id="explore-next", elem_classes=["key-next"], **button)
            chosen["shuffle"] = gr.Checkbox(False, label="Shuffle", elem_id="explore-shuffle", **narrow)
            chosen["seed"] = gr.Number(
                0, label="Seed", precision=0, minimum=0, visible=False, elem_id="explore-seed", **narrow
            )
        self.place, self.note = _html("place"), _html("note")
        self.grid = card_grid(elem_id="explore-grid")
        self.focus, self.colours = _html("focus", visible=False), _html("colours", visible=False)
        self._lay_out_labelling(explorer)
        self.bars, self.map = class_bars(), map_view()
        self.page, self.current, self.wanted = gr.State(1), gr.State(None), gr.State(None)
        self.chosen: dict[str, Any] = {field.name: chosen[field.name] for field in fields(Choices)}
        self._inputs = [self.page, self.current, *self.chosen.values()]
        self._outputs = [
            self.totals, self.pagination, self.back, self.forward, self.place, self.note, self.grid, self.focus,
            self.bars, self.colours, self.map, self.labelling, self.right, self.page, self.current, self.wanted,
            *self.chosen.values(),
        ]  # fmt: skip

    def _lay_out_labelling(self, explorer: Explorer) -> None:
        """What corrects the class of the open image; corrections stay in the browser until they are downloaded."""
        self.kept = gr.BrowserState({}, storage_key="vitrail-corrections", secret="vitrail")
        with gr.Row(visible=False, equal_height=True, elem_id="explore-labelling") as self.labelling:
            self.right = gr.Dropdown(
                list(explorer.classes), label="Right label", min_width=200, scale=0, elem_id="explore-right"
            )
            self.save = gr.Button("Save label", size="sm", scale=0, min_width=120, elem_id="explore-save")
        self.download = gr.DownloadButton(
            "Download corrections", visible=False, size="sm", elem_id="explore-corrections"
        )

    def _filters(self, galleries: list[str], explorer: Explorer) -> dict[str, Any]:
        def dropdown(name: str, choices: list[Any], value: Any, width: int = 150, **options: Any) -> gr.Dropdown:
            return gr.Dropdown(
                choices, value=value, label=name, min_width=width, elem_id=f"explore-{name.lower()}", **options
            )

        options = explorer.attribute_options
        with gr.Row():
            return {
                "gallery": dropdown("Gallery", galleries, galleries[0]),
                "class_name": dropdown("Class", _all_and(explorer.classes, "classes"), _ALL),
                "split": dropdown("Split", _all_and(explorer.splits, "splits"), _ALL),
                "attributes": dropdown("Attributes", options, [], 200, multiselect=True, visible=bool(options)),
            }

    def _listen(self) -> None:
        chosen = self.chosen
        self._on(None, self.open_link, [])
        # The last of several choices counts; by default, those that come while one is being answered would be dropped.
        last = {"trigger_mode": "always_last"}
        self._on(chosen["gallery"].input, self.change_gallery, [chosen["gallery"]], **last)
        filters = ("class_name", "split", "attributes", "method", "compared", "other", "shuffle")
        changed = [chosen[name].input for name in filters] + [chosen["seed"].submit, chosen["seed"].blur]
        self._on(changed, self.change_filter, self._inputs, **last)
        self._on(chosen["task"].input, self.change_task, self._inputs, **last)
        self._on(chosen["view"].input, self.change_view, self._inputs, **last)
        # Each press counts: those that come while one is being answered wait, and go on from where it ends.
        self._on(self.back.click, self.go_back, self._inputs, trigger_mode="multiple")
        self._on(self.forward.click, self.go_forward, self._inputs, trigger_mode="multiple")
        self._on([self.grid.select, self.map.select], self.open_image, self._inputs)
        self._on(self.bars.select, self.open_class, self._inputs)
        saved = [self.kept, self.download]
        self.save.click(report_errors(self.correct), [self.kept, self.current, self.right, chosen["gallery"]], saved)
        gr.on([self.kept.change, chosen["gallery"].change], self.offer, [self.kept, chosen["gallery"]], self.download)
        figures = [self.colours, self.map, self.note]
        self.wanted.change(report_errors(self.draw), [self.current, *chosen.values()], figures)

    def open_link(self, request: gr.Request) -> Changes:
        """Show what a link asks for; a wrong one is reported, and everything is shown."""
        query = request.query_params.multi_items()
        try:
            asked = dict(query) if dict(query).get("tab") == "explore" else {}
            choices = from_query(self._explorers, query if asked else [], self._first)
            view, page = self._view(choices), asked.get("at-page", "1")
            number = int(page) if page.isascii() and page.isdecimal() and len(page) < 9 else 1
            row = view.explorer.row_of(asked["image"]) if "image" in asked else None
        except UserError as error:
            gr.Warning(escape(one_line(str(error))))
            choices, number, row = from_query(self._explorers, [], self._first), 1, None
            view = self._view(choices)
        return _merged(self._offered(choices), self._changes(view, number, row))

    def change_gallery(self, name: object) -> Changes:
        """Show another gallery, without any filter."""
        choices = Choices(name, task=self._explorers.explorer(name).main)
        return _merged(self._offered(choices), self._changes(self._view(choices), 1, None))

    def change_filter(self, _page: object, _current: object, *chosen: object) -> Changes:
        """Show the first page or image of other values."""
        return self._changes(self._view(Choices(*chosen)), 1, None)

    def change_task(self, _page: object, _current: object, *chosen: object) -> Changes:
        """Show another task, and offer its values for comparison."""
        view = self._view(replace(Choices(*chosen), compared=[]))
        compared = {"choices": list(view.values), "value": []}
        return _merged({self.chosen["compared"]: compared}, self._changes(view, 1, None))

    def change_view(self, _page: object, current: object, *chosen: object) -> Changes:
        """Show another view of the same images; the one that was open stays visible."""
        view = self._view(Choices(*chosen))
        row = _row(view, current)
        return self._changes(view, view.page_with(row) if view.choices.view == GRID else 1, row)

    def go_back(self, page: int, current: object, *chosen: object) -> Changes:
        """Show the previous page or image."""
        return self._turn(-1, page, current, chosen)

    def go_forward(self, page: int, current: object, *chosen: object) -> Changes:
        """Show the next page or image."""
        return self._turn(1, page, current, chosen)

    def open_image(self, event: gr.SelectData, page: int, _current: object, *chosen: object) -> Changes:
        """Show a single image, chosen in a grid or on the map."""
        view = self._view(replace(Choices(*chosen), view=ONE))
        return _merged(
            {self.chosen["view"]: {"value": ONE}}, self._changes(view, page, view.explorer.row_of(event.value))
        )

    def open_class(self, event: gr.SelectData, _page: object, _current: object, *chosen: object) -> Changes:
        """Show the images of a class, chosen among the bars."""
        narrowed = self._view(Choices(*chosen)).narrowed(event.value)
        changed: Changes = {
            self.chosen[name]: {"value": getattr(narrowed, name)} for name in ("class_name", "attributes", "view")
        }
        return _merged(changed, self._changes(self._view(narrowed), 1, None))

    def correct(self, kept: object, current: object, value: object, gallery: object) -> tuple[object, Any]:
        """Keep another label for the open image."""
        corrections = corrected(kept, self._explorers.explorer(gallery), current, value)
        return corrections, self.offer(corrections, gallery)

    def offer(self, kept: object, gallery: object) -> Any:
        """Offer the corrections of a gallery as a file."""
        explorer = self._explorers.explorer(gallery)
        own = read_corrections(kept, explorer)
        if not own:
            return gr.update(visible=False)
        label = f"Download {len(own):,} correction{'s' if len(own) > 1 else ''} (CSV)"
        return gr.update(value=str(corrections_file(own, explorer)), label=label, visible=True)

    def draw(self, progress: gr.Progress = _PROGRESS, current: object = None, *chosen: object) -> dict[Any, Any]:
        """Draw the figures that take long."""
        view = self._view(Choices(*chosen))
        if view.choices.view == COLOURS:
            return {self.colours: view.colours(lambda items, what: progress.tqdm(list(items), desc=what))}
        if view.choices.view == MAP:
            progress(0, desc="laying out the images, once for all")
            points, note = view.map(_row(view, current))
            return {self.map: points, self.note: _note(note)}
        return {self.note: gr.skip()}

    def _view(self, choices: Choices) -> View:
        return View(self._explorers, choices, self._size)

    def _turn(self, by: int, page: int, current: object, chosen: Sequence[object]) -> Changes:
        view = self._view(Choices(*chosen))
        row = _row(view, current)
        if view.choices.view == ONE:
            return self._changes(view, page, view.next_row(row, by))
        return self._changes(view, page + by, row)

    def _on(self, triggers: Any, handler: Callable[..., Changes], inputs: Sequence[Any], **options: Any) -> None:
        @wraps(handler)
        def updates(*args: Any, **kwargs: Any) -> dict[Any, Any]:
            # The value of a state is not a property.
            return {
                part: changed["value"] if isinstance(part, gr.State) else gr.update(**changed)
                for part, changed in handler(*args, **kwargs).items()
            }

        # One after another: each goes on from the page and image that the one before it left.
        in_turn = {"concurrency_limit": 1, "concurrency_id": "explore", "show_progress": "hidden"}
        gr.on(triggers, report_errors(updates), list(inputs), self._outputs, **in_turn, **options)

    def _offered(self, choices: Choices) -> Changes:
        """What can be chosen of a gallery, and what is."""
        explorer, parts = self._explorers.explorer(choices.gallery), self.chosen
        options, peers = explorer.attribute_options, self._explorers.peers(choices.gallery)
        classes, splits = _all_and(explorer.classes, "classes"), _all_and(explorer.splits, "splits")
        return {
            parts["gallery"]: {"value": choices.gallery},
            parts["view"]: {"value": choices.view},
            parts["class_name"]: {"choices": classes, "value": choices.class_name or _ALL},
            parts["split"]: {"choices": splits, "value": choices.split or _ALL},
            parts["attributes"]: {"choices": options, "value": list(choices.attributes), "visible": bool(options)},
            parts["task"]: {"choices": list(explorer.facets), "value": choices.task or explorer.main or None},
            parts["other"]: {"choices": peers, "value": choices.other or next(iter(peers), None)},
            parts["compared"]: {"choices": list(explorer.classes), "value": []},
        }

    def _changes(self, view: View, number: int, row: int | None) -> Changes:
        """What a view shows; figures that take long are only requested."""
        kind = view.choices.view
        if kind == ONE and row is None:
            row = view.next_row(None, 0)
        visible = {
            self.pagination: kind in (*_PAGED, ONE),
            self.place: kind in (*_PAGED, ONE),
            self.grid: kind in _PAGED,
            self.focus: kind == ONE,
            self.bars: kind == CLASSES,
            self.colours: kind == COLOURS,
            self.map: kind == MAP,
            self.labelling: kind == ONE and row is not None and view.explorer.has_single_classes,
            self.note: kind in (MAP, MISTAKES, COMPARE),
            self.chosen["task"]: kind in (CLASSES, COLOURS, MAP, MISTAKES, COMPARE) and bool(view.explorer.main),
            self.chosen["method"]: kind == MAP,
            self.chosen["compared"]: kind == COLOURS,
            self.chosen["other"]: kind == COMPARE and len(self._explorers.peers(view.explorer.name)) > 1,
            self.chosen["shuffle"]: kind in (GRID, ONE),
            self.chosen["seed"]: kind in (GRID, ONE) and bool(view.choices.shuffle),
        }
        changes: Changes = {part: {"visible": is_visible} for part, is_visible in visible.items()}
        changes[self.totals] = {"value": view.totals(number, row)}
        changes[self.current] = {"value": None if row is None else view.explorer.ids[row]}
        changes[self.page] = {"value": number}
        return _merged(changes, self._content(view, number, row))

    def _content(self, view: View, number: int, row: int | None) -> Changes:
        kind = view.choices.view
        if kind == CLASSES:
            return {self.bars: {"value": view.classes()}}
        if kind in (COLOURS, MAP):
            # Names what is requested, so that the same figure is not requested twice.
            return {self.wanted: {"value": repr((view.choices, row))}}
        paged = {GRID: view.grid, MISTAKES: view.mistakes, COMPARE: view.compared}
        shown = view.one(row) if kind == ONE else paged[kind](number)
        changes: Changes = {
            self.place: {"value": f'<p role="status">{escape(shown.place)}</p>'},
            self.back: {"interactive": not shown.is_first},
            self.forward: {"interactive": not shown.is_last},
        }
        if kind == ONE:
            explorer = view.explorer
            label = explorer.value_of(row, explorer.main) if row is not None and explorer.main else None
            right = {"choices": list(explorer.classes), "value": label if label in explorer.classes else None}
            return {**changes, self.focus: {"value": shown.html}, self.page: {"value": number}, self.right: right}
        content = {self.grid: shown.html, self.note: shown.note, self.page: shown.number}
        return {**changes, **{part: {"value": value} for part, value in content.items()}}


def _row(view: View, current: object) -> int | None:
    """Row of the image that is open, if one is."""
    return None if current is None else view.explorer.row_of(current)


def _merged(one: Changes, other: Changes) -> Changes:
    """Both; of a property in both, the other's."""
    return {part: one.get(part, {}) | other.get(part, {}) for part in one | other}
