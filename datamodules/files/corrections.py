"""Corrected labels: which cells of a table of images they change, checked before any is."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.files.columns import path_texts, plain_texts
from datamodules.table import composed, table_error
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import pyarrow as pa

HISTORY = "corrections"
"""Column of the new table that has each row's corrections, a JSON list of objects; later ones come last."""

_NAMES = {
    "image": ("image", "name", "id"),
    "task": ("task",),
    "old": ("old", "old_label"),
    "label": ("label", "new", "new_label"),
    "by": ("by", "who"),
    "when": ("when", "date"),
    "reason": ("reason", "note"),
}
_SEPARATORS = re.compile(r"[|;,]")


@dataclass(frozen=True)
class Correction:
    """One corrected label; ``row`` is that of its file; ``old`` is None where the cell is empty."""

    row: int
    image: str
    task: str
    label: str
    old: str | None = None
    by: str = ""
    when: str = ""
    reason: str = ""


def corrections_of(table: pa.Table, rows: Sequence[int], origin: str) -> list[Correction]:
    """Return the corrections in a table with columns such as ``image``, ``task``, ``label``, ``old``, ``reason``.

    Raises:
        UserError: for a table without images or labels.
    """
    by_role = {role: next((n for n in names if n in table.column_names), "") for role, names in _NAMES.items()}
    if missing := [role for role in ("image", "label") if not by_role[role]]:
        raise UserError(f"{origin}: has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    texts = {
        role: path_texts(table[name]) if role == "image" else plain_texts(table[name])
        for role, name in by_role.items()
        if name
    }
    found = []
    for place, row in enumerate(rows):
        values = {role: composed(column[place]).strip() for role, column in texts.items()}
        values["task"] = values.get("task") or LABEL_TASK
        found.append(Correction(row, old=values.pop("old", "") or None, **values))
    return found


