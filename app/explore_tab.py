"""The tab Explore: what is in a gallery, by filters, one by one, by class, by colour, on a map, and what went wrong.

Whatever is shown is computed anew from the chosen values, see ``explore_views``; a session only keeps its page and its
picture. What takes long (map and colours) is asked for by an event of its own, so that leafing never waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import wraps
from html import escape
from typing import Any

import gradio as gr

from app.context import AppContext
from app.explore_layout import ALL, Parts, lay_out_tab, with_all
from app.explore_views import CLASSES, COLOURS, GRID, MAP, MISTAKES, ONE, Asked, Leaf, View, from_query
from app.explored import Explored
from app.messages import one_line, told
from vitrail.errors import UserError

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
        in_turn = {"trigger_mode": "multiple", "concurrency_limit": 1, "concurrency_id": "explore-leaf"}
        self._on(parts.back.click, self.back, parts.inputs, **in_turn)
        self._on(parts.on.click, self.on, parts.inputs, **in_turn)
        self._on([parts.grid.select, parts.points.select], self.opened_picture, parts.inputs)
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
        """Other values: pages and pictures start at the first."""
        return self._shown(self._view(Asked(*asked)), 1, None)

    def other_task(self, _page: object, _current: object, *asked: object) -> Changes:
        """Another task, whose values can be compared now."""
        view = self._view(replace(Asked(*asked), compared=[]))
        compared = {"choices": list(view.values), "value": []}
        return _merged({self._parts.asked["compared"]: compared}, self._shown(view, 1, None))

    def other_view(self, _page: object, current: object, *asked: object) -> Changes:
        """Another view of the same pictures; the one that was open stays in sight."""
        view = self._view(Asked(*asked))
        row = _row(view, current)
        return self._shown(view, view.page_with(row) if view.asked.view == GRID else 1, row)

    def back(self, page: int, current: object, *asked: object) -> Changes:
        """The previous page or picture."""
        return self._turned(-1, page, current, asked)

    def on(self, page: int, current: object, *asked: object) -> Changes:
        """The next page or picture."""
        return self._turned(1, page, current, asked)

    def opened_picture(self, event: gr.SelectData, page: int, _current: object, *asked: object) -> Changes:
        """A single picture, chosen in a grid or on the map."""
        view = self._view(replace(Asked(*asked), view=ONE))
        shown = self._shown(view, page, view.explorer.row_of(event.value))
        return _merged({self._parts.asked["view"]: {"value": ONE}}, shown)

    def opened_class(self, event: gr.SelectData, _page: object, _current: object, *asked: object) -> Changes:
        """The pictures of a class, chosen among the bars."""
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
            progress(0, desc="laying out the pictures, once for all")
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

        gr.on(triggers, told(updates), list(inputs), self._parts.outputs, show_progress="hidden", **options)

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
    """Row of the picture that is open, where one is and the gallery still has it."""
    return None if current is None else view.explorer.row_of(current)


def _merged(one: Changes, other: Changes) -> Changes:
    """Both; of a property in both, the other's."""
    return {
        part: one.get(part, {}) | other.get(part, {}) for part in [*one, *(part for part in other if part not in one)]
    }
