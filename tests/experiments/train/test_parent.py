"""``fit --from RUN``: a new run from the weights of a trained one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.experiments.conftest import error_line
from tests.support.data import write_image_folder
from tests.support.runs import products_run
from vitrail.programs import main
from vitrail.runs import Run


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(products_run())


def fit(parent: Run, *args: str) -> int:
    return main("vitrail", ["fit", "--from", str(parent.path), "--runs", "runs", *args, "--trainer.max_epochs=1"])


def state(run: Run, name: str = "best") -> dict[str, torch.Tensor]:
    content = torch.load(run.checkpoint(name), weights_only=True)
    found: dict[str, torch.Tensor] = content["state_dict"]
    return found


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], prefix: str = "") -> bool:
    """Whether the parameters are; a learning rate of 0 does not hold BatchNorm's statistics."""
    names = [name for name in one if name.startswith(prefix) and "running_" not in name and "num_batches" not in name]
    return bool(names) and all(torch.equal(one[name], two[name]) for name in names)


def test_a_new_run_goes_on_with_another_recipe_and_is_resumed_without_the_parent(
    parent: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    held = ["--model.init_args.lr=0", "--model.init_args.optim_options.backbone_lr=0"]
    assert fit(parent, "--config", "overlays/balanced", *held, "--test_best=true") == 0
    child = Run.latest("balanced")
    assert same(state(parent), state(child))  # with a learning rate of 0 they are the parent's
    assert child.record["parent"] == str(parent.checkpoint())
    assert child.record["pretrained"] == parent.record["pretrained"]
    assert child.config["from"] == str(parent.path)
    model = child.config["model"]["init_args"]
    assert model["backbone"] == parent.config["model"]["init_args"]["backbone"]
    assert child.config["data"]["init_args"]["loader"]["sampling"] == "balanced"
    losses = model["loss_options"]
    assert (losses["class_weighting"], losses["label_smoothing"]) == ("inverse", 0.05)
    printed = capsys.readouterr().out
    assert f"--from {parent.checkpoint()}: weights taken over." in printed
    assert f"It went on from {parent.checkpoint()}." in printed
    config = child.path / "config.yaml"
    assert main("vitrail", ["fit", "--config", str(config), "--ckpt_path", "last", "--trainer.max_epochs=2"]) == 0
    assert "weights taken over" not in capsys.readouterr().out


def test_heads_of_other_classes_start_again_and_another_network_is_refused(
    parent: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = list(parent.load_model().tasks)
    assert (
        fit(parent, f"--model.init_args.task_weights={{{tasks[0]}: 1.0}}", "--name", "one", "--model.init_args.lr=0")
        == 0
    )
    printed = capsys.readouterr().out
    assert all(f"the head of {task} is left out: it is not trained here" in printed for task in tasks[1:])
    assert same(state(Run.latest("one")), state(parent), "encoder.")
    assert same(state(Run.latest("one")), state(parent), "heads.0.")
    assert fit(parent, "--model.init_args.backbone=test_efficientnet", "--model.init_args.pretrained=false") == 2
    assert "the weights do not fit MultiTaskClassifier" in error_line(capsys)
    assert main("vitrail", ["fit", "--from", str(tmp_path)]) == 2
    assert "not a run directory" in error_line(capsys)
    assert json.loads((Run.latest("one").path / "run.json").read_text())["parent"]


def test_own_images_bring_their_data_and_the_parent_the_rest(parent: Run, tmp_path: Path) -> None:
    write_image_folder(tmp_path / "photos", splits=(), objects=10)
    assert fit(parent, "--data", "photos", "--model.init_args.lr=0") == 0
    child = Run.latest("photos")
    data = child.config["data"]
    assert data["class_path"].endswith("ImageFolder")
    assert data["init_args"]["image"]["size"] == parent.config["data"]["init_args"]["image"]["size"]
    assert child.record["parent"] == str(parent.checkpoint())
    assert same(state(child), state(parent), "encoder.")
