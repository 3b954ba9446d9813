"""A data set in columns: names, sources, splits, groups, captions and targets of all samples.

Everything is in NumPy and Arrow arrays, nothing in a Python object per row, so a table of some million rows stays
small, and worker processes share its memory instead of copying it as reference counts are touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vitrail.errors import UserError
from vitrail.predictions import known_rows, target_texts
from vitrail.types import CLASS_KINDS, LABEL_TASK, UNKNOWN, TaskKind, kind_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray


def composed(text: str) -> str:
    """Return the text in the Unicode normal form NFC, in which the same letters are the same characters."""
    return unicodedata.normalize("NFC", text)


class Missing:
    """What counts as missing, one rule for labels, attributes, groups and captions, and how often it did.

    Attributes:
        texts: that mean unknown, case-folded; the empty one always does.
        counts: for each column the number of rows by the text that made them unknown; the empty text is not listed.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.texts = frozenset(composed(text).strip().casefold() for text in texts)
        self.counts: dict[str, dict[str, int]] = {}

    def means_unknown(self, text: str) -> bool:
        """Return whether a text, blanks around it aside, means that the value is unknown."""
        text = text.strip()
        return not text or text.casefold() in self.texts

    def known(self, column: str, texts: Iterable[str], aliases: Mapping[str, str] | None = None) -> list[str]:
        """Return the texts of a column in NFC without blanks around them, empty where missing, which is counted.

        Args:
            column: name in reports: ``class``, ``group``, ``caption`` or that of ``attribute_column``.
            texts: one of each row.
            aliases: texts to replace before.
        """
        known: dict[str, str] = {}
        kept = []
        for text in texts:
            if (value := known.get(text)) is None:
                stripped = composed(text).strip()
                value = (aliases or {}).get(stripped, stripped)
                value = known[text] = "" if self.means_unknown(value) else value
            if not value and (stripped := text.strip()):
                counts = self.counts.setdefault(column, {})
                counts[stripped] = counts.get(stripped, 0) + 1
            kept.append(value)
        return kept


def attribute_column(task: str) -> str:
    """Return the name of a task's column in reports; a task may be called like another column of the table."""
    return task if task == LABEL_TASK else f"attribute {task}"


def strings_of(column: pd.Series[Any], fill: pa.LargeStringArray | str = "") -> pa.LargeStringArray:
    """Return a column as one array of Arrow strings; missing (with an array as ``fill`` also empty) ones are filled."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # The pandas conversion first: it also takes columns of mixed types, which Arrow refuses.
    strings = pa.chunked_array([pa.array(column.astype("string"), type=pa.large_string())]).combine_chunks()
    strings = pc.fill_null(strings, fill)
    if not isinstance(fill, str):
        strings = pc.if_else(pc.equal(strings, ""), fill, strings)
    return pa.concat_arrays([strings])


def codes_of(strings: pa.LargeStringArray, vocabulary: Sequence[str]) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Return indices into the vocabulary (``UNKNOWN`` where it lacks the value), and counts of the values it lacks."""
    encoded = strings.dictionary_encode()
    place = {value: index for index, value in enumerate(vocabulary)}
    distinct = encoded.dictionary.to_pylist()
    by_code = np.array([place.get(value, UNKNOWN) for value in distinct], dtype=np.int64)
    codes = encoded.indices.to_numpy()
    counts = np.bincount(codes, minlength=len(distinct))
    missing = {value: int(count) for value, count in zip(distinct, counts, strict=True) if value not in place}
    return by_code[codes], missing


def hash_strings(digest: hashlib._Hash, strings: pa.LargeStringArray) -> None:
    """Feed lengths and bytes to a hash, so that neither chunking nor offsets matter."""
    _, offset_buffer, data = strings.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)[strings.offset :][: len(strings) + 1]
    digest.update(np.diff(offsets).tobytes())
    if data is not None:
        digest.update(data[int(offsets[0]) : int(offsets[-1])])


SPLITS = ("train", "val", "test")
"""Names of the splits; ``SampleTable.split_codes`` are indices into them."""

_OWN_COLUMNS = ("name", "source", "split", "group", "caption", "row")
_SHOWN_PROBLEMS = 20
_SHOWN_NAMES = 5


