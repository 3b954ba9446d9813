"""Table: a user's own table of images, in CSV, Parquet or JSON Lines, whatever its columns are called."""

from __future__ import annotations

import hashlib
import re
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args
from urllib.parse import urlsplit

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.base import ImageDataModule
from datamodules.checks.verify import Verification
from datamodules.files.columns import (
    URL,
    guessed_kind,
    other_targets,
    path_texts,
    plain_texts,
    require_column,
    require_order,
    sample_columns,
    strata,
    vocabularies,
)
from datamodules.files.label_csv import as_on_disk, count_files_left_out, read_label_file
from datamodules.loading.decode import MAX_BYTES
from datamodules.options import Options, SplitName
from datamodules.splits import SplitBy, SplitOptions, resolve_splits, split_of_name
from datamodules.table import Missing, SampleTable, composed, table_error, target_column
from vitrail.console import tracked
from vitrail.errors import UserError, without_passwords
from vitrail.files import cache_directory, write_atomically
from vitrail.types import LABEL_TASK, TaskKind, kind_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SUFFIXES = (".csv", ".tsv", ".txt", ".parquet", ".jsonl", ".ndjson")
"""Endings of the files that ``Table`` reads."""

AUTO = "auto"
_MULTI_LABEL: TaskKind = "multi_label"

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "image": (
        *("image", "image_path", "img", "img_path", "path", "file", "filename", "file_name", "filepath", "file_path"),
        *("image_url", "url", "photo", "image_id", "id"),
    ),
    "label": ("label", "class", "class_label", "class_name", "category", "target", "species", "breed", "y"),
    "group": ("group", "group_id", "instance_id", "object_id", "product_id", "patient_id", "subject_id"),
    "split": ("split", "subset", "partition", "set", "fold_name"),
    "caption": ("caption", "captions", "text", "description", "title", "sentence", "prompt"),
}
"""Column names that are taken for each role where the user names none, the first one that the table has."""

_DOWNLOADS = 16
"""Images that are fetched at the same time: servers answer slowly and one by one."""

_SECONDS = 60
"""That a server may be silent for."""


