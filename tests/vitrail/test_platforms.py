"""What Windows and macOS lack is taken away: nothing asks for it unguarded."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules import Wares
from datamodules.options import ImageOptions, LoaderOptions
from experiments.train.own_data import _cores
from vitrail.files import lock, write_text_atomically
from vitrail.runtime import keep_freed_memory, memory_bytes, start_process, stop_process

PACKAGES = ("app", "callbacks", "datamodules", "evaluation", "experiments", "lightning_modules", "retrieval", "vitrail")
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty")
OS_NAMES = ("fork", "forkpty", "sched_getaffinity", "sysconf", "killpg", "getuid", "geteuid", "setsid", "O_DIRECTORY")
SIGNALS = ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGCHLD")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    for name in OS_NAMES:
        monkeypatch.delattr(os, name, raising=False)
    for name in SIGNALS:
        monkeypatch.delattr(signal, name, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")


@pytest.mark.usefixtures("windows")
def test_files_locks_memory_and_cores(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "new" / "a.txt", "text")
    with lock(tmp_path / "lock", busy="taken by {owner}"), lock(tmp_path / "lock", busy="taken by {owner}"):
        pass  # there is no lock
    assert (tmp_path / "new" / "a.txt").read_text() == "text"
    assert memory_bytes() is None
    assert not keep_freed_memory()
    assert _cores() == os.cpu_count()


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
