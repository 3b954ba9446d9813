"""Opening a run that another person may have made: whose checkpoint is meant, and that none of its code is run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from app.state.runs import ServedRun
from callbacks.guards import MonitoredMetrics
from evaluation.__main__ import main as evaluation
from experiments.__main__ import main as experiments
from experiments.train.cli import main
from retrieval.__main__ import main as retrieval
from tests.experiments.conftest import error_line
from vitrail.errors import UserError
from vitrail.trust import PLUGINS

Change = Callable[[dict[str, Any]], None]

EVIL = """
import os
from pathlib import Path

Path(os.environ["RAN"]).touch()

from datamodules.wares import Wares
from lightning_modules.classification import MultiTaskClassifier


class Data(Wares):
    pass


class Model(MultiTaskClassifier):
    pass


def hook(*args):
    pass
"""


@pytest.fixture
def run(fitted: Path) -> Path:
    return fitted


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that appears as soon as the module ``stranger`` is imported."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "stranger.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    yield tmp_path / "ran"
    sys.modules.pop("stranger", None)


def changed(run: Path, change: Change) -> None:
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


def foreign_data(config: dict[str, Any]) -> None:
    config["data"]["class_path"] = "stranger.Data"


def foreign_model(config: dict[str, Any]) -> None:
    config["model"]["class_path"] = "stranger.Model"


def foreign_argument(config: dict[str, Any]) -> None:
    config["model"]["init_args"]["optim"] = "{class_path: stranger.Model}"


def foreign_strategy(config: dict[str, Any]) -> None:
    config["trainer"]["strategy"] = {"class_path": "stranger.Model"}


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        *((stage, foreign_data) for stage in ("fit", "validate", "predict")),
        *(("test", change) for change in (foreign_data, foreign_model, foreign_argument, foreign_strategy)),
    ],
)
def test_a_stage_refuses_a_run_of_foreign_classes(
    run: Path, ran: Path, stage: str, change: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(run, change)
    commands = [[stage, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]]
    if stage != "fit":
        commands.append([stage, f"--config={run / 'config.yaml'}", "--ckpt_path=best"])
    for command in commands:
        assert main(command) == 2
        line = error_line(capsys)
        assert "stranger." in line
        assert PLUGINS in line
    assert not ran.exists()
    assert len(list(run.parent.iterdir())) == 1


@pytest.mark.parametrize(
    "command",
    [
        lambda run: evaluation(["explain", str(run), "--worst", "1"]),
        lambda run: evaluation(["wise-ft", str(run)]),
        lambda run: evaluation(["soup", str(run), str(shutil.copytree(run, run.with_name("other")))]),
        lambda run: evaluation(["linear-probe", "--config", str(run / "config.yaml"), "--backbone", "test_resnet"]),
        lambda run: evaluation(["explore", "--config", str(run / "config.yaml"), "--to", str(run / "page")]),
        lambda run: retrieval(["index", "--run", str(run)]),
        lambda run: experiments(["export", str(run)]),
    ],
    ids=["explain", "wise_ft", "soup", "linear_probe", "explore", "index", "export"],
)
def test_commands_refuse_data_of_foreign_classes(
    run: Path, ran: Path, command: Callable[[Path], int], capsys: pytest.CaptureFixture[str]
) -> None:
    changed(run, foreign_data)
    shutil.copy(run / "checkpoints" / "best.ckpt", run / "checkpoints" / "start.ckpt")
    assert command(run) == 2
    line = error_line(capsys)
    assert "stranger.Data" in line
    assert not ran.exists()


def test_a_report_leaves_out_what_it_would_need_foreign_classes_for(run: Path, ran: Path) -> None:
    changed(run, foreign_data)
    assert evaluation(["report", str(run)]) == 0
    assert "stranger.Data" in (run / "report.md").read_text()
    assert not ran.exists()


def test_classes_of_an_allowed_plugin_are_built(run: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(run, foreign_data)
    monkeypatch.setenv(PLUGINS, "stranger")
    assert main(["validate", "--ckpt_path", str(run / "checkpoints" / "best.ckpt")]) == 0
    assert ran.exists()


def test_callbacks_and_loggers_of_a_run_are_not_built(run: Path, ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(config: dict[str, Any]) -> None:
        hook = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": "stranger.hook"}}
        config["trainer"]["callbacks"] = [hook, {"class_path": "stranger.Model"}]
        config["trainer"]["logger"] = {"class_path": "stranger.Model"}
        config["trainer"]["profiler"] = "stranger.Model"

    changed(run, change)
    assert main(["validate", "--ckpt_path", str(run / "checkpoints" / "best.ckpt")]) == 0
    assert "LambdaCallback" in capsys.readouterr().err
    assert not ran.exists()
    # A training cannot go on without them, so it is refused.
    assert main(["fit", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 2
    assert "LambdaCallback" in capsys.readouterr().err
    assert not ran.exists()


@pytest.mark.parametrize("text", ["data: !!python/object/apply:os.system ['touch $RAN']\n", "a: [", "- 1\n", "\xff"])
def test_what_is_no_plain_configuration_is_one_line(
    run: Path, ran: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").write_bytes(text.encode("latin-1"))
    assert main(["test", "--ckpt_path", str(run / "checkpoints" / "best.ckpt")]) == 2
    line = error_line(capsys)
    assert "config.yaml" in line
    assert not ran.exists()


def test_damaged_files_of_a_run_are_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "run.json").write_text('{"stages": [')
    assert main(["validate", "--ckpt_path", str(run / "checkpoints" / "best.ckpt")]) == 2
    assert f"error: {run}/run.json: not readable as JSON" in capsys.readouterr().err
    changed(run, lambda config: config.pop("checkpoint"))
    other = shutil.copytree(run, run.with_name("other"))
    assert evaluation(["soup", str(run), str(other)]) == 2
    assert "error: " in capsys.readouterr().err
    # Also where only the checkpoint is the run's.
    (run / "config.yaml").write_text("a: [")
    arguments = ["--config", str(other / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "best.ckpt")]
    assert main(["validate", *arguments]) == 2
    assert f"{run}/config.yaml: not a YAML file" in capsys.readouterr().err


class _Touches:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_checkpoint_that_runs_code_is_refused_everywhere(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, ran = run / "checkpoints" / "best.ckpt", tmp_path / "ran"
    checkpoint = torch.load(best, weights_only=True)
    torch.save({**checkpoint, "callbacks": _Touches(ran)}, best)
    changed(run, lambda config: config.update(weights_only=False))
    assert main(["test", "--ckpt_path", str(best)]) == 2
    assert main(["fit", "--ckpt_path", str(best)]) == 2
    assert evaluation(["explain", str(run), "--worst", "1"]) == 2
    assert evaluation(["efficiency", str(run)]) == 2
    assert retrieval(["index", "--run", str(run)]) == 2
    assert experiments(["export", str(run)]) == 2
    with pytest.raises(UserError, match=r"best\.ckpt"):
        ServedRun(run)
    assert not ran.exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("class_path", ["stranger.Model", "os.system", "datamodules.Wares", ""])
def test_a_checkpoint_of_a_foreign_class_is_refused(
    run: Path, ran: Path, class_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(best, weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = class_path
    torch.save(checkpoint, best)
    assert evaluation(["explain", str(run), "--worst", "1"]) == 2
    assert retrieval(["index", "--run", str(run)]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
    assert not ran.exists()


def test_a_runs_own_configuration_means_that_run(run: Path) -> None:
    other = run.with_name("20990101-000000")
    shutil.copytree(run, other)
    for name in ("best", "last"):
        assert main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", name]) == 0
    assert (run / "predictions" / "predict.parquet").is_file()
    assert not (other / "predictions" / "predict.parquet").exists()
    (made,) = set(run.parent.iterdir()) - {run, other}
    stage = json.loads((made / "run.json").read_text())["stages"][0]
    assert stage["checkpoint"] == str(run / "checkpoints" / "last.ckpt")


def test_a_training_goes_on_with_the_run_whose_configuration_is_given(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run.with_name("20990101-000000")
    shutil.copytree(run, other)
    before = (other / "run.json").read_bytes()
    assert main(["fit", f"--config={run / 'config.yaml'}", "--ckpt_path=last"]) == 0
    stages = [stage["stage"] for stage in json.loads((run / "run.json").read_text())["stages"]]
    # Its own configuration says `test_best: true`, and there is a best checkpoint though nothing is left to train.
    assert stages == ["fit", "test", "fit", "test"]
    assert "Not tested" not in capsys.readouterr().out
    assert (other / "run.json").read_bytes() == before


def test_a_command_inside_of_the_run_means_it_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert main(["predict", "-c", "config.yaml", "--ckpt_path=best"]) == 0
    assert (run / "predictions" / "predict.parquet").is_file()
    assert main(["validate", "--ckpt_path", "checkpoints/last.ckpt"]) == 0
    assert len(list(run.parent.iterdir())) == 2


def test_callbacks_of_the_command_line_are_built(run: Path) -> None:
    arguments = ["--config", str(run / "config.yaml"), "--ckpt_path", "best"]
    assert main(["predict", *arguments, "--trainer.callbacks+=callbacks.EmbeddingExport"]) == 0
    assert (run / "gallery").is_dir()


def test_a_run_without_the_checkpoint_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "best.ckpt").unlink()
    shutil.copytree(run, run.with_name("20990101-000000"))
    assert main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", "best"]) == 2
    assert f"{run} has no checkpoints/best.ckpt; it has last" in capsys.readouterr().err


def test_new_directories_are_made_next_to_the_run_wherever_its_author_kept_theirs(run: Path, tmp_path: Path) -> None:
    changed(run, lambda config: config.update(runs=str(tmp_path / "elsewhere")))
    assert main(["validate", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    assert len(list(run.parent.iterdir())) == 2
    assert not (tmp_path / "elsewhere").exists()


def test_checkpoints_of_a_strangers_run_stay_in_a_run_directory(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"

    def change(config: dict[str, Any]) -> None:
        for section in ("checkpoint", "last"):
            config[section]["dirpath"] = str(elsewhere)

    changed(run, change)
    assert main(["fit", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--trainer.max_epochs=3"]) == 0
    err = capsys.readouterr().err
    assert "checkpoint.dirpath of " in err
    assert "last.dirpath of " in err
    assert not elsewhere.exists()
    (made,) = set(run.parent.iterdir()) - {run}
    assert sorted(path.name for path in (made / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_checkpoint_outside_of_runs_needs_a_configuration(
    run: Path, stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(run / "checkpoints" / "best.ckpt", tmp_path / "copied.ckpt")
    for value in (str(run), str(tmp_path / "copied.ckpt"), "best", ""):
        assert main([stage, "--ckpt_path", value]) == 2
        line = error_line(capsys)
        assert line.startswith(f"error: --ckpt_path {value}: is not a checkpoint in a run directory")


@pytest.mark.parametrize("name", ["../../x", "sweeps"])
def test_a_name_that_leads_elsewhere_is_refused(
    run: Path, tiny: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["fit", "--config", str(tiny), "--runs", str(tmp_path / "runs"), f"--name={name}"]) == 2
    assert capsys.readouterr().err.startswith("error: --name")
    changed(run, lambda config: config.update(name=name))
    assert main(["test", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 2
    assert capsys.readouterr().err.startswith("error: --name")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_refused_training_leaves_no_directory(tiny: Path, tmp_path: Path) -> None:
    arguments = ["fit", "--config", str(tiny), "--runs", str(tmp_path / "runs")]
    assert main([*arguments, "--data.init_args.n_samples=-1"]) == 2
    assert main([*arguments, "--trainer.default_root_dir=x"]) == 2
    assert main([*arguments, "--checkpoint.monitor=test/loss"]) == 2
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.fixture
def sigint() -> Iterator[None]:
    """Lightning leaves Ctrl-C ignored after the first one."""
    before = signal.getsignal(signal.SIGINT)
    # Ignored from the start where a shell runs the tests in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize("epoch", [0, 1])
def test_ctrl_c_ends_a_training_with_the_command_that_goes_on(
    tiny: Path, tmp_path: Path, epoch: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: object, trainer: Trainer, *_: object) -> None:
        if trainer.current_epoch == epoch:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MonitoredMetrics, "on_train_batch_end", stop, raising=False)
    assert main(["fit", "--config", str(tiny), "--runs", str(tmp_path / "runs")]) == 130
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("interrupted; ")]
    (run,) = (tmp_path / "runs" / "tiny").iterdir()
    if epoch:
        command = f"python -m experiments fit --config {run}/config.yaml --ckpt_path last"
        assert line == f"interrupted; go on with: {command}"
        monkeypatch.undo()
        assert main(shlex.split(command)[3:]) == 0
        assert json.loads((run / "run.json").read_text())["stages"][-1]["exit"] == "finished"
    else:
        assert "run the same command again" in line
