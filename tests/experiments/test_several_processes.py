"""Several processes evaluate as one does, and train as one does, for every task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.train.cli import main
from lightning_modules import load_task
from tests.experiments.several_processes import ALIKE, EPOCHS, SIZES, TASKS, TRAINED, is_costly
from tests.support.forks import run_program
from vitrail.predictions import read_predictions

pytestmark = pytest.mark.timeout(600)

TORCHRUN = """
name: torchrun
test_best: true
data:
  class_path: datamodules.Wares
  init_args: {n_samples: 60, resolution: 16, image: {size: 16}, loader: {batch_size: 8}}
model:
  class_path: lightning_modules.MultiTaskClassifier
  init_args: {backbone: test_vit, pretrained: false}
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
wandb: {mode: disabled}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "torchrun.yaml").write_text(TORCHRUN)
    run_program("tests.experiments.several_processes", str(folder))
    return folder


@pytest.fixture(scope="module")
def costly(folder: Path) -> Path:
    """The same folder with what only the slow tests look at."""
    run_program("tests.experiments.several_processes", str(folder), "costly")
    return folder


@pytest.fixture(scope="module")
def sharded(costly: Path) -> Path:
    """The same folder after two processes of torchrun trained tasks with sharded weights, and overlays."""
    program = ("-m", "tests.experiments.several_processes", str(costly), "sharded", *TRAINED, "ddp", "fsdp")
    run_program("torch.distributed.run", "--standalone", "--nproc-per-node=2", *program, seconds=400)
    return costly


def evaluations(*names: str) -> pytest.MarkDecorator:
    """Worlds, sizes and tasks; the costly ones are slow tests."""
    cases = [(world, size, task) for world in (2, 3) for size in SIZES for task in names]
    return pytest.mark.parametrize(
        ("world", "size", "task"),
        [pytest.param(*case, marks=[pytest.mark.slow] if is_costly(*case) else []) for case in cases],
    )


@pytest.fixture
def evaluated(request: pytest.FixtureRequest, world: int, size: int, task: str) -> Path:
    """The folder, with that evaluation on one process and on several."""
    found: Path = request.getfixturevalue("costly" if is_costly(world, size, task) else "folder")
    return found


def metrics(here: Path, rank: int) -> dict[str, float]:
    found: dict[str, float] = json.loads((here / f"metrics_{rank}.json").read_text())
    return found


def trained(folder: Path, world: int, task: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(
        folder / str(world) / f"{task}-trained" / f"trained_{rank}.pt", weights_only=True
    )
    return found


@pytest.mark.slow
@evaluations(*TASKS)
def test_metrics_are_those_of_one_process(evaluated: Path, world: int, size: int, task: str) -> None:
    alone = metrics(evaluated / "1" / f"{task}-{size}", 0)
    assert "test/loss" in alone
    assert ("test/image_to_text/R@1" in alone) == (task == "captioned")
    assert ("test/class/accuracy" in alone) == (task != "captioned")
    for rank in range(world):
        found = metrics(evaluated / str(world) / f"{task}-{size}", rank)
        assert found == pytest.approx(alone, rel=1e-6)
        # Shares of samples are counts, and may differ by a rounding only.
        for name, value in found.items():
            if name.endswith("accuracy"):
                assert round(value * size * 1000) == round(alone[name] * size * 1000)


@evaluations(*(name for name in TASKS if name != "captioned"))
def test_predictions_are_those_of_one_process(evaluated: Path, world: int, size: int, task: str) -> None:
    for split in ("test", "predict") if size < 1000 else ("test",):
        place = Path(f"{task}-{size}") / "predictions" / f"{split}.parquet"
        alone, together = (read_predictions(evaluated / str(count) / place) for count in (1, world))
        assert not list((evaluated / str(world) / place.parent).glob(".*")), "a shard is left"
        np.testing.assert_array_equal(together.sample_id, alone.sample_id)
        np.testing.assert_array_equal(together.groups, alone.groups)
        np.testing.assert_array_equal(together.sample_id, np.arange(58, 58 + size))
        np.testing.assert_array_equal(together.names, alone.names)
        for name, logits in alone.logits.items():
            np.testing.assert_array_equal(together.targets[name], alone.targets[name])
            np.testing.assert_allclose(together.logits[name], logits, rtol=0, atol=1e-6)


@evaluations(*TASKS)
def test_reports_are_those_of_one_process(evaluated: Path, world: int, size: int, task: str) -> None:
    reports = sorted((evaluated / "1" / f"{task}-{size}" / "reports").glob("*.csv"))
    assert reports
    for path in reports:
        other = evaluated / str(world) / f"{task}-{size}" / "reports" / path.name
        pd.testing.assert_frame_equal(pd.read_csv(other), pd.read_csv(path), rtol=1e-6)


trainings = pytest.mark.parametrize(
    "task", [pytest.param(task, marks=pytest.mark.slow) if task in ALIKE else task for task in TRAINED]
)


@pytest.fixture
def where_trained(request: pytest.FixtureRequest, task: str) -> Path:
    """The folder, with that training on one process and on two."""
    found: Path = request.getfixturevalue("costly" if task in ALIKE else "folder")
    return found


@trainings
def test_two_processes_learn_the_same_weights_and_learn(where_trained: Path, task: str) -> None:
    first, second = (trained(where_trained, 2, task, rank) for rank in range(2))
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    assert len(first["losses"]) == EPOCHS
    assert first["losses"] == second["losses"]
    assert first["losses"][-1] < 0.9 * first["losses"][0]


@trainings
def test_two_processes_learn_what_one_learns_from_their_joined_batches(where_trained: Path, task: str) -> None:
    alone, both = (trained(where_trained, world, task, 0) for world in (1, 2))
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-4)


