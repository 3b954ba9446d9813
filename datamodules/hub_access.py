"""Opening data sets of the ``datasets`` library, from the hub or a local copy, and reading single pictures of them.

Without a network ``datasets`` tries again for half a minute and more. Here the hub is asked once whether it can be
reached, and if not, only the local cache is looked into.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datamodules import images
from vitrail.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_OWN_RECORDS = ("dataset_dict.json", "dataset_info.json", "state.json")

HUB_TIMEOUT = 5.0
"""Seconds that the hub has to answer at all."""


def open_splits(path: str, config_name: str = "", revision: str = "") -> dict[str, Any]:
    """Opens all splits of a data set.

    Args:
        path: a name on the hub (``owner/name``), or a local folder (written by ``save_to_disk``, or with Parquet files
            or folders of pictures) or file (Parquet or Arrow).
        config_name: which of several configurations, where the data set has them.
        revision: branch, tag or commit on the hub.

    Returns:
        The ``datasets.Dataset`` of each split by its own name; a data set without splits is called train.

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


class PictureColumn:
    """The pictures of one or several ``datasets.Dataset``, one after another, decoded when asked for.

    Args:
        parts: the data sets.
        column: their column of pictures (encoded bytes, paths, or the library's ``Image``).

    Raises:
        UserError: where the column holds no pictures.
    """

    def __init__(self, parts: Sequence[Any], column: str) -> None:
        from datasets import Image

        self._column = column
        self._parts = []
        for part in parts:
            try:
                self._parts.append(part.select_columns([column]).cast_column(column, Image(decode=False)))
            except (TypeError, ValueError, NotImplementedError) as error:
                kind = part.features[column]
                raise UserError(f"data columns.image: column {column!r} holds no pictures but {kind}") from error
        self._ends = np.cumsum([len(part) for part in parts])

    def read(self, index: int, name: str, value_range: images.ValueRange = "auto") -> torch.Tensor:
        """Reads one picture.

        Args:
            index: counted over all parts.
            name: what errors call the picture.
            value_range: as of ``images.read_image``.

        Returns:
            uint8 ``(3, H, W)``, RGB.

        Raises:
            ImageError: for a picture that is missing or cannot be read.
        """
        return images.read_image(self.encoded(index, name), name, value_range)

    def encoded(self, index: int, name: str) -> bytes | str:
        """A picture as it is stored.

        Args:
            index: counted over all parts.
            name: what errors call the picture.

        Returns:
            The content of its file, or the file's path.

        Raises:
            ImageError: for a picture that is missing.
        """
        part = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[part] - len(self._parts[part]))
        encoded = self._parts[part][row][self._column]
        if encoded is None:
            raise images.ImageError(f"{name}: has no picture; remove this row")
        found: bytes | str = encoded["path"] if encoded["bytes"] is None else encoded["bytes"]
        return found


def local_files(path: str, config_name: str, parts: Mapping[str, Any], column: str) -> list[str]:
    """The files of a local folder that some splits were read from.

    Args:
        path: of the folder.
        config_name: as of ``open_splits``.
        parts: the ``datasets.Dataset`` of each of those splits by its own name.
        column: of pictures.
    """
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
    """The given columns as an Arrow table, without touching the others (the pictures are large)."""
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
    """Makes the libraries look into their caches only, where the hub does not answer."""
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
    """Whether a server answers in time; through the hub libraries' own session, which knows of proxies."""
    from huggingface_hub import get_session

    answers: list[bool] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=HUB_TIMEOUT)
        # Which client library it is, and so which errors there are, depends on the version.
        except Exception:
            return
        answers.append(True)

    # The time limit of a request does not hold for looking up the host's name; the thread's does.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT + 1)
    return bool(answers)
