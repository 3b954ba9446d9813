"""Whatever kills a run: resumed, it ends with the weights, metrics and logs of one that was never interrupted."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.forks import run_program
from tests.support.models import write_clip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

KILLS = [2, pytest.param(10, marks=pytest.mark.slow)]
"""Of each experiment, over as many runs as that takes."""

SHARED = """
seed_everything: 7
trainer:
  max_epochs: 3
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  gradient_clip_val: 1.0
  num_sanity_val_steps: 0
  callbacks:
    - class_path: callbacks.BackboneUnfreezing
      init_args: {unfreeze_epoch: 1, lr: 1.0e-2, backbone_lr: 1.0e-3, head_lr: 5.0e-3}
    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging
      init_args: {decay: 0.9}
    - class_path: tests.experiments.killed_runs.KilledAt
wandb: {mode: disabled}
"""

# mixup, dropout, EMA, both phases, a worker process; last.ckpt in the middle of epochs too.
CLASSIFIES = (
    SHARED
    + """
name: classifies
data:
  class_path: datamodules.Wares
  init_args:
    n_samples: 40
    resolution: 16
    image: {size: 16}
    augment: {preset: reference, mixup: 0.4, cutmix: 0.5}
    loader: {batch_size: 6, num_workers: 2}
model:
  class_path: lightning_modules.MultiTaskClassifier
  init_args: {backbone: test_efficientnet, pretrained: false}
last: {every_n_train_steps: 3}
"""
)

# A learned temperature, features computed once in phase one, retrieval metrics, no worker, last.ckpt once an epoch.
EMBEDS = (
    SHARED
    + """
name: embeds
data:
  class_path: datamodules.Wares
  init_args:
    n_samples: 40
    resolution: 16
    image: {size: 16}
    loader: {batch_size: 6}
model:
  class_path: lightning_modules.DualEncoder
  init_args:
    towers: {model: CLIP, pretrained: false}
    logit_scale: {scale: 5.0, lr: 0.05}
"""
)


@pytest.fixture(scope="module", params=KILLS)
def kills(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, kills: int) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    clip = write_clip(folder / "clip", image_size=16)
    (folder / "classifies.yaml").write_text(CLASSIFIES, encoding="utf-8")
    (folder / "embeds.yaml").write_text(EMBEDS.replace("CLIP", str(clip)), encoding="utf-8")
    run_program("tests.experiments.killed_runs", str(folder), str(kills), "classifies", "embeds", seconds=1200)
    return folder


def runs(folder: Path, experiment: str) -> list[Path]:
    found = []
    for name in json.loads((folder / "history.json").read_text()):
        if name.startswith(experiment):
            (directory,) = (folder / name).glob("*/*")
            found.append(directory)
    assert found
    return found


def interrupted(folder: Path, cause: str) -> dict[Path, list[int]]:
    """Run directories and the exit codes of their parts."""
    history = json.loads((folder / "interrupted.json").read_text())
    found = {}
    for name, codes in history.items():
        if f"-{cause}-" in name:
            (directory,) = (folder / name).glob("*/*")
            found[directory] = codes
    return found


def whole(folder: Path, experiment: str) -> Path:
    (directory,) = (folder / f"{experiment}-whole").glob("*/*")
    return directory


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves of nested dicts and lists, but for paths, which differ from run to run."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{Path(str(key)).name}")
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from leaves(item, f"{path}/{place}")
    elif not isinstance(value, (str, Path)):
        yield path, value


def test_kills_came_and_runs_ended(folder: Path, kills: int) -> None:
    history = json.loads((folder / "history.json").read_text())
    codes = [code for chain in history.values() for _, code in chain[:-1]]
    assert codes == [-signal.SIGKILL] * 2 * kills
    assert all(chain[-1][1] == 0 for chain in history.values())


@pytest.mark.parametrize("experiment", ["classifies", "embeds"])
def test_the_log_is_the_same_byte_by_byte(folder: Path, experiment: str) -> None:
    expected = (whole(folder, experiment) / "metrics.csv").read_bytes()
    assert expected.count(b"\n") > 20
    for run in runs(folder, experiment):
        assert (run / "metrics.csv").read_bytes() == expected


@pytest.mark.parametrize(("cause", "code"), [("terminated", 143), ("full", 2), ("requeued", -signal.SIGKILL)])
def test_other_interruptions_end_with_their_code_and_are_resumed_as_well(folder: Path, cause: str, code: int) -> None:
    expected = whole(folder, "classifies")
    weights = torch.load(expected / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    found = interrupted(folder, cause)
    assert found
    for run, codes in found.items():
        assert codes == [code, 0], run
        assert (run / "metrics.csv").read_bytes() == (expected / "metrics.csv").read_bytes(), run
        resumed = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(value, resumed[key]) for key, value in weights.items()), run


def test_interruptions_are_recorded_and_printed(folder: Path) -> None:
    for run in interrupted(folder, "terminated"):
        assert [stage["exit"] for stage in json.loads((run / "run.json").read_text())["stages"]] == [
            "terminated",
            "finished",
        ]
        log = (folder / f"{run.parents[1].name}.log").read_text()
        assert f"SIGTERM: {run.resolve()}/checkpoints/last.ckpt is written" in log
    for run in interrupted(folder, "full"):
        log = (folder / f"{run.parents[1].name}.log").read_text()
        assert log.count("error: ") == 1
        assert "free some space" in log
        assert "Traceback" not in log
        assert not [path for path in (run / "checkpoints").iterdir() if path.suffix != ".ckpt"]
    assert (folder / "scontrol").read_text().split("\n")[:-1] == ["requeue 77"]


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
@pytest.mark.parametrize("experiment", ["classifies", "embeds"])
def test_checkpoints_are_the_same_bit_by_bit(folder: Path, experiment: str, name: str) -> None:
    expected = dict(leaves(torch.load(whole(folder, experiment) / "checkpoints" / name, weights_only=True)))
    for part in ("/state_dict/", "/optimizer_states/", "/current_model_state/", "/callbacks/"):
        assert any(key.startswith(part) for key in expected), part
    for run in runs(folder, experiment):
        found = dict(leaves(torch.load(run / "checkpoints" / name, weights_only=True)))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key.endswith("/current_score"):
                # ModelCheckpoint does not restore it: after a resume it is missing until a better epoch comes.
                continue
            same = torch.equal(value, found[key]) if torch.is_tensor(value) else value == found[key]
            assert same, key


def test_every_run_has_one_record_of_all_its_parts(folder: Path) -> None:
    history = json.loads((folder / "history.json").read_text())
    for experiment in ("classifies", "embeds"):
        for run in runs(folder, experiment):
            name = run.parents[1].name
            stages = json.loads((run / "run.json").read_text())["stages"]
            given_up = len(list(folder.glob(f"{name}-given-up-*")))
            assert len(stages) == len(history[name]) - given_up
            assert stages[-1]["exit"] == "finished"
