"""Negatives from all processes: the gradient of two is that of one with the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from tests.lightning_modules.tiny_pairs import pair_batch, tiny_pair
from vitrail.types import Batch

CASES: dict[str, dict[str, Any]] = {
    "info_nce": {"loss": "info_nce"},
    "label_aware": {"loss": "label_aware"},
    "sigmoid": {"loss": "sigmoid"},
    "cached": {"loss": "label_aware", "chunk_size": 2},
}
IDS = [0, 1, 2, 3, 4, 6, 9, 12]


class Step(nn.Module):
    """The training step as DDP wants it, a forward."""

    def __init__(self, folder: Path, changes: dict[str, Any]) -> None:
        super().__init__()
        self.task = tiny_pair(folder, **changes)
        texts = [f"number {index} of a rose or tulip or daisy or iris" for index in IDS]
        self.task.towers.tokenizer = self.task.towers.train_tokenizer(texts)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.task._shared_step(batch, "train")[0]


def gradients(step: nn.Module, module: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    loss = step(batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def on_one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own = pair_batch(IDS[rank * 4 : rank * 4 + 4])
    found = {}
    for name, changes in CASES.items():
        step = Step(Path(folder, "clip"), changes)
        found[name] = gradients(DistributedDataParallel(step), step, own)
        dist.barrier()
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, torch.Tensor]]]]:
    folder = tmp_path_factory.mktemp("two")
    Step(folder / "clip", {})  # writes the configuration before both read it
    # Forked processes need not import everything again; where there is an accelerator they may not be forked.
    method = "spawn" if torch.accelerator.is_available() else "fork"
    start_processes(on_one_of_two_processes, args=(str(folder),), nprocs=2, start_method=method)  # type: ignore[no-untyped-call]
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradient_of_the_joined_batch(case: str, of_two: Any) -> None:
    folder, ranks = of_two
    step = Step(folder / "clip", {**CASES[case], "chunk_size": 0})
    expected = gradients(step, step, pair_batch(IDS))
    losses = [rank[case].pop("loss") for rank in ranks]
    torch.testing.assert_close(torch.stack(losses).mean(), expected.pop("loss"), rtol=1e-5, atol=0)
    assert "task.objective.temperature.log_scale" in expected
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for rank in ranks:
        assert rank[case].keys() == expected.keys()
        for name, gradient in expected.items():
            error = float((rank[case][name] - gradient).norm())
            # Relative to itself, or to the largest where it is nothing but rounding.
            assert error <= 1e-5 * max(float(gradient.norm()), 1e-3 * scale), name
