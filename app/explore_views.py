"""What the browser of a gallery shows for what was chosen; from plain values to HTML, without events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from app.cards import Card, cards_html
from app.class_bars import bars_html
from app.class_colours import colour_figure
from app.embedding_map import map_points
from app.explored import Explored
from app.exploring import Explorer, Filter
from app.leafing import Page, page_of, shuffled, step
from app.picture_address import picture_url
from vitrail.errors import UserError

GRID, ONE, CLASSES, COLOURS, MAP, MISTAKES = "Grid", "One picture", "Classes", "Colours", "Map", "Mistakes"
VIEWS = (GRID, ONE, CLASSES, COLOURS, MAP, MISTAKES)

COLUMNS = 4
_SIDE = 1024
_LARGEST_SEED = 2**32 - 1
_EMPTY = "No picture is left by the filters; take one away."

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
    """A page of pictures, or a single one.

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
        page: pictures on a page.

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
        """Rows in the order in which pictures are leafed through."""
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
        """How many pictures the filter leaves, with a link to what is shown."""
        query = [("tab", "explore"), ("gallery", self.explorer.name), ("view", str(self.asked.view))]
        query += [("split", self.chosen.split)] if self.chosen.split else []
        for task, values in self.chosen.values:
            query += [("class" if task == self.explorer.main else task, value) for value in values]
        link = f'<a href="?{escape(urlencode(query))}">Link to this view</a>'
        return f'<p role="status"><strong>{escape(self.explorer.totals(self.rows))}</strong> {link}</p>'

    def grid(self, number: int) -> Leaf:
        """A page of pictures."""
        page = page_of(self.order, number, self._size)
        cards = [self._card(row) for row in page.rows.tolist()]
        shown = cards_html(cards, COLUMNS, label="Pictures of the gallery", empty=_EMPTY)
        return _leaf(shown, page, len(self.order))

    def page_with(self, row: int | None) -> int:
        """Number of the page on which a picture is; 1 where it is on none."""
        found = np.flatnonzero(self.order == row) if row is not None else self.order[:0]
        return int(found[0]) // self._size + 1 if len(found) else 1

    def turned(self, row: int | None, by: int) -> int | None:
        """The next picture's row; None where there are no pictures."""
        return int(self.order[step(self.order, row, by)]) if len(self.order) else None

    def one(self, row: int | None) -> Leaf:
        """A single picture with all that is known of it, and its place in the order; None where there is no picture."""
        if row is None:
            return Leaf(_missing(_EMPTY), "no pictures")
        facts = self.explorer.facts(row)
        main = self.explorer.main
        described = f"{self.explorer.value_of(row, main)}: {facts['id']}" if main else facts["id"]
        said = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
        address = picture_url(self.explorer.name, facts["id"], _SIDE)
        shown = (
            f'<figure class="focus"><img src="{escape(address)}" alt="{escape(described)}">'
            f"<figcaption><dl>{said}</dl></figcaption></figure>"
        )
        found = np.flatnonzero(self.order == row)
        if not len(found):
            return Leaf(shown, "not among the filtered pictures", is_last=not len(self.order))
        place, count = int(found[0]), len(self.order)
        return Leaf(shown, f"{place + 1:,} of {count:,}", place == 0, place == count - 1)

    def classes(self) -> str:
        """How many pictures each class has."""
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
        curves, missing = colours.densities(self.chosen, task, names, lambda each: progress(each, "reading pictures"))
        said = "".join(_missing(line) for line in missing)
        return (colour_figure(curves, task) if curves else "") + (said or ("" if curves else _missing(_EMPTY)))

    def map(self, row: int | None) -> tuple[dict[str, object], str]:
        """The map's points, and what is to be known of it."""
        placed = self._explored.picture_map(self.explorer.name, self.asked.method)
        task = self.task if self.explorer.main else ""
        told = f"{placed.told} by {self.asked.method} of the vectors that {self.explorer.made_by} gives them."
        if self.asked.method != "PCA":
            told += " Distances between far clusters and the sizes of clusters mean nothing."
        told += " Pictures that the filters leave out are grey." if len(self.rows) < len(self.explorer) else ""
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
            said += " Pictures that the model may have learned from are among them."
        shown = cards_html(cards, COLUMNS, label="Mistakes of the model", empty="There are no mistakes here.")
        return _leaf(shown, page, len(found.rows), f'<p class="explore-note" role="status">{escape(said)}</p>')

    def narrowed(self, value: object) -> Asked:
        """What is asked for next when a class is chosen among the bars: its pictures.

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
    place = f"page {page.number:,} of {page.pages:,} · {page.first:,} to {last:,} of {of:,}" if of else "no pictures"
    return Leaf(shown, place, page.number == 1, page.number == page.pages, page.number, said)


def _origin(explorer: Explorer, task: str) -> str:
    what = "the data's labels" if explorer.facets[task].labelled else "what the model predicts; the data have no labels"
    return f'<p class="explore-note">By {escape(what)}.</p>'


def _missing(line: str) -> str:
    return f'<p class="explore-missing" role="status">{escape(line)}</p>'