@dataclass(frozen=True)
class TableColumns(Options):
    """Which column is what: a name, ``auto`` for the first one with a usual name, or empty for none.

    Attributes:
        image: path (relative to the table's folder or ``root``, or absolute) or URL of each image.
        label: class of each image; whole numbers and texts.
        labels: further columns of classes, each a task of its own; where ``label`` is auto or empty, the first of them
            is the main task.
        group: the object, product or patient that an image shows; images of one group stay in one split.
        split: train, val or test, in any usual spelling.
        caption: a text, in Parquet and JSON Lines also a list of texts. Rows of one image are joined, and all their
            captions kept.
        kinds: what columns of labels hold: ``single_label``, ``multi_label`` (texts with a separator, or lists),
            ``ordinal`` (classes with an order) or ``regression`` (numbers). A column that only stands here is a further
            task. Where nothing is given, lists, texts of recurring labels with ``|`` or ``;`` between them, and numbers
            with fractions are recognised, which is reported; everything else is classes.
        label_sep: text between the labels of a multi-label cell; by default ``|``, ``;`` or ``,``, whichever most cells
            have. An empty cell is unknown, a cell with only a separator has no label.
        one_hot: further multi-label tasks by name, each with the columns of its labels, which have 1, 0 or nothing
            (not known).
        classes: all classes of a column in their order, which ordinal columns need unless they hold whole numbers.
    """

    argument: ClassVar[str] = "columns"

    image: str = AUTO
    label: str = AUTO
    labels: list[str] = field(default_factory=list)
    group: str = AUTO
    split: str = AUTO
    caption: str = AUTO
    kinds: dict[str, TaskKind] = field(default_factory=dict)
    label_sep: str = ""
    one_hot: dict[str, list[str]] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in self.kinds.items():
            if kind not in get_args(TaskKind):
                raise UserError(
                    f"data columns.kinds: the kind of {name!r} must be one of {', '.join(get_args(TaskKind))}; got "
                    f"{kind!r}"
                )
        for option in ("one_hot", "classes"):
            for name, values in getattr(self, option).items():
                if not isinstance(values, list) or len(set(map(str, values))) < max(1, len(values)):
                    raise UserError(f"data columns.{option}: {name!r} must have a list without repetitions")
        object.__setattr__(self, "classes", {name: list(map(str, values)) for name, values in self.classes.items()})

    def found_in(self, names: Sequence[str], where: str) -> TableColumns:
        """Return the columns with each ``auto`` replaced by the table's own name, or by nothing where it has none.

        Raises:
            UserError: for a column that the table lacks, and where no column has images.
        """
        by_usual_name = {re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_"): name for name in reversed(names)}
        values: dict[str, Any] = {}
        for role, usual in USUAL_NAMES.items():
            given = getattr(self, role)
            if given == AUTO:
                given = next((by_usual_name[name] for name in usual if name in by_usual_name), "")
                given = "" if given in {*self.labels, *values.values()} or (role == "label" and self.labels) else given
            elif given:
                require_column(given, names, role, where)
            values[role] = given
        for option in ("labels", "kinds", "classes"):
            for name in getattr(self, option):
                require_column(name, names, option, where)
        for task, columns in self.one_hot.items():
            if task in names or task in USUAL_NAMES:
                raise UserError(f"data columns.one_hot: {task!r} is a name of the table's own; choose another")
            for name in columns:
                require_column(name, names, f"one_hot.{task}", where)
        if not values["image"]:
            raise UserError(
                f"data columns.image: {where} has the columns {', '.join(names)}; name the one with the images' paths "
                "by --image COLUMN, or by columns.image in an experiment"
            )
        return replace(self, **values)

    @property
    def tasks(self) -> dict[str, str]:
        """The column of each task, the main task first; empty without labels. Of resolved columns only.

        One-hot tasks, which have several columns, stand for themselves.
        """
        names = (self.label, *self.labels, *self.kinds, *self.classes, *self.one_hot)
        columns = list(dict.fromkeys(name for name in names if name))
        return {LABEL_TASK if number == 0 else name: name for number, name in enumerate(columns)}

    @property
    def task_kinds(self) -> dict[str, TaskKind]:
        """Kinds of the tasks that are not single-label. Of resolved columns only."""
        kinds = {**self.kinds, **dict.fromkeys(self.one_hot, _MULTI_LABEL)}
        of_tasks = {task: kind_of(kinds, name) for task, name in self.tasks.items()}
        return {task: kind for task, kind in of_tasks.items() if kind != "single_label"}


class Table(ImageDataModule):
    """Images that a table lists by path or URL, with labels, groups, splits and captions in any of its columns.

    Images behind URLs (``https://``, ``s3://``, ``gs://`` and what else fsspec knows) are fetched once and kept under
    ``$VITRAIL_CACHE``; one that cannot be fetched is an unreadable image, as ``checks.on_bad_image`` treats them.

    Args:
        path: the table: CSV or TSV with a header, Parquet, or JSON Lines.
        columns: which column is what; by default by their usual names, which is reported.
        root: folder that relative paths of images start from; the table's own by default.
        sep: character between the fields of a CSV file; by default the one that its header has.
        split: how samples are divided. By default by the split column; a val or test that it lacks is cut out of train
            by its fraction. Without such a column by group, or stratified where there is no group column either.
        rows: values by column of the rows to use, such as ``{domain: [1, 2]}``; all rows by default.
        shared: options of every data set, see ``ImageDataModule``.

    Example:
        A table ``birds.csv`` with the columns ``file;latin_name;nest`` is read by
        ``Table("birds.csv", columns={"label": "latin_name", "group": "nest"})``.
    """

    def __init__(
        self,
        path: str,
        columns: TableColumns = TableColumns(),
        root: str = "",
        sep: str = "",
        split: SplitOptions = SplitOptions(),
        rows: dict[str, list[str | int]] | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        if len(sep) > 1:
            raise UserError(f"data sep: must be one character; got {sep!r}")
        self.path, self.root, self.sep = path, root, sep
        self.columns = TableColumns.of(columns)
        self.split_options = SplitOptions.of(split)
        self.rows = {name: [str(value) for value in values] for name, values in (rows or {}).items()}
        self._urls: dict[int, str] = {}

    def load_table(self) -> SampleTable:
        """Read the table."""
        path = Path(self.path).expanduser().absolute()
        arrow, features, rows, notes = read_table(path, self.sep)
        columns, guesses = self._resolved(arrow, features, path)
        arrow, rows = self._wanted(arrow, rows, path)
        root = Path(self.root).expanduser().absolute() if self.root else path.parent
        missing = Missing(self.check_options.missing or ())
        kinds = columns.task_kinds
        of_classes = {task: name for task, name in columns.tasks.items() if kinds.get(task, "ordinal") == "ordinal"}
        given = {task: columns.classes[name] for task, name in columns.tasks.items() if name in columns.classes}
        values = sample_columns(
            arrow,
            features,
            of_classes,
            missing,
            str(path),
            caption=columns.caption,
            group=columns.group,
            given=given,
            option="columns.classes",
        )
        others, separators = other_targets(
            arrow,
            features,
            rows,
            columns.tasks,
            kinds,
            missing,
            str(path),
            label_sep=columns.label_sep,
            guess_sep=True,
            one_hot=columns.one_hot,
            classes=columns.classes,
        )
        frame = self._frame(arrow, {**values, **others}, rows, columns, path)
        self._locate_images(frame, root, path)
        frame["split"] = self._splits(frame, columns)
        names = {**given, **vocabularies(frame, of_classes, features, missing, given)}
        require_order(columns.tasks, kinds, names, str(path), "columns.classes")
        return SampleTable.from_frame(
            frame,
            {task: target_column(task) for task in columns.tasks},
            names,
            str(path),
            str(root),
            missing=missing.counts,
            notes=[*notes, *guesses, *separators, *self._choices(columns, arrow.column_names, path)],
            kinds=kinds,
        )

    def _wanted(self, arrow: pa.Table, rows: Sequence[int], path: Path) -> tuple[pa.Table, list[int]]:
        """The rows to use, and their numbers."""
        keep = np.ones(len(arrow), dtype=bool)
        for name, values in self.rows.items():
            if name not in arrow.column_names:
                raise UserError(f"data rows: {path} has no column {name!r}; it has {', '.join(arrow.column_names)}")
            own = plain_texts(arrow[name])
            if absent := sorted(set(values) - set(own)):
                some = ", ".join(sorted(set(own))[:5])
                raise UserError(f"data rows: {path} has no {name} {absent[0]!r}; it has {some}")
            keep &= np.isin(np.array(own, dtype=object), values)
        if self.rows and not keep.any():
            raise UserError(f"data rows: {path} has no row with all of {self.rows}; leave one out")
        return arrow.filter(keep), [row for row, wanted in zip(rows, keep.tolist(), strict=True) if wanted]

    def resolved_columns(self) -> TableColumns:
        """Return which column is what, by their names in the table; report the kinds that were recognised."""
        path = Path(self.path).expanduser().absolute()
        arrow, features, _, _ = read_table(path, self.sep)
        columns, guesses = self._resolved(arrow, features, path)
        for guess in guesses:
            rank_zero_info(guess)
        return columns

    def _resolved(self, arrow: pa.Table, features: Mapping[str, Any], path: Path) -> tuple[TableColumns, list[str]]:
        """Which column is what, the kinds that were recognised filled in, and a sentence about each of these."""
        columns = self.columns.found_in(arrow.column_names, str(path))
        kinds, notes = dict(columns.kinds), []
        for name in columns.tasks.values():
            if name in kinds or name in columns.one_hot or name in columns.classes:
                continue
            if guess := guessed_kind(arrow[name].combine_chunks(), features.get(name)):
                kinds[name] = guess.kind
                notes.append(
                    f"{path}: {name!r} {guess.reason}, so it is taken as {guess.kind}; set data columns.kinds: "
                    f"{{{name}: single_label}} where each value is a class of its own."
                )
        return replace(columns, kinds=kinds), notes

    def _frame(
        self, arrow: pa.Table, values: Mapping[str, list[Any]], rows: Sequence[int], columns: TableColumns, path: Path
    ) -> pd.DataFrame:
        """One row for each image: those of one image are joined where they only differ in their captions."""
        import pandas as pd

        kind = arrow.schema.field(columns.image).type
        if not _holds_paths(kind):
            raise UserError(
                f"data columns.image: {path} has {kind} in {columns.image!r}, which are no paths; images inside "
                "the table are read by data.class_path: datamodules.HubImages"
            )
        names = path_texts(arrow[columns.image])
        frame = pd.DataFrame({"name": names, "row": rows, **values}, dtype=object)
        problems = [(row, "no image path") for row, name in zip(rows, names, strict=True) if not name]
        problems += [
            (row, f"{shown} has a password in it, which would be recorded")
            for row, name in zip(rows, names, strict=True)
            if (shown := without_passwords(name)) != name
        ]
        if columns.split:
            texts = plain_texts(arrow[columns.split])
            frame["split"] = [split_of_name(text) for text in texts]
            problems += [
                (row, f"split {text!r} must be one of train, val, test")
                for row, text, split in zip(rows, texts, frame["split"], strict=True)
                if split is None
            ]
        if "group" in frame:
            frame["group"] = [group or name for group, name in zip(frame["group"], names, strict=True)]
        if not problems:
            frame, problems = _joined(frame)
        if problems:
            raise table_error(str(path), problems, "correct or remove these rows")
        if not len(frame):
            raise UserError(f"{path}: has no rows; give a table with at least one sample")
        return frame

    def _locate_images(self, frame: pd.DataFrame, root: Path, path: Path) -> None:
        """Add the column of sources, and note which are fetched."""
        names = [str(name) for name in frame["name"]]
        remote = [bool(URL.match(name)) for name in names]
        local = iter(as_on_disk(root, [name for name, url in zip(names, remote, strict=True) if not url]))
        frame["source"] = [
            str(_kept_at(name)) if url else str(Path(next(local)).expanduser())
            for name, url in zip(names, remote, strict=True)
        ]
        self._urls = {row: name for row, (name, url) in enumerate(zip(names, remote, strict=True)) if url}
        if not any(remote) and not any((root / source).exists() for source in frame["source"]):
            raise UserError(
                f"{path}: none of its {len(frame)} images exists below {root}, the first is {names[0]!r}; set data "
                "root to the folder that the paths start from, or data columns.image to another column"
            )

    def _splits(self, frame: pd.DataFrame, columns: TableColumns) -> Any:
        labels: Any = [""] * len(frame)
        if columns.tasks:
            labels = strata(frame[target_column(LABEL_TASK)].tolist(), kind_of(columns.task_kinds, LABEL_TASK))
        otherwise: SplitBy = "group" if columns.group else "stratified" if columns.tasks else "random"
        return resolve_splits(
            self.split_options,
            labels=np.asarray(labels, dtype=str),
            groups=frame["group"] if "group" in frame else frame["name"],
            seed=self.seed,
            default="table" if columns.split else otherwise,
            own=np.array(frame["split"], dtype=str) if columns.split else None,
            carve=True,
        )

    def _choices(self, columns: TableColumns, names: Sequence[str], path: Path) -> list[str]:
        """A sentence about the columns that were chosen by their names, and those that are not used."""
        chosen = [
            f"{role} {getattr(columns, role)!r}"
            for role in USUAL_NAMES
            if getattr(self.columns, role) == AUTO and getattr(columns, role)
        ]
        used = {columns.image, columns.group, columns.split, columns.caption, *columns.tasks.values()}
        used |= {name for of_task in columns.one_hot.values() for name in of_task}
        unused = [repr(name) for name in names if name not in used]
        notes = [f"{path}: columns by their names: {', '.join(chosen)}."] if chosen else []
        if not (columns.tasks or columns.caption):
            return notes  # only the images are wanted
        return [*notes, *([f"{path}: columns that are not used: {', '.join(unused)}."] if unused else [])]

    def fetch(self) -> dict[int, str]:
        """Fetch the images behind URLs that are not there yet; return why not for rows that could not be fetched."""
        return _fetched(self.table, self._urls)

    def verification(self, cached_splits: Sequence[SplitName] = (), *, quality: bool = False) -> Verification:
        """Fetch the images behind URLs that are not there yet, and read all images once.

        Raises:
            UserError: none could be fetched.
        """
        reasons = self.fetch()
        if reasons and len(reasons) == len(self._urls):
            raise UserError(
                f"{self.table.origin}: no image could be fetched; {next(iter(reasons.values()))}: check the network "
                "and the URLs"
            )
        found = super().verification(cached_splits, quality=quality)
        return replace(found, bad={row: reasons.get(row, reason) for row, reason in found.bad.items()})

    def count_left_out(self) -> dict[str, int]:
        """Count the files among the local images that the table does not name."""
        sources = self.table.sources.to_pylist()
        return count_files_left_out(
            [source for row, source in enumerate(sources) if row not in self._urls], self.table.origin
        )


def read_table(path: Path, sep: str) -> tuple[pa.Table, Mapping[str, Any], list[int], list[str]]:
    """Return the table in columns, the types of the ``datasets`` library, the row numbers and notes."""
    import pyarrow as pa

    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"data path: {path.name} must end with one of {', '.join(SUFFIXES)}; convert the table")
    if suffix in (".csv", ".tsv", ".txt"):
        file = read_label_file(path, [], separator=sep)
        if file.problems:
            raise table_error(str(path), file.problems, "correct or remove these rows")
        table = pa.table({name: pa.array(column, pa.large_string()) for name, column in file.columns.items()})
        return table, dict.fromkeys(table.column_names), file.rows, file.notes
    if not path.is_file():
        raise UserError(f"data path: there is no file {path}; give a table")
    try:
        if suffix == ".parquet":
            import datasets
            import pyarrow.parquet as pq

            table = pq.read_table(path)
            features: Mapping[str, Any] = datasets.Features.from_arrow_schema(table.schema)
        else:
            import pyarrow.json

            table = pyarrow.json.read_json(path)
            features = dict.fromkeys(table.column_names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"data path: {path} cannot be read ({' '.join(str(error).split())[:200]})") from error
    table = table.rename_columns([composed(name) for name in table.column_names])
    return table, features, list(range(1, len(table) + 1)), []


def _holds_paths(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary))


