"""The tab Explore: what is in a gallery, by filters, one by one, by class, by colour, on a map, and what went wrong.

Whatever is shown is computed anew from the chosen values, see ``explore_views``; a session only keeps its page and its
image. What takes long (map and colours) is asked for by an event of its own, so that leafing never waits for it.

The components of the tab Explore, without what they do.

What the browser of a gallery shows for what was chosen; from plain values to HTML, without events.

What was computed of the galleries for the dataset browser, kept for all who look at them.
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

from app.logic.explore import Explorer, Filter, Page, page_of, shuffled, step
from app.state.context import AppContext, Once
from app.widgets.cards import Card, card_grid, cards_html, image_url
from app.widgets.charts import ClassColours, bars_html, class_bars, colour_figure
from app.widgets.embedding_map import ImageMap, checked_method, image_map, lay_out, map_points, methods
from app.widgets.page import one_line, told
from vitrail.errors import UserError


class Explored:
    """Each part is computed when it is first asked for.

    Args:
        context: what is served.
    """

    def __init__(self, context: AppContext) -> None:
        self._context = context
        self._explorers: Once[Explorer] = Once(len(context.galleries))
        self._colours: Once[ClassColours] = Once(len(context.galleries))
        self._maps: Once[ImageMap] = Once(len(methods()) * len(context.galleries))

    def explorer(self, name: object) -> Explorer:
        """Of a gallery.

        Raises:
            UserError: for a name that is not served.
        """
        gallery = self._context.gallery(name)
        return self._explorers.get(gallery.name, lambda: Explorer(gallery))

    def colours(self, name: object) -> ClassColours:
        """Of a gallery."""
        gallery = self._context.gallery(name)
        return self._colours.get(gallery.name, lambda: ClassColours(gallery, self.explorer(name)))

    def image_map(self, name: object, method: object) -> ImageMap:
        """Of a gallery.

        Raises:
            UserError: for a method that there is none of.
        """
        gallery, explorer = self._context.gallery(name), self.explorer(name)
        known = checked_method(method)
        return self._maps.get((gallery.name, known), lambda: lay_out(gallery.gallery, explorer.ids, known))


GRID, ONE, CLASSES, COLOURS, MAP, MISTAKES = "Grid", "One image", "Classes", "Colours", "Map", "Mistakes"
VIEWS = (GRID, ONE, CLASSES, COLOURS, MAP, MISTAKES)

COLUMNS = 4
_SIDE = 1024
_LARGEST_SEED = 2**32 - 1
_EMPTY = "No image is left by the filters; take one away."

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Hands things on and shows how far it is; gets what is being done as well."""


