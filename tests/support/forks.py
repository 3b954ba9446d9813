"""Programs that tests run, each in a fork of one process that has imported what costs time and has computed nothing.

That process is started for the first test that asks, and ends with the one that started it.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tests.support.processes import begin_fork, end_of_fork

ROOT = Path(__file__).parents[2]

COSTLY = (
    "timm",
    "matplotlib.figure",
    "optuna",
    "lance_namespace",  # most of what importing LanceDB costs; LanceDB itself starts a thread
    "callbacks",
    "experiments.train.cli",
    "experiments.launch.study",
    "lightning_modules",
    "retrieval.__main__",
)


def run_program(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, code: int = 0, seconds: float = 280
) -> None:
    """Run a module as by ``python -m``; it must end with the exit code, below 0 for a signal."""
    with tempfile.NamedTemporaryFile(prefix="vitrail-program-") as log:
        whole = {**os.environ, **(environment or {})}
        asked = {"module": module, "arguments": arguments, "log": log.name, "environment": whole}
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        answer = ""
        try:
            server.stdin.write(json.dumps(asked) + "\n")
            server.stdin.flush()
            if select.select([server.stdout], [], [], seconds)[0]:
                answer = server.stdout.readline()
        finally:
            if not answer:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
                _server.cache_clear()
        printed = Path(log.name).read_text(encoding="utf-8", errors="replace")[-4000:]
        assert answer, f"{module} took more than {seconds} seconds, or its server failed\n{printed}"
        assert int(answer) == code, printed


@cache
def _server() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.forks"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _run(module: str, arguments: list[str], log: str, environment: dict[str, str]) -> int:
    def program() -> None:
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return end_of_fork(begin_fork(program, Path(log)))


def _serve() -> None:
    """Print an exit code for each line of JSON."""
    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with Path(os.devnull).open("r+b") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
    warnings.filterwarnings("ignore")
    for name in COSTLY:
        importlib.import_module(name)
    for line in asked:
        answers.write(f"{_run(**json.loads(line))}\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
