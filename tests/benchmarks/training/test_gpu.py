from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.training import gpu
from vitrail.types import LABEL_TASK


def test_both_rates_come_from_one_run(tmp_path: Path) -> None:
    setting = gpu.Setting(batch=4, steps=4, pixels=32, workers=1, accelerator="cpu")
    rates = gpu.fit("test_resnet", tmp_path, 2, setting)
    assert {key: len(values) for key, values in rates.items()} == {"alone": 2, "end_to_end": 2}
    assert all(rate > 0 for values in rates.values() for rate in values)


def test_the_copy_learns_and_the_task_does_not() -> None:
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


def test_a_share_is_of_the_same_epoch() -> None:
    (row,) = gpu.rows_of("DeiT-Tiny", {"alone": [100.0, 50.0], "end_to_end": [98.0, 48.0]})
    assert (row.ratio, row.low, row.high) == pytest.approx((0.97, 0.96, 0.98))
    assert row.kept


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = gpu.run(1)
    assert [row.benchmark for row in rows] == ["GPU, DeiT-Tiny, bf16", "GPU, ViT-B/16, bf16"]
    assert all(math.isnan(row.ratio) and row.kept is None for row in rows)
    monkeypatch.setattr("sys.argv", ["benchmarks.training.gpu"])
    gpu.main()
    assert capsys.readouterr().out == "benchmarks.training.gpu: not measured, this machine has no CUDA device\n"