@dataclass(frozen=True)
class Asked:
    """What somebody wants to see; every value may come from outside and is checked before it is used.

    Attributes:
        gallery: its name.
        class_name: value of the main task, empty for all.
        split: empty for all.
        attributes: such as ``colour: blue``.
        view: one of ``VIEWS``.
        task: whose values are counted, drawn and judged.
        method: of the map.
        compared: classes whose colours are drawn; none for the most frequent ones.
        shuffle: whether the order is drawn.
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
    shuffle: Any = False
    seed: Any = 0


class Leaf(NamedTuple):
    """A page of images, or a single one.

    Attributes:
        shown: HTML.
        place: which one it is, in words.
        is_first: whether there is none before it.
        is_last: whether there is none after it.
        number: of the page, from 1.
        said: HTML above it.
    """

    shown: str
    place: str
    is_first: bool = True
    is_last: bool = True
    number: int = 1
    said: str = ""


class View:
    """The answer to what was asked.

    Args:
        explored: what is kept of the galleries.
        asked: what was asked for.
        page: images on a page.

    Raises:
        UserError: for names and values that are not there.
    """

    def __init__(self, explored: Explored, asked: Asked, page: int) -> None:
        self._explored, self._size = explored, page
        self.explorer = explored.explorer(asked.gallery)
        self.asked = asked
        if asked.view not in VIEWS:
            raise UserError(f"view {str(asked.view)[:80]!r}: there is none; choose one of: {', '.join(VIEWS)}")
        self.chosen: Filter = self.explorer.filter(asked.split, asked.class_name, asked.attributes)
        self.rows = self.explorer.find(self.chosen)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Rows in the order in which images are leafed through."""
        return shuffled(self.rows, self._seed() if self.asked.shuffle else None)

    @property
    def task(self) -> str:
        """Task that was asked for, else the main one."""
        task = self.asked.task or self.explorer.main
        if not isinstance(task, str) or task not in self.explorer.facets:
            raise UserError(
                f"gallery {self.explorer.name!r}: there is no task {str(task)[:80]!r}; choose one of the list"
            )
        return str(task)

    @property
    def values(self) -> tuple[str, ...]:
        """Values of the task; none where the gallery has no tasks."""
        return self.explorer.facets[self.task].values if self.explorer.main else ()

    def totals(self) -> str:
        """How many images the filter leaves, with a link to what is shown."""
        query = [("tab", "explore"), ("gallery", self.explorer.name), ("view", str(self.asked.view))]
        query += [("split", self.chosen.split)] if self.chosen.split else []
        for task, values in self.chosen.values:
            query += [("class" if task == self.explorer.main else task, value) for value in values]
        link = f'<a href="?{escape(urlencode(query))}">Link to this view</a>'
        return f'<p role="status"><strong>{escape(self.explorer.totals(self.rows))}</strong> {link}</p>'

    def grid(self, number: int) -> Leaf:
        """A page of images."""
        page = page_of(self.order, number, self._size)
        cards = [self._card(row) for row in page.rows.tolist()]
        shown = cards_html(cards, COLUMNS, label="Images of the gallery", empty=_EMPTY)
        return _leaf(shown, page, len(self.order))

    def page_with(self, row: int | None) -> int:
        """Number of the page on which an image is; 1 where it is on none."""
        found = np.flatnonzero(self.order == row) if row is not None else self.order[:0]
        return int(found[0]) // self._size + 1 if len(found) else 1

    def turned(self, row: int | None, by: int) -> int | None:
        """The next image's row; None where there are no images."""
        return int(self.order[step(self.order, row, by)]) if len(self.order) else None

    def one(self, row: int | None) -> Leaf:
        """A single image with all that is known of it, and its place in the order; None where there is no image."""
        if row is None:
            return Leaf(_missing(_EMPTY), "no images")
        facts = self.explorer.facts(row)
        main = self.explorer.main
        described = f"{self.explorer.value_of(row, main)}: {facts['id']}" if main else facts["id"]
        said = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
        address = image_url(self.explorer.name, facts["id"], _SIDE)
        shown = (
            f'<figure class="focus"><img src="{escape(address)}" alt="{escape(described)}">'
            f"<figcaption><dl>{said}</dl></figcaption></figure>"
        )
        found = np.flatnonzero(self.order == row)
        if not len(found):
            return Leaf(shown, "not among the filtered images", is_last=not len(self.order))
        place, count = int(found[0]), len(self.order)
        return Leaf(shown, f"{place + 1:,} of {count:,}", place == 0, place == count - 1)

    def classes(self) -> str:
        """How many images each class has."""
        if not self.explorer.main:
            return _missing("The gallery has neither labels nor predictions, so there are no classes to count.")
        return _origin(self.explorer, self.task) + bars_html(self.explorer.counts(self.rows, self.task), self.task)

    def colours(self, progress: Progress) -> str:
        """Densities of hue, saturation and value of some classes."""
        if not self.explorer.main:
            return _missing("The gallery has neither labels nor predictions, so there are no classes to compare.")
        colours, task = self._explored.colours(self.explorer.name), self.task
        if not isinstance(self.asked.compared or (), (list, tuple)):
            raise UserError("classes to compare: are a list of names; choose some of the list")
        names = list(self.asked.compared or ()) or colours.default_classes(self.chosen, task)
        curves, missing = colours.densities(self.chosen, task, names, lambda each: progress(each, "reading images"))
        said = "".join(_missing(line) for line in missing)
        return (colour_figure(curves, task) if curves else "") + (said or ("" if curves else _missing(_EMPTY)))

    def map(self, row: int | None) -> tuple[dict[str, object], str]:
        """The map's points, and what is to be known of it."""
        placed = self._explored.image_map(self.explorer.name, self.asked.method)
        task = self.task if self.explorer.main else ""
        told = f"{placed.told} by {self.asked.method} of the vectors that {self.explorer.made_by} gives them."
        if self.asked.method != "PCA":
            told += " Distances between far clusters and the sizes of clusters mean nothing."
        told += " Images that the filters leave out are grey." if len(self.rows) < len(self.explorer) else ""
        return map_points(self.explorer, placed, self.rows, task, row), told

    def mistakes(self, number: int) -> Leaf:
        """A page of mistakes, the most confident first."""
        if not self.explorer.judged_tasks():
            return Leaf("", "no mistakes", said=_missing("There are not both labels and predictions to be compared."))
        task = self.task
        found = self.explorer.mistakes(self.rows, task)
        page = page_of(found.rows, number, self._size)
        cards = [self._mistake(row, task) for row in page.rows.tolist()]
        share = f" ({len(found.rows) / found.judged:.1%})" if found.judged else ""
        said = (
            f"{len(found.rows):,} of {found.judged:,} answers on {task} are wrong{share}; the most confident first. "
            "Confidence is the network's own, before calibration."
        )
        if self.chosen.split in ("", "train") and "train" in self.explorer.splits:
            said += " Images that the model may have learned from are among them."
        shown = cards_html(cards, COLUMNS, label="Mistakes of the model", empty="There are no mistakes here.")
        return _leaf(shown, page, len(found.rows), f'<p class="explore-note" role="status">{escape(said)}</p>')

    def narrowed(self, value: object) -> Asked:
        """What is asked for next when a class is chosen among the bars: its images.

        Raises:
            UserError: for a value that the task does not have.
        """
        task = self.task
        if not isinstance(value, str) or value not in self.explorer.facets[task].values:
            raise UserError(f"{task}: has no value {str(value)[:80]!r}; choose one of the list")
        if task == self.explorer.main:
            return replace(self.asked, class_name=value, view=GRID)
        others = [other for other in self.asked.attributes or () if not other.startswith(f"{task}: ")]
        return replace(self.asked, attributes=[*others, f"{task}: {value}"], view=GRID)

    def _seed(self) -> int:
        seed = self.asked.seed
        if isinstance(seed, bool) or not isinstance(seed, (int, float)) or not 0 <= seed <= _LARGEST_SEED:
            raise UserError(f"seed: {str(seed)[:40]!r} is none; take a whole number from 0 to {_LARGEST_SEED:,}")
        return int(seed)

    def _card(self, row: int) -> Card:
        explorer = self.explorer
        values = [explorer.value_of(row, task) for task in explorer.facets if task != explorer.main]
        lines = [" · ".join(values)] if values else []
        title = explorer.value_of(row, explorer.main) if explorer.main else explorer.id_of(row)
        return Card(explorer.name, explorer.id_of(row), title, [*lines, explorer.split_of(row)])

    def _mistake(self, row: int, task: str) -> Card:
        label, answer, confidence = self.explorer.mistake(row, task)
        lines = [f"prediction: {answer}", f"confidence {confidence:.2f}", self.explorer.split_of(row)]
        return Card(self.explorer.name, self.explorer.id_of(row), f"target: {label}", lines)


