"""Shards: where they are (folders, globs, URLs, names on the hub) and reading encoded images from them, front to back.

Files are opened by the ``datasets`` library, which tries again when a connection breaks and knows tokens.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from datamodules.files.label_csv import data_home
from datamodules.loading.decode import MAX_PIXELS, UNDECIDED, ValueRange, read_image
from datamodules.splits import split_of_name
from datamodules.table import SPLITS
from vitrail.errors import UserError, refuse_passwords

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray


ShardFormat = Literal["auto", "parquet", "webdataset"]

SUFFIXES = {"parquet": (".parquet",), "webdataset": (".tar", ".tar.gz", ".tgz")}
INDEX_FILE = "index.parquet"
"""Next to WebDataset shards: what is in them, so that they need not be read through."""

_ENDINGS = tuple(ending for endings in SUFFIXES.values() for ending in endings)
_NUMBERED = re.compile(r"(.*-)(\d+)-of-(\d+)(\.[^/]*)")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_CHUNK = 1 << 20
_ROWS = 32
"""Rows of Parquet that are taken out of a row group at a time."""


def find_shards(
    shards: str | Sequence[str] | Mapping[str, str | Sequence[str]], where: str = "data shards"
) -> dict[str, list[str]]:
    """Return paths and URLs of the shards of each split, in a stable order.

    Args:
        shards: for each split, or for all together, a folder, a glob (``*``, ``**``), a path, a URL, a numbered range
            (``train-{00000..00011}.tar``) or a list of those, or the name of a data set on the hub. Where splits are
            not given, file names decide (``train-…``, ``val``, ``validation``, ``test``).
        where: YAML key, for errors.
    """
    refuse_passwords(shards, where)
    if isinstance(shards, Mapping):
        if strange := sorted(set(shards) - set(SPLITS)):
            raise UserError(f"{where}: must be among {', '.join(SPLITS)}; got {strange[0]!r}")
        found = {split: _expand_all(shards[split], f"{where}.{split}") for split in SPLITS if split in shards}
    elif isinstance(shards, str) and (on_hub := _hub_files(shards, where)) is not None:
        found = on_hub
    else:
        found = _by_name(_expand_all(shards, where), where)
    if not found.get("train"):
        raise UserError(f"{where}: there are no training shards; name them with shards: {{train: …, val: …, test: …}}")
    counts = Counter(url for urls in found.values() for url in urls)
    if repeated := sorted(url for url, count in counts.items() if count > 1):
        raise UserError(f"{where}: {repeated[0]} is named twice; name each shard once, in one split")
    return found


def format_of(urls: Sequence[str], shard_format: ShardFormat) -> str:
    """Return ``parquet`` or ``webdataset``, by the files' endings if it is not given."""
    if shard_format != "auto":
        return shard_format
    kinds = {kind for url in urls for kind, endings in SUFFIXES.items() if _path_of(url).endswith(endings)}
    if len(kinds) != 1:
        found = "both Parquet and tar files" if kinds else f"{urls[0]}, which ends neither with .parquet nor with .tar"
        raise UserError(f"data shards: has {found}; name files of one kind, or set data format")
    return kinds.pop()


def short_names(urls: Sequence[str]) -> list[str]:
    """Return the shards' names without the folder that all share, so that the set may be moved.

    Queries, such as signatures that change from run to run, count only where shards differ in nothing else.
    """
    plain = [_path_of(url) for url in urls]
    urls = plain if len(set(plain)) == len(plain) else urls
    folders = [url.split("/")[:-1] for url in urls]
    shared = 0
    while all(len(folder) > shared and folder[shared] == folders[0][shared] for folder in folders):
        shared += 1
    return ["/".join(url.split("/")[shared:]) for url in urls]


@contextmanager
def open_shard(url: str, *, sequential: bool = False) -> Iterator[IO[bytes]]:
    """Open a shard to read; remote ones block by block, or ``sequential``, which every web server supports."""
    from datasets.utils.file_utils import xopen

    options = {"block_size": 0} if sequential and url.startswith("http") else {}
    with shard_errors(url):
        file: Any = xopen(url, "rb", **options)
    with file:
        yield file


