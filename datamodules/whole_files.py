"""Files that are written whole, and whose damage is noticed when they are read.

A kill, a full disk or a power cut leaves the old file or none, never half of one. Parquet files and checkpoints carry
checksums, which their readers here compare; a file that does not match is refused by name.
"""

from __future__ import annotations

import errno
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote

from datamodules.schema import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_CHECK_KEY = b"vitrine.check"
"""Of a Parquet file's metadata: ``_MARK`` and the checksum of the whole file. Parquet's own checksums are of its pages'
contents only; what lies between them says where the pages are and what is in them."""

_MARK, _UNKNOWN = b"crc32 of this file with zeros here: ", b"00000000"

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)
"""What file systems and permissions answer where a folder cannot be flushed."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name next to ``path`` to write to, and rename it once the block has ended without an error.

    The content is flushed to the disk before the rename, the folder after it: without the first, a power cut can leave
    an empty file under the final name; without the second, no file. The folder is made if need be; the suffix stays,
    for writers that choose the format by it.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield partial
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except OSError as error:
        # The name that the user knows; some errors of writing have none, and those that are a plain text take none.
        if error.errno is not None and error.filename in (None, partial, str(partial)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, whose entries are flushed to the disk."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in made:
        flush(one.parent)


def flush(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, from the operating system's memory to the disk.

    Raises:
        OSError: where a file cannot be flushed, the disk is full, say.
    """
    is_folder = path.is_dir()
    try:
        # Windows flushes what can be written only, and no folders.
        number = os.open(path, os.O_RDONLY if is_folder or os.name != "nt" else os.O_RDWR)
    except OSError:
        if is_folder:
            return
        raise
    try:
        os.fsync(number)
    except OSError as error:
        if not is_folder or error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(number)


class DamagedFileError(UserError):
    """A file is not as it was written; whoever can make it again catches this."""


def write_parquet(table: pa.Table, path: Path) -> None:
    """Writes a table with a checksum of the whole file, which ``read_parquet`` compares."""
    import pyarrow.parquet as pq

    metadata = {**(table.schema.metadata or {}), _CHECK_KEY: _MARK + _UNKNOWN}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(content.rindex(_MARK) + len(_MARK))
        file.write(b"%08x" % zlib.crc32(content))


def read_parquet(path: Path | IO[bytes], columns: Sequence[str] | None = None, name: str = "") -> pa.Table:
    """Reads a table; a file that has a checksum is compared with it.

    Args:
        path: of the file, or the open file.
        columns: only these.
        name: of the file for messages; its path by default.

    Raises:
        DamagedFileError: where the file is cut short, damaged, or no Parquet file.
        OSError: where it cannot be opened.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = path.read_bytes() if isinstance(path, Path) else path.read()
    place = content.rfind(_MARK) + len(_MARK)
    noted = content[place : place + len(_UNKNOWN)]
    if (
        place >= len(_MARK)
        and b"%08x" % zlib.crc32(content[:place] + _UNKNOWN + content[place + len(noted) :]) != noted
    ):
        raise DamagedFileError(f"{name or path}: is damaged or was changed, its checksum does not match")
    try:
        table = pq.read_table(pa.BufferReader(content), columns=columns)
    # Of damaged files pyarrow raises its own errors, OSError and what its parsers stumble over.
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DamagedFileError(f"{name or path}: not a readable Parquet file ({reason})") from error
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != _CHECK_KEY}
    return table.replace_schema_metadata(metadata or None)


def check_zip(path: Path, way_out: str) -> None:
    """Compares the records of a zip archive, as checkpoints are, with their checksums, which PyTorch does not.

    What is no archive is left to its reader.

    Args:
        path: of the file.
        way_out: what to do about a damaged one.

    Raises:
        DamagedFileError: names the file and the record.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    # zipfile raises many kinds for damaged headers.
    except Exception as error:
        raise DamagedFileError(f"{path}: is damaged ({_first_line(error)}); {way_out}") from error
    if bad is not None:
        raise DamagedFileError(f"{path}: is damaged, the checksum of {bad!r} in it does not match; {way_out}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def local_folder(uri: str) -> Path | None:
    """The folder that a URI or path names; None for an object store."""
    if uri.startswith("file://"):
        return Path(unquote(uri.removeprefix("file://")))
    return None if re.match(r"[a-zA-Z][a-zA-Z0-9+-]+://", uri) else Path(uri).expanduser()