def test_two_processes_average_the_same_weights_and_keep_those_that_were_validated(folder: Path) -> None:
    here = [folder / str(world) / "averaged" for world in (1, 2)]
    alone = torch.load(here[0] / "averaged_0.pt", weights_only=True)
    both = [torch.load(here[1] / f"averaged_{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(both[0]["validated"]) == EPOCHS
    for one, other, expected in zip(*(one["validated"] for one in (*both, alone)), strict=True):
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-3)
    best = torch.load(here[1] / "best.ckpt", weights_only=True)
    assert both[0]["best_epoch"] == both[1]["best_epoch"] == best["epoch"]
    for name, value in both[0]["validated"][best["epoch"]].items():
        assert torch.equal(best["state_dict"][name], value), name
    raw = best["current_model_state"]
    assert any(not torch.equal(value, raw[name]) for name, value in best["state_dict"].items())


@pytest.mark.slow
@pytest.mark.parametrize("task", TRAINED)
def test_sharded_weights_learn_as_whole_ones_do_and_checkpoints_are_whole(sharded: Path, task: str) -> None:
    one, two = (sharded / str(world) / f"{task}-sharded" for world in (1, 2))
    for name in ("half.ckpt", "whole.ckpt"):
        alone, both = (torch.load(here / name, weights_only=True) for here in (one, two))
        assert both["state_dict"].keys() == alone["state_dict"].keys()
        for key, value in alone["state_dict"].items():
            torch.testing.assert_close(both["state_dict"][key], value, rtol=0, atol=1e-3)
        optimizers = [checkpoint["optimizer_states"][0] for checkpoint in (alone, both)]
        for one_group, other in zip(*(optimizer["param_groups"] for optimizer in optimizers), strict=True):
            for key in ("name", "weight_decay", "lr_scale"):
                assert one_group[key] == other[key]
            # Numbers of weights may differ; torch goes by their order within the group when it resumes.
            for number, other_number in zip(one_group["params"], other["params"], strict=True):
                one_state, other_state = optimizers[0]["state"][number], optimizers[1]["state"][other_number]
                assert one_state["step"] == other_state["step"]
                torch.testing.assert_close(other_state["exp_avg"], one_state["exp_avg"], rtol=0, atol=1e-3)
    load_task(two / "whole.ckpt")
    alone_tested, *tested = (
        json.loads((here / f"tested_{rank}.json").read_text()) for here, rank in ((one, 0), (two, 0), (two, 1))
    )
    for found in tested:
        assert found["test/loss"] == pytest.approx(alone_tested["test/loss"], rel=1e-3)


def test_a_loss_that_is_not_a_number_on_one_process_stops_both(folder: Path) -> None:
    here = folder / "2" / "stop"
    both = [torch.load(here / f"spoilt_{rank}.pt", weights_only=True) for rank in range(2)]
    assert both[0]["message"] == both[1]["message"]
    assert "training loss is nan at epoch 0, batch 2" in both[0]["message"]
    [event] = json.loads((here / "non_finite.json").read_text())["batches"]
    [process] = event["processes"]
    assert process["rank"] == 1
    assert len(process["sample_id"]) == len(process["name"]) == 4


def test_a_step_that_is_bad_on_one_process_is_left_out_on_both(folder: Path) -> None:
    here = folder / "2" / "skip"
    both = [torch.load(here / f"spoilt_{rank}.pt", weights_only=True) for rank in range(2)]
    assert both[0]["message"] == both[1]["message"] == ""
    for name, value in both[0]["weights"].items():
        assert torch.equal(value, both[1]["weights"][name]), name
        assert torch.isfinite(value).all(), name
    assert json.loads((here / "non_finite.json").read_text())["skipped_steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
def test_torchrun_makes_one_run_whose_checkpoint_needs_no_torchrun(sharded: Path, overlay: str) -> None:
    folder = sharded
    [run] = (folder / "runs" / overlay).glob("*")
    assert run.name.startswith("job-")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert [stage["exit"] for stage in stages] == ["finished", "finished"]
    log = pd.read_csv(run / "metrics.csv")
    assert log["test/loss"].notna().sum() == 1
    predictions = read_predictions(run / "predictions" / "test.parquet")
    best = run / "checkpoints" / "best.ckpt"
    alone = ["--config", str(folder / "torchrun.yaml"), "--runs", str(folder / "alone"), "--name", f"{overlay}-alone"]
    assert main(["test", *alone, "--ckpt_path", str(best)]) == 0
    again = read_predictions(run / "predictions" / "test.parquet")
    np.testing.assert_array_equal(again.sample_id, predictions.sample_id)
    for task, logits in predictions.logits.items():
        np.testing.assert_allclose(again.logits[task], logits, rtol=0, atol=1e-6)
