"""Which pictures answer which queries, by their labels: queries made of attributes, as people would ask for them.

A query is a combination of values that at least one picture has: "bottle", "blue bottle", "new blue plastic bottle",
"blue plastic". A picture is relevant if its true class and attributes say all that the query says; a value that is not
known of a picture says nothing.

The text begins with what is said of the state, then colour, then material, then the class, as adjectives stand in
English. What a class is called in it:

* ``last``: the last word of its name. People say "bottle", and mean ``tableware_water_bottle`` as well as
  ``personal_care_shampoo_bottle``: classes that share the word share the query.
* ``unique``: as few words from its end as no other class ends in ("water bottle", "shampoo bottle").
* ``full``: all of them ("tableware water bottle").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

ClassWords = Literal["last", "unique", "full"]
"""What a class is called in a query."""

_LAST = ("colour", "material", LABEL_TASK)
"""Tasks whose values end a text, in this order; all others stand before them."""

_Said = tuple[tuple[str, str], ...]
"""Tasks with values, in the order of speaking."""


@dataclass(frozen=True, eq=False)
class AttributeQuery:
    """A query and its answers.

    Attributes:
        text: as a person would write it.
        values: the tasks that it names and what it says there, in the order of the text; of the class, the words.
        relevant: int64 ``(R,)``, the pictures that answer it, ascending, at least one.
    """

    text: str
    values: _Said
    relevant: NDArray[np.int64]

    @property
    def head(self) -> str:
        """What the query is about: the last value that it names, the class if it names one."""
        return "=".join(self.values[-1])


def attribute_queries(
    labels: Mapping[str, Sequence[str | None]], class_words: ClassWords = "last", class_names: Iterable[str] = ()
) -> list[AttributeQuery]:
    """All queries that have an answer, in the order of their texts.

    Args:
        labels: by task the values of N pictures, None or empty where unknown.
        class_words: what a class is called.
        class_names: classes that names are told apart from, where the pictures show only some of them.

    Raises:
        UserError: there are no labels, or no such way to call a class.
    """
    if not labels:
        raise UserError("attribute queries need labels; fill the gallery from data with classes or attributes")
    if class_words not in get_args(ClassWords):
        raise UserError(f"class words: {class_words!r} is unknown; choose one of {', '.join(get_args(ClassWords))}")
    tasks = [*(task for task in labels if task not in _LAST), *(task for task in _LAST if task in labels)]
    called = class_texts({*class_names, *filter(None, labels.get(LABEL_TASK, []))}, class_words)
    answers: dict[_Said, list[NDArray[np.int64]]] = {}
    for known, rows in _alike(tasks, labels, called).items():
        for said in _combinations(known):
            answers.setdefault(said, []).append(rows)
    queries = [
        AttributeQuery(" ".join(value.replace("_", " ") for _, value in said), said, np.sort(np.concatenate(rows)))
        for said, rows in answers.items()
    ]
    return sorted(queries, key=lambda query: (query.text, query.values))


def class_texts(names: Iterable[str], class_words: ClassWords) -> dict[str, str]:
    """What each class is called in a query.

    Args:
        names: of all classes.
        class_words: by which rule.
    """
    words = {name: name.replace("_", " ").split() for name in names}
    if class_words == "last":
        return {name: own[-1] for name, own in words.items()}
    if class_words == "full":
        return {name: " ".join(own) for name, own in words.items()}
    return {name: _shortest_unique(name, words) for name in words}


def _shortest_unique(name: str, words: Mapping[str, list[str]]) -> str:
    own = words[name]
    for length in range(1, len(own)):
        if all(other[-length:] != own[-length:] for key, other in words.items() if key != name):
            return " ".join(own[-length:])
    return " ".join(own)


def _alike(
    tasks: Sequence[str], labels: Mapping[str, Sequence[str | None]], called: Mapping[str, str]
) -> dict[_Said, NDArray[np.int64]]:
    """Pictures of which the same is known, by what that is."""
    rows: dict[_Said, list[int]] = {}
    for row, values in enumerate(zip(*(labels[task] for task in tasks), strict=True)):
        known = ((task, value) for task, value in zip(tasks, values, strict=True) if value)
        said = tuple((task, called[value] if task == LABEL_TASK else value) for task, value in known)
        rows.setdefault(said, []).append(row)
    return {said: np.array(own, dtype=np.int64) for said, own in rows.items()}


def _combinations(known: _Said) -> Iterator[_Said]:
    for size in range(1, len(known) + 1):
        yield from itertools.combinations(known, size)
