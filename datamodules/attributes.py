"""What the texts of a label table mean: attributes such as ``color:red;material:metal``, aliases, vocabularies.

The canonical name of the colour attribute is ``colour``; ``color`` is folded into it wherever it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from datamodules.columns import Missing, attribute_column, composed
from datamodules.label_file import Problems, read_text
from datamodules.table import table_error
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

_ANOTHER = re.compile(r"[|,]\s*[^\W\d][\w ]*:")
"""A further name and colon in a value, behind something else than a semicolon."""

_FOLDED = {"color": "colour"}


class VocabularyOptions(TypedDict, total=False):
    """Which values a table may hold.

    Attributes:
        source: ``train`` learns the values of each task from the train rows; ``files`` reads them from the two files
            below, where they exist, and keeps their order; default train. Values that a vocabulary lacks count as
            unknown and are listed in the run record.
        classes_file: one class a line; default classes.txt.
        attributes_file: YAML with a list of values for each attribute; default attributes.yaml.
        aliases: for each attribute (or ``class``) the spellings to replace, such as ``{colour: {grey: gray}}``; an
            empty text or null means unknown. An alias that no row has is reported.
    """

    source: Literal["train", "files"]
    classes_file: str
    attributes_file: str
    aliases: dict[str, dict[str, str | None]]


def canonical_attribute(name: str) -> str:
    """The name of an attribute as tasks are called: lower case, ``color`` folded into ``colour``."""
    name = composed(name).strip().lower()
    return _FOLDED.get(name, name)


def parse_attributes(text: str) -> tuple[dict[str, str], list[str]]:
    """Takes ``color:red;material:metal`` apart.

    Returns:
        Values by canonical attribute name in the order of the text, and what is wrong with the text.
    """
    values: dict[str, str] = {}
    wrong: list[str] = []
    for part in text.split(";"):
        if not part.strip():
            continue
        name, colon, value = part.partition(":")
        key = canonical_attribute(name)
        if not colon:
            wrong.append(f"attribute {part.strip()!r} has no colon")
        elif not key:
            wrong.append(f"attribute {part.strip()!r} has no name")
        elif key == LABEL_TASK:
            wrong.append(f"attribute {part.strip()!r}: the name {LABEL_TASK!r} is taken by the class label")
        elif key in values:
            wrong.append(f"attribute {key!r} occurs twice")
        elif _ANOTHER.search(value):
            wrong.append(f"attribute {part.strip()!r} looks like several; separate attributes by semicolons")
        else:
            values[key] = value.strip()
    return values, wrong


def plain_text(text: str) -> str:
    """A caption with its white space (no-break spaces and line breaks too) made single blanks, none at the ends."""
    return " ".join(text.split())


class Vocabulary:
    """Aliases and vocabulary files of a table.

    Args:
        options: what the user gave.
        missing: what counts as missing; the empty text alone by default.

    Raises:
        UserError: for an unknown key or source.
    """

    def __init__(self, options: VocabularyOptions | None, missing: Missing | None = None) -> None:
        options = options or {}
        self.missing = missing or Missing()
        if strange := sorted(set(options) - set(VocabularyOptions.__annotations__)):
            known = ", ".join(VocabularyOptions.__annotations__)
            raise UserError(f"data vocabulary: unknown key {strange[0]!r}; known keys are {known}")
        self._source = options.get("source", "train")
        if self._source not in ("train", "files"):
            raise UserError(f"data vocabulary.source: is {self._source!r}, must be train or files")
        self._classes_file = options.get("classes_file", "classes.txt")
        self._attributes_file = options.get("attributes_file", "attributes.yaml")
        self._aliases = {
            canonical_attribute(task): {
                composed(text).strip(): composed(value or "").strip() for text, value in pairs.items()
            }
            for task, pairs in (options.get("aliases") or {}).items()
        }

    def values(self, task: str, texts: Iterable[str]) -> list[str]:
        """The values that the texts of a column stand for, empty where unknown, which is counted."""
        return self.missing.known(attribute_column(task), texts, self._aliases.get(task))

    def check_aliases(self, texts: Mapping[str, Sequence[str]], where: str) -> list[str]:
        """Refuses aliases of attributes that the table lacks.

        Args:
            texts: by task what the table's rows have.
            where: the table, for messages.

        Returns:
            A sentence for each task that has aliases which match no row.

        Raises:
            UserError: for the first attribute that is not there.
        """
        notes = []
        for task, pairs in self._aliases.items():
            if task not in texts:
                raise UserError(
                    f"data vocabulary.aliases: {where} has no attribute {task!r}; it has {', '.join(texts)}"
                )
            there = {composed(text).strip() for text in set(texts[task])}
            if unused := [text for text in pairs if text not in there]:
                none = ", ".join(map(repr, unused))
                notes.append(f"data vocabulary.aliases: no row of {where} has the {task} {none}; correct or remove it")
        return notes

    def from_files(self, root: Path) -> dict[str, list[str]]:
        """Class names by task as the files have them; empty where vocabularies are to be learned.

        Args:
            root: folder of the data set, which the files lie in.

        Raises:
            UserError: where neither file exists or one cannot be understood.
        """
        if self._source == "train":
            return {}
        classes, attributes = root / self._classes_file, root / self._attributes_file
        if not classes.is_file() and not attributes.is_file():
            raise UserError(
                f"data vocabulary.source: files, but {root} has neither {self._classes_file} nor "
                f"{self._attributes_file}; add one or set source: train"
            )
        lists = read_attributes_file(attributes) if attributes.is_file() else {}
        if classes.is_file():
            lists[LABEL_TASK] = read_classes_file(classes)
        # Values that are aliased or mean unknown are no classes; what remains keeps its order.
        aliases: dict[str, dict[str, str | None]] = {task: {**pairs} for task, pairs in self._aliases.items()}
        unknown = Vocabulary({"aliases": aliases}, Missing(self.missing.texts))  # these are no rows to be counted
        named = {task: dict.fromkeys(unknown.values(task, texts)) for task, texts in lists.items()}
        return {task: [value for value in values if value] for task, values in named.items()}


def read_classes_file(path: Path) -> list[str]:
    """Class names, one a line, in the order of the file; empty lines do not count.

    Raises:
        UserError: for a class that is named twice, or text that is not UTF-8.
    """
    problems: Problems = []
    names: dict[str, int] = {}
    for row, line in enumerate(read_text(path, problems).split("\n"), start=1):
        name = line.strip()
        if name in names:
            problems.append((row, f"class {name!r} again, first in row {names[name]}"))
        elif name:
            names[name] = row
    if problems:
        raise table_error(str(path), problems, "correct or remove these lines")
    return list(names)


def read_attributes_file(path: Path) -> dict[str, list[str]]:
    """Values by canonical attribute name, in the order of the YAML file.

    Raises:
        UserError: for a file that is not a mapping from attributes to lists of values.
    """
    import yaml

    problems: Problems = []
    text = read_text(path, problems)
    if problems:
        raise table_error(str(path), problems, "save the file as UTF-8")
    try:
        # Nodes, not objects: a colour called `off` stays a text, and a name that occurs twice is seen.
        top = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is no YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(top, yaml.MappingNode):
        raise UserError(f"{path}: must hold lists of values by attribute; write `colour: [red, blue]`")
    lists: dict[str, list[str]] = {}
    for name, values in top.value:
        key, where = canonical_attribute(str(name.value)), f"{path}:{name.start_mark.line + 1}"
        if not isinstance(values, yaml.SequenceNode) or any(not isinstance(v, yaml.ScalarNode) for v in values.value):
            raise UserError(f"{where}: {key!r} must hold a list of values; write `{key}: [a, b]`")
        if key in lists:
            raise UserError(f"{where}: attribute {key!r} occurs twice; join the two lists")
        lists[key] = [str(value.value) for value in values.value]
    return lists
