"""Reading a CSV table of labels with everything that is wrong in it gathered by row, instead of stopping at the first.

The values come as they stand in the file; what they mean is the data set's business.

Columns of labels and captions of Arrow tables, as the texts that a sample table is made of.

What the texts of a label table mean: attributes such as ``color:red;material:metal``, aliases, vocabularies.

The canonical name of the colour attribute is ``colour``; ``color`` is folded into it wherever it comes from.

Where a data set lies: the folder that the user names, else ``$VITRAIL_DATA/<name>``, else ``data/<name>``.

And which files are in it, those that are no images included.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from datamodules.loading.decode import HEIF_SUFFIXES, heif_formats
from datamodules.options import Options
from datamodules.table import Missing, attribute_column, composed, table_error
from vitrail.errors import UserError
from vitrail.trust import unguarded
from vitrail.types import LABEL_TASK

_SEPARATORS = (",", ";", "\t", "|")
_HEAD = 1 << 16
"""Characters of a file in which its header is looked for."""

Problems = list[tuple[int, str]]
"""Line of the file and what is wrong there."""


@dataclass(frozen=True)
class LabelFile:
    """The columns of a table; N is the number of rows that have all their fields.

    Attributes:
        columns: for each column name N values as they stand in the file.
        rows: N line numbers, counted from 1; where a value holds line breaks, the line that its row begins at.
        problems: what was wrong in the file.
        notes: what was left out, one sentence each.
    """

    columns: dict[str, list[str]]
    rows: list[int]
    problems: Problems
    notes: list[str]


def read_text(path: Path, problems: Problems) -> str:
    """Reads a text file in UTF-8, or in UTF-16 as spreadsheets save "Unicode text", in the normal form NFC.

    A byte order mark is left out, bytes that are not UTF-8 are told and replaced.

    Args:
        path: the file.
        problems: gets a line for each line of the file that is not UTF-8.

    Raises:
        UserError: where there is no such file, with the names of its neighbours, or where it is broken UTF-16.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        beside = sorted(file.name for file in path.parent.glob(f"*{path.suffix}"))
        found = f"; {path.parent} has {', '.join(beside[:5])}" if beside else ""
        raise UserError(f"{path}: cannot be read ({error.strerror}){found}; give the name of the table") from error
    if (encoding := _utf16(data)) is not None:
        try:
            return composed(data.decode(encoding).lstrip("\ufeff"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is broken UTF-16 ({error.reason}); save it as UTF-8") from error
    try:
        return composed(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        for row, line in enumerate(data.split(b"\n"), start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                problems.append(
                    (row, f"is not UTF-8 (byte {line[error.start]:#04x} at {error.start}); save it as UTF-8")
                )
        return composed(data.decode("utf-8-sig", errors="replace"))


def _utf16(data: bytes) -> str | None:
    """Which UTF-16 a file is in, by its mark, or by the zero in each of its first ASCII letters; None for others."""
    if data.startswith(b"\xff\xfe") or (data[1:8:2] == b"\0\0\0\0" and b"\0" not in data[0:8:2]):
        return "utf-16-le"
    if data.startswith(b"\xfe\xff") or (data[0:8:2] == b"\0\0\0\0" and b"\0" not in data[1:8:2]):
        return "utf-16-be"
    return None


def read_label_file(path: Path, required: Sequence[str], separator: str = "") -> LabelFile:
    """Reads a table with a header; fields are separated by commas, semicolons, tabs or bars, as the header shows.

    Blank rows and columns without a name are left out, the latter with a note where they hold something. So are
    apostrophes that guard a cell against being computed (``'=1``), with a note.

    Args:
        path: the file, in UTF-8 or UTF-16.
        required: columns that must be there.
        separator: of the fields; by default as the header shows.

    Raises:
        UserError: for a file that cannot be read or lacks columns. What is wrong in single rows is gathered instead.
    """
    problems: Problems = []
    text = read_text(path, problems)
    reader, header = _opened(path, text, required, separator)
    _check_header(path, header, required)
    values: list[list[str]] = [[] for _ in header]
    # Labels and attributes repeat: one object for each distinct text keeps large tables small while they are read.
    shared: dict[str, str] = {}
    rows: list[int] = []
    while True:
        row = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            problems.append((row, f"{error}; look for a stray quote"))
            continue
        if not any(field.strip() for field in fields):
            continue
        if not any(field.strip() for field in fields[len(header) :]):
            fields = fields[: len(header)]
        if len(fields) == len(header):
            rows.append(row)
            for column, field in zip(values, fields, strict=True):
                column.append(shared[field] if field in shared else shared.setdefault(field, unguarded(field)))
        else:
            problems.append((row, f"{len(fields)} fields where the header has {len(header)}"))
    columns = dict(zip(header, values, strict=True))
    notes = [
        f"{path}: column {place} has no name and is left out"
        for place, (name, column) in enumerate(zip(header, values, strict=True), start=1)
        if not name and any(field.strip() for field in column)
    ]
    if guarded := [field for field, text in shared.items() if field != text]:
        notes.append(
            f"{path}: an apostrophe before = + - or @ guards against formulas and is no part of the text; left out of "
            f"{len(guarded)} texts, such as {guarded[0][:40]!r}"
        )
    columns.pop("", None)
    return LabelFile(columns, rows, problems, notes)


def _opened(path: Path, text: str, required: Sequence[str], given: str = "") -> tuple[Any, list[str]]:
    """A reader of the rows below the header, and the header: its first row that is not blank.

    The separator is the one under which most of the required columns are there, and of those the one with most fields.
    """
    named = re.match(r"sep=(.)\s*\n", text)  # Excel's own line

    def opened(content: str, separator: str) -> tuple[Any, list[str]]:
        reader = csv.reader(io.StringIO(content, newline=""), strict=True, delimiter=separator)
        if named:
            next(reader)
        header = next((fields for fields in reader if any(field.strip() for field in fields)), [])
        return reader, [unguarded(name.strip()) for name in header]

    def fits(separator: str) -> tuple[int, int]:
        try:
            header = opened(text[:_HEAD], separator)[1]
        except csv.Error:
            return -1, 0
        return sum(name in header for name in required), len(header)

    separator = given or (named[1] if named else max(_SEPARATORS, key=fits))
    try:
        return opened(text, separator)
    except csv.Error as error:
        raise UserError(f"{path}:1: {error}; correct the header") from error


def relative_path(text: str) -> str:
    """Brings an image's path as a table has it, maybe with back-slashes, to the form ``folder/name.jpg``.

    Raises:
        ValueError: for no path, an absolute one, or one that leads out of its folder; the text says which.
    """
    whole = text.strip().replace("\\", "/")
    parts = [part for part in whole.split("/") if part not in ("", ".")]
    if not parts:
        raise ValueError("no image path")
    if whole.startswith("/") or parts[0].endswith(":"):
        raise ValueError(f"image path {text!r} is absolute; make it relative to the data set's folder")
    if ".." in parts:
        raise ValueError(f"image path {text!r} leads out of the data set's folder")
    return "/".join(parts)


def _check_header(path: Path, header: list[str], required: Sequence[str]) -> None:
    if missing := [name for name in required if name not in header]:
        raise UserError(
            f"{path}: missing column {', '.join(missing)}; the header has {', '.join(header) or 'nothing'}: "
            "rename or add columns"
        )
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise UserError(f"{path}: column {', '.join(twice)} occurs twice; remove one")


def class_names_of(feature: Any) -> list[str]:
    """Names of the library's ``ClassLabel``, none for other features."""
    return [composed(name) for name in getattr(feature, "names", None) or []]


def label_texts(column: Any, names: Sequence[str], where: str) -> list[str]:
    """The values of a column of labels as texts, empty for unknown.

    Args:
        column: Arrow array of texts, whole numbers or truth values.
        names: what whole numbers stand for; none where they are the names themselves. Below 0 is unknown.
        where: YAML key and file, for the error.

    Raises:
        UserError: for a number that has no name, and for a column of another type.
    """
    import pyarrow as pa

    column = plain_column(column)
    kind = column.type
    values = column.to_pylist()
    if pa.types.is_null(kind):
        return [""] * len(values)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return ["" if value is None else value.strip() for value in values]
    if pa.types.is_integer(kind) and names:
        if values and max((value for value in values if value is not None), default=-1) >= len(names):
            row = next(row for row, value in enumerate(values) if value is not None and value >= len(names))
            raise UserError(
                f"{where}: row {row} has the label {values[row]}, but there are {len(names)} class names (0 to "
                f"{len(names) - 1}); correct the label or name all classes"
            )
        return ["" if value is None or value < 0 else names[value] for value in values]
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return ["" if value is None else str(value) for value in values]
    raise UserError(f"{where}: holds {kind}, which is no class; give a column of names or whole numbers")


def plain_column(column: Any) -> Any:
    """An Arrow array of the values themselves: categories as texts, whole numbers among NaN as such."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(column.type):
        known = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.all(pc.equal(known, pc.floor(known))).as_py()
        column = known.cast(pa.int64()) if whole is not False else known
    return column


def plain_texts(column: Any) -> list[str]:
    """The values of a column of any single ones as texts on one line, empty for null and NaN."""
    return [first_text(value) for value in plain_column(column).to_pylist()]


def numbers_in_order(values: Iterable[str]) -> list[str]:
    """Distinct whole numbers by size, where alphabetical order would put 10 before 2; empty ones are left out."""
    return sorted(set(values) - {""}, key=int)


def first_text(value: object) -> str:
    """A caption, or the first of several, on one line; empty where there is none."""
    if isinstance(value, list):
        value = value[0] if value else None
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else composed(" ".join(str(value).split()))


_ANOTHER = re.compile(r"[|,]\s*[^\W\d][\w ]*:")
"""A further name and colon in a value, behind something else than a semicolon."""

_FOLDED = {"color": "colour"}


@dataclass(frozen=True)
class VocabularyOptions(Options):
    """Which values a table may have.

    Attributes:
        source: ``train`` takes the values of each task from the train rows; ``files`` reads them from the two files
            below, where they exist, and keeps their order. Values that a vocabulary lacks count as unknown and are
            listed in the run record.
        classes_file: one class a line.
        attributes_file: YAML with a list of values for each attribute.
        aliases: for each attribute (or ``class``) the spellings to replace, such as ``{colour: {grey: gray}}``; an
            empty text or null means unknown. An alias that no row has is reported.
    """

    argument: ClassVar[str] = "vocabulary"

    source: Literal["train", "files"] = "train"
    classes_file: str = "classes.txt"
    attributes_file: str = "attributes.yaml"
    aliases: dict[str, dict[str, str | None]] = field(default_factory=dict)


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
    """

    def __init__(self, options: VocabularyOptions, missing: Missing | None = None) -> None:
        self.missing = missing or Missing()
        self._options = options
        self._aliases = {
            canonical_attribute(task): {
                composed(text).strip(): composed(value or "").strip() for text, value in pairs.items()
            }
            for task, pairs in options.aliases.items()
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
        if self._options.source == "train":
            return {}
        classes, attributes = root / self._options.classes_file, root / self._options.attributes_file
        if not classes.is_file() and not attributes.is_file():
            raise UserError(
                f"data vocabulary.source: files, but {root} has neither {classes.name} nor {attributes.name}; add one "
                "or set source: train"
            )
        lists = read_attributes_file(attributes) if attributes.is_file() else {}
        if classes.is_file():
            lists[LABEL_TASK] = read_classes_file(classes)
        # Values that are aliased or mean unknown are no classes; what remains keeps its order.
        rows = Vocabulary(self._options, Missing(self.missing.texts))  # these are no rows to be counted
        named = {task: dict.fromkeys(rows.values(task, texts)) for task, texts in lists.items()}
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


VARIABLE = "VITRAIL_DATA"


def locate(root: str, name: str, source: str, layout: str) -> Path:
    """Finds the folder of a data set.

    Args:
        root: what the user gave; empty for the usual place.
        name: the data set's folder in the usual place.
        source: where the data set is to be had, for the error.
        layout: how its folder is laid out, for the error.

    Returns:
        An existing folder.

    Raises:
        UserError: where there is no such folder; it says how to come by one.
    """
    home = os.environ.get(VARIABLE, "")
    folder = Path(root).expanduser() if root else Path(home or "data").expanduser() / name
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"data root: {folder} is a file; give the folder that holds {layout}")
    asked = "data root" if root else f"${VARIABLE}" if home else "data"
    raise UserError(
        f"{asked}: there is no folder {folder}; get the data from {source}, lay them out as {layout}, "
        f"and point data root (or ${VARIABLE}, which holds {name}/) at them"
    )


def files_below(top: Path) -> Iterator[str]:
    """Paths of all files below a folder, relative to it; hidden ones are left alone, linked folders come once."""
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not is_left_alone(name))
        below = Path(folder).relative_to(top)
        yield from ((below / name).as_posix() for name in files if not is_left_alone(name))


def is_left_alone(name: str) -> bool:
    """Whether a file or folder is hidden, or one that macOS puts into archives."""
    return name.startswith(".") or name == "__MACOSX"


def count_files_left_out(sources: Sequence[str], origin: str, below: str = "") -> dict[str, int]:
    """Count the files that lie among a data set's images and are none of them.

    Args:
        sources: the images' paths.
        origin: where the table comes from, which is not left out.
        below: folder of which all images below it belong to the data set.

    Returns:
        Number of files by the ending of their names in lower case (empty for none), most frequent first; those below
        ``below``, or without it those in the same folders as the images that a table names.
    """
    # Paths as texts: a million Path objects would take their time.
    used = {os.path.abspath(source) for source in (*sources, origin)}  # noqa: PTH100
    if below:
        there = [(path, os.path.abspath(os.path.join(below, path))) for path in files_below(Path(below))]  # noqa: PTH100, PTH118
    else:
        folders = {os.path.dirname(source) for source in sources}  # noqa: PTH120
        there = [(entry.name, os.path.abspath(entry)) for entry in _files_in(folders)]  # noqa: PTH100
    left = Counter(Path(name).suffix.lower() for name, path in there if path not in used)
    return dict(sorted(left.items(), key=lambda one: (-one[1], one[0])))


def _files_in(folders: Iterable[str]) -> Iterator[os.DirEntry[str]]:
    for folder in folders:
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            yield from (entry for entry in entries if entry.is_file() and not is_left_alone(entry.name))


def left_out_text(left_out: Mapping[str, int]) -> str:
    """Such as: by ending: .txt 3, .heic 2 (the extra heic reads them)."""
    shown = []
    for suffix, count in left_out.items():
        hint = " (install the extra heic to read them)" if suffix in HEIF_SUFFIXES and not heif_formats() else ""
        shown.append(f"{suffix or 'no ending'} {count}{hint}")
    return "by ending: " + ", ".join(shown)


def as_on_disk(root: Path, paths: Iterable[str]) -> list[str]:
    """Paths as the file system spells them: macOS and archives made there hold names in another Unicode normal form.

    Args:
        root: folder of the data set.
        paths: below it, with ``/`` between their parts.

    Returns:
        For each the path of the file that has the same name in NFC; the path itself where there is none.
    """
    listings: dict[str, dict[str, str]] = {}

    def spelled(path: str) -> str:
        if path.isascii() or os.path.lexists(f"{root}/{path}"):
            return path
        found = ""
        for part in path.split("/"):
            if found not in listings:
                folder = f"{root}/{found}"
                names = os.listdir(folder) if os.path.isdir(folder) else []  # noqa: PTH112, PTH208 -- millions of them
                listings[found] = {composed(name): name for name in sorted(names)}
            name = listings[found].get(composed(part), part)
            found = f"{found}/{name}" if found else name
        return found

    return [spelled(path) for path in paths]
