"""What Windows and macOS lack is taken away: nothing asks for it unguarded."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest

from datamodules import Wares
from datamodules.options import ImageOptions, LoaderOptions
from vitrail.errors import UserError
from vitrail.files import lock, write_text_atomically
from vitrail.runtime import cores, keep_freed_memory, memory_bytes, start_process, stop_process

PACKAGES = ("app", "callbacks", "datamodules", "evaluation", "experiments", "lightning_modules", "retrieval", "vitrail")
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty")
OS_NAMES = ("fork", "forkpty", "sched_getaffinity", "sysconf", "killpg", "getuid", "geteuid", "setsid", "O_DIRECTORY")
SIGNALS = ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGCHLD", "SIGALRM")


class Msvcrt:
    """Locks of bytes as Windows has them: another handle is refused, also in the same process."""

    LK_UNLCK, LK_NBLCK = 0, 2

    def __init__(self) -> None:
        self.held: set[tuple[int, int]] = set()

    def locking(self, number: int, mode: int, count: int) -> None:
        place = os.fstat(number).st_ino, os.lseek(number, 0, os.SEEK_CUR)
        if mode == self.LK_UNLCK:
            self.held.remove(place)
        elif place in self.held:
            raise PermissionError(13, "Permission denied")
        else:
            self.held.add(place)


@pytest.fixture
def msvcrt() -> Msvcrt:
    return Msvcrt()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch, msvcrt: Msvcrt) -> None:
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "msvcrt", cast("ModuleType", msvcrt))
    for name in OS_NAMES:
        monkeypatch.delattr(os, name, raising=False)
    for name in SIGNALS[:-1]:  # pytest-timeout needs the last one where a test fails
        monkeypatch.delattr(signal, name, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")


@pytest.mark.usefixtures("windows")
def test_files_memory_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text_atomically(tmp_path / "new" / "a.txt", "text")
    assert (tmp_path / "new" / "a.txt").read_text() == "text"
    assert memory_bytes() is None
    assert not keep_freed_memory()
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1000")
    assert cores() == os.cpu_count()


@pytest.mark.usefixtures("windows")
def test_a_lock_keeps_others_out_until_it_is_given_back(tmp_path: Path, msvcrt: Msvcrt) -> None:
    path = tmp_path / "lock"
    with lock(path, busy="taken by {owner}"):
        with pytest.raises(UserError, match=f"^taken by process {os.getpid()}$"), lock(path, busy="taken by {owner}"):
            pytest.fail("it is locked")
        assert min(place for _, place in msvcrt.held) > path.stat().st_size, (
            "Windows lets no other process read a locked byte"
        )
    with pytest.raises(ZeroDivisionError), lock(path, busy="taken by {owner}"):
        raise ZeroDivisionError
    assert not msvcrt.held


@pytest.mark.usefixtures("windows")
def test_a_lock_is_waited_for(tmp_path: Path, msvcrt: Msvcrt, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            msvcrt.held.clear()

    monkeypatch.setattr(time, "sleep", sleep)
    with (tmp_path / "lock").open("w") as held:  # by another process
        os.lseek(held.fileno(), 1 << 30, os.SEEK_SET)
        msvcrt.locking(held.fileno(), msvcrt.LK_NBLCK, 1)
        with lock(tmp_path / "lock"):
            assert len(waited) == 3


def refuse(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let a file be replaced only after some attempts, as while a virus scanner reads it."""
    replace, left = os.replace, [times]

    def busy(source: Path, target: Path) -> None:
        if left[0]:
            left[0] -= 1
            raise PermissionError(13, "Access is denied", str(source), 5, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)


@pytest.mark.usefixtures("windows")
def test_a_file_that_is_open_elsewhere_is_replaced_a_moment_later(
    tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("old")
    refuse(monkeypatch, 2)
    write_text_atomically(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert len(pauses) == 2


@pytest.mark.parametrize("on_windows", [True, False])
def test_a_file_that_stays_open_elsewhere_is_an_error(
    tmp_path: Path,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    on_windows: bool,
) -> None:
    if on_windows:
        request.getfixturevalue("windows")
    (tmp_path / "a.txt").write_text("old")
    refuse(monkeypatch, 1000)
    with pytest.raises(PermissionError) as raised:
        write_text_atomically(tmp_path / "a.txt", "new")
    assert raised.value.filename == str(tmp_path / "a.txt")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]
    assert sum(pauses) == (pytest.approx(2, rel=0.05) if on_windows else 0)


@pytest.mark.usefixtures("windows")
def test_a_process_is_started_without_what_only_linux_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def started(command: list[str], **options: object) -> str:
        given.update(options)
        return "process"

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    with (tmp_path / "log").open("wb") as log:
        start_process(["this"], log)
    assert given["preexec_fn"] is None, "Windows refuses it"
    assert given["creationflags"] == 512


def test_a_process_starts_and_stops(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        process = start_process(["http.server", "0", "--bind", "127.0.0.1"], log)
        assert process.poll() is None
        stop_process(process)
    assert process.poll() is not None


def test_what_workers_need_can_be_pickled_because_not_every_system_forks() -> None:
    data = Wares(n_samples=60, image=ImageOptions(size=32), loader=LoaderOptions(batch_size=8))
    data.prepare_data()
    data.setup("fit")
    loaders = data.train_dataloader(), data.val_dataloader(), data.rows_dataloader(data.rows_of(["val", "test"]))
    for loader in loaders:
        for part in (loader.dataset, loader.collate_fn, loader.worker_init_fn):
            pickle.loads(pickle.dumps(part))  # noqa: S301 -- our own bytes


IMPORT_ALL = f"""
import importlib, os, pkgutil, signal, sys
ours = {sorted(PACKAGES)!r}
names = [*ours]
for name in ours:
    path = importlib.import_module(name).__path__
    names += [one.name for one in pkgutil.walk_packages(path, name + ".") if not one.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)  # and the libraries, which are as they are on this system
for name in [name for name in sys.modules if name.split(".")[0] in ours]:
    del sys.modules[name]
sys.modules.update(dict.fromkeys({MODULES!r}))
for where, missing in ((os, {OS_NAMES!r}), (signal, {SIGNALS!r})):
    for name in missing:
        vars(where).pop(name, None)
sys.platform = "win32"
for name in names:
    importlib.import_module(name)
print(len(names))
"""


@pytest.mark.slow
def test_every_module_is_imported_without_what_only_posix_has() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 200