def exported_corrections(folder: Path, tag: str) -> list[Correction]:
    """Return the corrections in a FiftyOne export: the labels of all samples with a tag.

    Raises:
        UserError: where there is no such export, or no sample has the tag.
    """
    path = folder / "samples.json"
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))["samples"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the samples of a FiftyOne dataset; export it as FiftyOneDataset") from error
    found = []
    for number, sample in enumerate(samples, start=1):
        if tag not in sample.get("tags", ()):
            continue
        name = str(sample.get("vitrail_name") or sample.get("filepath", ""))
        for field, task in (sample.get("vitrail_tasks") or {"ground_truth": LABEL_TASK}).items():
            if (label := _exported(sample.get(field))) is not None:
                found.append(Correction(number, name, task, label, reason=f"tag {tag}"))
    if not found:
        raise UserError(f"{path}: no sample has the tag {tag!r} and a label; tag the corrected ones in FiftyOne")
    return found


def _exported(value: Any) -> str | None:
    """The text of a Classification, Classifications or number of FiftyOne."""
    if isinstance(value, Mapping) and "classifications" in value:
        return "|".join(str(one["label"]) for one in value["classifications"])
    if isinstance(value, Mapping):
        value = value.get("label") if "label" in value else value.get("value")
    return None if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def corrected(
    table: pa.Table,
    columns: Mapping[str, str],
    corrections: Sequence[Correction],
    origin: str,
    *,
    new_classes: bool = False,
) -> tuple[pa.Table, int]:
    """Return a table with corrected cells and their history, and the number of changed cells.

    Args:
        table: as it is in its file.
        columns: column of the ``image`` and of each task.
        corrections: of any of its images.
        origin: file of the corrections, for messages.
        new_classes: whether classes that no row has yet are allowed.

    Raises:
        UserError: one for all unknown images and tasks, unknown classes, labels that are no longer the old ones, and
            images with two corrections of a task, with their rows.
    """
    import pyarrow as pa

    names = path_texts(table[columns["image"]])
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    cells = {task: _Cells(table[name]) for task, name in columns.items() if task != "image"}
    has_history = HISTORY in table.column_names
    before = plain_texts(table[HISTORY]) if has_history else [""] * len(names)
    history: list[list[dict[str, Any]]] = [json.loads(text or "[]") for text in before]
    problems: list[tuple[int, str]] = []
    given = Counter((one.image, one.task) for one in corrections)
    changed = 0
    for one in corrections:
        if problem := _problem(one, places, cells, given, new_classes=new_classes):
            problems.append((one.row, problem))
            continue
        for place in places[one.image]:
            if entry := _change(one, cells[one.task], place):
                changed += 1
                history[place].append({"column": columns[one.task], **entry})
    if problems:
        raise table_error(origin, problems, "correct or remove these rows; nothing has been written")
    for task, own in cells.items():
        place = table.column_names.index(columns[task])
        table = table.set_column(place, table.field(place), own.column())
    texts = pa.array([json.dumps(one, ensure_ascii=False) if one else "" for one in history], pa.string())
    if has_history:
        return table.set_column(table.column_names.index(HISTORY), HISTORY, texts), changed
    return table.append_column(HISTORY, texts), changed


def _change(one: Correction, cells: _Cells, place: int) -> dict[str, Any]:
    """Correct a cell, and return what its history keeps of that; empty where it had this label already."""
    old = cells.texts[place]
    if not cells.set(place, one.label):
        return {}
    left_out = ("row", "image", "task", "label", "old")
    kept = {key: value for key, value in asdict(one).items() if value and key not in left_out}
    return {"old": old, "new": cells.texts[place], **kept}


def _problem(
    one: Correction,
    places: Mapping[str, Sequence[int]],
    cells: Mapping[str, _Cells],
    given: Mapping[tuple[str, str], int],
    *,
    new_classes: bool,
) -> str:
    if one.image not in places:
        return f"no image {one.image!r} in the table"
    if one.task not in cells:
        return f"no task {one.task!r}; tasks are {', '.join(cells)}"
    if given[one.image, one.task] > 1:
        return f"several corrections of {one.task} of {one.image!r}"
    own = cells[one.task]
    for place in places[one.image]:
        if one.old is not None and not own.same(one.old, own.texts[place]):
            return f"{one.image!r} is labelled {own.texts[place]!r} by now, not {one.old!r}"
    return own.refusal(one.label, new_classes=new_classes)


class _Cells:
    """The cells of a column as texts: classes, labels with a separator, lists of labels, or numbers.

    Attributes:
        texts: of each row as they are now.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        import pyarrow as pa

        self._column, self._kind = column, column.type
        self._is_list = pa.types.is_list(self._kind) or pa.types.is_large_list(self._kind)
        self._is_number = pa.types.is_integer(self._kind) or pa.types.is_floating(self._kind)
        values = column.to_pylist()
        lists = [map(str, value) for value in values if value] if self._is_list else []
        self._elements = {composed(label).strip() for labels in lists for label in labels}
        if self._is_list:
            values = [None if value is None else "|".join(map(str, value)) for value in values]
        self.texts = ["" if _is_nothing(value) else composed(str(value)).strip() for value in values]
        self._before = tuple(self.texts)
        self._classes = set(self.texts)
        self._labels = self._elements or {part.strip() for text in self._classes for part in _SEPARATORS.split(text)}
        used = Counter(separator for text in self.texts for separator in _SEPARATORS.findall(text))
        self._separator = used.most_common(1)[0][0] if used else "|"
        self._changed: set[int] = set()

    def parts(self, text: str) -> list[str]:
        """Return the labels of a cell; those of lists may have a separator within them."""
        if text in self._elements:
            return [text]
        known = (text.split(mark) for mark in "|;," if mark in text)
        found = next((one for one in known if {part.strip() for part in one} <= self._elements), None)
        return [part.strip() for part in found or _SEPARATORS.split(text) if part.strip()]

    def same(self, one: str, other: str) -> bool:
        """Return whether two texts mean the same labels, or the same number."""
        if self._is_number or not {one, other} <= self._classes:
            # 007 and 7 may both be classes.
            try:
                return float(one) == float(other)
            except ValueError:
                pass
        return one == other or sorted(self.parts(one)) == sorted(self.parts(other)) != []

    def refusal(self, label: str, *, new_classes: bool) -> str:
        """Return why a label cannot be in this column; empty if it can."""
        if self._is_number or _are_numbers(self._classes):
            if label and not self._is_possible(label):
                return f"{label!r} is no number"
            if new_classes or not label or not self._numbers_are_classes():
                return ""
            if any(float(label) == float(text) for text in self._classes if text):
                return ""
        elif new_classes or not label or label in self._classes or set(self.parts(label)) <= self._labels:
            return ""
        return f"class {label!r} is in no row of the table; allow it with --new-classes"

    def _numbers_are_classes(self) -> bool:
        """Whether numbers may be classes: they are whole, and there are two rows or more of each on average."""
        numbers = {float(text) for text in self._classes if text}
        rows = sum(1 for text in self._before if text)
        return all(number.is_integer() for number in numbers) and 2 * len(numbers) <= rows

    def _is_possible(self, label: str) -> bool:
        import pyarrow as pa

        try:
            number = float(label)
        except ValueError:
            return False
        return math.isfinite(number) and (number.is_integer() or not pa.types.is_integer(self._kind))

    def set(self, place: int, label: str) -> bool:
        """Change a cell; return whether that is a change."""
        if label not in self._classes and self._labels > self._classes:
            label = self._separator.join(self.parts(label))
        if self.same(label, self.texts[place]) or label == self.texts[place]:
            return False
        self.texts[place] = label
        self._changed.add(place)
        return True

    def column(self) -> Any:
        """Return the column as Arrow has it; cells that are not corrected stay as they are."""
        import pyarrow as pa

        if not self._changed:
            return self._column
        values = self._column.to_pylist()
        for place in self._changed:
            values[place] = self._value(self.texts[place])
        return pa.array(values, type=self._kind)

    def _value(self, text: str) -> Any:
        import pyarrow as pa

        if self._is_list:
            return self.parts(text)
        if self._is_number:
            number = float(text) if text else None
            return int(number) if number is not None and pa.types.is_integer(self._kind) else number
        return text.lower() in ("1", "true", "yes") if pa.types.is_boolean(self._kind) else text


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _are_numbers(classes: set[str]) -> bool:
    try:
        return len([float(text) for text in classes if text]) > 0
    except ValueError:
        return False
