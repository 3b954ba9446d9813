"""Processes that take trials of one sweep; called by ``test_sweep_study.py``."""

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
    study = opened(folder, grid(own))
    study.ask_for(6)
    (own / "taken").write_text(json.dumps(all_values(study)), encoding="utf-8")


def killed(folder: Path) -> None:
    """Takes two trials and ends neither."""
    study = opened(folder, grid(folder))
    study.ask_for(6)
    study.take()
    study.take()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    root, part = Path(sys.argv[1]), sys.argv[2]
    if part == "share":
        in_forks(2, lambda: share(root), root / "log")
    else:
        killed(root)
