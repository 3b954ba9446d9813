from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.training import gpu
from vitrail.types import LABEL_TASK


@pytest.mark.slow
def test_both_rates_come_from_one_run(tmp_path: Path) -> None:
    rates = gpu.fit("test_resnet", tmp_path, 2, batch=4, steps=4, pixels=32, workers=1)
    assert {key: len(values) for key, values in rates.items()} == {gpu.ALONE: 2, gpu.END_TO_END: 2}
    assert all(rate > 0 for values in rates.values() for rate in values)


def test_the_copy_is_trained_and_the_task_is_not() -> None:
    from lightning_modules.classification import ImageClassifier

    task = ImageClassifier("test_resnet", ["cup", "lamp"], pretrained=False, image_size=32)
    before = [parameter.detach().clone() for parameter in task.parameters()]

    class FakeTrainer:
        precision = "32-true"

    rates = gpu.Rates("rates.json", skip=1, alone_steps=2)
    rates._batch = {
        "image": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8),
        "label": torch.tensor([0, 1, 0, 1]),
    }
    assert rates._alone(FakeTrainer(), task) > 0  # type: ignore[arg-type]  # what is read
    assert all(torch.equal(one, other) for one, other in zip(before, task.parameters(), strict=True))
    assert set(task.tasks) == {LABEL_TASK}


@pytest.mark.parametrize("available", [True, False])
def test_a_share_is_of_the_same_epoch(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    rates = {gpu.ALONE: [100.0, 50.0], gpu.END_TO_END: [98.0, 48.0]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(gpu, "fit", lambda *arguments, **options: rates)
    rows = gpu.run(1)
    assert [row.benchmark for row in rows] == ["GPU, DeiT-Tiny, bf16", "GPU, ViT-B/16, bf16"]
    if available:
        assert (rows[0].ratio, rows[0].low, rows[0].high) == pytest.approx((0.97, 0.96, 0.98))
        assert rows[0].kept
    else:
        assert all(math.isnan(row.ratio) and row.kept is None for row in rows)
        assert rows[0].note == "not measured: this machine has no CUDA device"