def table_error(origin: str, problems: Iterable[tuple[int, str]], hint: str) -> UserError:
    """Return the problems (row, text) of a table's file as one error: the first twenty by row, then a count."""
    ordered = sorted(problems)
    lines = [f"{origin}: {len(ordered)} {'problem' if len(ordered) == 1 else 'problems'}; {hint}"]
    lines += [f"  {origin}:{row}: {text}" for row, text in ordered[:_SHOWN_PROBLEMS]]
    if len(ordered) > _SHOWN_PROBLEMS:
        lines.append(f"  and {len(ordered) - _SHOWN_PROBLEMS} more")
    return UserError("\n".join(lines))


@dataclass(frozen=True, eq=False)
class CaptionLists:
    """One caption or more of each of N samples, in columns.

    Attributes:
        values: Arrow strings ``(M,)``, all captions, sample by sample.
        offsets: int64 ``(N + 1,)``, where each sample's captions begin.
    """

    values: pa.LargeStringArray
    offsets: NDArray[np.int64]

    @classmethod
    def from_column(cls, column: pd.Series[Any]) -> CaptionLists:
        """Convert a column of texts or of lists of texts; a sample without any has one empty text."""
        import pandas as pd
        import pyarrow as pa

        if not any(isinstance(value, list | tuple) for value in column):
            return cls(strings_of(column), np.arange(len(column) + 1, dtype=np.int64))
        lists = [
            ([str(text) for text in value] or [""])
            if isinstance(value, list | tuple)
            else ["" if pd.isna(value) else str(value)]
            for value in column
        ]
        array = pa.array(lists, pa.large_list(pa.large_string()))
        return cls(array.values, array.offsets.to_numpy())

    @property
    def counts(self) -> NDArray[np.int64]:
        """int64 ``(N,)``, captions of each sample, at least 1."""
        return np.diff(self.offsets)

    @property
    def several(self) -> bool:
        """Whether some sample has more than one."""
        return len(self.values) > len(self.offsets) - 1

    @property
    def first(self) -> pa.LargeStringArray:
        """Arrow strings ``(N,)``, the first caption of each sample."""
        return self.values.take(self.offsets[:-1]) if self.several else self.values

    def of(self, rows: Sequence[int]) -> list[list[str]]:
        """Return all captions of some samples."""
        return [self.values[int(self.offsets[row]) : int(self.offsets[row + 1])].to_pylist() for row in rows]

    def pick(self, rows: Sequence[int], numbers: Sequence[int]) -> list[str]:
        """Return one caption each of some samples, by its number."""
        places = self.offsets[np.asarray(rows, dtype=np.int64)] + np.asarray(numbers, dtype=np.int64)
        picked: list[str] = self.values.take(places).to_pylist()
        return picked


