"""Seconds and memory of several models, measured in turn.

A machine is never quiet. Each model sits in a process of its own, all at once, and every round asks one after the
other, in an order that moves on from round to round. A ratio is taken within a round, where both sides met the same
disturbances. Models that do not fit into memory together are measured in groups; the first model is in each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.cost.efficiency import BatchCost, Costs, ModelSource

_SHARE_OF_MEMORY = 0.4
"""Of the machine, for the weights of one group: activations and other people need the rest."""
_BASE_BYTES = 600_000_000
"""What a process needs beside its weights."""


def measure(
    sources: Mapping[str, ModelSource],
    weight_bytes: Mapping[str, int],
    batch_sizes: Sequence[int],
    repeats: int,
    *,
    warm_up: int = 1,
    device: str = "cpu",
    threads: int = 0,
    available: int | None = None,
) -> dict[str, Costs]:
    """Costs of each model; the first is what ratios are to.

    Args:
        sources: the models, by name.
        weight_bytes: size of each, for the groups.
        batch_sizes: each is measured apart.
        repeats: rounds that count, at least 1.
        warm_up: rounds before them that do not; at least 1, in which memory is measured too.
        device: ``cpu`` or ``cuda``.
        threads: of the CPU; 0 leaves the choice to PyTorch.
        available: bytes for all models of a group; by default a share of the machine's memory.
    """
    names = list(sources)
    room = available or int(_SHARE_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    found: dict[str, Costs] = {}
    for group in groups(names, weight_bytes, room):
        workers = {name: _Worker(sources[name], device, threads) for name in group}
        try:
            measured = _measure_group(workers, names[0], sorted(batch_sizes), repeats, max(1, warm_up))
        finally:
            for worker in workers.values():
                worker.close()
        found |= {name: costs for name, costs in measured.items() if name not in found}
    return found


def groups(names: Sequence[str], weight_bytes: Mapping[str, int], available: int) -> list[list[str]]:
    """Models that are in memory at once, in order; the first model is in each, every other one in one of them."""
    first, *others = names
    made: list[list[str]] = [[first]]
    left = free = available - weight_bytes[first] - _BASE_BYTES
    for name in others:
        size = weight_bytes[name] + _BASE_BYTES
        if size > left and len(made[-1]) > 1:
            made.append([first])
            left = free
        made[-1].append(name)
        left -= size
    return made


def _measure_group(
    workers: Mapping[str, _Worker], first: str, batch_sizes: Sequence[int], repeats: int, warm_up: int
) -> dict[str, Costs]:
    names = list(workers)
    heads: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    replies: dict[str, dict[int, list[dict[str, Any]]]] = {name: {size: [] for size in batch_sizes} for name in names}
    for name, worker in workers.items():
        try:
            heads[name] = worker.start()
        except RuntimeError as error:
            errors[name] = str(error)
    for number in range(warm_up + repeats):
        start = number % len(names)
        for size in batch_sizes:
            for name in names[start:] + names[:start]:
                if name in errors:
                    continue
                try:
                    replies[name][size].append(workers[name].ask(str(size)))
                except RuntimeError as error:
                    errors[name] = str(error)
    peer = first if first not in errors else next((name for name in names if name not in errors), "")
    seconds = {
        name: {size: [one["seconds"] for one in replies[name][size][warm_up:]] for size in batch_sizes}
        for name in names
        if name not in errors
    }
    return {
        name: Costs(error=errors[name])
        if name in errors
        else Costs(
            heads[name]["device"],
            heads[name]["threads"],
            peer,
            {
                size: BatchCost(
                    seconds[name][size],
                    [one / other for one, other in zip(seconds[name][size], seconds[peer][size], strict=True)],
                    replies[name][size][0]["peak_bytes"],
                )
                for size in batch_sizes
            },
        )
        for name in names
    }


class _Worker:
    """A process with one model."""

    def __init__(self, source: ModelSource, device: str, threads: int) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evaluation.cost.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        values = {"source": json.loads(source.as_json()), "device": device, "threads": threads}
        self._first = json.dumps(values)

    def start(self) -> dict[str, Any]:
        """Build the model; where it is."""
        return self.ask(self._first)

    def ask(self, line: str) -> dict[str, Any]:
        """One answer.

        Raises:
            RuntimeError: if the process has ended, with the last line that it said.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(self._why()) from None
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(self._why())
        values: dict[str, Any] = json.loads(answer)
        return values

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        self._process.terminate()
        self._process.wait()
        self._said.close()

    def _why(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", errors="replace").strip().splitlines()
        if code < 0:
            return f"ended by signal {-code}, which is how a machine without memory left ends a process"
        return (lines or [f"ended with {code}"])[-1].removeprefix("error: ")
