"""The ablation command on generated data, with a runner that trains in this process."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from evaluation.cost.efficiency import BatchCost, Costs, ModelSource
from evaluation.tables.summary import summarise_run
from experiments.launch.ablation import Variant, main, read_ablation
from experiments.launch.study import Outcome
from experiments.launch.workers import Job, Watch, run_trial
from experiments.train.cli import main as fit
from tests.experiments.conftest import TINY
from tests.support.data import write_products
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
"""Millions of parameters, and of those that learn: OpenAI's models, and R3's two numbers."""


class Trains:
    """Runs a job's fit in this process.

    Attributes:
        jobs: all that were asked for.
        stops: a job of this number ends as if it were stopped from outside.
    """

    def __init__(self, stops: int = -1) -> None:
        self.jobs: list[Job] = []
        self.stops = stops

    def __call__(self, job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        self.jobs.append(job)
        place = ["--name", job.name, "--runs", str(job.folder / "trials")]
        if len(self.jobs) - 1 == self.stops:
            # As a process leaves it that was ended after its first epoch.
            assert fit([*job.arguments, *place, "--trainer.max_epochs=1", "--test_best=false"]) == 0
            stop.set()
            return Outcome("stopped")
        resumed = ["--ckpt_path", str(job.resumes)] if job.resumes else []
        code = fit([*job.arguments, *place, *resumed])
        (run, *_) = (job.folder / "trials" / job.name).glob("*/") if code == 0 else (None,)
        return Outcome("complete", 0.5, 1, run) if code == 0 else Outcome("failed", error=f"exit code {code}")


class Notes(Trains):
    """Notes what is asked for, and trains nothing."""

    def __call__(self, job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        self.jobs.append(job)
        return Outcome("failed", error="not trained")


def refuses(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
    raise AssertionError(f"{job.name} is done and must not run again")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    (folder / "tiny.yaml").write_text(TINY.replace("max_epochs: 2", "max_epochs: 1"))
    missing = {"model": {"init_args": {"pretrained": str(folder / "nothing.safetensors")}}}
    wrong = {"model": {"init_args": {"backbone": "resnet_nobody"}}}
    variants = [
        {"name": "small", "changes": {}},
        {"name": "vit", "changes": {"model": {"init_args": {"backbone": "test_vit"}}}},
        {"name": "no weights", "changes": missing},
        {"name": "unknown", "changes": wrong},
    ]
    path = folder / "four.yaml"
    path.write_text(yaml.safe_dump({"experiment": "tiny.yaml", "variants": variants}))
    return path


def measured(sources: dict[str, ModelSource], *_: object, **__: object) -> dict[str, Costs]:
    """Twice as long from each model to the next."""
    first = next(iter(sources))
    return {
        name: Costs("cpu", 1, first, {1: BatchCost([0.01 * 2**place] * 2, [2.0**place] * 2, 10**6)})
        for place, name in enumerate(sources)
    }


@pytest.fixture(scope="module")
def done(folder: Path, file: Path) -> Iterator[tuple[Path, Trains]]:
    runner = Trains()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.cost.efficiency.measure", measured)
        patch.setenv("VITRAIL_CACHE", str(folder / "cache"))
        assert main([str(file), "--runs", str(folder / "runs"), "--batch-sizes", "1"], runner) == 0
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
    assert (place / "ablation.png").stat().st_size > 10_000
    lines = (place / "ablation.md").read_text().splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_nothing_is_done_twice(
    done: tuple[Path, Trains],
    file: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place, _ = done
    before = table(place)
    monkeypatch.setattr("evaluation.cost.efficiency.measure", None)  # would fail if it were called
    assert main([str(file), "--runs", str(folder / "runs"), "--batch-sizes", "1"], refuses) == 0
    pd.testing.assert_frame_equal(table(place), before)
    capsys.readouterr()
    assert main([str(file), "--runs", str(folder / "runs"), "--batch-sizes", "1", "--markdown"], refuses) == 0
    assert capsys.readouterr().out.strip() == (place / "ablation.md").read_text().partition("\n\n")[2].strip()


def test_only_what_changed_or_failed_runs_again(done: tuple[Path, Trains], file: Path, folder: Path) -> None:
    runner = Notes()
    arguments = [str(file), "--runs", str(folder / "runs"), "--without", "costs", "--retry-failed"]
    assert main([*arguments, "--set", "vit:model.init_args.lr=0.002", "--only", "vit", "no weights"], runner) == 0
    assert [job.name.rsplit("-", 1)[0] for job in runner.jobs] == ["vit", "no_weights"]
    assert yaml.safe_load((done[0] / "variants" / "vit.yaml").read_text())["model"]["init_args"]["lr"] == 0.002


def test_a_stopped_ablation_goes_on_with_the_same_run(
    file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(folder / "cache"))
    arguments = [str(file), "--runs", str(folder / "stopped"), "--without", "costs", "--only", "small"]
    arguments += ["--set", "trainer.max_epochs=2"]
    assert main(arguments, Trains(stops=0)) == 0
    place = folder / "stopped" / "ablations" / "four"
    assert "class_accuracy" not in table(place)
    (run,) = (place / "trials").glob("*/*")
    # Its configuration as the true command would have left it, which asks for both epochs.
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["max_epochs"], config["test_best"] = 2, True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    runner = Trains()
    assert main(arguments, runner) == 0
    (job,) = runner.jobs
    assert job.resumes == run / "checkpoints" / "last.ckpt"
    assert Path(str(table(place).loc["small", "run"])).resolve() == run.resolve()
    epochs = pd.read_csv(run / "metrics.csv")["epoch"].dropna()
    assert set(epochs) >= {0, 1}


def test_leftovers_without_a_checkpoint_do_not_stand_in_the_way(file: Path, folder: Path) -> None:
    arguments = [str(file), "--runs", str(folder / "leftover"), "--without", "costs", "--only", "small"]

    def dies(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        (job.folder / "trials" / job.name / "20260101-000000").mkdir(parents=True)
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        return Outcome("stopped")

    assert main(arguments, dies) == 128 + signal.SIGTERM
    runner = Notes()
    assert main(arguments, runner) == 0
    assert runner.jobs[0].resumes is None
    assert not list((folder / "leftover" / "ablations" / "four" / "trials").glob("*/*"))


@pytest.mark.parametrize(("arguments", "says"), [(["--only", "nobody"], "--only nobody"), (["--set", "x"], "--set x")])
def test_mistakes_are_told(
    file: Path, tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(file), "--runs", str(tmp_path), *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_a_variant_trains_as_a_process_of_its_own(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    arguments = [str(file), "--runs", str(tmp_path), "--only", "small", "no weights", "--batch-sizes", "1", "2"]
    assert main([*arguments, "--repeats", "2"], run_trial) == 0
    rows = table(tmp_path / "ablations" / "four")
    assert 0 <= float(rows.loc["small", "class_accuracy"]) <= 1  # type: ignore[arg-type]  # a number in this column
    assert "nothing.safetensors" in str(rows.loc["no weights", "note"])
    assert float(rows.loc["small", "p50_seconds_2"]) > 0  # type: ignore[arg-type]  # likewise


CLIP = FILES[0].with_name("clip_architectures.yaml")
SOME_OF_CLIP = ["RN50", "ViT-B/32", "ViT-B/32, early layers frozen"]


@pytest.mark.parametrize(
    ("path", "only"),
    [
        *(pytest.param(path, [], id=path.stem, marks=[pytest.mark.slow] if path == CLIP else []) for path in FILES),
        pytest.param(CLIP, SOME_OF_CLIP, id="some of clip_architectures"),
    ],
)
def test_every_ablation_counts_all_its_variants_without_weights(
    path: Path, only: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_products(tmp_path / "products")
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path))
    arguments = ["--runs", str(tmp_path), "--without", "costs", "accuracy", *(["--only", *only] if only else [])]
    assert main([str(path), *arguments], refuses) == 0
    rows = table(tmp_path / "ablations" / path.stem)
    assert len(rows) == len(only or yaml.safe_load(path.read_text())["variants"])
    assert rows["note"].isna().all()
    assert (rows["image_flops"] > 0).all()
    assert (rows["trainable"] <= rows["parameters"]).all()
    if path == CLIP:
        found = {str(name): (row["parameters"], row["trainable"]) for name, row in rows.iterrows()}
        assert {name: tuple(round(one / 1e6, 2) for one in both) for name, both in found.items()} == {
            name: KNOWN[name] for name in only or KNOWN
        }


def test_a_damaged_record_is_told(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "ablations" / "four" / "variants"
    place.mkdir(parents=True)
    (place / "small.json").write_text("{")
    assert main([str(file), "--runs", str(tmp_path), "--without", "costs", "accuracy"], refuses) == 2
    assert "remove it to begin anew" in capsys.readouterr().err
    record: dict[str, Any] = {"name": "small", "fingerprint": "of another version", "outcome": {"run": "gone"}}
    (place / "small.json").write_text(json.dumps(record))
    assert main([str(file), "--runs", str(tmp_path), "--without", "costs", "accuracy"], refuses) == 0


def test_a_first_run_that_is_refused_ends_the_ablation_with_its_line(
    file: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[Job] = []

    def refused(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        jobs.append(job)
        return Outcome("failed", error="exit code 2: data root: there is no folder photos")

    arguments = [str(file), "--runs", str(folder / "refused"), "--without", "costs"]
    assert main(arguments, refused) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: data root: there is no folder photos (the first run of ")
    assert len(jobs) == 1
    # The same command begins with it again, and one that fails in another way ends nothing and is left as it is.
    notes = Notes()
    assert main(arguments, notes) == 0
    assert [job.name for job in notes.jobs[:1]] == [job.name for job in jobs]
    assert len(notes.jobs) == 4
    assert main(arguments, refuses) == 0
    assert main([*arguments, "--name", "../../x"], refuses) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --name")


BASE = {"model": {"class_path": "A", "init_args": {"lr": 1.0, "betas": [1, 2]}}, "trainer": {"max_epochs": 3}}
CHANGED: dict[str, Any] = {"model": {"init_args": {"lr": 2.0, "betas": [3]}}}


def write(folder: Path, variants: Any, **more: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "sub").mkdir(exist_ok=True)
    file = folder / "sub" / "ablation.yaml"
    file.write_text(yaml.safe_dump({"experiment": "../base.yaml", "variants": variants, **more}))
    return file


TWO = [{"name": "plain", "changes": {}}, {"name": "B/32: changed", "changes": CHANGED}]


def test_changes_are_laid_over_the_experiment(tmp_path: Path) -> None:
    plain, changed = read_ablation(write(tmp_path, TWO))
    assert plain.experiment == BASE
    assert changed.experiment["model"] == {"class_path": "A", "init_args": {"lr": 2.0, "betas": [3]}}
    assert changed.experiment["trainer"] == BASE["trainer"]
    assert changed.slug == "B_32_changed"
    assert plain.fingerprint != changed.fingerprint == read_ablation(write(tmp_path, TWO))[1].fingerprint


def test_overlays_come_after_changes_and_settings_last(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {lr: 5.0}}\ntrainer: {max_epochs: 9}")
    settings = ["trainer.max_epochs=7", "B/32: changed:model.init_args.betas=[4, 5]", "plain:model.init_args.lr=1e-3"]
    plain, changed = read_ablation(write(tmp_path, TWO), [overlay], settings)
    assert plain.experiment["trainer"] == changed.experiment["trainer"] == {"max_epochs": 7}
    assert changed.experiment["model"]["init_args"] == {"lr": 5.0, "betas": [4, 5]}
    assert plain.experiment["model"]["init_args"]["betas"] == [1, 2]


@pytest.mark.parametrize(
    ("variants", "more", "says"),
    [
        ([], {}, "empty"),
        ("x", {}, "a list variants"),
        (TWO, {"typo": 1}, "unknown key 'typo'"),
        ([{"name": "a"}], {}, r"variants\[0\]: needs name"),
        ([{"name": "a", "changes": {}}, {"name": "b", "changes": []}], {}, r"variants\[1\]: needs name"),
        ([{"name": "a/b", "changes": {}}, {"name": "a b", "changes": {}}], {}, "'a b' is not a name of its own"),
        ([{"name": "..", "changes": {}}], {}, "not a name of its own"),
        (TWO, {"experiment": "nothing.yaml"}, "nothing.yaml"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, variants: Any, more: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_ablation(write(tmp_path, variants, **more))


@pytest.mark.parametrize("setting", ["trainer.max_epochs", "nobody:trainer.max_epochs=1", "=1", "plain:=1", "a=[1"])
def test_a_wrong_setting_is_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(UserError, match="--set"):
        read_ablation(write(tmp_path, TWO), settings=[setting])


def test_a_slug_stays_readable() -> None:
    assert Variant("ViT-L/14@336", {}).slug == "ViT-L_14@336"
