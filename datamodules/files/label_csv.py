"""Label files of a data set: where they are, reading them with all problems gathered by row, and what they mean.

A data set is in the folder that the user names, in ``$VITRAIL_DATA/<name>``, or in ``data/<name>``. Attributes are
texts such as ``color:red;material:metal``; ``color`` is renamed to the canonical ``colour`` wherever it comes from.
"""

from __future__ import annotations

import contextlib
import csv
import io
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
        columns: N values by column name, as they are in the file.
        rows: N line numbers, from 1; where a value has line breaks, the line that its row begins at.
        problems: what was wrong in the file.
        notes: what was left out, one sentence each.
    """

    columns: dict[str, list[str]]
    rows: list[int]
    problems: Problems
    notes: list[str]


def read_text(path: Path, problems: Problems) -> str:
    """Read a text file in UTF-8, or in UTF-16 as spreadsheets save "Unicode text", in the normal form NFC.

    Bytes that are not UTF-8 are replaced; ``problems`` gets an entry for each such line.

    Raises:
        UserError: where there is no such file, with the names of its neighbours, or where it is broken UTF-16.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        neighbours = sorted(file.name for file in path.parent.glob(f"*{path.suffix}"))
        found = f"; {path.parent} has {', '.join(neighbours[:5])}" if neighbours else ""
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
    """The UTF-16 of a file, by its mark, or by the zero in each of its first ASCII letters; None for others."""
    if data.startswith(b"\xff\xfe") or (data[1:8:2] == b"\0\0\0\0" and b"\0" not in data[0:8:2]):
        return "utf-16-le"
    if data.startswith(b"\xfe\xff") or (data[0:8:2] == b"\0\0\0\0" and b"\0" not in data[1:8:2]):
        return "utf-16-be"
    return None


def read_label_file(path: Path, required: Sequence[str], separator: str = "") -> LabelFile:
    """Read a table with a header; fields are separated by commas, semicolons, tabs or bars, by default as it shows.

    Blank rows are left out; so are columns without a name that have values, and apostrophes that guard a cell against
    being computed (``'=1``), with a note.

    Raises:
        UserError: for a file that cannot be read or lacks required columns. Problems of rows are gathered instead.
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
    """Return an image's path, maybe with back-slashes, in the form ``folder/name.jpg``.

    Raises:
        ValueError: for an empty path, an absolute one, or one that leads out of its folder.
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
    """Return the name of an attribute's task: in lower case, ``colour`` for ``color``."""
    name = composed(name).strip().lower()
    return _FOLDED.get(name, name)


def parse_attributes(text: str) -> tuple[dict[str, str], list[str]]:
    """Parse ``color:red;material:metal`` to values by canonical attribute name, and what is wrong with the text."""
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
    """Return a caption with white space (no-break spaces and line breaks too) made single blanks, none at the ends."""
    return " ".join(text.split())


class Vocabulary:
    """Aliases and vocabulary files of a table; by default only the empty text counts as missing."""

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
        """Return the values that the texts of a column stand for, empty where unknown, which is counted."""
        return self.missing.known(attribute_column(task), texts, self._aliases.get(task))

    def check_aliases(self, texts: Mapping[str, Sequence[str]], where: str) -> list[str]:
        """Return a sentence for each task that has aliases which match no row of the table (``texts`` by task).

        Raises:
            UserError: for aliases of an attribute that the table lacks.
        """
        notes = []
        for task, pairs in self._aliases.items():
            if task not in texts:
                raise UserError(
                    f"data vocabulary.aliases: {where} has no attribute {task!r}; it has {', '.join(texts)}"
                )
            in_use = {composed(text).strip() for text in set(texts[task])}
            if unused := ", ".join(repr(text) for text in pairs if text not in in_use):
                notes.append(
                    f"data vocabulary.aliases: no row of {where} has the {task} {unused}; correct or remove it"
                )
        return notes

    def from_files(self, root: Path) -> dict[str, list[str]]:
        """Return class names by task as the files in a folder have them; empty with ``source: train``.

        Raises:
            UserError: where neither file exists or one cannot be parsed.
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
    """Return class names, one a line, in the order of the file.

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
    """Return values by canonical attribute name, in the order of the YAML file.

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
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())}); correct it") from error
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


def data_home() -> Path:
    """Return the folder of all data sets: ``$VITRAIL_DATA``, or ``data``."""
    return Path(os.environ.get("VITRAIL_DATA") or "data").expanduser()


def locate(root: str, name: str, source: str, layout: str) -> Path:
    """Return the existing folder of a data set.

    Args:
        root: what the user gave; empty for the usual place.
        name: the data set's folder in the usual place.
        source: where the data set is published, for the error.
        layout: how its folder is laid out, for the error.

    Raises:
        UserError: where there is no such folder, with how to get one.
    """
    folder = Path(root).expanduser() if root else data_home() / name
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"data root: {folder} is a file; give the folder that holds {layout}")
    asked = "data root" if root else "$VITRAIL_DATA" if os.environ.get("VITRAIL_DATA") else "data"
    raise UserError(
        f"{asked}: there is no folder {folder}; get the data from {source}, lay them out as {layout}, "
        f"and point data root (or $VITRAIL_DATA, which holds {name}/) at them"
    )


def files_below(top: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it, without hidden ones; linked folders come once."""
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
    """Return whether a file or folder is hidden, or one that macOS puts into archives."""
    return name.startswith(".") or name == "__MACOSX"


def count_files_left_out(sources: Sequence[str], origin: str, below: str = "") -> dict[str, int]:
    """Count the files among a data set's images that are not used, by the ending of their names in lower case.

    Args:
        sources: the images' paths.
        origin: where the table comes from, which is not left out.
        below: folder to look into; by default those that the images are in.
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
    """Return a text such as: by ending: .txt 3, .heic 2 (install the extra heic to read them)."""
    shown = []
    for suffix, count in left_out.items():
        hint = " (install the extra heic to read them)" if suffix in HEIF_SUFFIXES and not heif_formats() else ""
        shown.append(f"{suffix or 'no ending'} {count}{hint}")
    return "by ending: " + ", ".join(shown)


def as_on_disk(root: Path, paths: Iterable[str]) -> list[str]:
    """Return paths below a folder as the file system spells them; names may be in another Unicode normal form there."""
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