def _joined(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[int, str]]]:
    """Join the rows of each image; where they differ in more than captions, each is a problem."""
    if not frame["name"].duplicated().any():
        return frame, []
    others = [column for column in frame.columns if column not in ("name", "row", "caption")]
    first = frame.groupby("name", sort=False).first()
    problems = []
    for record in frame[frame["name"].duplicated()].to_dict("records"):
        kept = first.loc[record["name"]]
        different = [name.removeprefix("target ") for name in others if record[name] != kept[name]]
        if different or "caption" not in frame:
            how = f", with another {', '.join(different)}" if different else ""
            problems.append((record["row"], f"image {record['name']!r} again{how}, first in row {kept['row']}"))
    if "caption" in frame:
        captions = frame.groupby("name", sort=False)["caption"].agg(
            lambda lists: list(dict.fromkeys(text for texts in lists for text in texts if text)) or [""]
        )
        first["caption"] = captions
    return first.reset_index(), problems


def _kept_at(url: str) -> Path:
    """Return the file that an image behind a URL is kept in."""
    digest = hashlib.sha256(url.encode()).hexdigest()
    suffix = Path(urlsplit(url).path).suffix.lower()
    suffix = suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ""
    return cache_directory() / "downloads" / digest[:2] / f"{digest}{suffix}"