@dataclass(frozen=True, eq=False)
class SampleTable:
    """All samples of a data set, one row each; the row number is the ``sample_id`` everywhere. N is their number.

    Attributes:
        names: Arrow strings ``(N,)``, a stable, unique name of each sample.
        caption_lists: the captions of each sample, one or more; a single empty one where there is none.
        group_ids: int64 ``(N,)``, index into ``group_values``.
        group_values: Arrow strings, the distinct groups in order of appearance.
        split_codes: int8 ``(N,)``, index into ``SPLITS``.
        rows: int64 ``(N,)``, line of each sample in the file of origin.
        tasks: class names of each task in the order of their indices, none for regression; the main task first.
        targets: for each task its targets by its kind: int64 ``(N,)``, index into the class names or ``UNKNOWN``;
            multi-label int8 ``(N, C)``, 1, 0 or ``UNKNOWN``; regression float32 ``(N,)``, NaN where not known.
        kinds: kinds of the tasks that are not single-label.
        unseen: for each task the values that its vocabulary lacks, with the number of samples that have them.
        missing: for each task and for ``group`` and ``caption`` columns how many rows are unknown because of which text
            (see ``checks.missing``). Not part of the fingerprint.
        notes: what was left out or matched nothing, one sentence each. Not part of the fingerprint.
        origin: file that the table comes from, for messages.
        root: folder that the sources are relative to, or empty.
        left_out: bool ``(N,)``, samples that are in no split, as those beyond ``shots``; None for none.
    """

    names: pa.LargeStringArray
    caption_lists: CaptionLists
    group_ids: NDArray[np.int64]
    group_values: pa.LargeStringArray
    split_codes: NDArray[np.int8]
    rows: NDArray[np.int64]
    tasks: dict[str, list[str]]
    targets: dict[str, NDArray[Any]]
    unseen: dict[str, dict[str, int]]
    origin: str
    root: str
    _sources: pa.LargeStringArray
    missing: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kinds: dict[str, TaskKind] = field(default_factory=dict)
    left_out: NDArray[np.bool_] | None = None

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        targets: Sequence[str] | Mapping[str, str],
        vocabularies: Mapping[str, Sequence[str]] | None = None,
        origin: str = "labels.csv",
        root: str = "",
        *,
        missing: Mapping[str, dict[str, int]] | None = None,
        notes: Sequence[str] = (),
        kinds: Mapping[str, TaskKind] | None = None,
    ) -> SampleTable:
        """Build the table from a data frame.

        Args:
            frame: columns ``name``, ``source`` (path or index) and ``split``; one for each target: texts, empty where
                unknown, of regression tasks numbers, of multi-label tasks lists of labels, None where unknown, or
                mappings from label to whether it applies (None: not known); optionally ``group`` (by default each
                sample is its own), ``caption`` (a text or several) and ``row`` (by default from 2, as in a CSV file).
            targets: tasks, the main one, ``class``, first, each with its column (``target_column`` names one that no
                other has); a list where columns are called like their tasks; empty for data without labels.
            vocabularies: class names by task; other tasks get those of the train rows in alphabetical order. Ordinal
                tasks need them, in their order.
            origin: see ``SampleTable``, as for all that follow.
            root: not part of the fingerprint, so that the data may be moved.
            missing: as ``SampleTable``.
            notes: as ``SampleTable``.
            kinds: as ``SampleTable``.

        Raises:
            UserError: for missing columns, no rows, unusable rows (reported together), and tasks without a class.
        """
        import pandas as pd

        targets = _columns_of(targets, origin)
        _check_columns(frame, targets, vocabularies or {}, origin)
        rows = np.asarray(frame["row"] if "row" in frame else range(2, len(frame) + 2), dtype=np.int64)
        columns = {key: strings_of(frame[key]) for key in ("name", "source", "split")}
        _check_rows(columns, rows, origin)
        split_codes = codes_of(columns["split"], SPLITS)[0].astype(np.int8)
        groups = strings_of(frame["group"], fill=columns["name"]) if "group" in frame else columns["name"]
        encoded = groups.dictionary_encode()
        tasks, values, unseen = _encode_targets(frame, targets, vocabularies or {}, kinds, split_codes == 0, origin)
        return cls(
            names=columns["name"],
            caption_lists=CaptionLists.from_column(frame.get("caption", pd.Series("", frame.index))),
            group_ids=encoded.indices.to_numpy().astype(np.int64),
            group_values=encoded.dictionary,
            split_codes=split_codes,
            rows=rows,
            tasks=tasks,
            targets=values,
            unseen=unseen,
            origin=origin,
            root=root,
            _sources=columns["source"],
            missing={column: dict(sorted(counts.items())) for column, counts in (missing or {}).items()},
            notes=list(notes),
            kinds={task: kind for task, kind in (kinds or {}).items() if kind != "single_label"},
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sources(self) -> pa.LargeStringArray:
        """Arrow strings ``(N,)``: paths of the images (below ``root``), or indices where images are not files."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not self.root:
            return self._sources
        absolute = pc.starts_with(self._sources, "/")
        root, slash = (pa.scalar(text, pa.large_string()) for text in (self.root.rstrip("/"), "/"))
        below = pc.binary_join_element_wise(root, self._sources, slash)
        return pc.if_else(absolute, self._sources, below)

    @property
    def groups(self) -> pa.LargeStringArray:
        """Arrow strings ``(N,)``: the physical object or product of each sample."""
        return self.group_values.take(self.group_ids)

    @property
    def captions(self) -> pa.LargeStringArray:
        """Arrow strings ``(N,)``: the first caption of each sample, empty where there is none."""
        return self.caption_lists.first

    def name(self, index: int) -> str:
        """Return the stable name of a sample."""
        return str(self.names[index].as_py())

    def source(self, index: int) -> str:
        """Return the path of a sample's image, or its index where images are not files."""
        return os.path.join(self.root, self._sources[index].as_py())  # noqa: PTH118 -- a source need not be a path

    def caption(self, index: int) -> str:
        """Return the first caption of a sample, empty where there is none."""
        return self.caption_lists.of([index])[0][0]

    def group(self, index: int) -> str:
        """Return the group of a sample."""
        return str(self.group_values[int(self.group_ids[index])].as_py())

    def split(self, index: int) -> str:
        """Return the split of a sample."""
        return SPLITS[self.split_codes[index]]

    def where(self, index: int) -> str:
        """Return file and row of a sample, for messages."""
        return f"{self.origin}:{self.rows[index]}"

    def split_indices(self, split: str) -> NDArray[np.int64]:
        """Return the rows of a split in order, int64."""
        within = self.split_codes == SPLITS.index(split)
        if self.left_out is not None:
            within &= ~self.left_out
        return np.flatnonzero(within).astype(np.int64)

    def class_counts(self, split: str = "train") -> dict[str, list[int]]:
        """Return for each task how many samples of the split each class or label has; none for regression.

        Unknown targets are not counted.
        """
        indices = self.split_indices(split)
        counts = {}
        for task, classes in self.tasks.items():
            known = self.targets[task][indices]
            match kind_of(self.kinds, task):
                case "multi_label":
                    counts[task] = (known == 1).sum(axis=0).tolist()
                case "regression":
                    counts[task] = []
                case _:
                    counts[task] = np.bincount(known[known != UNKNOWN], minlength=len(classes)).tolist()
        return counts

    def target_stats(self) -> dict[str, list[float]]:
        """Return mean and standard deviation of each regression task's known training targets."""
        rows = self.split_indices("train")
        stats = {}
        for task in self.tasks:
            if kind_of(self.kinds, task) == "regression":
                known = self.targets[task][rows].astype(np.float64)
                known = known[~np.isnan(known)]
                stats[task] = [float(known.mean()), float(known.std())]
        return stats

    def target_medians(self) -> dict[str, list[float]]:
        """Return the median of each regression task's known training targets, a list of one number each."""
        rows = self.split_indices("train")
        numbers = [task for task in self.tasks if kind_of(self.kinds, task) == "regression"]
        return {task: [float(np.nanmedian(self.targets[task][rows].astype(np.float64)))] for task in numbers}

    def target_texts(self, task: str, rows: NDArray[np.int64]) -> list[str | None]:
        """Return the targets of some rows as texts, see ``vitrail.predictions.target_texts``."""
        return target_texts(self.targets[task][rows], self.tasks[task])

    def facts(self, sample_ids: NDArray[np.int64], content: Sequence[str], *, image_files: bool) -> pa.Table:
        """Return what a gallery records of some samples; see ``vitrail.types.DescribesImages.image_facts``.

        Args:
            sample_ids: int64 ``(n,)``.
            content: hash of each of their images.
            image_files: whether the sources are files.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = pa.array(sample_ids)
        sources = self.sources.take(rows).to_pylist() if image_files else [""] * len(sample_ids)
        columns = {
            "id": self.names.take(rows),
            "path": pa.array([os.path.abspath(source) if source else "" for source in sources]),  # noqa: PTH100 -- keeps links
            "content": pa.array(content),
            "caption": self.captions.take(rows),
            "group": self.groups.take(rows),
            "split": pa.array(SPLITS).take(pa.array(self.split_codes[sample_ids])),
        }
        labels = {}
        for task, names in self.tasks.items():
            codes, kind = self.targets[task][sample_ids], kind_of(self.kinds, task)
            labels[f"label_{task}"] = _labels(codes, names, kind)
        captions = [[text for text in texts if text.strip()] for texts in self.caption_lists.of(sample_ids.tolist())]
        strings = {name: pc.cast(values, pa.string()) for name, values in columns.items()}
        return pa.table({**strings, **labels, "captions": pa.array(captions, pa.list_(pa.string()))})

    def as_test_set(
        self, tasks: Mapping[str, Sequence[str]], kinds: Mapping[str, TaskKind] | None = None
    ) -> SampleTable:
        """Return the table with all samples in the test split and classes numbered as a model has them.

        Args:
            tasks: class names of each of the model's tasks. Values that they lack, and tasks that the table lacks, are
                unknown; the values are in ``unseen``.
            kinds: of the model's tasks.

        Raises:
            UserError: where the table has tasks of the model's, but no class of theirs.
        """
        targets, unseen = {}, {}
        for task, names in tasks.items():
            own, kind, given = self.tasks.get(task, []), kind_of(kinds, task), kind_of(self.kinds, task)
            if task in self.tasks and kind != given and not {kind, given} <= set(CLASS_KINDS):
                raise UserError(f"{self.origin}: task {task!r} is {given}, the model has it as {kind}; set its kind")
            codes = self.targets.get(task, unknown_column(kind, len(self), len(own)))
            targets[task], counts = _renumbered(kind, codes, own, names)
            strange = {name: count for name, count in zip(own, counts, strict=False) if name not in names and count}
            unseen[task] = {**self.unseen.get(task, {}), **strange}
        common = [task for task in tasks if known_rows(targets[task]).any()]
        if not common and (shared := [task for task in tasks if task in self.tasks]):
            raise UserError(
                f"{self.origin}: none of its classes of {shared[0]!r} ({_some(self.tasks[shared[0]])}) is one of the "
                f"model's ({_some(tasks[shared[0]])}); rename them, as by vocabulary.aliases"
            )
        return replace(
            self,
            tasks={task: list(names) for task, names in tasks.items()},
            targets=targets,
            unseen=unseen,
            kinds={task: kind for task in tasks if (kind := kind_of(kinds, task)) != "single_label"},
            split_codes=np.full(len(self), SPLITS.index("test"), dtype=np.int8),
            left_out=None,
        )

    def renamed(self, names: Mapping[str, str]) -> SampleTable:
        """Return the table with other names for classes of the main task; classes that get one name become one."""
        own = self.tasks.get(LABEL_TASK, [])
        called = [names.get(name, name) for name in own]
        distinct = list(dict.fromkeys(called))
        # UNKNOWN is the last entry.
        place = np.array([*(distinct.index(name) for name in called), UNKNOWN], dtype=np.int64)
        targets = {LABEL_TASK: place[self.targets[LABEL_TASK]]} if own else {}
        return replace(
            self, tasks={**self.tasks, LABEL_TASK: distinct} if own else self.tasks, targets={**self.targets, **targets}
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 in hexadecimal of all content; ``root``, ``origin`` and the row numbers do not count."""
        described: list[Any] = [self.tasks, self.unseen, *([self.kinds] if self.kinds else [])]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for strings in (self.names, self._sources, self.caption_lists.values, self.group_values):
            hash_strings(digest, strings)
        if self.caption_lists.several:
            digest.update(self.caption_lists.offsets.tobytes())
        for codes in (self.split_codes, self.group_ids, *(self.targets[task] for task in self.tasks)):
            digest.update(np.ascontiguousarray(codes).tobytes())
        if self.left_out is not None:
            digest.update(self.left_out.tobytes())
        return digest.hexdigest()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def target_column(task: str) -> str:
    """Return a name for a task's column that no other column has, whatever the task is called."""
    return f"target {task}"


def _columns_of(targets: Sequence[str] | Mapping[str, str], origin: str) -> Mapping[str, str]:
    """Return the column of each task."""
    if targets and next(iter(targets)) != LABEL_TASK:
        raise ValueError(f"the first target must be {LABEL_TASK!r}, not {list(targets)}")
    if isinstance(targets, Mapping):
        return targets
    if taken := [task for task in targets if task in _OWN_COLUMNS]:
        raise UserError(f"{origin}: a task cannot use the column {taken[0]!r}; give from_frame() a mapping to another")
    return {task: task for task in targets}


def _check_columns(
    frame: pd.DataFrame, targets: Mapping[str, str], vocabularies: Mapping[str, Sequence[str]], origin: str
) -> None:
    missing = [key for key in ("name", "source", "split", *targets.values()) if key not in frame]
    if missing:
        raise UserError(
            f"{origin}: missing column {', '.join(missing)}; the table has {', '.join(map(str, frame.columns))}"
        )
    if not len(frame):
        raise UserError(f"{origin}: has no rows; give a table with at least one sample")
    for task, classes in vocabularies.items():
        if task not in targets:
            raise UserError(
                f"{origin}: vocabulary for {task!r}, which is not a target; targets are {', '.join(targets)}"
            )
        if len(set(classes)) != len(classes) or "" in classes:
            raise UserError(f"{origin}: vocabulary of {task!r} has a repeated or empty name; remove it")


def _check_rows(columns: Mapping[str, pa.LargeStringArray], rows: NDArray[np.int64], origin: str) -> None:
    problems: list[tuple[int, str]] = []
    for key in ("name", "source"):
        empty = columns[key].to_numpy(zero_copy_only=False) == ""
        problems += [(int(row), f"empty {key}") for row in rows[empty]]
    encoded = columns["name"].dictionary_encode()
    codes = encoded.indices.to_numpy()
    first = np.unique(codes, return_index=True)[1]
    for index in np.flatnonzero(first[codes] != np.arange(len(codes))):
        name = columns["name"][int(index)].as_py()
        if name:
            problems.append((int(rows[index]), f"name {name!r} again, first in row {rows[first[codes[index]]]}"))
    for index in np.flatnonzero(codes_of(columns["split"], SPLITS)[0] == UNKNOWN):
        split = columns["split"][int(index)].as_py()
        problems.append((int(rows[index]), f"split {split!r} is not one of {', '.join(SPLITS)}"))
    if problems:
        raise table_error(origin, problems, "correct or remove these rows")


def _renumbered(
    kind: TaskKind, codes: NDArray[Any], own: Sequence[str], names: Sequence[str]
) -> tuple[NDArray[Any], list[int]]:
    """Targets by the classes of a model, unknown where it lacks one, and how often each of the own classes occurs."""
    place = {name: index for index, name in enumerate(names)}
    if kind == "regression":
        return codes, []
    if kind == "multi_label":
        # A label that the table does not know is not known to be absent.
        padded = np.concatenate([codes, np.full((len(codes), 1), UNKNOWN, dtype=np.int8)], axis=1)
        own_place = {name: index for index, name in enumerate(own)}
        columns = [own_place.get(name, len(own)) for name in names]
        return np.ascontiguousarray(padded[:, columns]), (codes == 1).sum(axis=0).tolist()
    mapped = np.array([*(place.get(name, UNKNOWN) for name in own), UNKNOWN], dtype=np.int64)
    # UNKNOWN is the last entry.
    return mapped[codes], np.bincount(codes[codes != UNKNOWN], minlength=len(own)).tolist()


def _labels(targets: NDArray[Any], names: Sequence[str], kind: TaskKind) -> pa.Array:
    """The targets of a task as a gallery has them, null where not known: text, lists of texts, or float32."""
    import pyarrow as pa

    known = known_rows(targets)
    if kind == "regression":
        return pa.array(targets, pa.float32(), mask=~known)
    if kind == "multi_label":
        several = [
            [name for name, entry in zip(names, row, strict=True) if entry == 1] if is_known else None
            for row, is_known in zip(targets.tolist(), known.tolist(), strict=True)
        ]
        return pa.array(several, pa.list_(pa.string()))
    return pa.array(names, pa.string()).take(pa.array(targets, mask=~known))


def unknown_column(kind: TaskKind, rows: int, labels: int) -> NDArray[Any]:
    """Return targets of a kind that are all unknown."""
    if kind == "regression":
        return np.full(rows, np.nan, dtype=np.float32)
    return np.full((rows, labels), UNKNOWN, np.int8) if kind == "multi_label" else np.full(rows, UNKNOWN, np.int64)


def _encode_targets(
    frame: pd.DataFrame,
    targets: Mapping[str, str],
    vocabularies: Mapping[str, Sequence[str]],
    kinds: Mapping[str, TaskKind] | None,
    in_train: NDArray[np.bool_],
    origin: str,
) -> tuple[dict[str, list[str]], dict[str, NDArray[Any]], dict[str, dict[str, int]]]:
    """Class names, targets and unseen values with their counts, each by task."""
    tasks: dict[str, list[str]] = {}
    values: dict[str, NDArray[Any]] = {}
    unseen: dict[str, dict[str, int]] = {}
    for task, column in targets.items():
        kind = kind_of(kinds, task)
        rows = np.asarray(frame["row"] if "row" in frame else range(2, len(frame) + 2), dtype=np.int64).tolist()
        if kind == "multi_label":
            cells = _label_cells(frame[column].tolist(), task, rows, origin)
            tasks[task], values[task], unseen[task] = _encode_labels(cells, vocabularies.get(task), in_train)
        elif kind == "regression":
            tasks[task], unseen[task] = [], {}
            values[task] = _encode_numbers(frame[column], task, rows, in_train, origin)
        elif kind == "ordinal" and task not in vocabularies:
            raise UserError(f"{origin}: task {task!r} is ordinal; give its classes in their order as its vocabulary")
        if kind not in CLASS_KINDS:
            if not known_rows(values[task][in_train]).any():
                raise UserError(f"{origin}: task {task!r} has no known value in the train split; drop the task")
            continue
        strings = strings_of(frame[column])
        in_use = sorted(set(strings.filter(in_train).unique().to_pylist()) - {""})
        tasks[task] = list(vocabularies.get(task, in_use))
        if not tasks[task]:
            raise UserError(f"{origin}: task {task!r} has no known value in the train split; add one or drop the task")
        values[task], missing = codes_of(strings, tasks[task])
        unseen[task] = {value: count for value, count in sorted(missing.items()) if value}
    return tasks, values, unseen


def _encode_numbers(
    column: pd.Series[Any], task: str, rows: Sequence[int], in_train: NDArray[np.bool_], origin: str
) -> NDArray[np.float32]:
    """Targets of a regression task, float32 ``(N,)``, NaN where not known.

    Raises:
        UserError: a cell is no number, or the numbers need more digits than float32 has.
    """
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    is_empty = (column.isna() | (column == "")).to_numpy(bool)
    wrong = np.flatnonzero((np.isnan(numbers) & ~is_empty) | (np.abs(numbers) > np.finfo(np.float32).max))
    if len(wrong):
        cells = ((rows[row], column.iloc[row]) for row in wrong.tolist())
        problems = [(row, f"{task} {str(cell)!r} must be a number, or empty (not known)") for row, cell in cells]
        raise table_error(origin, problems, "correct these cells")
    values = numbers.astype(np.float32)
    known = numbers[in_train & ~np.isnan(numbers)]
    if len(known) and np.nanmax(np.abs(values - numbers)) > 1e-3 * known.std() > 0:
        raise UserError(
            f"{origin}: numbers of {task!r} differ by less than float32 can hold, such as {known[0]:.10g}; subtract a "
            "constant from all of them"
        )
    return values


def _label_cells(
    cells: Sequence[Any], task: str, rows: Sequence[int], origin: str
) -> list[Mapping[str, bool | None] | None]:
    """Cells of a multi-label column as mappings; None where not known.

    Raises:
        UserError: a cell is a text or a number; a text would be taken for a list of letters.
    """
    is_nothing = [cell is None or (isinstance(cell, float) and np.isnan(cell)) for cell in cells]
    problems = [
        (row, f"{task} {cell!r} must be a list of labels, or None (not known)")
        for row, cell, nothing in zip(rows, cells, is_nothing, strict=True)
        if not nothing and (isinstance(cell, str) or not isinstance(cell, Iterable))
    ]
    if problems:
        raise table_error(origin, problems, "correct these cells")
    return [
        None if nothing else cell if isinstance(cell, Mapping) else dict.fromkeys(cell, True)
        for cell, nothing in zip(cells, is_nothing, strict=True)
    ]


def _encode_labels(
    cells: Sequence[Mapping[str, bool | None] | None],
    vocabulary: Sequence[str] | None,
    in_train: NDArray[np.bool_],
) -> tuple[list[str], NDArray[np.int8], dict[str, int]]:
    """Labels, targets ``(N, C)`` and counts of the labels that the vocabulary lacks, of a multi-label column."""
    in_use = {name for cell, train in zip(cells, in_train.tolist(), strict=True) if train for name in cell or ()}
    names = sorted(in_use) if vocabulary is None else list(vocabulary)
    place = {name: index for index, name in enumerate(names)}
    targets = np.zeros((len(cells), len(names)), dtype=np.int8)
    unseen: dict[str, int] = {}
    for row, cell in enumerate(cells):
        if cell is None:
            targets[row] = UNKNOWN
            continue
        for name, applies in cell.items():
            if name in place:
                targets[row, place[name]] = UNKNOWN if applies is None else int(applies)
            elif applies:
                unseen[name] = unseen.get(name, 0) + 1
    return names, targets, dict(sorted(unseen.items()))
