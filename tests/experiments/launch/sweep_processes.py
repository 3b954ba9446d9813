"""Processes that take trials of one sweep; called by ``test_study.py``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from tests.experiments.launch.test_study import all_values, grid, opened
from tests.experiments.several_processes import in_forks


def share(folder: Path) -> None:
    """Takes trials until there are none, both processes at once."""
    own = folder / os.environ["RANK"]
    own.mkdir()
    (own / "taken").write_text(json.dumps(all_values(opened(folder, grid(own)))), encoding="utf-8")


def die(trial_id: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path, *, early: bool) -> None:
    """Takes two trials and ends neither; if early, it is killed before the second one's first heartbeat."""
    study = opened(folder, grid(folder))
    study.take(6)
    if early:
        study._rdb.record_heartbeat = die  # type: ignore[method-assign]
        study._running.clear()
    study.take(6)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    root, part = Path(sys.argv[1]), sys.argv[2]
    if part == "share":
        in_forks(2, lambda: share(root), root / "log")
    else:
        killed(root, early=part == "killed_early")
