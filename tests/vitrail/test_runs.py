from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from evaluation.__main__ import main
from tests.evaluation.predictions_fixture import TASKS, make_predictions
from vitrail.errors import UserError
from vitrail.predictions import OutputCalibration, read_predictions, write_predictions
from vitrail.runs import (
    Run,
    new_run_directory,
    read_temperatures,
    resolve_checkpoint,
    run_of_checkpoint,
    same_data,
    write_temperatures,
)


def stage(name: str = "fit", how: str = "finished", started: str = "2026-01-01T10:00:00.000") -> dict[str, Any]:
    return {"stage": name, "started": started, "exit": how}


def make_run(folder: Path, *stages: dict[str, Any]) -> Path:
    """A whole run, as the command line leaves it."""
    run = folder / "shop" / "20260101-100000"
    write_predictions(run / "predictions" / "test.parquet", make_predictions(20))
    counts = {task: [4] * len(names) for task, names in TASKS.items()}
    record = {"seed": 7, "data": {"class_counts": counts}, "stages": list(stages or [stage(), stage("test")])}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (run / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 7, "model": {"lr": 0.1}}), encoding="utf-8")
    (run / "metrics.csv").write_text("epoch,step,val/loss\n0,9,1.5\n1,19,\n", encoding="utf-8")
    (run / "checkpoints").mkdir()
    for name in ("best", "last"):
        (run / "checkpoints" / f"{name}.ckpt").write_bytes(name.encode())
    return run


def test_a_whole_run_misses_nothing(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    run = Run(path)
    assert run.missing == []
    assert not run.interrupted
    assert run.name == "shop/20260101-100000"
    assert run.config["model"] == {"lr": 0.1}
    assert run.record["seed"] == 7
    assert run.splits == ["test"]
    assert run.checkpoints == {name: path / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")}
    expected = pd.DataFrame({"epoch": [0, 1], "step": [9, 19], "val/loss": [1.5, math.nan]})
    pd.testing.assert_frame_equal(run.metrics, expected)
    predictions = run.predictions()
    assert predictions is not None
    np.testing.assert_array_equal(
        predictions.logits["class"], read_predictions(path / "predictions" / "test.parquet").logits["class"]
    )
    assert run.problem_of("test") == ""
    assert run.class_counts(TASKS) == {"class": [4, 4, 4], "colour": [4, 4]}
    assert run.temperatures == {}


def test_without_a_checkpoint_all_but_the_model_can_be_used(tmp_path: Path) -> None:
    data = {"class_path": "datamodules.Wares", "init_args": {"n_samples": 12, "views": 1, "resolution": 32}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": data}), encoding="utf-8")
    run = Run(tmp_path)
    assert run.config == {"data": data}
    assert run.metrics.empty
    assert next(iter(run.datamodule.tasks)) == "class"
    with pytest.raises(UserError, match=r"no checkpoints/best\.ckpt, as of a run that was never trained; .*datamodule"):
        _ = run.model


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        Run(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(UserError, match="not a run directory"):
        Run(tmp_path)


def test_a_run_that_has_just_begun_lists_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"stages": [stage(how="unfinished")]}), encoding="utf-8")
    run = Run(tmp_path)
    assert run.interrupted
    assert run.predictions() is None
    assert run.config == {}
    assert run.metrics.empty
    assert run.class_counts(TASKS) == {}
    missing = run.missing
    assert missing[0] == "fit, begun 2026-01-01T10:00:00.000, did not finish: it was killed, or still runs"
    for part in ("config.yaml: there is no", "metrics.csv: nothing was", "test.parquet: there are no", "best.ckpt: "):
        assert sum(part in sentence for sentence in missing) == 1
    assert run.missing == missing
    assert run.problem_of("test").endswith(f"experiments test --ckpt_path {tmp_path}/checkpoints/best.ckpt`")
    assert "experiments validate --ckpt_path" in run.problem_of("val")
    assert any("val.parquet" in sentence for sentence in run.missing)  # now that it was asked for


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", b'{"stages": ['),
        ("run.json", b"[1, 2]"),
        ("run.json", b"\xff\xfe\x00"),
        ("config.yaml", b"model: [1"),
        ("config.yaml", b"just words"),
        ("config.yaml", b""),
        ("metrics.csv", b""),
        ("metrics.csv", b"epoch,step\n"),
        ("metrics.csv", b"\xff\xfe\x00\x01,"),
        ("predictions/test.parquet", b"PAR1 and no more"),
        ("checkpoints/calibration.json", b"{}"),
        ("checkpoints/calibration.json", b'{"temperatures": {"class": -1}, "checkpoint_sha256": null}'),
    ],
)
def test_one_damaged_file_is_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    path = make_run(tmp_path)
    (path / name).write_bytes(content)
    run = Run(path)
    assert len(run.missing) == 1
    assert name in run.missing[0]
    assert len(run.missing[0].splitlines()) == 1
    # All else can still be read.
    assert (run.config != {}) == (name != "config.yaml")
    assert (run.record != {}) == (name != "run.json")
    assert run.metrics.empty == (name == "metrics.csv")
    assert (run.predictions() is None) == ("parquet" in name)


