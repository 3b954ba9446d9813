"""HubImages: any data set of the ``datasets`` library that has a column of images and one of labels.

Data sets come from huggingface.co/datasets, or from a local folder or file in one of the library's formats. Without a
network ``datasets`` retries for half a minute and more; here the hub is asked once whether it can be reached, and if
not, only the local cache is used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from datamodules.base import ImageDataModule
from datamodules.files.columns import (
    kinds_of_tasks,
    label_vocabularies,
    of_class_kinds,
    other_targets,
    require_column,
    require_order,
    sample_columns,
    strata,
    vocabularies,
)
from datamodules.files.label_csv import count_files_left_out
from datamodules.loading import decode as images
from datamodules.options import Options
from datamodules.splits import SplitOptions, resolve_splits, split_of_name
from datamodules.table import SPLITS, Missing, SampleTable, composed, target_column
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK, TaskKind, kind_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


_OWN_RECORDS = ("dataset_dict.json", "dataset_info.json", "state.json")

HUB_TIMEOUT = 5.0
"""Seconds that the hub has to answer at all."""


def open_splits(path: str, config_name: str = "", revision: str = "") -> dict[str, Any]:
    """Return the ``datasets.Dataset`` of each split by its own name; a data set without splits is called train.

    The arguments are those of ``HubImages``.

    Raises:
        UserError: where there is no such data set, configuration or network, within seconds.
    """
    import datasets

    local = Path(path).expanduser()
    try:
        if local.exists():
            opened = _open_local(local, config_name)
        elif path.startswith((".", "~", "/")) or (path.count("/") != 1 and "/" in path):
            raise UserError(f"data path: there is no {path}; give an existing folder or file, or a name on the hub")
        else:
            with offline_if_unreachable():
                opened = datasets.load_dataset(path, config_name or None, revision=revision or None)
    except ConnectionError as error:
        raise UserError(
            f"data path: the hub cannot be reached and {path} is not in the local cache; connect to the network, set "
            "$HF_HOME to a cache that holds it, or give the path of a local copy"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"data path: {path} cannot be opened: {' '.join(str(error).split())}") from error
    return dict(opened) if isinstance(opened, datasets.DatasetDict) else {"train": opened}


class ImageColumn:
    """A column of images (encoded bytes, paths, or the library's ``Image``) of ``datasets.Dataset``, concatenated."""

    def __init__(self, parts: Sequence[Any], column: str) -> None:
        from datasets import Image

        self._column = column
        self._parts = []
        for part in parts:
            single = part.select_columns([column])
            try:
                self._parts.append(single.cast_column(column, Image(decode=False)))
            # Arrow has no cast from such a type (NotImplementedError), or the arrays are no images (the other two).
            except (NotImplementedError, TypeError, ValueError) as error:
                kind = part.features[column]
                raise UserError(f"data columns.image: column {column!r} holds no images but {kind}") from error
        self._ends = np.cumsum([len(part) for part in parts])

    def read(
        self, index: int, name: str, value_range: images.ValueRange = "auto", max_pixels: int = images.MAX_PIXELS
    ) -> torch.Tensor:
        """Read an image by its index over all data sets, uint8 ``(3, H, W)``; errors call it ``name``."""
        return images.read_image(self.encoded(index, name), name, value_range, max_pixels)

    def encoded(self, index: int, name: str) -> bytes | str:
        """Return the content of an image's file, or the file's path."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[part] - len(self._parts[part]))
        encoded = self._parts[part][row][self._column]
        if encoded is None:
            raise images.ImageError(f"{name}: has no image; remove this row")
        found: bytes | str = encoded["path"] if encoded["bytes"] is None else encoded["bytes"]
        return found


def local_files(path: str, config_name: str, parts: Mapping[str, Any], column: str) -> list[str]:
    """Return the files of a local folder that some splits (``datasets.Dataset`` by own name) were read from."""
    import datasets
    import pyarrow.compute as pc

    first = next(iter(parts.values()))
    if _is_saved(Path(path)):
        records = [str(file) for name in _OWN_RECORDS for file in Path(path).glob(f"**/{name}")]
        return [*records, *(file["filename"] for part in parts.values() for file in part.cache_files)]
    if first.info.builder_name != "imagefolder":
        files = datasets.load_dataset_builder(path, config_name or None).config.data_files or {}
        return [str(file) for split in parts for file in files.get(split, [])]
    tables = [
        part.cast_column(column, datasets.Image(decode=False)).select_columns([column]) for part in parts.values()
    ]
    stored = [pc.struct_field(table.with_format("arrow")[:][column], "path") for table in tables]
    described = [
        str(file) for ending in ("csv", "jsonl", "parquet") for file in Path(path).glob(f"**/metadata.{ending}")
    ]
    return [*described, *(file for paths in stored for file in paths.to_pylist() if file)]


def read_columns(part: Any, columns: Sequence[str]) -> pa.Table:
    """Return some columns as an Arrow table, without reading the others (images are large)."""
    return part.select_columns(list(columns)).with_format("arrow")[:]


def _open_local(path: Path, config_name: str) -> Any:
    import datasets

    if _is_saved(path):
        return datasets.load_from_disk(str(path))
    if path.suffix == ".arrow":
        return datasets.Dataset.from_file(str(path))
    if path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=str(path))
    if path.is_file():
        raise UserError(f"data path: {path} is neither Parquet nor Arrow; give such a file, or a folder")
    return datasets.load_dataset(str(path), config_name or None)


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Restrict the libraries to their caches where the hub does not answer."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not any(before) and not answers_in_time(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def answers_in_time(endpoint: str) -> bool:
    """Return whether a server answers in time, through the hub libraries' own session, which knows of proxies."""
    from huggingface_hub import get_session

    answers: list[bool] = []

    def ask() -> None:
        with suppress(Exception):  # the client library, and so its errors, depend on the version
            get_session().head(endpoint, timeout=HUB_TIMEOUT)
            answers.append(True)

    # The time limit of a request does not hold for looking up the host's name; the thread's does.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT + 1)
    return bool(answers)


@dataclass(frozen=True)
class ColumnOptions(Options):
    """Which columns of the data set are what.

    Attributes:
        image: images.
        label: class, as the library's ClassLabel, text or whole number.
        caption: text, or several texts of which the first is taken; empty for none.
        group: the object or product that an image shows; empty for none.
        attributes: further columns, each a task of its own.
        kinds: of columns of labels that are not ``single_label``: ``multi_label`` (lists, or texts with ``label_sep``),
            ``ordinal`` or ``regression``.
        label_sep: text between the labels of a multi-label cell.
        classes: all classes of a column in their order, which ordinal columns of texts need.
    """

    argument: ClassVar[str] = "columns"

    image: str = "image"
    label: str = "label"
    caption: str = ""
    group: str = ""
    attributes: list[str] = field(default_factory=list)
    kinds: dict[str, TaskKind] = field(default_factory=dict)
    label_sep: str = ""
    classes: dict[str, list[str]] = field(default_factory=dict)


class HubImages(ImageDataModule):
    """Images and labels of any data set of the ``datasets`` library.

    Args:
        path: name on the hub (``owner/name``), or a local folder (``save_to_disk``, Parquet, or folders of images) or
            file (Parquet, Arrow).
        columns: which columns are what.
        config_name: which of several configurations, where the data set has them.
        revision: branch, tag or commit on the hub.
        splits: for train, val and test the data set's own names; the usual ones are found without. Others are left out.
        split: how samples are divided; by default the data set's own splits. Where it has no val or test, that is cut
            out of train by its fraction (0 leaves it empty), groups kept together.
        shared: options of every data set, see ``ImageDataModule``.
    """

    def __init__(
        self,
        path: str,
        columns: ColumnOptions = ColumnOptions(),
        config_name: str = "",
        revision: str = "",
        splits: dict[str, str] | None = None,
        split: SplitOptions = SplitOptions(),
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.path = path
        self.columns = ColumnOptions.of(columns)
        if LABEL_TASK in self.columns.attributes:
            raise UserError(
                f"data columns.attributes: the name {LABEL_TASK!r} is taken by the main task; rename the column"
            )
        self.config_name = config_name
        self.revision = revision
        self.split_names = splits or {}
        self.split_options = SplitOptions.of(split)
        self._images: ImageColumn | None = None
        self._local_files: list[str] = []

    def load_table(self) -> SampleTable:
        """Open the data set and read all columns but the images."""
        import pandas as pd

        opened = open_splits(self.path, self.config_name, self.revision)
        chosen = self._choose_splits(opened)
        parts = {split: opened[theirs] for split, theirs in chosen.items()}
        for split, part in parts.items():
            self._check_columns(part, f"{self.path} ({chosen[split]})")
        self._images = ImageColumn(list(parts.values()), self.columns.image)
        folder = Path(self.path).expanduser()
        if folder.is_dir():
            named = {chosen[split]: part for split, part in parts.items()}
            self._local_files = local_files(str(folder), self.config_name, named, self.columns.image)
        missing = Missing(self.check_options.missing or ())
        tasks, features = self._tasks(), parts["train"].features
        kinds = kinds_of_tasks(self.columns.kinds, tasks, self.path)
        frames = [self._frame(part, chosen[split], split, missing, kinds) for split, part in parts.items()]
        frame = pd.concat(frames, ignore_index=True)
        groups = frame["group"].where(frame["group"] != "", frame["name"]) if "group" in frame else frame["name"]
        frame["split"] = resolve_splits(
            self.split_options,
            labels=strata(frame[target_column(LABEL_TASK)].tolist(), kind_of(kinds, LABEL_TASK)),
            groups=groups,
            seed=self.seed,
            own=frame["split"].to_numpy(dtype=str),
            carve=True,
        )
        given = {task: self.columns.classes[name] for task, name in tasks.items() if name in self.columns.classes}
        known = vocabularies(frame, of_class_kinds(tasks, kinds), features, missing, given, sort_digits=False)
        known |= label_vocabularies(tasks, kinds, features, given)
        require_order(tasks, kinds, known, self.path, "columns.classes")
        columns = {task: target_column(task) for task in tasks}
        return SampleTable.from_frame(frame, columns, known, self.path, missing=missing.counts, kinds=kinds)

    def _tasks(self) -> dict[str, str]:
        """Columns of the tasks, the main one first."""
        return {LABEL_TASK: self.columns.label, **{composed(name): name for name in self.columns.attributes}}

    def count_left_out(self) -> dict[str, int]:
        """Count the files of a local folder that none of the splits were read from."""
        _ = self.table
        folder = str(Path(self.path).expanduser())
        return count_files_left_out(self._local_files, "", folder) if self._local_files else {}

    def read_image(self, index: int) -> torch.Tensor:
        """See ``ImageDataModule``; out of the data set's files."""
        name = self.table.name(index)
        assert self._images is not None, "the table opens the images"
        return self._images.read(index, f"{self.path}: {name}", self.value_range, self.max_pixels)

    def encoded_image(self, index: int) -> bytes:
        """Return the image's file as it is stored."""
        name = self.table.name(index)
        assert self._images is not None, "the table opens the images"
        found = self._images.encoded(index, f"{self.path}: {name}")
        return found if isinstance(found, bytes) else Path(found).read_bytes()

    def _choose_splits(self, opened: Mapping[str, Any]) -> dict[str, str]:
        """By split the data set's own name of it, train first."""
        has = ", ".join(opened)
        if strange := sorted(set(self.split_names) - set(SPLITS)):
            raise UserError(f"data splits: keys must be among {', '.join(SPLITS)}; got {strange[0]!r}")
        chosen: dict[str, str] = {}
        for split in SPLITS:
            given = self.split_names.get(split)
            if given is not None and given not in opened:
                raise UserError(f"data splits.{split}: {self.path} has no split {given!r}; it has {has}")
            usual = sorted((name for name in opened if split_of_name(name) == split), key=lambda name: name != split)
            if given or usual:
                chosen[split] = given or usual[0]
        if not chosen and len(opened) == 1:
            chosen["train"] = next(iter(opened))
        if "train" not in chosen:
            raise UserError(f"data splits: {self.path} has no split train; it has {has}: name one as splits.train")
        if len(set(chosen.values())) < len(chosen):
            raise UserError(f"data splits: {chosen} uses one split twice; name each once")
        return chosen

    def _check_columns(self, part: Any, where: str) -> None:
        wanted = [(key, getattr(self.columns, key)) for key in ("image", "label", "caption", "group")]
        wanted += [("attributes", name) for name in self.columns.attributes]
        for key, name in wanted:
            if name or key in ("image", "label"):
                require_column(name, part.features, key, where)

    def _frame(
        self, part: Any, theirs: str, split: str, missing: Missing, kinds: Mapping[str, TaskKind]
    ) -> pd.DataFrame:
        import pandas as pd

        caption, group, tasks = self.columns.caption, self.columns.group, self._tasks()
        table = read_columns(part, sorted({*tasks.values(), caption, group} - {""}))
        names = [f"{theirs}/{row}" for row in range(len(part))]
        frame = pd.DataFrame({"name": names, "source": names, "split": split, "row": range(len(part))}, dtype=object)
        where, given = f"{self.path} ({theirs})", self.columns.classes
        columns = sample_columns(
            table,
            part.features,
            of_class_kinds(tasks, kinds),
            missing,
            where,
            caption=caption,
            group=group,
            given={task: given[name] for task, name in tasks.items() if name in given},
            option="columns.classes",
        )
        others, _ = other_targets(
            table,
            part.features,
            range(len(part)),
            tasks,
            kinds,
            missing,
            where,
            label_sep=self.columns.label_sep,
            classes=given,
        )
        if caption:
            columns["caption"] = [texts[0] for texts in columns["caption"]]
        return frame.assign(**columns, **others)
