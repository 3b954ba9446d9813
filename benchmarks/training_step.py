"""A training step of Vitrine beside a hand-written loop, ``transformers.Trainer`` and ``open_clip``'s loss.

    python -m benchmarks.training_step [--repeats 20]

RegNetX-200MF on 32 pictures of 64 px, and the same with a small BERT and a contrastive loss, in float32 on the
processor. Every loop runs in a process of its own and trains all the time with everything that comes with it; they
take turns of eight steps, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.interleaved import Row, interleave, row, say
from benchmarks.pacing import Paced, Pacer, steps_for

if TYPE_CHECKING:
    from benchmarks.contenders import Kind

WARM_UP, CHUNK, TURNS_OF_A_REPEAT = 8, 8, 8
OURS, BY_HAND = "Vitrine", "hand-written loop"
UNIT = "steps/s"


def run(repeats: int) -> list[Row]:
    """Steps per second of Vitrine by those of each peer, for both kinds of training."""
    from benchmarks.contenders import CONTENDERS

    rows: list[Row] = []
    for kind, contenders in CONTENDERS.items():
        rates = measure(kind, list(contenders), repeats * TURNS_OF_A_REPEAT)
        rows += rows_of(kind, rates)
    return rows


def rows_of(kind: str, rates: Mapping[str, list[float]]) -> list[Row]:
    """Vitrine beside every other contender.

    Args:
        kind: of training.
        rates: of each contender the steps per second of every turn.
    """
    return [
        row(f"training step, {kind}", OURS, peer, rates, UNIT, "≥ 0.98" if peer == BY_HAND else "> 1")
        for peer in rates
        if peer != OURS
    ]


def measure(kind: Kind, contenders: list[str], turns: int, chunk: int = CHUNK) -> dict[str, list[float]]:
    """Steps per second of each contender in every turn, the contenders in turn."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loops: dict[str, Paced] = {}
        for number, name in enumerate(contenders):
            own = folder / str(number)
            own.mkdir()
            arguments = ["--kind", kind, "--contender", name, "--folder", str(own), "--turns", str(turns)]
            # As the command line sets it for itself, but for all alike.
            environment = {"OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "disabled"}
            loop = Paced(
                "benchmarks.training_step", [*arguments, "--chunk", str(chunk)], folder / f"{number}.log", environment
            )
            stack.callback(loop.stop)
            loops[name] = loop
        for loop in loops.values():
            loop.wait_until_warm()
        seconds = interleave({name: loop.turn for name, loop in loops.items()}, turns)
        for loop in loops.values():
            loop.finish()
    return {name: [chunk / one for one in found] for name, found in seconds.items()}


def main() -> None:
    """Print the ratios, or be one of the contenders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="eight turns of eight steps each")
    for hidden in ("--kind", "--contender", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--turns", "--chunk", "--times"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        _train(options)
    else:
        say(run(options.repeats))


def _train(options: argparse.Namespace) -> None:
    """Train as one contender until the end."""
    from vitrail.runtime import keep_freed_memory

    keep_freed_memory()  # before torch allocates anything, as the command line does
    from benchmarks.contenders import CONTENDERS, Training
    from benchmarks.long_epoch import LongEpoch

    training = Training(options.kind, steps_for(WARM_UP, options.chunk, options.turns), Path(options.folder))
    LongEpoch.pacer = Pacer(WARM_UP, options.chunk, sys.stdin, os.fdopen(options.times, "w", encoding="ascii"))
    CONTENDERS[training.kind][options.contender](training)


if __name__ == "__main__":
    main()
