"""Atomic writes, object stores, locks between processes, checksums of Parquet files and checkpoints, safe CSV."""

from __future__ import annotations

import csv
import errno
import hashlib
import os
import re
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote

from vitrail.errors import UserError, refuse_passwords
from vitrail.trust import FORMULA, unguarded

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


_CHECK_KEY = b"vitrail.check"
"""Metadata key of a Parquet file's checksum; Parquet's own checksums cover only the contents of its pages."""

_MARK, _UNKNOWN = b"crc32 of this file with zeros here: ", b"00000000"

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)
"""Errors of file systems that cannot flush folders."""

_RENAME_PAUSES = tuple(0.001 * 2**number for number in range(11))
"""Seconds between attempts to replace a file that is open elsewhere, 2 s together."""

_LOCKED_BYTE, _LOCK_PAUSE = 1 << 30, 0.1
"""Windows locks bytes, which no other process can read: one far behind the text; seconds between attempts."""


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the same suffix next to ``path``, renamed to it when the block ends without an error.

    A kill, a full disk or a power cut leaves the old file or none: the content is flushed to the disk before the
    rename, and the folder, which is created if necessary, after it.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield partial
        flush(partial)
        rename(partial, path)
        flush(path.parent)
    except OSError as error:
        # Show the final name; errors without a number cannot have one.
        if error.errno is not None and error.filename in (None, partial, str(partial)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """Rename a file, over another one if there is one, or a folder; wait for their readers where the system needs it.

    Windows refuses while another process, such as a virus scanner, has one of the files open.

    Raises:
        PermissionError: the file may not be replaced, on Windows after 2 s.
    """
    for seconds in _RENAME_PAUSES if sys.platform == "win32" else ():
        try:
            source.replace(target)
        except PermissionError:
            time.sleep(seconds)
        else:
            return
    source.replace(target)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with write_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and flush their entries to the disk."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in made:
        flush(one.parent)


def flush(path: Path) -> None:
    """Flush a file's content or a folder's entries to the disk; OSError if a file cannot be flushed."""
    is_folder = path.is_dir()
    try:
        # Windows flushes only writable files, and no folders.
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


def current_keys(metadata: Mapping[Any, Any] | None) -> dict[Any, Any]:
    """Return a file's metadata (bytes or strings) with keys of version 0.1, which began with ``vitrine``, renamed.

    Example:
        >>> current_keys({b"vitrine.tasks": b"{}", b"pandas": b"{}"})
        {b'vitrail.tasks': b'{}', b'pandas': b'{}'}
    """

    def present(key: Any) -> Any:
        old, new = (b"vitrine", b"vitrail") if isinstance(key, bytes) else ("vitrine", "vitrail")
        return new + key[len(old) :] if key.startswith(old) else key

    return {present(key): value for key, value in (metadata or {}).items()}


class DamagedFileError(UserError):
    """A file's content has changed since it was written; callers that can write it again catch this."""


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table with a checksum of the whole file."""
    import pyarrow.parquet as pq

    metadata = {**(table.schema.metadata or {}), _CHECK_KEY: _MARK + _UNKNOWN}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(content.rindex(_MARK) + len(_MARK))
        file.write(b"%08x" % zlib.crc32(content))


def read_parquet(path: Path | IO[bytes], columns: Sequence[str] | None = None, name: str = "") -> pa.Table:
    """Read a table and verify its checksum, if it has one.

    Args:
        path: path of the file, or the open file.
        columns: columns to read, by default all.
        name: name of the file in messages, by default its path.

    Raises:
        DamagedFileError: the file is truncated, damaged, or no Parquet file.
        OSError: it cannot be opened.
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
    # pyarrow raises many kinds for damaged files.
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DamagedFileError(f"{name or path}: not a readable Parquet file ({reason})") from error
    metadata = {key: value for key, value in current_keys(table.schema.metadata).items() if key != _CHECK_KEY}
    return table.replace_schema_metadata(metadata or None)


def check_zip(path: Path, hint: str) -> None:
    """Verify the checksums of a zip archive such as a checkpoint, which PyTorch does not; ignore other files.

    Args:
        path: path of the file.
        hint: fix for a damaged file, for the message.

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
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DamagedFileError(f"{path}: is damaged ({reason}); {hint}") from error
    if bad is not None:
        raise DamagedFileError(f"{path}: is damaged, the checksum of {bad!r} in it does not match; {hint}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def cache_directory() -> Path:
    """Return ``$VITRAIL_CACHE``, or ``~/.cache/vitrail``."""
    return Path(os.environ.get("VITRAIL_CACHE") or "~/.cache/vitrail").expanduser()


def local_folder(uri: str) -> Path | None:
    """Return the folder of a URI or path; None for an object store."""
    if uri.startswith("file://"):
        return Path(unquote(uri.removeprefix("file://")))
    return None if re.match(r"[a-zA-Z][a-zA-Z0-9+-]+://", uri) else Path(uri).expanduser()


@contextmanager
def remote_errors(url: str, doing: str) -> Iterator[None]:
    """Turn what the libraries of object stores raise into one line.

    Args:
        url: of the file or folder.
        doing: for the message, ``read`` or ``written``.
    """
    refuse_passwords(url, "address")
    try:
        yield
    except UserError:
        raise
    # botocore's and its peers' errors have no common class; some carry a whole request.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        fix = "install the library" if isinstance(error, ImportError) else "check address, credentials and endpoint"
        raise UserError(f"{url}: cannot be {doing} ({reason}); {fix}") from error


def upload(path: Path, url: str) -> None:
    """Copy a file to an object store, where it appears once all of it is there.

    Args:
        path: of the file.
        url: such as ``s3://bucket/folder/name``, of any store that fsspec knows.

    Raises:
        UserError: it cannot be written there.
    """
    from fsspec.core import url_to_fs

    with remote_errors(url, "written"):
        store, place = url_to_fs(url)
        store.put_file(str(path), place)


@contextmanager
def write_remotely(url: str) -> Iterator[Path]:
    """Yield a temporary path with the same name, uploaded to ``url`` when the block ends without an error."""
    with tempfile.TemporaryDirectory(prefix="vitrail-upload-") as folder:
        path = Path(folder) / url.rpartition("/")[2]
        yield path
        upload(path, url)


def remove_remotely(url: str) -> None:
    """Remove a file from an object store.

    Raises:
        UserError: it cannot be removed.
    """
    from fsspec.core import url_to_fs

    with remote_errors(url, "removed"):
        store, place = url_to_fs(url)
        store.rm_file(place)


def remote_names(url: str) -> list[str]:
    """Return the names of the files in a folder of an object store, sorted; none where there is no such folder.

    Raises:
        UserError: the store cannot be reached, or refuses access.
    """
    from fsspec.core import url_to_fs

    with remote_errors(url, "read"):
        store, place = url_to_fs(url, use_listings_cache=False)
        try:
            return sorted(name.rstrip("/").rpartition("/")[2] for name in store.ls(place, detail=False))
        except FileNotFoundError:
            return []


def fetch(url: str, folder: Path) -> Path:
    """Copy a file from an object store into a folder, unless it is there and has not changed since.

    Raises:
        UserError: it cannot be read.
    """
    from fsspec.core import url_to_fs

    path = folder / url.rpartition("/")[2]
    note = folder / f".{path.name}.version"
    with remote_errors(url, "read"), lock(folder / ".fetching.lock"):
        store, place = url_to_fs(url, use_listings_cache=False)
        version = str(store.ukey(place))
        if not path.is_file() or not note.is_file() or note.read_text(encoding="utf-8") != version:
            note.unlink(missing_ok=True)
            with write_atomically(path) as partial:
                store.get_file(place, str(partial))
            write_text_atomically(note, version)
    return path


_NUMBERS = re.compile(r"[+-]?[\d.][\d.,eE+\-–±% \[\]()]*|[+-](inf|nan)")
"""Numbers, also with their intervals, are no formulas."""


def write_csv(path: Path, frame: pd.DataFrame, *, index: bool = False) -> None:
    """Write a table atomically; text that a spreadsheet would take for a formula gets an apostrophe in front.

    ``read_csv`` and ``read_label_file`` remove it.
    """
    safe = frame.map(_escaped)
    safe.columns = frame.columns.map(_escaped)
    safe.columns.names = [_escaped(name) for name in frame.columns.names]
    if index:
        safe.index = frame.index.map(_escaped)
        safe.index.names = [_escaped(name) for name in frame.index.names]
    # Readers end a row at a carriage return, but the csv module does not quote it by default.
    texts = [*safe.to_numpy().ravel().tolist(), *safe.columns, *(safe.index if index else ())]
    ends_rows = any("\r" in text for text in texts if isinstance(text, str))
    with write_atomically(path) as partial:
        safe.to_csv(partial, index=index, quoting=csv.QUOTE_NONNUMERIC if ends_rows else csv.QUOTE_MINIMAL)


def read_csv(path: Path) -> pd.DataFrame:
    """Read what ``write_csv`` wrote (OSError or ValueError if it is unreadable)."""
    import pandas as pd

    # A class named "None" or "NA" is text; missing values are empty cells.
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""])
    frame.columns = frame.columns.map(_unescaped)
    return frame.map(_unescaped)


def _escaped(cell: Any) -> Any:
    if not isinstance(cell, str) or not FORMULA.match(cell) or _NUMBERS.fullmatch(cell):
        return cell
    return f"'{cell}"


def _unescaped(cell: Any) -> Any:
    return unguarded(cell) if isinstance(cell, str) else cell


def timestamped_directory(place: Path) -> Path:
    """Return a path below ``place`` that is named by the time and does not exist yet."""
    made = place / time.strftime("%Y%m%d-%H%M%S")
    directory, number = made, 1
    while directory.exists():
        number += 1
        directory = made.with_name(f"{made.name}-{number}")
    return directory


@contextmanager
def lock(path: Path, busy: str = "") -> Iterator[None]:
    """Hold an exclusive lock between processes; it is released when the process ends.

    Args:
        path: the lock file, created with its folder.
        busy: error message if another process, ``{owner}``, holds the lock; by default wait for it.

    Raises:
        UserError: another process holds the lock.
        OSError: the folder is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            unlock = _lock_file(file, wait=not busy)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(busy.replace("{owner}", file.read().strip() or "another process")) from error
        except OSError:  # some network file systems have no locks
            yield
            return
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            yield
        finally:
            unlock()


def _lock_file(file: IO[str], *, wait: bool) -> Callable[[], None]:
    """Lock an open file and return what unlocks it; BlockingIOError if it is locked and is not to be waited for."""
    try:
        import fcntl
    except ImportError:
        return _lock_byte(file, wait=wait)
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    # Not unlocked by hand: a process that was forked meanwhile may still hold it.
    return lambda: None


def _lock_byte(file: IO[str], *, wait: bool) -> Callable[[], None]:
    """Do the same on Windows, where a lock has to be given back."""
    msvcrt: Any = import_module("msvcrt")

    def locking(mode: int) -> None:
        os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file.fileno(), mode, 1)

    while True:
        try:
            locking(msvcrt.LK_NBLCK)
        except PermissionError as error:
            if not wait:
                raise BlockingIOError(*error.args) from error
            time.sleep(_LOCK_PAUSE)
        else:
            return lambda: locking(msvcrt.LK_UNLCK)
