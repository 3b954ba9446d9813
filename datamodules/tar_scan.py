"""What is in a WebDataset shard that has no index of ours: it is read through once, and what was found is kept.

It is kept under ``$VITRINE_CACHE`` for as long as the shard stays the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.images import HEIF_SUFFIXES, SUFFIXES
from datamodules.location import is_left_alone
from datamodules.shard_files import open_shard, shard_error, unpacked
from datamodules.verification import cache_directory
from vitrail.errors import UserError
from vitrail.files import DamagedFileError, exclusively, read_parquet, write_parquet, written_whole

if TYPE_CHECKING:
    import pyarrow as pa

PICTURE_SUFFIXES = tuple(suffix.removeprefix(".") for suffix in (*SUFFIXES, *HEIF_SUFFIXES))
"""Members of a tar file that are pictures, the first that a sample has."""

OTHERS_KEY = b"others"
"""Metadata of what is known of a tar file: its members that are no pictures of samples, counted by ending as JSON."""

_FORMAT = 3  # Counts up when the meaning of the cached columns changes.
_LARGEST_TEXT = 1 << 20
_MEMBER = re.compile(r"((?:.*/|)[^./][^.]*)\.([^/]+)")


def scanned(url: str, picture_suffix: str) -> pa.Table:
    """What is in a tar file, from the cache as long as the file is the same.

    Args:
        url: of the shard.
        picture_suffix: of the members that are pictures; empty for the first usual one.

    Returns:
        For each sample ``key``, ``offset`` and ``size`` of its picture in the archive, and ``fields``, its short
        members by their endings as JSON. The schema's metadata count all other members: by what follows a sample's key
        (``json``, ``seg.png``), and files of no sample by their last ending with its dot.

    Raises:
        UserError: where the shard cannot be read, is truncated or not in the format.
    """
    folder = cache_directory() / "shards"
    stamp = stamp_of(url)
    key = hashlib.sha256(f"{_FORMAT}\n{url}\n{stamp}\n{picture_suffix}".encode()).hexdigest()
    path = folder / f"{key}.parquet"
    with _one_scanner(folder, key):
        if stamp and path.exists():
            try:
                return read_parquet(path)
            except (DamagedFileError, OSError) as error:
                rank_zero_warn(f"{error}; {url} is read through again")
        table = _scan(url, picture_suffix)
        if stamp:
            _keep(table, path, url)
        return table


@contextlib.contextmanager
def _one_scanner(folder: Path, key: str) -> Iterator[None]:
    """Where several processes begin together, one reads the file through and the others wait for what it finds."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without such a folder each process does the work, see _keep
            stack.enter_context(exclusively(folder, key))
        yield


def _keep(table: pa.Table, path: Path, url: str) -> None:
    try:
        with written_whole(path) as partial:
            write_parquet(table, partial)
    except OSError as error:
        rank_zero_warn(f"{path.parent}: cannot keep what is in {url} ({error}); set $VITRINE_CACHE")


def stamp_of(url: str) -> str:
    """What changes with a shard's content; empty where its server says nothing."""
    with open_shard(url) as file:
        return _stamp(url, file)


def _stamp(url: str, file: IO[bytes]) -> str:
    if "://" not in url:
        status = os.fstat(file.fileno())
        return f"{status.st_size} {status.st_mtime_ns}"
    details: Any = getattr(file, "details", None)
    with contextlib.suppress(Exception):  # not every file system knows details; then there is no stamp
        details = details or file.info()  # type: ignore[attr-defined]
    known = {
        key.lower(): str(value)
        for key, value in (details if isinstance(details, dict) else {}).items()
        if value
        and key.lower() in ("size", "etag", "mtime", "lastmodified", "last_modified", "last-modified", "blob_id", "md5")
    }
    # A size alone says little: tar files are filled up to round ones.
    return json.dumps(known, sort_keys=True) if len(known) > 1 else ""


def _scan(url: str, picture_suffix: str) -> pa.Table:
    """Goes through a tar file: key, place of the picture and all short texts of each sample."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {"key": [], "offset": [], "size": [], "fields": []}
    others: Counter[str] = Counter()
    with open_shard(url, sequential=True) as file, _whole(url, file) as archive:
        for key, members in _samples(url, archive, others):
            suffixes = [picture_suffix] if picture_suffix else PICTURE_SUFFIXES
            place = next((members[suffix] for suffix in suffixes if suffix in members), None)
            if not isinstance(place, tuple):
                wanted = picture_suffix or ", ".join(PICTURE_SUFFIXES)
                raise UserError(
                    f"data shards: {url}: sample {key!r} has no picture ({wanted}) but {', '.join(sorted(members))}; "
                    "correct the shard, or name the ending with columns: {image: …}"
                )
            others.update(suffix for suffix, member in members.items() if member is not place)
            texts = {suffix: text for suffix, text in members.items() if isinstance(text, str)}
            for name, value in zip(columns, (key, *place, json.dumps(texts)), strict=True):
                columns[name].append(value)
    if not columns["key"]:
        raise UserError(f"data shards: {url} has no samples (files called key.jpg, key.cls …); name a WebDataset shard")
    return pa.table(columns).replace_schema_metadata({OTHERS_KEY: json.dumps(others)})


@contextlib.contextmanager
def _whole(url: str, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The archive, with an error in words where it is broken."""
    try:
        with unpacked(url, file) as archive:
            yield archive
    except UserError:
        raise
    except (tarfile.TarError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"data shards: {url} is truncated or no tar file ({reason}); get it anew") from error
    except Exception as error:  # what broken connections raise depends on the libraries
        raise shard_error(url, error) from error


def _samples(url: str, archive: IO[bytes], others: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Keys, and by ending either (offset, size) of a picture or the content of a short text; others are counted."""
    key, members = "", dict[str, Any]()
    watched = _LastBlock(archive)
    with tarfile.open(fileobj=cast("IO[bytes]", watched), mode="r|") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else all members of the file gather there
            match = _MEMBER.fullmatch(member.name.removeprefix("./")) if member.isfile() else None
            if match is None:
                if member.isfile() and not any(map(is_left_alone, Path(member.name).parts)):
                    others[Path(member.name).suffix.lower() or "."] += 1
                continue
            if match[1] != key and members:
                yield key, members
                members = {}
            key, suffix = match[1], match[2].lower()
            if suffix in members:
                raise UserError(f"data shards: {url}: sample {key!r} has two files .{suffix}; remove one")
            members[suffix] = _content_of(tar, member, suffix)
    if watched.block.strip(b"\0"):
        # tarfile takes the end of a file for the end of the archive, which says so by blocks of zeros.
        raise UserError(f"data shards: {url} is truncated: the end of the archive is missing; get it anew")
    if members:
        yield key, members


class _LastBlock:
    """Hands a file on and knows the last block that was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.block = b""
        self._file = file

    def read(self, size: int) -> bytes:
        """Bytes of the file."""
        content = self._file.read(size)
        self.block = (self.block + content)[-tarfile.BLOCKSIZE :]
        return content


def _content_of(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> tuple[int, int] | str:
    if suffix.rsplit(".", 1)[-1] in PICTURE_SUFFIXES or member.size > _LARGEST_TEXT:
        return member.offset_data, member.size
    file = tar.extractfile(member)
    content = file.read() if file else b""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return member.offset_data, member.size