def from_query(explored: Explored, query: Sequence[tuple[str, str]], first: str) -> Asked:
    """What an address asks for, such as ``?tab=explore&split=test&class=mug&colour=blue&colour=red``.

    Args:
        explored: the galleries.
        query: parameters of the address, one may come several times.
        first: name of the gallery where the address names none.

    Raises:
        UserError: for a value that the gallery does not have.
    """
    single = dict(query)
    name, view = single.get("gallery", first), single.get("view", GRID)
    explorer = explored.explorer(name)
    if view not in VIEWS:
        raise UserError(f"view {view[:80]!r}: there is none; choose one of: {', '.join(VIEWS)}")
    attributes = [f"{task}: {value}" for task, value in query if task in explorer.facets and task != explorer.main]
    asked = Asked(name, single.get("class", ""), single.get("split", ""), attributes, view, explorer.main)
    explorer.filter(asked.split, asked.class_name, attributes)
    return asked


def _leaf(shown: str, page: Page, of: int, said: str = "") -> Leaf:
    last = page.first + len(page.rows) - 1
    place = f"page {page.number:,} of {page.pages:,} · {page.first:,} to {last:,} of {of:,}" if of else "no images"
    return Leaf(shown, place, page.number == 1, page.number == page.pages, page.number, said)


