"""One writer of a gallery at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from datamodules.schema import UserError
from datamodules.whole_files import local_folder

_NAME = ".writing.lock"


@contextmanager
def writing_lock(uri: str) -> Iterator[None]:
    """Keeps a second writer out of a gallery on this machine; reading goes on.

    The operating system ends the lock with the process, so a killed writer blocks nobody. At an object store there is
    no lock: there each commit is refused that another one came before.

    Raises:
        UserError: while somebody else writes, or where the folder cannot be written.
    """
    folder = local_folder(uri)
    if folder is None:
        yield
        return
    try:
        import fcntl
    except ImportError:  # Windows has other locks; the check at each commit is there too
        yield
        return
    try:
        file = (folder / _NAME).open("a+")
    except OSError as error:
        raise UserError(f"{uri}: cannot be written ({error.strerror}); what is there is untouched") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise UserError(
                f"{uri}: {who} is writing to this gallery; wait until it is done, then run the same command again"
            ) from error
        except OSError:  # some network file systems know no locks; the check at each commit is there too
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield
