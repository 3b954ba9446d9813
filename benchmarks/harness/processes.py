"""Functions and training loops that are measured in processes of their own, and the memory that processes hold.

A loop of Lightning or of a ``Trainer`` cannot be called for eight steps: it runs until it ends. So the data pause it.
Every loop gets its batches from a loader whose collation ticks; at the end of a turn the tick waits until the measuring
process lets the loop go on. What is measured is the time between two fetches of a batch, which is a whole step whatever
a loop does in it, and a loop that waits uses no processor.

``object_store`` is a real one on this machine: moto's S3 server in a process of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

S = TypeVar("S")
B = TypeVar("B")

GO = "go\n"


def in_new_process(target: str, *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Call a function in a process of its own.

    Args:
        target: ``module:function``.
        arguments: JSON values.
        environment: variables on top of those of this process.

    Returns:
        What the function returns, a JSON value.

    Raises:
        RuntimeError: if the process fails, with the last lines that it printed.
    """
    done = subprocess.run(
        _command(target, arguments),
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    if done.returncode:
        raise RuntimeError(f"{target} {arguments} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _command(target: str, arguments: tuple[Any, ...]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.harness.processes", target, json.dumps(arguments)]


class Pacer:
    """The loop's side of ``Paced``.

    Args:
        warm_up: batches before the first turn.
        chunk: batches of a turn.
        permits: gives a line for every turn.
        times: takes the seconds of every turn, a line each; the first line means that the warm-up is over.
    """

    def __init__(self, warm_up: int, chunk: int, permits: TextIO, times: TextIO) -> None:
        self._next, self._chunk = warm_up, chunk
        self._permits, self._times = permits, times
        self._ticks = 0
        self._begin: float | None = None

    def tick(self) -> None:
        """Count a batch; wait at the end of a turn."""
        self._ticks += 1
        if self._ticks <= self._next:
            return
        seconds = 0.0 if self._begin is None else time.perf_counter() - self._begin
        self._next += self._chunk
        self._times.write(f"{seconds!r}\n")
        self._times.flush()
        if self._permits.readline() != GO:
            # The other side has gone; to go on would only disturb the machine.
            os._exit(1)
        self._begin = time.perf_counter()

    def pace(self, collate: Callable[[S], B]) -> Callable[[S], B]:
        """The same collation, after a tick."""

        def paced(samples: S) -> B:
            self.tick()
            return collate(samples)

        return paced


def steps_for(warm_up: int, chunk: int, turns: int) -> int:
    """Batches that a loop needs for a number of turns; the end of the last one is the fetch of one more."""
    return warm_up + chunk * turns + 1


class Paced:
    """A process with a loop that waits for its turns, seen from the process that measures.

    Args:
        target: ``module:function``, called with a ``Pacer`` and the arguments.
        arguments: JSON values.
        log: file for what the process prints.
        warm_up: batches before the first turn.
        chunk: batches of a turn.
        environment: variables on top of those of this process.
    """

    def __init__(
        self,
        target: str,
        *arguments: Any,
        log: Path,
        warm_up: int,
        chunk: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = log
        read, write = os.pipe()
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [*_command(target, arguments), str(write), str(warm_up), str(chunk)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                text=True,
                env={**os.environ, **(environment or {})},
            )
        os.close(write)
        self._times = os.fdopen(read, encoding="ascii")

    def wait_until_warm(self) -> None:
        """Return when the loop waits for its first turn.

        Raises:
            RuntimeError: if the process has failed, with the last lines that it printed.
        """
        self._next_line()

    def turn(self) -> float:
        """Let the loop do its steps, and return the seconds that they took.

        Raises:
            RuntimeError: if the process has failed.
        """
        self._allow()
        return float(self._next_line())

    def finish(self) -> None:
        """Let the loop end.

        Raises:
            RuntimeError: if the process has failed.
        """
        self._allow()
        if self._process.wait():
            raise self._failure()

    def stop(self) -> None:
        """End the process if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._times.close()

    def _allow(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(GO)
        self._process.stdin.flush()

    def _next_line(self) -> str:
        if not (line := self._times.readline()):
            self._process.wait()
            raise self._failure()
        return line

    def _failure(self) -> RuntimeError:
        printed = self._log.read_text(encoding="utf-8", errors="replace")
        return RuntimeError(f"a loop ended with {self._process.returncode}:\n{printed[-3000:]}")


def peak_memory() -> float:
    """Highest resident memory of this process, since the peak was last cleared, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


def own_memory(process: int) -> float:
    """Memory that a process has written to and shares with no other, in MB.

    What it has in common with its parent does not count. Neither do pages of a file that it has mapped: where the file
    was written a moment ago Linux calls them dirty and private too, but they are the file's, not the process's.
    """
    total = dirty = 0
    for line in Path(f"/proc/{process}/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("Private_Dirty:"):
            dirty = int(line.split()[1])
        elif line.startswith("Anonymous:"):
            total += min(dirty, int(line.split()[1]))
    return total / 1024


def children(process: int) -> list[int]:
    """Numbers of the processes that one has started, from any of its threads."""
    found: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(FileNotFoundError):  # the thread has ended meanwhile
            found += map(int, path.read_text(encoding="ascii").split())
    return found


def main(target: str, arguments: str, *paced: str) -> None:
    """Be the process that ``in_new_process`` or ``Paced`` has started."""
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    if paced:
        times, warm_up, chunk = map(int, paced)
        function(Pacer(warm_up, chunk, sys.stdin, os.fdopen(times, "w", encoding="ascii")), *json.loads(arguments))
    else:
        sys.stdout.write(f"\n{json.dumps(function(*json.loads(arguments)))}\n")


_SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Run the server for the length of the block, on a free port of the loopback interface.

    Yields:
        Environment variables by which its clients find it and log in.

    Raises:
        RuntimeError: if it does not start, such as where moto is not installed.
    """
    command = [sys.executable, "-c", _SERVE]
    # It ends with its standard input, so also where this process is killed.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split()
            if not address:
                raise RuntimeError("moto's S3 server does not start; pip install 'moto[s3]' flask flask-cors")
            yield {
                "AWS_ACCESS_KEY_ID": "vitrail",
                "AWS_SECRET_ACCESS_KEY": "not-so-secret",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": "http://{}:{}".format(*address),
            }
        finally:
            process.kill()  # what it has is in its memory


if __name__ == "__main__":
    main(*sys.argv[1:])
