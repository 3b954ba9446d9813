from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch

from callbacks.finetuning import StartWeights
from tests.support.models import TinyData, seeded_multitask, tiny_trainer


def start(root: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(root / "checkpoints" / "start.ckpt", weights_only=True)["state_dict"]
    return weights


def test_the_weights_before_the_first_step_are_kept(tmp_path: Path) -> None:
    task = seeded_multitask()
    begin = {name: value.clone() for name, value in task.state_dict().items()}
    tiny_trainer(tmp_path, callbacks=[StartWeights()], num_sanity_val_steps=0).fit(task, TinyData())
    kept = start(tmp_path)
    assert all(torch.equal(kept[name], value) for name, value in begin.items() if "metrics" not in name)


def test_a_resumed_run_keeps_those_it_has(tmp_path: Path) -> None:
    first = tiny_trainer(tmp_path, callbacks=[StartWeights()])
    first.fit(seeded_multitask(), TinyData())
    first.save_checkpoint(tmp_path / "last.ckpt")
    before = start(tmp_path)
    resumed: pl.Trainer = tiny_trainer(tmp_path, callbacks=[StartWeights()], max_epochs=2)
    resumed.fit(seeded_multitask(), TinyData(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert all(torch.equal(value, start(tmp_path)[name]) for name, value in before.items())
