"""Real servers for tests, each a process of its own on a free port of the loopback interface, ended with its test."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.processes import s3_server


@contextmanager
def s3() -> Iterator[dict[str, str]]:
    """An S3 server; the variables by which clients find it. Skips where it is not installed."""
    for name in ("moto", "flask_cors", "s3fs"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the S3 server of moto needs {name}, which is not installed")
    with s3_server() as environment:
        yield environment


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A throw-away PostgreSQL server in an empty folder; the URL of its database. Skips where it is not installed."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("the PostgreSQL driver psycopg is not installed")
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *map(Path, filter(None, [shutil.which("initdb")]))]
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    programs = found[0].resolve().parent
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # which the server refuses
        account = pwd.getpwnam("nobody")
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        for parent in (folder, *folder.parents):
            if parent.stat().st_uid == 0 and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o011)
        os.chown(folder, account.pw_uid, account.pw_gid)
    data = folder / "data"
    make = [str(programs / "initdb"), "-D", str(data), "-U", "vitrail", "-A", "trust", "--no-sync"]
    quiet: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **user}
    subprocess.run(make, check=True, **quiet)
    port = free_port()
    options = ("-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", f"unix_socket_directories={folder}")
    with subprocess.Popen([programs / "postgres", "-D", data, "-p", str(port), *options], **quiet) as server:
        try:
            ready = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
            deadline = time.monotonic() + 60
            while subprocess.run(ready, check=False).returncode:
                assert server.poll() is None, "PostgreSQL does not start"
                assert time.monotonic() < deadline, "PostgreSQL does not start within a minute"
                time.sleep(0.05)
            yield f"postgresql+psycopg://vitrail:secret@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # fast shutdown
            server.wait(30)


def free_port() -> int:
    """A port of the loopback interface that no one listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