def _fetched(table: SampleTable, urls: Mapping[int, str]) -> dict[int, str]:
    """Fetch what is not there yet; return why not for each row that could not be fetched."""
    absent = {row: url for row, url in urls.items() if not Path(table.source(row)).exists()}
    if not absent:
        return {}

    def fetch(row: int) -> str:
        try:
            content = _content(absent[row])
        except Exception as error:  # which errors there are depends on the protocol's library
            return f"{absent[row]} cannot be fetched ({' '.join(str(error).split())[:200] or type(error).__name__})"
        if len(content) > MAX_BYTES:
            return f"{absent[row]} cannot be fetched (larger than {MAX_BYTES} bytes)"
        with write_atomically(Path(table.source(row))) as path:
            path.write_bytes(content)
        return ""

    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        reasons = dict(zip(absent, tracked(pool.map(fetch, absent), "fetching images", len(absent)), strict=True))
    return {row: reason for row, reason in reasons.items() if reason}


def _content(url: str) -> bytes:
    if url.lower().startswith(("http://", "https://")):
        # fsspec would ask for the size first: two requests an image.
        request = urllib.request.Request(url, headers={"User-Agent": "vitrail"})
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            content: bytes = response.read(MAX_BYTES + 1)
    else:
        import fsspec

        with fsspec.open(url, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    return content
