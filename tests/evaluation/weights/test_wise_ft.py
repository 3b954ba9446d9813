from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from evaluation.__main__ import main
from evaluation.weights.wise_ft import Mixture, best_mixture, interpolated_weights, mixtures_table, sweep
from evaluation.weights.zero_shot import finetuning_cost
from experiments.train.cli import main as experiments
from lightning_modules.checkpoint import load_task, read_checkpoint
from tests.experiments.plain_figures import plain_figures
from tests.support.data import write_flowers
from tests.support.models import pair_batch, tiny_pair, write_clip
from vitrail.errors import UserError

CONFIG = """
data:
  class_path: datamodules.Flowers102
  init_args:
    root: {root}
    classes: base
    image: {{size: 32}}
    loader: {{batch_size: 8}}
    checks: {{allow_leaks: [exact, near]}}
model:
  class_path: lightning_modules.DualEncoder
  init_args:
    towers: {{model: {root}/clip}}
    lr: 0.003
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: callbacks.StartWeights
checkpoint: {{monitor: val/class/accuracy, mode: max}}
wandb: {{mode: disabled}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning on half of the classes, with what it said at its end in ``said.txt``."""
    root = tmp_path_factory.mktemp("wise")
    write_flowers(root)
    write_clip(root / "clip")
    config = root / "base.yaml"
    config.write_text(CONFIG.format(root=root))
    with plain_figures():
        assert experiments(["fit", "--config", str(config), "--runs", str(root / "runs"), "--test_best=true"]) == 0
    [run] = (root / "runs").glob("*/*")
    return run


def test_start_weights_are_those_of_the_pretrained_model(finished: Path) -> None:
    start = read_checkpoint(finished / "checkpoints" / "start.ckpt")["state_dict"]
    best = read_checkpoint(finished / "checkpoints" / "best.ckpt")["state_dict"]
    assert start.keys() == best.keys()
    assert any(not torch.equal(start[name], best[name]) for name in start)
    from transformers import CLIPModel

    pretrained = CLIPModel.from_pretrained(finished.parents[2] / "clip").state_dict()
    for name, value in pretrained.items():
        if "logit_scale" not in name:
            assert torch.equal(start[f"towers.model.{name}"], value), name


def test_the_run_keeps_what_the_model_said_before(finished: Path) -> None:
    after, before = (pd.read_parquet(finished / "predictions" / f"{name}.parquet") for name in ("test", "test_start"))
    assert after["name"].tolist() == before["name"].tolist()
    assert set(before["target_class"]) == {0, 1, 2, 3, 51, 52, 53, 54}


def test_mixtures_are_evaluated_and_the_best_on_validation_is_kept(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["wise-ft", str(finished), "--alphas", "0", "0.5", "1"]) == 0
    said = capsys.readouterr().out
    frame = pd.read_csv(finished / "reports" / "wise_ft.csv")
    assert frame["alpha"].tolist() == [0.0, 0.5, 1.0]
    assert set(frame.columns) == {"alpha", "val", "test", "base", "novel"}
    assert (finished / "figures" / "wise_ft.png").stat().st_size > 1000
    chosen = frame["alpha"].tolist()[int(frame["val"].to_numpy().argmax())]
    assert f"α = {chosen:g}" in said
    start, best, kept = (
        read_checkpoint(finished / "checkpoints" / f"{name}.ckpt")["state_dict"]
        for name in ("start", "best", "wise_ft")
    )
    for name, value in kept.items():
        torch.testing.assert_close(value, torch.lerp(start[name].double(), best[name].double(), chosen).to(value.dtype))
    assert load_task(finished / "checkpoints" / "wise_ft.ckpt").tasks


def test_the_ends_agree_with_the_predictions_of_the_run(finished: Path) -> None:
    from datamodules.cli import load_datamodule

    datamodule = load_datamodule(finished / "config.yaml")
    datamodule.prepare_data()
    datamodule.setup("test")
    cost = finetuning_cost(finished, datamodule, 51)
    start, best = (
        read_checkpoint(finished / "checkpoints" / f"{name}.ckpt")["state_dict"] for name in ("start", "best")
    )
    task = load_task(finished / "checkpoints" / "best.ckpt")
    ends = list(sweep(task, start, best, datamodule, alphas=(0.0, 1.0), base_classes=51))
    assert ends[0].novel == pytest.approx(cost.before.novel.value)
    assert ends[1].base == pytest.approx(cost.after.base.value)


def test_of_equal_mixtures_the_one_nearest_to_the_start_is_taken() -> None:
    mixtures = [Mixture(alpha, val, 0.5, None, None) for alpha, val in ((0.0, 0.5), (0.4, 0.8), (0.9, 0.8))]
    assert best_mixture(mixtures).alpha == 0.4
    assert len(mixtures_table(mixtures, mixtures[1]).rows) == 3
    assert mixtures[0].harmonic is None
    assert Mixture(0.0, 0.5, 0.5, 0.6, 0.3).harmonic == pytest.approx(0.4)


def test_nothing_is_chosen_where_nothing_was_measured() -> None:
    nothing = [Mixture(alpha, float("nan"), 0.5, 0.5, float("nan")) for alpha in (0.0, 1.0)]
    with pytest.raises(UserError, match="no sample of the validation split has a known class"):
        best_mixture(nothing)
    assert mixtures_table(nothing, nothing[0]).rows[0] == ["0", "–", "0.500", "0.500", "–", "–"]


def test_shares_out_of_range_and_missing_files_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["wise-ft", str(finished), "--alphas", "2"]) == 2
    assert main(["wise-ft", str(tmp_path)]) == 2
    shutil.copy(finished / "config.yaml", tmp_path)
    capsys.readouterr()
    assert main(["wise-ft", str(tmp_path)]) == 2
    assert "train it with callbacks.StartWeights" in capsys.readouterr().err
    task: Any = None
    with pytest.raises(UserError, match="alphas"):
        list(sweep(task, {}, {}, task, alphas=(-0.1,), base_classes=0))


def test_the_ends_are_the_models_and_the_middle_is_between() -> None:
    start, end = (
        {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(3)},
        {"w": torch.tensor([1.0, 4.0]), "n": torch.tensor(5)},
    )
    assert torch.equal(interpolated_weights(start, end, 0.0)["w"], start["w"])
    assert torch.equal(interpolated_weights(start, end, 1.0)["w"], end["w"])
    assert torch.equal(interpolated_weights(start, end, 0.25)["w"], torch.tensor([0.25, 2.5]))
    assert interpolated_weights(start, end, 0.25)["n"] == 5


@torch.no_grad()
def test_an_adapter_is_scaled_as_its_product(tmp_path: Path) -> None:
    task = tiny_pair(tmp_path, lora={"rank": 2, "alpha": 2}).eval()
    start = {name: value.clone() for name, value in task.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    end = {
        name: torch.randn(value.shape, generator=generator) if "lora_" in name else value
        for name, value in start.items()
    }
    key = next(name for name in start if name.endswith("lora_B.default.weight"))
    adapter = key.removesuffix("lora_B.default.weight") + "lora_A.default.weight"
    half = interpolated_weights(start, end, 0.5)
    torch.testing.assert_close(half[key] @ half[adapter], 0.5 * end[key] @ end[adapter])
    task.load_state_dict(interpolated_weights(start, end, 0.0))
    plain = tiny_pair(tmp_path).eval()
    image = pair_batch([1, 2])["image"]
    torch.testing.assert_close(task.encode_image(image), plain.encode_image(image))


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match=r"1 of another shape \(a is "):
        interpolated_weights({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, 0.5)