def test_a_row_that_was_cut_short_keeps_what_it_has(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    (path / "metrics.csv").write_text("epoch,step,val/loss\n0,9,1.5\n1,1", encoding="utf-8")
    metrics = Run(path).metrics
    assert metrics["val/loss"].tolist()[0] == 1.5
    assert math.isnan(metrics["val/loss"].tolist()[1])


@pytest.mark.parametrize("record", [{}, {"stages": None}, {"stages": ["fit", 3]}, {"data": 4}])
def test_a_record_may_be_empty(tmp_path: Path, record: object) -> None:
    path = make_run(tmp_path)
    (path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    run = Run(path)
    assert (run.stages, run.interrupted, run.missing) == ([], False, [])
    assert run.class_counts(TASKS) == {}


def test_a_resumed_run_is_not_interrupted(tmp_path: Path) -> None:
    first, second = stage(how="terminated"), stage(started="2026-01-02T10:00:00.000")
    run = Run(make_run(tmp_path, first, second))
    assert not run.interrupted
    assert run.missing == []


def test_a_failed_stage_is_reported(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path, stage(), stage("test", "ValueError: boom")))
    assert not run.interrupted
    assert run.missing == ["test, begun 2026-01-01T10:00:00.000, did not finish: ValueError: boom"]


def test_empty_predictions_and_counts_that_do_not_fit(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    write_predictions(path / "predictions" / "test.parquet", make_predictions(20).take(np.empty(0, dtype=np.int64)))
    run = Run(path)
    assert run.predictions() is None
    assert run.class_counts({"class": ["a", "b"]}) == {}
    assert run.missing[0] == "predictions/test.parquet: holds no samples"
    assert "data.class_counts.class has 3 counts for 2 classes" in run.missing[1]


def test_the_checkpoint_that_predicted_is_that_of_the_last_finished_stage(tmp_path: Path) -> None:
    def by(name: str, checkpoint: str | None, how: str = "finished") -> dict[str, Any]:
        return {**stage(name, how), "checkpoint": checkpoint}

    stages = [by("test", None), by("test", "r/checkpoints/last.ckpt"), by("test", "r/best.ckpt", "unfinished")]
    run = Run(make_run(tmp_path, *stages, by("validate", "r/checkpoints/best.ckpt")))
    outputs = OutputCalibration(scales={"price": 2.0})
    write_temperatures(run.path, {"class": 2.0}, {}, outputs)
    assert [run.predicted_by(split) for split in ("test", "val", "predict")] == ["last", "best", ""]
    assert [run.other_checkpoint(split) for split in ("test", "val", "predict")] == ["last", "", ""]
    # Temperatures are those of the best checkpoint.
    assert run.temperatures_for("test") == {}
    assert run.temperatures_for("val") == {"class": 2.0}
    assert run.output_calibration_for("test") == OutputCalibration()
    assert run.output_calibration_for("val") == outputs


def test_temperatures_of_another_checkpoint_are_not_used(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    write_temperatures(path, {"class": 1.5}, {})
    assert Run(path).temperatures == {"class": 1.5}
    (path / "checkpoints" / "best.ckpt").write_bytes(b"trained again")
    run = Run(path)
    assert run.temperatures == {}
    assert run.missing == [
        f"{path}/checkpoints/calibration.json: belongs to another checkpoint than checkpoints/best.ckpt; "
        f"run `python -m evaluation calibrate {path}` again"
    ]


@pytest.fixture
def siblings(tmp_path: Path) -> list[Path]:
    """What ``runs/shop/*`` may hold: a whole run, an empty directory, one of other things, a file, one without end."""
    whole = make_run(tmp_path)
    folder = whole.parent
    (folder / "20260101-110000").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "todo.txt").write_text("label more")
    (folder / "table.csv").write_text("a,b\n")
    (folder / "20260101-120000").mkdir()
    (folder / "20260101-120000" / "run.json").write_text(json.dumps({"stages": [stage(how="UserError: no weights")]}))
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    "arguments", [["summary"], ["compare"], ["efficiency", "--counts-only"], ["soup"]], ids=" ".join
)
def test_what_is_no_run_is_left_out_by_name(
    arguments: list[str], siblings: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*arguments, *map(str, siblings)])
    printed = capsys.readouterr()
    left_out = [line for line in printed.err.splitlines() if line.startswith(f"{arguments[0]}: left out ")]
    assert sorted(line.split(": ")[1].removeprefix("left out ") for line in left_out) == [
        str(path) for path in siblings if path.name != "20260101-100000"
    ]
    if arguments[0] == "summary":
        assert "shop" in printed.out
        assert "error" not in printed.err


