"""The command line as a user meets it: directories, repeats, refusals of what would make a number untrustworthy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.cli import LightningCLI

from callbacks import BestCheckpoint, LastCheckpoint
from experiments.train.cli import (
    main,
    refuse_conflicting_checkpoint,
    refuse_other_checkpoints,
    refuse_reversed_selection,
    refuse_sections,
    refuse_test_metrics,
    refuse_trainer_options,
    refuse_untrained,
)
from tests.experiments.conftest import error_line, only_run
from vitrail.errors import UserError
from vitrail.runs import Run

RunCommand = Callable[..., int]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return state


def other_run(run: Path) -> Path:
    """The one that has come next to a run."""
    (other,) = (path for path in run.parent.iterdir() if path != run)
    return other


def test_fit_leaves_everything_that_is_known_of_a_run(fitted: Path) -> None:
    for name in ("config.yaml", "run.json", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (fitted / name).is_file(), name
    record = json.loads((fitted / "run.json").read_text())
    assert record["seed"] == 42
    assert record["data"]["fingerprint"]
    assert [stage["stage"] for stage in record["stages"]] == ["fit", "test"]
    assert {stage["exit"] for stage in record["stages"]} == {"finished"}
    predictions = pd.read_parquet(fitted / "predictions" / "test.parquet")
    assert predictions["sample_id"].is_unique
    assert len(predictions) == record["data"]["samples"]["test"]
    assert list((fitted / "figures").glob("confusion_test_*.png"))
    metrics = pd.read_csv(fitted / "metrics.csv")
    assert metrics["val/loss"].notna().sum() == 2


@pytest.mark.slow
def test_saved_config_repeats_the_run_bit_for_bit(run: RunCommand, tmp_path: Path) -> None:
    assert run("fit", "--model.init_args.lr=0.002") == 0
    first = only_run(tmp_path / "runs")
    assert main(["fit", "--config", str(first / "config.yaml")]) == 0
    second = other_run(first)
    assert yaml.safe_load((first / "config.yaml").read_text()) == yaml.safe_load((second / "config.yaml").read_text())
    for key, value in weights(first).items():
        assert torch.equal(value, weights(second)[key]), key


def test_stages_write_into_the_run_of_the_checkpoint_and_keep_the_log(run: RunCommand, fitted: Path) -> None:
    predictions = fitted / "predictions" / "test.parquet"
    predictions.unlink()
    log = (fitted / "metrics.csv").read_bytes()
    assert run("test", "--ckpt_path", "best") == 0
    assert predictions.is_file()
    assert run("predict", "--ckpt_path=best") == 0
    assert (fitted / "predictions" / "predict.parquet").is_file()
    # The checkpoint alone is enough: its configuration is in the same run.
    assert main(["validate", "--ckpt_path", str(fitted / "checkpoints" / "best.ckpt")]) == 0
    assert list(fitted.parent.iterdir()) == [fitted]
    assert (fitted / "metrics.csv").read_bytes() == log
    stages = json.loads((fitted / "run.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["fit", "test", "test", "predict", "validate"]


@pytest.mark.parametrize(
    "arguments", [("--ckpt_path=best", "--data.init_args.loader.batch_size=5"), ("--ckpt_path=last",)]
)
def test_results_on_other_data_or_of_another_checkpoint_go_to_a_new_directory(
    run: RunCommand, fitted: Path, arguments: tuple[str, ...]
) -> None:
    before = (fitted / "predictions" / "test.parquet").stat().st_mtime_ns
    assert run("test", *arguments) == 0
    assert (other_run(fitted) / "predictions" / "test.parquet").is_file()
    assert (fitted / "predictions" / "test.parquet").stat().st_mtime_ns == before


def test_resume_continues_where_the_run_ended(run: RunCommand, fitted: Path) -> None:
    assert run("fit", "--ckpt_path=last", "--trainer.max_epochs=3", "--test_best=true") == 0
    second = other_run(fitted)
    record = json.loads((second / "run.json").read_text())
    # What was tested is not what training went on from.
    assert record["stages"][1]["checkpoint"] == str((second / "checkpoints" / "best.ckpt").resolve())
    assert Run(second).predicted_by("test") == "best"
    assert record["stages"][0]["checkpoint"] == str(fitted / "checkpoints" / "last.ckpt")
    assert torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 3


@pytest.mark.parametrize(
    ("subcommand", "arguments", "message"),
    [
        ("test", (), "--ckpt_path"),
        ("fit", ("--checkpoint.monitor=test/loss",), "test/loss"),
        ("fit", ("--model.init_args.backbone=resnt18",), "resnt18"),
        ("fit", ("--model=NoSuchTask",), "NoSuchTask"),
        ("fit", ("--data.init_args.loader.batch=3",), "batch"),
        ("fit", ("--ckpt_path=nowhere.ckpt",), "nowhere.ckpt"),
        ("fit", ("--trainer.default_root_dir=x",), "--runs"),
        ("fit", ("--config", "absent.yaml"), "absent.yaml"),
        ("fit", ("--last.copy_to=s3://key:secret@bucket/run",), "last.copy_to: s3://key:***@bucket/run has a password"),
        ("fit", ("--trainer.strategy=ddq",), "trainer: You selected an invalid strategy name"),
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
    run: RunCommand, subcommand: str, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(subcommand, *arguments) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--trainer.limit_val_batches=0",), "limit_val_batches is 0"),
        (("--trainer.check_val_every_n_epoch=5",), "check_val_every_n_epoch is 5"),
    ],
)
def test_training_without_validation_says_so_before_and_after(
    run: RunCommand,
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
    assert str(only_run(tmp_path / "runs")) in out
    assert f"Not tested: there is no best checkpoint. No validation takes place (trainer.{word}" in out
    assert [row.split(": ")[0] for row in out.splitlines() if row.startswith("epoch ")] == ["epoch 1/2", "epoch 2/2"]
    assert not (only_run(tmp_path / "runs") / "predictions").exists()


def test_a_finished_run_that_goes_on_keeps_its_best_unless_the_data_differ(
    run: RunCommand, fitted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = json.loads((fitted / "run.json").read_text())["stages"][0]["best"]
    # With this learning rate no later epoch is better.
    longer = ("--ckpt_path", str(fitted / "checkpoints" / "last.ckpt"), "--trainer.max_epochs=3")
    assert run("fit", *longer, "--name=longer", "--trainer.limit_train_batches=1") == 0
    (second,) = (tmp_path / "runs" / "longer").glob("*")
    found = json.loads((second / "run.json").read_text())["stages"][0]["best"]
    third_epoch = pd.read_csv(second / "metrics.csv")["val/loss"].dropna().iloc[-1]
    assert found["score"] == pytest.approx(min(best["score"], third_epoch))
    assert (second / "checkpoints" / "best.ckpt").is_file()
    assert run("fit", *longer, "--name=other", "--trainer.limit_val_batches=1") == 0
    assert "Earlier epochs do not count for best.ckpt: the run that training goes on from had other data" in caplog.text


@pytest.mark.usefixtures("fitted")
def test_checkpoint_that_conflicts_with_the_configuration_is_refused(
    run: RunCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", "--ckpt_path=last", "--model.init_args.lr=0.5") == 2
    assert "lr: the checkpoint has 0.001, the configuration 0.5" in capsys.readouterr().err
    assert run("test", "--ckpt_path=last", "--data.init_args.image.size=64") == 2
    assert "image_size" in capsys.readouterr().err


def test_an_overlay_changes_one_setting_of_a_permanent_callback(run: RunCommand, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("checkpoint: {monitor: val/class/accuracy, mode: max}\n")
    assert run("fit", "--config", str(overlay), "--trainer.max_epochs=1") == 0
    directory = only_run(tmp_path / "runs")
    saved = yaml.safe_load((directory / "config.yaml").read_text())
    assert saved["checkpoint"]["monitor"] == "val/class/accuracy"
    assert saved["checkpoint"]["filename"] == "best"
    assert (directory / "checkpoints" / "best.ckpt").is_file()


class Model(LightningModule):
    def __init__(self, lr: float, class_names: list[str], class_counts: dict[str, list[int]] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()


class Ready(Model):
    ready_without_training = True


def checkpoint(path: Path, **hyper_parameters: object) -> Path:
    versions = {"pytorch-lightning_version": "2.6.6"}
    torch.save({**versions, "hyper_parameters": hyper_parameters, "state_dict": {}}, path)
    return path


def test_a_checkpoint_that_fits_passes(tmp_path: Path) -> None:
    # Counts of the training split may differ.
    path = checkpoint(tmp_path / "x.ckpt", lr=0.1, class_names=["a"], class_counts={"class": [3]})
    refuse_conflicting_checkpoint(Model(0.1, ["a"], {"class": [4]}), path)
    with pytest.raises(UserError, match=r"x\.ckpt: has weights but no training state"):
        refuse_conflicting_checkpoint(Model(0.1, ["a"]), path, trains=True)


@pytest.mark.parametrize(
    ("saved", "key"),
    [({"lr": 0.2, "class_names": ["a", "b"]}, "lr"), ({"lr": 0.1, "class_names": ["b", "a"]}, "class_names")],
)
def test_each_difference_is_named(tmp_path: Path, saved: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=key) as refusal:
        refuse_conflicting_checkpoint(Model(0.1, ["a", "b"]), checkpoint(tmp_path / "x.ckpt", **saved))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", r"x\.ckpt"),
        ({"weight": torch.zeros(2)}, "is not a checkpoint of a run; plain weights belong to"),
        ({"state_dict": {}, "hyper_parameters": {}}, "is not a checkpoint of a run"),
        (
            {"pytorch-lightning_version": "2.6.6", "state_dict": [1], "hyper_parameters": {}},
            "is not a checkpoint of a run",
        ),
        ([1, 2], "is not a checkpoint of a run"),
        ({"hyper_parameters": {"lr": Model}}, "not a readable checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_and_its_code_is_not_run(
    tmp_path: Path, content: object, message: str
) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=message):
        refuse_conflicting_checkpoint(Model(0.1, []), path)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches: must be at least 1; got 0"),
        ({"check_val_every_n_epoch": 0}, "trainer.check_val_every_n_epoch: must be at least 1"),
        ({"val_check_interval": 0.0}, "trainer.val_check_interval: must be more than 0"),
        ({"gradient_clip_val": -1.0}, "trainer.gradient_clip_val: must be at least 0"),
        ({"max_epochs": 0}, "trainer.max_epochs: 0 trains nothing"),
        ({"max_steps": 0}, "trainer.max_steps: 0 trains nothing"),
        ({"limit_train_batches": 0}, "trainer.limit_train_batches: 0 trains nothing"),
    ],
)
def test_settings_that_train_nothing_or_fail_are_refused(options: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=key):
        refuse_trainer_options(options)
    refuse_trainer_options({"accumulate_grad_batches": 1, "check_val_every_n_epoch": None, "max_epochs": -1})


@pytest.mark.parametrize("section", [None, [1], 7])
def test_a_section_that_is_no_mapping_is_refused(section: object) -> None:
    with pytest.raises(UserError, match="checkpoint: must be a mapping of options"):
        refuse_sections({"trainer": {}, "checkpoint": section}, ["trainer", "checkpoint", "last"])


def test_selection_on_test_is_refused() -> None:
    for callback in (ModelCheckpoint(monitor="test/loss"), EarlyStopping(monitor="test/class/accuracy")):
        with pytest.raises(UserError, match="test"):
            refuse_test_metrics([callback])
    refuse_test_metrics([ModelCheckpoint(monitor="val/loss"), ModelCheckpoint()])


def test_untrained_model_is_not_evaluated() -> None:
    with pytest.raises(UserError, match="--ckpt_path"):
        refuse_untrained(Model(0.1, []), "test")
    refuse_untrained(Ready(0.1, []), "test")


@pytest.mark.parametrize(
    ("monitor", "mode", "right"),
    [
        ("val/class/accuracy", "min", "max"),
        ("val/mean_per_class", "min", "max"),
        ("val/colour/f1_macro", "min", "max"),
        ("val/class/top5", "min", "max"),
        ("val/text_to_image/R@10", "min", "max"),
        ("val/retrieval/mean_recall", "min", "max"),
        ("val/loss", "max", "min"),
        ("val/class/loss", "max", "min"),
        ("val/image_to_text/median_rank", "max", "min"),
    ],
)
def test_the_worst_epoch_is_not_taken_for_the_best(monitor: str, mode: Any, right: Any) -> None:
    with pytest.raises(UserError, match=rf"^checkpoint\.mode: {mode} takes .* set checkpoint\.mode: {right}$"):
        refuse_reversed_selection([BestCheckpoint(monitor=monitor, mode=mode)])
    with pytest.raises(UserError, match=rf"^EarlyStopping\.mode: .* set EarlyStopping\.mode: {right}$"):
        refuse_reversed_selection([EarlyStopping(monitor=monitor, mode=mode)])
    others = [BestCheckpoint(monitor="val/of_their_own", mode=mode), ModelCheckpoint(), LastCheckpoint()]
    refuse_reversed_selection([BestCheckpoint(monitor=monitor, mode=right), *others])


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ({"filename": "best"}, "best.ckpt"),
        ({"filename": "last"}, "last.ckpt"),
        ({"filename": "start"}, "start.ckpt"),
        ({"save_last": True}, "last.ckpt"),
        ({"save_last": "link", "filename": "{epoch}"}, "last.ckpt"),
        ({"dirpath": "run/checkpoints", "filename": "best"}, "best.ckpt"),
        ({"dirpath": "run", "filename": "checkpoints/best"}, "best.ckpt"),
    ],
)
def test_other_callbacks_do_not_write_under_the_names_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    best, last = BestCheckpoint(tmp_path / "run" / "checkpoints", monitor="val/loss"), LastCheckpoint()
    with pytest.raises(UserError, match=f"ModelCheckpoint would overwrite the run's own {file}"):
        refuse_other_checkpoints([last, ModelCheckpoint(**options), best], best, last)


def test_other_callbacks_may_keep_checkpoints_of_their_own(tmp_path: Path) -> None:
    best, last = BestCheckpoint(tmp_path, monitor="val/loss"), LastCheckpoint()
    others = [
        ModelCheckpoint(),
        ModelCheckpoint(filename="best-{epoch}"),
        ModelCheckpoint(tmp_path / "other", "best", save_last=True),
        OnExceptionCheckpoint(tmp_path),
    ]
    refuse_other_checkpoints([last, *others, best], best, last)
    for double in (BestCheckpoint(tmp_path / "other", monitor="val/loss"), LastCheckpoint()):
        with pytest.raises(UserError, match="is there already; set it in the section"):
            refuse_other_checkpoints([last, double, best], best, last)
    with pytest.raises(UserError, match=r"OnExceptionCheckpoint would overwrite the run's own last\.ckpt"):
        refuse_other_checkpoints([last, OnExceptionCheckpoint(tmp_path, "last"), best], best, last)


@pytest.mark.parametrize(("asked", "built"), [("fit", ["fit"]), ("fitt", ["fit", "validate", "test", "predict"])])
def test_only_the_parser_of_the_command_is_built(
    asked: str, built: list[str], tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[str] = []
    prepare = LightningCLI._prepare_subcommand_parser

    def noted(self: LightningCLI, klass: type, subcommand: str, **options: Any) -> Any:
        found.append(subcommand)
        return prepare(self, klass, subcommand, **options)

    monkeypatch.setattr(LightningCLI, "_prepare_subcommand_parser", noted)
    # No number: the first of all mistakes.
    assert main([asked, "--config", str(tiny), "--trainer.max_epochs", "many"]) == 2
    assert found == built
    assert ("max_epochs" if asked == "fit" else "fitt") in error_line(capsys)
