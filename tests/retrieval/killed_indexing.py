"""Indexing that is killed at every stage, and finished; ``test_killed_indexing.py`` looks at what is left.

A program of its own: everything is imported once, and each indexing is a fork that has computed nothing yet.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance_namespace  # noqa: F401 -- most of what importing LanceDB costs; LanceDB itself starts a thread
import torch

import lightning_modules.checkpoint
from retrieval.__main__ import main
from tests.support.galleries import dual_encoder, photos
from tests.support.processes import begin_fork, end_of_fork

CHUNK = 8
COUNT = 22


def kill_at(call: Callable[..., Any], number: int = 1, after: bool = False) -> Callable[..., Any]:
    """The call, at whose n-th time the process is killed, before it is made or after."""
    calls = 0

    def killing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        result = call(*arguments, **named) if calls != number or after else None
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return killing


def between_the_tables() -> None:
    from retrieval.store import Store

    Store.create = kill_at(Store.create, after=True)  # type: ignore[method-assign]


def before_the_first_image() -> None:
    from retrieval import fill as filling

    filling.fill = kill_at(filling.fill)


def while_encoding() -> None:
    from lightning_modules import DualEncoder

    # The sixth batch, of the third chunk: the first chunk has been written, the second has been or is being.
    DualEncoder.predict_step = kill_at(DualEncoder.predict_step, 6)  # type: ignore[method-assign]


def between_captions_and_images() -> None:
    from retrieval.store import Store

    # Of the second chunk: captions, images, captions, and then.
    Store.append = kill_at(Store.append, 4)  # type: ignore[method-assign]


def while_tidying() -> None:
    from retrieval.store import Store

    Store.tidy = kill_at(Store.tidy)  # type: ignore[method-assign]


def while_the_matrix_is_written() -> None:
    from retrieval.search import vectors as vector_rows
    from retrieval.search.vectors import write_vectors

    def half(path: Path, batches: Any, dim: int) -> None:
        write_vectors(path, (kill_at(lambda batch: batch)(batch) for batch in batches), dim)

    vars(vector_rows)["write_vectors"] = half


STAGES: dict[str, Callable[[], None]] = {
    stage.__name__: stage
    for stage in (
        between_the_tables,
        before_the_first_image,
        while_encoding,
        between_captions_and_images,
        while_tidying,
        while_the_matrix_is_written,
    )
}


def index(folder: Path, uri: Path) -> int:
    """One indexing."""
    data = ["--data", "tests.support.galleries.Photos", "--data.init_args.root", str(folder / "data")]
    data += ["--data.init_args.captions", "true"]
    run = ["--run", str(folder / "run"), "--checkpoint", "any", "--device", "cpu"]
    return main(["index", *run, "--gallery", str(uri), "--chunk", str(CHUNK), *data])


def in_fork(work: Callable[[], int], log: Path) -> int:
    """What the work returns, or the number of the signal that ended it, below 0."""
    return end_of_fork(begin_fork(work, log))


def killed(folder: Path, stage: str) -> int:
    STAGES[stage]()
    return index(folder, folder / stage)


def expect(code: int, wanted: int, what: str) -> None:
    if code != wanted:
        raise RuntimeError(f"{what}: ended with {code}, not {wanted}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    # Everything that costs time and starts no thread is done once, before the forks: the model above all.
    task = dual_encoder(root / "clip")
    lightning_modules.checkpoint.load_task = lambda *_: task
    photos(root / "data", captions=True)
    expect(in_fork(lambda: index(root, root / "undisturbed"), root / "log"), 0, "undisturbed")
    for name in STAGES:
        expect(in_fork(lambda name=name: killed(root, name), root / "log"), -signal.SIGKILL, name)  # type: ignore[misc]
        if (root / name).exists():
            shutil.copytree(root / name, root / f"{name}-killed")
            for left in (root / name).glob(".*.part.*"):
                os.utime(left, (0, 0))  # some time goes by
        expect(in_fork(lambda name=name: index(root, root / name), root / "log"), 0, f"{name}, finished")  # type: ignore[misc]