def _origin(explorer: Explorer, task: str) -> str:
    what = "the data's labels" if explorer.facets[task].labelled else "what the model predicts; the data have no labels"
    return f'<p class="explore-note">By {escape(what)}.</p>'


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

_NARROW: dict[str, Any] = {"scale": 0, "min_width": 120}

ALL = ""
"""Value of a choice that leaves everything."""


@dataclass(frozen=True)
class Parts:
    """Components of the tab.

    Attributes:
        asked: those in which something is chosen, by field of ``Asked``.
        totals: how many images the filters leave.
        leafing: the row of the two buttons that follow, and of the choice of an order.
        back: previous.
        on: next.
        place: which page or image this is.
        said: sentences above what is shown.
        grid: images, also mistakes.
        focus: a single image.
        bars: classes.
        colours: densities.
        points: the map.
        page: number of the page, from 1.
        current: name of the image that is open.
        wanted: changes when a figure that takes long is asked for.
    """

    asked: dict[str, Any]
    totals: gr.HTML
    leafing: gr.Row
    back: gr.Button
    on: gr.Button
    place: gr.HTML
    said: gr.HTML
    grid: gr.HTML
    focus: gr.HTML
    bars: gr.HTML
    colours: gr.HTML
    points: gr.HTML
    page: gr.State
    current: gr.State
    wanted: gr.State

    @property
    def inputs(self) -> list[Any]:
        """What handlers get: page, image, and the fields of ``Asked`` in their order."""
        return [self.page, self.current, *self.asked.values()]

    @property
    def outputs(self) -> list[Any]:
        """What handlers may change."""
        own = [getattr(self, field.name) for field in fields(self) if field.name != "asked"]
        return [*own, *self.asked.values()]


def lay_out_tab(galleries: Sequence[str], explorer: Explorer) -> Parts:
    """Makes the components where the caller stands.

    Args:
        galleries: names of all.
        explorer: of the first.
    """
    asked = _filters(galleries, explorer)
    totals = _html("explore-totals")
    asked["view"] = gr.Radio(list(VIEWS), value=GRID, label="Show", elem_id="explore-view")
    task = explorer.main or None
    asked["task"] = gr.Radio(list(explorer.facets), value=task, label="By", visible=False, elem_id="explore-task")
    asked["method"] = gr.Radio(methods(), value=methods()[0], label="Projection", visible=False)
    asked["compared"] = gr.Dropdown(
        list(explorer.classes), value=[], multiselect=True, visible=False, elem_id="explore-compared",
        label="Values to compare (none: the most frequent ones)",
    )  # fmt: skip
    with gr.Row(visible=False, elem_id="explore-leafing") as leafing:
        back = gr.Button("← Previous", elem_id="explore-previous", elem_classes=["key-previous"], size="sm", **_NARROW)
        on = gr.Button("Next →", elem_id="explore-next", elem_classes=["key-next"], size="sm", **_NARROW)
        asked["shuffle"] = gr.Checkbox(False, label="Shuffle", elem_id="explore-shuffle", **_NARROW)
        asked["seed"] = gr.Number(
            0, label="Seed", precision=0, minimum=0, visible=False, elem_id="explore-seed", **_NARROW
        )
    place, said = _html("explore-place"), _html("explore-said")
    grid = card_grid(elem_id="explore-grid")
    focus, colours = _html("explore-focus", visible=False), _html("explore-colours", visible=False)
    order = {name: asked[name] for name in (field.name for field in fields(Asked))}
    return Parts(
        order, totals, leafing, back, on, place, said, grid, focus, class_bars(), colours, image_map(),
        gr.State(1), gr.State(None), gr.State(None),
    )  # fmt: skip


