"""The callbacks on two processes (gloo): the traps of DDP with a backbone that is frozen at first, and exact counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.callbacks.two_processes import EPOCHS, PHASE_ONE, evaluate, train
from tests.support.forks import run_program
from tests.support.runs import SPLIT_SIZES


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    for name in ("fit", "accumulated", "uneven", "evaluation"):
        (folder / name).mkdir()
    run_program("tests.callbacks.two_processes", str(folder))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    # The same samples a step as two processes with batches of two, or two such batches, have together.
    for name, batch_size in (("fit", 4), ("accumulated", 8)):
        (folder / name).mkdir()
        train(folder / name, batch_size)
    (folder / "uneven").mkdir()
    train(folder / "uneven", 4, accumulate_grad_batches=5)
    evaluate(folder / "evaluation")
    return folder


def weights(folder: Path, epoch: int, rank: int) -> dict[str, torch.Tensor]:
    loaded: dict[str, Any] = torch.load(folder / f"weights_{epoch}_{rank}.pt", weights_only=True)
    # BatchNorm's running statistics are each process's own until the next forward pass, as DDP has it.
    return {key: value for key, value in loaded.items() if not key.rpartition(".")[2].startswith(("running", "num_"))}


@pytest.mark.parametrize("run", ["fit", "accumulated", "uneven"])
@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_processes_hold_the_same_weights(both: Path, run: str, epoch: int) -> None:
    first, second = weights(both / run, epoch, 0), weights(both / run, epoch, 1)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("run", ["fit", "accumulated", "uneven"])
def test_heads_learn_in_phase_one_as_they_would_alone(both: Path, alone: Path, run: str) -> None:
    together, single = weights(both / run, PHASE_ONE - 1, 0), weights(alone / run, PHASE_ONE - 1, 0)
    assert together.keys() == single.keys()
    for key, value in together.items():
        torch.testing.assert_close(value, single[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", ["fit", "accumulated", "uneven"])
def test_backbone_learns_in_phase_two(both: Path, run: str) -> None:
    before, after = weights(both / run, PHASE_ONE - 1, 1), weights(both / run, EPOCHS - 1, 1)
    backbone = [key for key in before if key.startswith("encoder.backbone.")]
    assert backbone
    assert [key for key in backbone if torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize("split", ["val", "test"])
def test_counts_are_summed_over_processes(both: Path, alone: Path, split: str) -> None:
    path = f"evaluation/figures/confusion_{split}_class.csv"
    counts = pd.read_csv(both / path, index_col=0)
    pd.testing.assert_frame_equal(counts, pd.read_csv(alone / path, index_col=0))
    assert counts.to_numpy().sum() == SPLIT_SIZES[split]


def test_the_worst_mistakes_are_those_of_all_processes(both: Path, alone: Path) -> None:
    together, single = (
        np.asarray(Image.open(folder / "evaluation" / "figures" / "mistakes_test_class.png").convert("RGB"), np.int64)
        for folder in (both, alone)
    )
    # Another batch rounds differently, so a pixel may have another colour by a shade.
    assert together.shape == single.shape
    assert (np.abs(together - single) > 3).mean() < 0.001