@contextmanager
def unpacked(url: str, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Decompress a tar archive that is compressed as a whole."""
    if _path_of(url).endswith((".gz", ".tgz")):
        with gzip.GzipFile(fileobj=file) as archive:
            yield archive  # type: ignore[misc]  # a GzipFile reads and seeks as any other
    else:
        yield file


def size_of(file: IO[bytes]) -> int | None:
    """Return the bytes of an opened file; None where its server does not report them."""
    size = getattr(file, "size", None)
    if isinstance(size, int):
        return size
    try:
        place = file.seek(0, os.SEEK_CUR)
        end = file.seek(0, os.SEEK_END)
        file.seek(place)
    except (OSError, ValueError):
        return None
    return end


@contextmanager
def shard_errors(url: str) -> Iterator[None]:
    """Turn errors of reading a shard into those of ``shard_error``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what broken files and connections raise depends on the libraries
        raise shard_error(url, error) from error


def shard_error(url: str, error: Exception) -> UserError:
    """Return what is wrong with a shard, and a fix, in one line."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        # Over HTTP any failure is called "not found".
        error = cause
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        text = f"there is no {url}; correct the path, or get the shard"
    elif isinstance(error, PermissionError):
        text = f"{url} may not be read (permission denied); log in or change permissions"
    elif lacks_ranges(error):
        text = (
            f"{url}: its server gives no parts of files (HTTP range requests), which Parquet needs; use tar shards "
            "with an index, another server, or a local copy"
        )
    elif isinstance(error, tarfile.TarError | EOFError):
        text = f"{url} is truncated or no tar file ({reason}); get an intact copy"
    elif isinstance(error, ImportError):
        text = f"{url}: {reason}; install the library, or use another kind of URL"
    elif error is cause:
        text = f"{url} cannot be read ({reason}); correct the address, or try again later"
    else:
        text = f"{url} cannot be read ({reason}); get an intact copy, or make it again"
    return UserError(f"data shards: {text}")


def lacks_ranges(error: Exception) -> bool:
    """Return whether an error shows that a server can only give a file from its beginning."""
    return "range requests" in str(error) or "Cannot seek streaming" in str(error)


def _expand_all(patterns: str | Sequence[str], where: str) -> list[str]:
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    found = [url for pattern in given for part in _ranges(pattern) for url in _expand(part, where)]
    if not found:
        raise UserError(f"{where}: names no shard; give a folder, a glob, a path or a URL")
    return found


def _expand(pattern: str, where: str) -> list[str]:
    from datasets.utils.file_utils import xglob

    is_remote = "://" in pattern
    if not is_remote:
        pattern = local_path(pattern)
    if is_remote and (pattern.startswith("http") or _path_of(pattern).endswith(_ENDINGS)) and "*" not in pattern:
        return [pattern]
    if not is_remote and Path(pattern).is_file():
        return [pattern]
    if not is_remote and "*" not in pattern and not Path(pattern).exists():
        raise UserError(
            f"{where}: there is no {pattern}; correct the path, or make shards by python -m datamodules pack"
        )
    globs = [pattern]
    if Path(pattern).is_dir() or (is_remote and "*" not in pattern):
        globs = [f"{pattern.rstrip('/')}/**/*{ending}" for ending in _ENDINGS]
    with shard_errors(pattern):
        found = {url for each in globs for url in xglob(each, recursive=True)}
    usable = sorted(url for url in found if url.endswith(_ENDINGS) and not _is_hidden(url))
    if not usable:
        raise UserError(f"{where}: no shard ({', '.join(_ENDINGS)}) is found as {pattern}; correct it")
    if pattern not in globs and (lacking := _lacking(usable)):
        raise UserError(
            f"{where}: {pattern} lacks {lacking}, others of its kind are there; get it, make the shards again, or name "
            "those to use"
        )
    return usable


def _lacking(urls: Sequence[str]) -> str:
    """The first of numbered shards (``…-00000-of-00012.tar``) that a folder lacks; empty where it has all."""
    there: dict[tuple[str, str, str], set[int]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, urls)):
        there.setdefault((match[1], match[3], match[4]), set()).add(int(match[2]))
    for (before, count, ending), numbers in there.items():
        if missing := sorted(set(range(int(count))) - numbers):
            return f"{before.rpartition('/')[2]}{missing[0]:0{len(count)}d}-of-{count}{ending}"
    return ""


def local_path(pattern: str) -> str:
    """Return a path, or one below the folder of all data sets where it does not exist."""
    path = Path(pattern).expanduser()
    first = next((place for place, part in enumerate(path.parts) if "*" in part), len(path.parts))
    fixed = Path(*path.parts[:first])
    return str(path if path.is_absolute() or fixed.exists() else data_home() / path)


def _ranges(pattern: str) -> list[str]:
    """``a-{08..11}.tar`` as ``a-08.tar`` … ``a-11.tar``; other patterns as they are."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last, width = int(match[1]), int(match[2]), len(match[1])
    numbers = [f"{number:0{width}d}" for number in range(first, last + 1)]
    return [
        rest for number in numbers for rest in _ranges(f"{pattern[: match.start()]}{number}{pattern[match.end() :]}")
    ]


def _by_name(urls: Sequence[str], where: str) -> dict[str, list[str]]:
    """Shards by the split in their names, the file's own before that of its folders."""
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for url, name in zip(urls, short_names(urls), strict=True):
        split = next((split for part in reversed(name.split("/")) if (split := _split_in(part))), "")
        if not split:
            raise UserError(
                f"{where}: {url} does not name its split (train-…, val-…, test-…); name the shards of each split with "
                "shards: {train: …, val: …, test: …}"
            )
        found[split].append(url)
    return {split: part for split, part in found.items() if part}


def _split_in(name: str) -> str:
    meant = {split for word in re.split(r"[^a-z]+", name.lower()) if (split := split_of_name(word))}
    return next((split for split in SPLITS if split in meant), "")


def _hub_files(name: str, where: str) -> dict[str, list[str]] | None:
    """The shards of a data set on the hub; None for other texts."""
    if not _HUB_NAME.fullmatch(name) or name.endswith(_ENDINGS) or Path(local_path(name)).exists():
        return None
    import datasets

    from datamodules.hub_images import offline_if_unreachable

    try:
        with offline_if_unreachable():
            builder = datasets.load_dataset_builder(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{where}: {name} is not a local folder and cannot be found on the hub ({reason}); connect to the network, "
            "or give a path or a URL"
        ) from error
    files = {split: [str(url) for url in urls] for split, urls in (builder.config.data_files or {}).items()}
    known = {split: next((urls for own, urls in files.items() if _split_in(own) == split), []) for split in SPLITS}
    if not all(_path_of(url).endswith(_ENDINGS) for urls in files.values() for url in urls) or not files:
        raise UserError(f"{where}: {name} is not stored as Parquet or tar files; read it with datamodules.HubImages")
    return {split: urls for split, urls in known.items() if urls}


def _path_of(url: str) -> str:
    """A URL without its query, whose ending shows the format."""
    return url.partition("?")[0] if "://" in url else url


def _is_hidden(url: str) -> bool:
    name = url.rsplit("/", 1)[-1]
    return name.startswith(".") or name == INDEX_FILE


@dataclass(frozen=True, eq=False)
class Shards:
    """The shards of a set; its table has N rows, shard by shard.

    Attributes:
        urls: path or URL of each shard.
        ends: int64 ``(shards,)``, number of the table's rows in a shard and all before it.
        images: table of N rows: ``key``, the name of each image in messages, and for tar files where the image begins
            (``offset``), its bytes (``size``) and their CRC-32 (``crc32``, null where unknown; pages of Parquet have
            checksums of their own).
        column: Parquet column of images; empty for tar files.
        members_left_out: members of tar files that are neither images nor columns, by the ending of their names.
        value_range: black and white in images with more than 8 bits a channel, where the shards record it.
    """

    urls: list[str]
    ends: NDArray[np.int64]
    images: pa.Table
    column: str
    members_left_out: dict[str, int] = field(default_factory=dict)
    value_range: list[float] | None = None

    def shard_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the shard of each of some rows of the table, int64 ``(n,)``."""
        return np.searchsorted(self.ends, rows, side="right")

    def first_row(self, shard: int) -> int:
        """Return the table's row that is a shard's first one."""
        return int(self.ends[shard - 1]) if shard else 0

    def label(self, row: int) -> str:
        """Return the name of an image in errors: its shard and its key."""
        return f"{self.urls[int(self.shard_of(np.array([row]))[0])]}: {self.images['key'][row]}"

    def place_hashes(self, rows: NDArray[np.int64], stamp_of: Callable[[str], str]) -> list[str]:
        """Return for each row a hash that changes with the image, without reading it, hexadecimal.

        It is the SHA-256 of the shard's stamp (size and date of change, or what its server reports) and of the place in
        it, so all images of a shard that was written again count as changed; empty where there is no stamp.
        """
        which = self.shard_of(rows)
        stamps = {shard: stamp_of(self.urls[shard]) for shard in np.unique(which).tolist()}
        places = zip(rows.tolist(), which.tolist(), strict=True)
        return [
            hashlib.sha256(f"{stamps[shard]} {row - self.first_row(shard)}".encode()).hexdigest()
            if stamps[shard]
            else ""
            for row, shard in places
        ]

    def read(self, rows: NDArray[np.int64]) -> Generator[bytes, None, None]:
        """Yield the encoded images (empty for none) of ascending rows of one shard, which is open meanwhile."""
        if not len(rows):
            return
        shard = int(self.shard_of(rows[:1])[0])
        url = self.urls[shard]
        with open_shard(url) as file, shard_errors(url):
            if self.column:
                images = _from_parquet(file, self.column, rows - self.first_row(shard))
            else:
                images = _from_tar(url, file, self.images.take(rows))
            for _ in range(len(rows)):
                if (image := next(images, None)) is None:
                    raise UserError(
                        f"data shards: {url} has fewer rows than when it was indexed; do not change shards in use"
                    )
                yield image

    def encoded(self, row: int) -> bytes:
        """Read one encoded image; opens its shard."""
        return next(self.read(np.array([row], dtype=np.int64)))

    def image(self, row: int, value_range: ValueRange = UNDECIDED, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
        """Read one image, uint8 ``(3, H, W)``, RGB; opens its shard."""
        return read_image(self.encoded(row), self.label(row), value_range, max_pixels)


def _from_parquet(file: IO[bytes], column: str, places: NDArray[np.int64]) -> Iterator[bytes]:
    """The images at some rows of a file; only their row groups are read."""
    import pyarrow.parquet as pq

    # Without buffering ahead, which would hold whole row groups of images.
    opened = pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
    begin = 0
    for group in range(opened.metadata.num_row_groups):
        end = begin + opened.metadata.row_group(group).num_rows
        wanted = places[(places >= begin) & (places < end)]
        if len(wanted):
            yield from _from_row_group(opened, group, column, wanted - begin)
        begin = end


def _from_row_group(opened: Any, group: int, column: str, wanted: NDArray[np.int64]) -> Iterator[bytes]:
    begin = 0
    for batch in opened.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[column]):
        cells = batch.column(0)
        for place in wanted[(wanted >= begin) & (wanted < begin + len(cells))]:
            yield _content(cells[int(place) - begin].as_py())
        begin += len(cells)
        if begin > wanted[-1]:
            return


def _content(cell: Any) -> bytes:
    """The bytes of a cell, or of the library's ``{bytes, path}``."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else b""


def _from_tar(url: str, file: IO[bytes], images: pa.Table) -> Iterator[bytes]:
    """Parts of an archive from front to back; a server without range requests sends all before them, too."""
    with ExitStack() as stack:
        archive, place = stack.enter_context(unpacked(url, file)), 0
        for image in images.to_pylist():
            try:
                content = _part(archive, place, image["offset"], image["size"])
            except ValueError as error:
                if not lacks_ranges(error):
                    raise
                whole = stack.enter_context(open_shard(url, sequential=True))
                archive = stack.enter_context(unpacked(url, whole))
                content = _part(archive, 0, image["offset"], image["size"])
            place = image["offset"] + image["size"]
            if len(content) < image["size"]:
                raise UserError(f"data shards: {url} ends within an image: it is truncated; get an intact copy")
            if image["crc32"] is not None and image["crc32"] != zlib.crc32(content):
                raise UserError(
                    f"data shards: {url}: {image['key']} is damaged, it is not the image that was packed; get an "
                    "intact copy of the shard"
                )
            yield content


def _part(archive: IO[bytes], place: int, offset: int, size: int) -> bytes:
    """Some bytes further on than the current place, fewer at the end; a connection may send them in pieces."""
    try:
        archive.seek(offset)
    except (OSError, ValueError):
        while place < offset and (skipped := archive.read(min(offset - place, _CHUNK))):
            place += len(skipped)
    pieces = []
    while size > 0 and (piece := archive.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
