"""A folder of cached files that several processes share: one maker at a time, a limit, and a clear word when full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from datamodules.schema import DISK_FULL, UserError

WAY_OUT = "free some space, set $VITRINE_CACHE to another disk, or set data loader.cache: never"


@contextmanager
def exclusively(folder: Path, key: str) -> Iterator[None]:
    """Lets one process at a time into the block, whoever asks with the same key; the others wait.

    The operating system ends the lock with the process, so a killed one blocks nobody.

    Args:
        folder: made where missing.
        key: part of a file name.

    Raises:
        OSError: if the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: files are renamed whole there too, so two makers only do the work twice.
        yield
        return
    with (folder / f".{key}.lock").open("w") as file:
        with suppress(OSError):  # some network file systems know no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def disk_full(folder: Path) -> Iterator[None]:
    """Turns a full disk and missing permission into one line that says what to do.

    Raises:
        UserError: in place of the OSError.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        full = error.errno in DISK_FULL
        why = "the disk is full" if full else f"cannot be written to ({error.strerror})"
        raise UserError(f"{folder}: {why}; {WAY_OUT}") from error


def make_room(folder: Path, allowed: int, keep: set[str]) -> None:
    """Removes the files that were not used for longest until the folder holds no more than is allowed.

    Files that a process has mapped stay readable for it.

    Args:
        folder: of the files; hidden ones count nothing.
        allowed: bytes.
        keep: names of files that stay.
    """
    found = []
    for path in folder.glob("*.pixels"):
        with suppress(OSError):  # another process may remove files as well
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= allowed:
            return
        if path.name not in keep:
            path.unlink(missing_ok=True)
            total -= size
