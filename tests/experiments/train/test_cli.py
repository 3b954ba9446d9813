"""The command line as a user meets it: directories, repeats, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from experiments.train.cli import main
from tests.experiments.conftest import only_run
from vitrail.runs import RunFiles

Run = Callable[..., int]


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    state: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return state


def test_fit_leaves_everything_that_is_known_of_a_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", "--test_best=true") == 0
    directory = only_run(tmp_path / "runs")
    assert str(directory) in capsys.readouterr().out
    for name in ("config.yaml", "run.json", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (directory / name).is_file(), name
    record = json.loads((directory / "run.json").read_text())
    assert record["seed"] == 42
    assert record["data"]["fingerprint"]
    assert [stage["stage"] for stage in record["stages"]] == ["fit", "test"]
    assert {stage["exit"] for stage in record["stages"]} == {"finished"}
    predictions = pd.read_parquet(directory / "predictions" / "test.parquet")
    assert predictions["sample_id"].is_unique
    assert len(predictions) == record["data"]["samples"]["test"]
    assert list((directory / "figures").glob("confusion_test_*.png"))
    metrics = pd.read_csv(directory / "metrics.csv")
    assert metrics["val/loss"].notna().sum() == 2


def test_saved_config_repeats_the_run_bit_for_bit(run: Run, tmp_path: Path) -> None:
    assert run("fit", "--model.init_args.lr=0.002") == 0
    first = only_run(tmp_path / "runs")
    assert main(["fit", "--config", str(first / "config.yaml")]) == 0
    second = next(path for path in (tmp_path / "runs").glob("*/*") if path != first)
    assert yaml.safe_load((first / "config.yaml").read_text()) == yaml.safe_load((second / "config.yaml").read_text())
    for key, value in weights(first).items():
        assert torch.equal(value, weights(second)[key]), key


def test_test_writes_beside_the_checkpoint_and_keeps_the_log(run: Run, tmp_path: Path) -> None:
    assert run("fit") == 0
    directory = only_run(tmp_path / "runs")
    log = (directory / "metrics.csv").read_bytes()
    assert run("test", "--ckpt_path", "best") == 0
    assert only_run(tmp_path / "runs") == directory
    assert (directory / "predictions" / "test.parquet").is_file()
    assert (directory / "metrics.csv").read_bytes() == log
    stages = json.loads((directory / "run.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["fit", "test"]
    # The checkpoint alone is enough: its configuration lies beside it.
    assert main(["validate", "--ckpt_path", str(directory / "checkpoints" / "best.ckpt")]) == 0


def test_results_on_other_data_go_to_a_new_directory(run: Run, tmp_path: Path) -> None:
    assert run("fit") == 0
    directory = only_run(tmp_path / "runs")
    assert run("test", "--ckpt_path=best", "--data.init_args.loader.batch_size=5") == 0
    assert not (directory / "predictions").exists()
    assert len(list((tmp_path / "runs").glob("*/*"))) == 2


def test_predict_writes_predictions(run: Run, tmp_path: Path) -> None:
    assert run("fit") == 0
    assert run("predict", "--ckpt_path=best") == 0
    assert (only_run(tmp_path / "runs") / "predictions" / "predict.parquet").is_file()


def test_results_of_another_checkpoint_do_not_replace_those_of_the_best(run: Run, tmp_path: Path) -> None:
    assert run("fit", "--test_best=true") == 0
    first = only_run(tmp_path / "runs")
    before = (first / "predictions" / "test.parquet").stat().st_mtime_ns
    assert run("test", "--ckpt_path=last") == 0
    second = next(path for path in (tmp_path / "runs").glob("*/*") if path != first)
    assert (second / "predictions" / "test.parquet").is_file()
    assert (first / "predictions" / "test.parquet").stat().st_mtime_ns == before


def test_resume_continues_where_the_run_ended(run: Run, tmp_path: Path) -> None:
    assert run("fit") == 0
    first = only_run(tmp_path / "runs")
    assert run("fit", "--ckpt_path=last", "--trainer.max_epochs=3", "--test_best=true") == 0
    second = next(path for path in (tmp_path / "runs").glob("*/*") if path != first)
    record = json.loads((second / "run.json").read_text())
    # What was tested is not what training went on from.
    assert record["stages"][1]["checkpoint"] == str((second / "checkpoints" / "best.ckpt").resolve())
    assert RunFiles(second).predicted_by("test") == "best"
    assert record["stages"][0]["checkpoint"] == str(first / "checkpoints" / "last.ckpt")
    assert torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 3


@pytest.mark.parametrize(
    ("subcommand", "arguments", "said"),
    [
        ("test", (), "--ckpt_path"),
        ("fit", ("--checkpoint.monitor=test/loss",), "test/loss"),
        ("fit", ("--trainer.max_epochs=many",), "trainer.max_epochs"),
        ("fit", ("--model.init_args.backbone=resnt18",), "resnt18"),
        ("fit", ("--model=NoSuchTask",), "NoSuchTask"),
        ("fit", ("--data.init_args.loader.batch=3",), "batch"),
        ("fit", ("--ckpt_path=nowhere.ckpt",), "nowhere.ckpt"),
        ("fit", ("--trainer.default_root_dir=x",), "--runs"),
        ("fit", ("--config", "absent.yaml"), "absent.yaml"),
        ("fit", ("--trainer.strategy=ddq",), "trainer: You selected an invalid strategy name"),
        ("fit", ("--trainer.accumulate_grad_batches=0",), "trainer.accumulate_grad_batches"),
        ("fit", ("--trainer.val_check_interval=100",), "val_check_interval"),
        ("fit", ("--trainer.enable_checkpointing=false",), "trainer: "),
        ("fit", ("--data.init_args.loader.batch_size=1",), "loader.batch_size: BatchNorm"),
        ("fit", ("--checkpoint.every_n_train_steps=2",), "checkpoint.every_n_train_steps"),
        ("fit", ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=best"), "own best.ckpt"),
        ("fit", ("--trainer.callbacks+=callbacks.ClassReport",), "more than one stateful callback"),
        ("train", (), "train"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    run: Run, subcommand: str, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(subcommand, *arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--trainer.limit_val_batches=0",), "limit_val_batches is 0"),
        (("--trainer.check_val_every_n_epoch=5",), "check_val_every_n_epoch is 5"),
    ],
)
def test_training_without_validation_says_so_before_and_after(
    run: Run,
    tmp_path: Path,
    arguments: tuple[str, ...],
    word: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert run("fit", "--test_best=true", *arguments) == 0
    (line,) = [message for message in caplog.messages if "there will be no best.ckpt" in message]
    assert word in line
    out = capsys.readouterr().out
    assert f"Not tested: there is no best checkpoint. No validation takes place (trainer.{word}" in out
    assert [row.split(": ")[0] for row in out.splitlines() if row.startswith("epoch ")] == ["epoch 1/2", "epoch 2/2"]
    assert not (only_run(tmp_path / "runs") / "predictions").exists()


def test_a_finished_run_that_goes_on_keeps_its_best_unless_the_data_differ(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run("fit") == 0
    first = only_run(tmp_path / "runs")
    best = json.loads((first / "run.json").read_text())["stages"][0]["best"]
    # With this learning rate no later epoch is better.
    longer = ("--ckpt_path", str(first / "checkpoints" / "last.ckpt"), "--trainer.max_epochs=3")
    assert run("fit", *longer, "--name=longer", "--trainer.limit_train_batches=1") == 0
    (second,) = (tmp_path / "runs" / "longer").glob("*")
    told = json.loads((second / "run.json").read_text())["stages"][0]["best"]
    third_epoch = pd.read_csv(second / "metrics.csv")["val/loss"].dropna().iloc[-1]
    assert told["score"] == pytest.approx(min(best["score"], third_epoch))
    assert (second / "checkpoints" / "best.ckpt").is_file()
    assert run("fit", *longer, "--name=other", "--trainer.limit_val_batches=1") == 0
    assert "Earlier epochs do not count for best.ckpt: the run that training goes on from had other data" in caplog.text


def test_checkpoint_that_conflicts_with_the_configuration_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit") == 0
    assert run("fit", "--ckpt_path=last", "--model.init_args.lr=0.5") == 2
    assert "lr: the checkpoint has 0.001, the configuration 0.5" in capsys.readouterr().err
    assert run("test", "--ckpt_path=last", "--data.init_args.image.size=64") == 2
    assert "image_size" in capsys.readouterr().err


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for word in ("fit", "validate", "test", "predict"):
        assert word in out


def test_an_overlay_changes_one_setting_of_a_permanent_callback(run: Run, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("checkpoint: {monitor: val/class/accuracy, mode: max}\n")
    assert run("fit", "--config", str(overlay), "--trainer.max_epochs=1") == 0
    directory = only_run(tmp_path / "runs")
    saved = yaml.safe_load((directory / "config.yaml").read_text())
    assert saved["checkpoint"]["monitor"] == "val/class/accuracy"
    assert saved["checkpoint"]["filename"] == "best"
    assert (directory / "checkpoints" / "best.ckpt").is_file()
