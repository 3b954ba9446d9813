"""The ablation command on generated data, with a runner that trains in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from evaluation.efficiency import BatchCost, Costs
from evaluation.tables.summary import summarise_run
from experiments.launch.ablation import read_ablation
from experiments.launch.study import Outcome
from experiments.launch.workers import Job, Watch, run_trial
from experiments.train.cli import main as fit
from tests.experiments.conftest import error_line, launch
from tests.support.data import write_products
from tests.support.runs import TINY
from vitrail.errors import UserError

FILES = sorted((Path(__file__).parents[3] / "experiments" / "ablations").glob("*.yaml"))

KNOWN = {
    "RN50": (102.01, 102.01),
    "RN101": (119.69, 119.69),
    "RN50x4": (178.30, 178.30),
    "RN50x16": (290.98, 290.98),
    "RN50x64": (623.26, 623.26),
    "ViT-B/32": (151.28, 151.28),
    "ViT-B/32, early layers frozen": (151.28, 21.14),
    "ViT-B/16": (149.62, 149.62),
    "ViT-L/14": (427.62, 427.62),
    "ViT-L/14@336": (427.94, 427.94),
    "ViT-L/14@336, early layers frozen": (427.94, 40.75),
}
"""Millions of parameters, and of trainable ones: OpenAI's models, and R3's two numbers."""


class Trains:
    """Runs a job's fit in this process.

    Attributes:
        jobs: all that were asked for.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def __call__(self, job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        self.jobs.append(job)
        code = fit([*job.arguments, "--name", job.name, "--runs", str(job.place.parent)])
        (run, *_) = job.place.glob("*/") if code == 0 else (None,)
        return Outcome("complete", 0.5, 1, run) if code == 0 else Outcome("failed", error=f"exit code {code}")


class Notes(Trains):
    """Notes what is asked for, and trains nothing."""

    def __call__(self, job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        self.jobs.append(job)
        return Outcome("failed", error="not trained")


def refuses(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
    raise AssertionError(f"{job.name} is done and must not run again")


def ablation(experiment: Path, overlays: Any) -> dict[str, Any]:
    command = ["python", "-m", "experiments", "fit", "--config", str(experiment), "${args}"]
    metric = {"name": "val/loss"}
    return {"method": "grid", "metric": metric, "parameters": {"overlay": {"values": overlays}}, "command": command}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    (folder / "tiny.yaml").write_text(TINY.replace("max_epochs: 2", "max_epochs: 1"))
    missing = {"model": {"init_args": {"pretrained": str(folder / "nothing.safetensors")}}}
    wrong = {"model": {"init_args": {"backbone": "resnet_nobody"}}}
    vit = {"model": {"init_args": {"backbone": "test_vit"}}}
    overlays = {"small": {}, "vit": vit, "no weights": missing, "unknown": wrong}
    path = folder / "four.yaml"
    path.write_text(yaml.safe_dump(ablation(folder / "tiny.yaml", overlays), sort_keys=False))
    return path


def measured(builders: dict[str, object], *_: object, **__: object) -> dict[str, Costs]:
    """Twice as long from each model to the next."""
    first = next(iter(builders))
    return {
        name: Costs("cpu", 1, first, {1: BatchCost([0.01 * 2**place] * 2, [2.0**place] * 2, 10**6)})
        for place, name in enumerate(builders)
    }


@pytest.fixture(scope="module")
def done(folder: Path, file: Path) -> Iterator[tuple[Path, Trains]]:
    runner = Trains()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.efficiency.measure", measured)
        patch.setenv("VITRAIL_CACHE", str(folder / "cache"))
        assert launch("ablate", str(file), "--runs", str(folder / "runs"), "--batch-sizes", "1", runner=runner) == 0
        yield folder / "runs" / "ablations" / "four", runner


def table(place: Path) -> pd.DataFrame:
    return pd.read_csv(place / "ablation.csv").set_index("variant")


def test_every_variant_has_a_row_with_what_could_be_had(done: tuple[Path, Trains]) -> None:
    place, _ = done
    rows = table(place)
    assert list(rows.index) == ["small", "vit", "no weights", "unknown"]
    for name in ("small", "vit"):
        (summary, *_) = summarise_run(Path(str(rows.loc[name, "run"])))
        assert rows.loc[name, "class_accuracy"] == pytest.approx(summary.accuracy)
        assert rows.loc[name, "class_accuracy_low"] == pytest.approx(summary.accuracy_interval.low)
    # Weights that are not there cost the accuracy only.
    assert rows["parameters"].to_dict()["no weights"] == rows["parameters"].to_dict()["small"]
    assert "no accuracy: exit code 2" in str(rows.loc["no weights", "note"])
    assert "timm does not know" in str(rows.loc["unknown", "note"])
    assert rows.loc["unknown", ["parameters", "p50_seconds_1", "class_accuracy"]].isna().all()
    assert rows.loc["vit", "ratio_1"] == 2
    assert "small" in (place / "compared.html").read_text()
    lines = (place / "ablation.md").read_text().splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


@pytest.mark.slow
def test_nothing_is_done_twice(
    done: tuple[Path, Trains],
    file: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place, _ = done
    before = table(place)
    monkeypatch.setattr("evaluation.efficiency.measure", None)  # would fail if it were called
    assert launch("ablate", str(file), "--runs", str(folder / "runs"), "--batch-sizes", "1", runner=refuses) == 0
    pd.testing.assert_frame_equal(table(place), before)
    capsys.readouterr()
    assert (
        launch("ablate", str(file), "--runs", str(folder / "runs"), "--batch-sizes", "1", "--markdown", runner=refuses)
        == 0
    )
    out = capsys.readouterr().out
    assert out.startswith((place / "ablation.md").read_text().partition("\n\n")[2].strip())
    # Then the comparison of the two runs.
    assert "Differences are to small" in out


def test_only_what_changed_or_failed_runs_again(done: tuple[Path, Trains], file: Path, folder: Path) -> None:
    runner = Notes()
    arguments = [str(file), "--runs", str(folder / "runs"), "--without", "costs", "--retry-failed"]
    assert (
        launch(
            "ablate", *arguments, "--set", "vit:model.init_args.lr=0.002", "--only", "vit", "no weights", runner=runner
        )
        == 0
    )
    assert [job.name for job in runner.jobs] == ["vit", "no_weights"]
    assert yaml.safe_load((done[0] / "overlays" / "vit.yaml").read_text())["model"]["init_args"]["lr"] == 0.002


def test_a_stopped_ablation_goes_on_in_the_same_place(file: Path, folder: Path) -> None:
    arguments = [str(file), "--runs", str(folder / "stopped"), "--without", "costs", "--only", "small"]
    places = []

    def stopped(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        places.append(job.place)
        signal.raise_signal(signal.SIGTERM)
        assert stop.wait(60)
        return Outcome("stopped")

    assert launch("ablate", *arguments, runner=stopped) == 128 + signal.SIGTERM
    runner = Notes()
    assert launch("ablate", *arguments, runner=runner) == 0
    assert [(job.place, job.is_fresh) for job in runner.jobs] == [(places[0], False)]


@pytest.mark.parametrize(("arguments", "message"), [(["--only", "none"], "got 'none'"), (["--set", "x"], "--set x")])
def test_mistakes_are_refused(
    file: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("ablate", str(file), "--runs", str(tmp_path), *arguments, runner=refuses) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_variant_trains_as_a_process_of_its_own(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    arguments = [str(file), "--runs", str(tmp_path), "--only", "small", "no weights", "--batch-sizes", "1", "2"]
    assert launch("ablate", *arguments, "--repeats", "2", runner=run_trial) == 0
    rows = table(tmp_path / "ablations" / "four")
    assert 0 <= float(rows.loc["small", "class_accuracy"]) <= 1  # type: ignore[arg-type]  # a number in this column
    assert "nothing.safetensors" in str(rows.loc["no weights", "note"])
    assert float(rows.loc["small", "p50_seconds_2"]) > 0  # type: ignore[arg-type]  # likewise


CLIP = FILES[0].with_name("clip_architectures.yaml")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path == CLIP else []) for path in FILES],
)
def test_every_ablation_counts_all_its_variants_without_weights(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_products(tmp_path / "products")
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path))
    arguments = ["--runs", str(tmp_path), "--without", "costs", "accuracy"]
    assert launch("ablate", str(path), *arguments, runner=refuses) == 0
    rows = table(tmp_path / "ablations" / path.stem)
    assert len(rows) == len(yaml.safe_load(path.read_text())["parameters"]["overlay"]["values"])
    assert rows["note"].isna().all()
    assert (rows["image_flops"] > 0).all()
    assert (rows["trainable"] <= rows["parameters"]).all()
    if path == CLIP:
        found = {str(name): (row["parameters"], row["trainable"]) for name, row in rows.iterrows()}
        assert {name: tuple(round(one / 1e6, 2) for one in both) for name, both in found.items()} == KNOWN


def test_damaged_costs_are_refused(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "ablations" / "four"
    place.mkdir(parents=True)
    (place / "costs.json").write_text("{")
    assert launch("ablate", str(file), "--runs", str(tmp_path), "--without", "accuracy", runner=refuses) == 2
    assert "remove it to measure again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_first_run_that_is_refused_ends_the_ablation_with_its_line(
    file: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[Job] = []

    def refused(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        jobs.append(job)
        return Outcome("failed", error="exit code 2: data root: there is no folder photos")

    arguments = [str(file), "--runs", str(folder / "refused"), "--without", "costs"]
    assert launch("ablate", *arguments, runner=refused) == 2
    line = error_line(capsys)
    assert line.startswith("error: data root: there is no folder photos (the first run of ")
    assert len(jobs) == 1
    # The same command begins with it again, and one that fails in another way ends nothing and is left as it is.
    notes = Notes()
    assert launch("ablate", *arguments, runner=notes) == 0
    assert [job.name for job in notes.jobs[:1]] == [job.name for job in jobs]
    assert len(notes.jobs) == 4
    assert launch("ablate", *arguments, runner=refuses) == 0
    assert launch("ablate", *arguments, "--name", "../../x", runner=refuses) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --name")


BASE = {"model": {"class_path": "A", "init_args": {"lr": 1.0, "betas": [1, 2]}}, "trainer": {"max_epochs": 3}}
CHANGED: dict[str, Any] = {"model": {"init_args": {"lr": 2.0, "betas": [3]}}}
TWO: dict[str, Any] = {"plain": {}, "B/32: changed": CHANGED}


def write(folder: Path, overlays: Any = TWO, **more: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    file = folder / "ablation.yaml"
    content = {**ablation(folder / "base.yaml", overlays), **more}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def experiments(*arguments: Any) -> list[Any]:
    return [read_ablation(*arguments).overlays[name] for name in TWO]


def test_changes_are_laid_over_the_experiment(tmp_path: Path) -> None:
    plain, changed = experiments(write(tmp_path))
    assert plain == BASE
    assert changed["model"] == {"class_path": "A", "init_args": {"lr": 2.0, "betas": [3]}}
    assert changed["trainer"] == BASE["trainer"]
    sweep = read_ablation(write(tmp_path))
    values = {"overlay": "B/32: changed"}
    assert sweep.place(1, values).name == "B_32_changed"
    # An experiment that has changed is another run.
    assert sweep.place(1, values) != read_ablation(write(tmp_path), [], ["trainer.max_epochs=1"]).place(1, values)
    # The overlay is the whole experiment, because laying changes over it twice is not the same.
    path = str(tmp_path / "B_32_changed.yaml")
    assert sweep.arguments(values, [], tmp_path) == ["fit", "--config", path, "--test_best=true"]


def test_an_overlay_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(CHANGED))
    overlays = {"plain": {}, "B/32: changed": str(tmp_path / "changed.yaml")}
    assert experiments(write(tmp_path, overlays)) == experiments(write(tmp_path))


def test_the_dialect_of_version_0_1_is_read(tmp_path: Path) -> None:
    expected = experiments(write(tmp_path))
    variants = [{"name": name, "changes": changes} for name, changes in TWO.items()]
    (tmp_path / "sub").mkdir()
    old = tmp_path / "sub" / "old.yaml"
    for strange, expected_error in (
        ({}, None),
        ({"typo": 1}, "unknown key 'typo'"),
        ({"variants": "x"}, "a list variants"),
    ):
        old.write_text(yaml.safe_dump({"experiment": "../base.yaml", "variants": variants, **strange}))
        if expected_error is None:
            assert experiments(old) == expected
        else:
            with pytest.raises(UserError, match=expected_error):
                read_ablation(old)
    old.write_text(yaml.safe_dump({"experiment": "../base.yaml", "variants": [{"name": "a"}]}))
    with pytest.raises(UserError, match=r"variants\[0\]: needs name"):
        read_ablation(old)


def test_overlays_come_after_changes_and_settings_last(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {lr: 5.0}}\ntrainer: {max_epochs: 9}")
    settings = ["trainer.max_epochs=7", "B/32: changed:model.init_args.betas=[4, 5]", "plain:model.init_args.lr=1e-3"]
    plain, changed = experiments(write(tmp_path), [overlay], settings)
    assert plain["trainer"] == changed["trainer"] == {"max_epochs": 7}
    assert plain["model"]["init_args"] == {"lr": 0.001, "betas": [1, 2]}
    assert changed["model"]["init_args"] == {"lr": 5.0, "betas": [4, 5]}


@pytest.mark.parametrize(
    ("overlays", "more", "message"),
    [
        ({}, {}, "must have values: with a name for each overlay"),
        (["a.yaml"], {}, "must have values: with a name for each overlay"),
        ({"a": 1}, {}, r"overlay\.values\.a: must be keys"),
        ({"a": "nothing.yaml"}, {}, "nothing.yaml"),
        ({"a/b": {}, "a b": {}}, {}, "'a b' is not a unique name"),
        ({"..": {}}, {}, "is not a unique name"),
        (TWO, {"typo": 1}, "typo: is not a key"),
        (TWO, {"method": "random"}, "an ablation is a grid over parameters.overlay alone"),
        (TWO, {"parameters": {"model.lr": {"values": [1, 2]}}}, "an ablation is a grid over parameters.overlay alone"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, overlays: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_ablation(write(tmp_path, overlays, **more))


@pytest.mark.parametrize("setting", ["trainer.max_epochs", "none:trainer.max_epochs=1", "=1", "plain:=1", "a=[1"])
def test_a_wrong_setting_is_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(UserError, match="--set"):
        read_ablation(write(tmp_path), settings=[setting])