def test_a_run_that_still_needs_a_test_is_left_out_of_tables(
    siblings: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (untested := tmp_path / "shop" / "untested").mkdir()
    (untested / "run.json").write_text(json.dumps({"stages": [stage()]}))
    assert main(["summary", str(untested), *map(str, siblings)]) == 0
    assert f"left out {untested}: a run without predictions/test.parquet" in capsys.readouterr().err
    # An average is not made of fewer runs than were asked for because one has lost its checkpoint.
    assert main(["soup", str(untested), str(tmp_path / "shop" / "20260101-100000")]) == 2
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["summary", "compare", "ensemble", "soup", "efficiency"])
def test_nothing_but_other_folders_is_one_line(
    command: str, siblings: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    others = [str(path) for path in siblings if path.name in ("20260101-110000", "notes")]
    assert main([command, *others]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {command}: none of these 2 is a run")


@pytest.mark.parametrize("command", ["summary", "report", "calibrate", "explain", "base_to_novel", "ensemble"])
def test_one_folder_that_is_no_run_is_one_line(
    command: str, siblings: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in siblings:
        if path.name in ("20260101-110000", "notes"):
            assert main([command, str(path)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ")
            assert str(path) in line


def test_a_link_that_leads_nowhere_is_left_out(siblings: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    link = siblings[0].with_name("latest")
    link.symlink_to(siblings[0].with_name("removed"))
    try:
        assert main(["summary", *map(str, siblings), str(link)]) == 0
        assert f"summary: left out {link}: " in capsys.readouterr().err
    finally:
        link.unlink()


def test_a_path_that_does_not_exist_is_a_mistake(siblings: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", *map(str, siblings), str(siblings[0] / "absent")]) == 2
    assert "absent: no such run directory" in capsys.readouterr().err


def test_written_and_read_with_the_digest_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"weights")
    path = write_temperatures(tmp_path, {"class": 1.5, "colour": 0.5}, {"fitted_on": "val"})
    assert path == tmp_path / Run.CALIBRATION
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["checkpoint_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert content["fitted_on"] == "val"
    assert read_temperatures(tmp_path) == {"class": 1.5, "colour": 0.5}
    assert sorted(file.name for file in path.parent.iterdir()) == ["best.ckpt", "calibration.json"]


def test_a_run_without_a_checkpoint_has_temperatures_until_it_has_one(tmp_path: Path) -> None:
    assert read_temperatures(tmp_path) == {}
    write_temperatures(tmp_path, {"class": 1.5}, {})
    assert read_temperatures(tmp_path) == {"class": 1.5}
    (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"belongs to another checkpoint.*calibrate .* again$"):
        read_temperatures(tmp_path)


def test_a_calibration_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / Run.CALIBRATION
    path.parent.mkdir()
    for temperatures in ("[1]", '{"class": "hot"}', '{"class": 0}', '{"class": -1}', '{"class": NaN}', "missing"):
        path.write_text(f'{{"temperatures": {temperatures}, "checkpoint_sha256": null}}', encoding="utf-8")
        with pytest.raises(UserError, match=r"not a readable calibration|finite numbers above 0") as caught:
            read_temperatures(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "VITRAIL_RUN_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


def make_named_run(root: Path, time: str, *names: str) -> Path:
    run = root / "flowers" / time
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"class_path": "Wares"}}))
    for name in names:
        (run / "checkpoints" / f"{name}.ckpt").write_bytes(b"x")
    return run


@pytest.mark.usefixtures("no_launcher")
def test_runs_have_own_directories_and_processes_of_one_run_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (new_run_directory(tmp_path, "flowers") for _ in range(2))
    assert first != second
    assert first.is_dir()
    assert second.is_dir()
    assert first.parent == second.parent == tmp_path / "flowers"
    with monkeypatch.context() as child:
        child.setenv("LOCAL_RANK", "1")
        assert new_run_directory(tmp_path, "flowers") == second.resolve()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert new_run_directory(tmp_path, "a") == new_run_directory(tmp_path, "a") == tmp_path / "a" / "job-17"


def test_best_and_last_name_the_newest_run_that_has_one(tmp_path: Path) -> None:
    make_named_run(tmp_path, "1", "best", "last")
    newest = make_named_run(tmp_path, "2", "last")
    assert resolve_checkpoint("last", tmp_path, "flowers") == newest / "checkpoints" / "last.ckpt"
    assert resolve_checkpoint("best", tmp_path, "flowers").parent.parent.name == "1"


@pytest.mark.parametrize("wanted", ["best", "nowhere.ckpt"])
def test_absent_checkpoint_is_a_user_error_that_names_it(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        resolve_checkpoint(wanted, tmp_path, "flowers")


def test_checkpoint_knows_its_run(tmp_path: Path) -> None:
    run = make_named_run(tmp_path, "1", "best")
    assert run_of_checkpoint(run / "checkpoints" / "best.ckpt") == run
    assert run_of_checkpoint(tmp_path / "elsewhere.ckpt") is None


def test_results_on_other_data_do_not_belong_to_the_run(tmp_path: Path) -> None:
    run = make_named_run(tmp_path, "1")
    assert same_data(run, {"class_path": "Wares"})
    assert not same_data(run, {"class_path": "Products"})
