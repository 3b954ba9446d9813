"""The result of a search as a table for a terminal, and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrieval.found import Found
from retrieval.schema import ModelIdentity

if TYPE_CHECKING:
    from rich.table import Table

    from retrieval.ranking import Query


@dataclass(frozen=True)
class Answer:
    """A search and what it found, ready to be shown.

    Attributes:
        query: what was asked.
        gallery: path or address.
        identity: the model that made the gallery.
        ranker: who ranked.
        find: ``pictures`` or ``captions``.
        where: filter, empty for none.
        found: best first.
        notes: what a person should know, one line each.
        example: the picture that was asked with, where it was one.
    """

    query: Query
    gallery: str
    identity: ModelIdentity
    ranker: str
    find: str
    where: str
    found: list[Found]
    notes: list[str]
    example: Found | None = None

    @property
    def asked(self) -> str:
        """The query in words."""
        if self.query.text is not None:
            return f"“{self.query.text}”"
        return f"picture {self.image_name}" if self.query.image is not None else f"like {self.query.like}"

    @property
    def image_name(self) -> str | None:
        """File of the picture that was asked with; what is no UTF-8 in its name is replaced, so it can be printed."""
        return None if self.query.image is None else str(self.query.image).encode(errors="replace").decode()


def as_json(answer: Answer) -> str:
    """One JSON object with query, notes, and what was found, in order."""
    query = {"text": answer.query.text, "like": answer.query.like, "image": answer.image_name}
    content = {
        "gallery": answer.gallery,
        "model": answer.identity.task,
        "run": answer.identity.run,
        "query": query,
        "where": answer.where,
        "find": answer.find,
        "ranker": answer.ranker,
        "notes": answer.notes,
        "found": [found.as_dict(rank) for rank, found in enumerate(answer.found, start=1)],
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def rich_table(answer: Answer) -> Table:
    """A row for each picture or caption; columns that nothing is known of are left out."""
    from rich.table import Table

    title = f"{_plain(answer.asked)} · {answer.ranker} · {_plain(answer.gallery)}"
    table = Table(title=title, title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("score", justify="right")
    table.add_column("caption" if answer.find == "captions" else "id", overflow="fold")
    if answer.find == "captions":
        table.add_column("of picture", overflow="fold")
        for rank, found in enumerate(answer.found, start=1):
            table.add_row(str(rank), f"{found.score:.4f}", _plain(found.caption), _plain(found.id))
        return table
    told = [", ".join(said(value) for value in found.predicted.values() if value) for found in answer.found]
    true = [", ".join(value for value in found.labels.values() if value) for found in answer.found]
    captions = [found.caption for found in answer.found]
    columns = [("the model says", told), ("labels", true), ("caption", captions)]
    shown = [(name, values) for name, values in columns if any(values)]
    for name, _ in shown:
        table.add_column(name, overflow="fold")
    for place, found in enumerate(answer.found):
        values = [_plain(values[place]) for _, values in shown]
        table.add_row(str(place + 1), f"{found.score:.4f}", _plain(found.id), *values)
    return table


def said(answer: tuple[str, float] | None) -> str:
    """A predicted value with how sure the model is, such as ``blue 0.93``."""
    return "" if answer is None else f"{answer[0]} {answer[1]:.2f}"


def _plain(text: str) -> str:
    """What people typed or wrote into tables must neither be read as markup nor command the terminal."""
    from rich.markup import escape

    return escape("".join(letter if letter.isprintable() else " " for letter in text))
