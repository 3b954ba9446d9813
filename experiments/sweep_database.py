"""Where a sweep's trials are kept: an SQLite file, or any database that SQLAlchemy knows."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

_FILE_URL = "sqlite:///"
_WAIT_FOR_LOCK = 120.0
"""Seconds that one writer of an SQLite file waits for another one."""


class Database:
    """A database that several threads, processes and machines may use.

    Args:
        url: such as ``sqlite:///sweep.db`` or ``postgresql://user@host/database``.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._threads = threading.Lock()
        path = url.removeprefix(_FILE_URL).partition("?")[0]
        self._lock_file = Path(f"{path}.lock") if url.startswith(_FILE_URL) and path else None

    def __str__(self) -> str:
        """Without the password: a message may end in a log that others read."""
        return re.sub(r"(://[^:/@]+):[^@]+@", r"\1:***@", self._url)

    def storage(self) -> optuna.storages.BaseStorage:
        """Connect; tables are made if need be."""
        is_file = self._url.startswith("sqlite")
        wait = {"connect_args": {"timeout": _WAIT_FOR_LOCK}} if is_file else {"pool_pre_ping": True}
        try:
            storage = optuna.storages.RDBStorage(self._url, engine_kwargs=wait)
        except (IntegrityError, OperationalError, ProgrammingError):
            # Two machines that begin at the same moment both make the tables of a new database.
            time.sleep(2.0)
            storage = optuna.storages.RDBStorage(self._url, engine_kwargs=wait)
        # With a cache of what cannot change any more; one for all studies, or one would not know another's trials.
        return optuna.storages.get_storage(storage)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread meanwhile, and no other process where the database is a file: SQLite has no row locks."""
        with self._threads:
            if self._lock_file is None:
                yield
                return
            import fcntl

            with self._lock_file.open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