def with_all(values: Sequence[str], what: str) -> list[tuple[str, str]]:
    """Choices of a list whose first leaves everything."""
    return [(f"all {what}", ALL), *((value, value) for value in values)]


def _filters(galleries: Sequence[str], explorer: Explorer) -> dict[str, Any]:
    with gr.Row():
        return {
            "gallery": gr.Dropdown(
                list(galleries), value=galleries[0], label="Gallery", min_width=150, elem_id="explore-gallery"
            ),
            "class_name": gr.Dropdown(
                with_all(explorer.classes, "classes"), value=ALL, label="Class", min_width=150, elem_id="explore-class"
            ),
            "split": gr.Dropdown(
                with_all(explorer.splits, "splits"), value=ALL, label="Split", min_width=150, elem_id="explore-split"
            ),
            "attributes": gr.Dropdown(
                explorer.attribute_options, value=[], multiselect=True, label="Attributes", min_width=200,
                visible=bool(explorer.attribute_options), elem_id="explore-attributes",
            ),
        }  # fmt: skip


def _html(name: str, **options: Any) -> gr.HTML:
    return gr.HTML("", css_template=_STYLE, js_on_load=None, elem_id=name, apply_default_css=False, **options)


Changes = dict[Any, dict[str, Any]]
"""By component the properties that change."""

# Gradio hands it to a handler that has one as a default.
_PROGRESS = gr.Progress()

_ANEW = ("class_name", "split", "attributes", "method", "compared", "shuffle")


def build(context: AppContext) -> None:
    """Puts the tab's components where the caller stands."""
    if not context.galleries:
        gr.Markdown("No gallery is served; start with `--gallery FOLDER`, or with `--run RUN` to have one made.")
        return
    _Tab(context).listen()


class _Tab:
    """The handlers."""

    def __init__(self, context: AppContext) -> None:
        self._first = next(iter(context.galleries))
        self._explored = Explored(context)
        self._size = context.limits.page
        self._parts: Parts = lay_out_tab(list(context.galleries), self._explored.explorer(self._first))

    def listen(self) -> None:
        """Lets the components answer to what people do."""
        parts, asked = self._parts, self._parts.asked
        self._on(None, self.arrived, [])
        # Of what is chosen while an answer is on its way the last counts; by default it would be dropped.
        last = {"trigger_mode": "always_last"}
        self._on(asked["gallery"].input, self.other_gallery, [asked["gallery"]], **last)
        changed = [asked[name].input for name in _ANEW] + [asked["seed"].submit, asked["seed"].blur]
        self._on(changed, self.other_filter, parts.inputs, **last)
        self._on(asked["task"].input, self.other_task, parts.inputs, **last)
        self._on(asked["view"].input, self.other_view, parts.inputs, **last)
        # Each press counts: those that come while one is being answered wait, and go on from where it ends.
        self._on(parts.back.click, self.back, parts.inputs, trigger_mode="multiple")
        self._on(parts.on.click, self.on, parts.inputs, trigger_mode="multiple")
        self._on([parts.grid.select, parts.points.select], self.opened_image, parts.inputs)
        self._on(parts.bars.select, self.opened_class, parts.inputs)
        parts.wanted.change(
            told(self.drawn), [parts.current, *asked.values()], [parts.colours, parts.points, parts.said]
        )  # fmt: skip

    def arrived(self, request: gr.Request) -> Changes:
        """What the address asks for; where that cannot be had it is said, and everything is shown."""
        query = request.query_params.multi_items()
        try:
            asked = from_query(self._explored, query if dict(query).get("tab") == "explore" else [], self._first)
        except UserError as error:
            gr.Warning(escape(one_line(str(error))))
            asked = from_query(self._explored, [], self._first)
        return _merged(self._choices(asked), self._shown(self._view(asked), 1, None))

    def other_gallery(self, name: object) -> Changes:
        """Another gallery, without any filter."""
        asked = Asked(name, task=self._explored.explorer(name).main)
        return _merged(self._choices(asked), self._shown(self._view(asked), 1, None))

    def other_filter(self, _page: object, _current: object, *asked: object) -> Changes:
        """Other values: pages and images start at the first."""
        return self._shown(self._view(Asked(*asked)), 1, None)

    def other_task(self, _page: object, _current: object, *asked: object) -> Changes:
        """Another task, whose values can be compared now."""
        view = self._view(replace(Asked(*asked), compared=[]))
        compared = {"choices": list(view.values), "value": []}
        return _merged({self._parts.asked["compared"]: compared}, self._shown(view, 1, None))

    def other_view(self, _page: object, current: object, *asked: object) -> Changes:
        """Another view of the same images; the one that was open stays in sight."""
        view = self._view(Asked(*asked))
        row = _row(view, current)
        return self._shown(view, view.page_with(row) if view.asked.view == GRID else 1, row)

    def back(self, page: int, current: object, *asked: object) -> Changes:
        """The previous page or image."""
        return self._turned(-1, page, current, asked)

    def on(self, page: int, current: object, *asked: object) -> Changes:
        """The next page or image."""
        return self._turned(1, page, current, asked)

    def opened_image(self, event: gr.SelectData, page: int, _current: object, *asked: object) -> Changes:
        """A single image, chosen in a grid or on the map."""
        view = self._view(replace(Asked(*asked), view=ONE))
        shown = self._shown(view, page, view.explorer.row_of(event.value))
        return _merged({self._parts.asked["view"]: {"value": ONE}}, shown)

    def opened_class(self, event: gr.SelectData, _page: object, _current: object, *asked: object) -> Changes:
        """The images of a class, chosen among the bars."""
        narrowed = self._view(Asked(*asked)).narrowed(event.value)
        changed: Changes = {
            self._parts.asked[name]: {"value": getattr(narrowed, name)} for name in ("class_name", "attributes", "view")
        }
        return _merged(changed, self._shown(self._view(narrowed), 1, None))

    def drawn(
        self,
        progress: gr.Progress = _PROGRESS,
        current: object = None,
        *asked: object,
    ) -> dict[Any, Any]:
        """The figures that take long."""
        view, parts = self._view(Asked(*asked)), self._parts

        def shown(items: Iterable[Any], what: str) -> Iterable[Any]:
            handed: Iterable[Any] = progress.tqdm(list(items), desc=what)
            return handed

        if view.asked.view == COLOURS:
            return {parts.colours: view.colours(shown)}
        if view.asked.view == MAP:
            progress(0, desc="laying out the images, once for all")
            points, said = view.map(_row(view, current))
            return {parts.points: points, parts.said: f'<p class="explore-note">{escape(said)}</p>'}
        return {parts.said: gr.skip()}

    def _view(self, asked: Asked) -> View:
        return View(self._explored, asked, self._size)

    def _turned(self, by: int, page: int, current: object, asked: Sequence[object]) -> Changes:
        view = self._view(Asked(*asked))
        row = _row(view, current)
        if view.asked.view == ONE:
            return self._shown(view, page, view.turned(row, by))
        return self._shown(view, page + by, row)

    def _on(self, triggers: Any, handler: Callable[..., Changes], inputs: Sequence[Any], **options: Any) -> None:
        @wraps(handler)
        def updates(*args: Any, **kwargs: Any) -> dict[Any, Any]:
            changes = handler(*args, **kwargs)
            # The value of a state is no property.
            return {
                part: changed["value"] if isinstance(part, gr.State) else gr.update(**changed)
                for part, changed in changes.items()
            }

        # One after another: each goes on from the page and image that the one before it left.
        in_turn = {"concurrency_limit": 1, "concurrency_id": "explore"}
        outputs = self._parts.outputs
        gr.on(triggers, told(updates), list(inputs), outputs, show_progress="hidden", **in_turn, **options)

    def _choices(self, asked: Asked) -> Changes:
        """What can be chosen of a gallery, and what is."""
        explorer, parts = self._explored.explorer(asked.gallery), self._parts.asked
        options = explorer.attribute_options
        return {
            parts["gallery"]: {"value": asked.gallery},
            parts["view"]: {"value": asked.view},
            parts["class_name"]: {"choices": with_all(explorer.classes, "classes"), "value": asked.class_name or ALL},
            parts["split"]: {"choices": with_all(explorer.splits, "splits"), "value": asked.split or ALL},
            parts["attributes"]: {"choices": options, "value": list(asked.attributes), "visible": bool(options)},
            parts["task"]: {"choices": list(explorer.facets), "value": explorer.main or None},
            parts["compared"]: {"choices": list(explorer.classes), "value": []},
        }

    def _shown(self, view: View, number: int, row: int | None) -> Changes:
        """What is seen of a view; figures that take long are only asked for."""
        parts, kind = self._parts, view.asked.view
        if kind == ONE and row is None:
            row = view.turned(None, 0)
        seen: Changes = {
            parts.totals: {"value": view.totals()},
            parts.leafing: {"visible": kind in (GRID, ONE, MISTAKES)},
            parts.place: {"visible": kind in (GRID, ONE, MISTAKES)},
            parts.grid: {"visible": kind in (GRID, MISTAKES)},
            parts.focus: {"visible": kind == ONE},
            parts.bars: {"visible": kind == CLASSES},
            parts.colours: {"visible": kind == COLOURS},
            parts.points: {"visible": kind == MAP},
            parts.said: {"visible": kind in (MAP, MISTAKES)},
            parts.asked["task"]: {"visible": kind in (CLASSES, COLOURS, MAP, MISTAKES) and bool(view.explorer.main)},
            parts.asked["method"]: {"visible": kind == MAP},
            parts.asked["compared"]: {"visible": kind == COLOURS},
            parts.asked["shuffle"]: {"visible": kind in (GRID, ONE)},
            parts.asked["seed"]: {"visible": kind in (GRID, ONE) and bool(view.asked.shuffle)},
            parts.current: {"value": None if row is None else view.explorer.id_of(row)},
            parts.page: {"value": 1},
        }
        return _merged(seen, self._content(view, number, row))

    def _content(self, view: View, number: int, row: int | None) -> Changes:
        parts, kind = self._parts, view.asked.view
        if kind == CLASSES:
            return {parts.bars: {"value": view.classes()}}
        if kind == ONE:
            leaf = view.one(row)
            return {parts.focus: {"value": leaf.shown}, parts.page: {"value": number}, **self._leafed(leaf)}
        if kind in (GRID, MISTAKES):
            leaf = view.grid(number) if kind == GRID else view.mistakes(number)
            shown: Changes = {parts.grid: {"value": leaf.shown}, parts.said: {"value": leaf.said}}
            return {**shown, parts.page: {"value": leaf.number}, **self._leafed(leaf)}
        # Names of what is wanted, so that the same figure is not asked for twice.
        return {parts.wanted: {"value": repr((view.asked, row))}}

    def _leafed(self, leaf: Leaf) -> Changes:
        parts = self._parts
        return {
            parts.place: {"value": f'<p role="status">{escape(leaf.place)}</p>'},
            parts.back: {"interactive": not leaf.is_first},
            parts.on: {"interactive": not leaf.is_last},
        }


def _row(view: View, current: object) -> int | None:
    """Row of the image that is open, where one is and the gallery still has it."""
    return None if current is None else view.explorer.row_of(current)


def _merged(one: Changes, other: Changes) -> Changes:
    """Both; of a property in both, the other's."""
    return {
        part: one.get(part, {}) | other.get(part, {}) for part in [*one, *(part for part in other if part not in one)]
    }
