from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from benchmarks.harness.data import write_photos
from benchmarks.training import frozen_phase


def test_both_ways_train_the_same_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_photos(tmp_path / "photos", 24, 60)
    heads: dict[str, dict[str, torch.Tensor]] = {}
    fit = Trainer.fit

    def kept(trainer: Trainer, model: torch.nn.Module, **arguments: object) -> None:
        fit(trainer, model, **arguments)  # type: ignore[arg-type]
        heads[mode] = {name: value.clone() for name, value in model.state_dict().items()}

    monkeypatch.setattr(Trainer, "fit", kept)
    for mode in frozen_phase.MODES.values():
        seed_everything(0)
        assert frozen_phase.seconds(folder, mode, backbone="test_resnet", size=32, epochs=2) > 0
    once, naive = heads["auto"], heads["never"]
    assert once.keys() == naive.keys()
    for name, value in once.items():
        assert torch.allclose(value, naive[name], atol=1e-5), name
