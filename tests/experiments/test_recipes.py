"""Every recipe trains a small network over an experiment of another one, and is found by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.experiments.conftest import only_run
from vitrail.config import merged, read_experiment
from vitrail.programs import main
from vitrail.runs import Run

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
RECIPES = sorted((EXPERIMENTS / "recipes").glob("*.yaml"))


def small(recipe: dict[str, Any]) -> dict[str, Any]:
    """What makes a recipe small: two epochs of 32 px in batches of eight, in as many phases."""
    callbacks = recipe["trainer"]["callbacks"]
    for callback in callbacks:
        arguments = callback["init_args"]
        if "unfreeze_epoch" in arguments:
            arguments["unfreeze_epoch"] = 1
        for phase in arguments.get("phases", [])[:-1]:
            phase["epochs"] = 1
    return {
        "data": {"init_args": {"image": {"size": 32}, "loader": {"batch_size": 8}}},
        "model": {"init_args": {"pretrained": False}},
        "trainer": {"max_epochs": 2, "callbacks": callbacks},
    }


# DeiT III's has the parts of timm's; the one for fine-tuning is the experiment for own images, which trains elsewhere.
SLOW = {"deit3", "finetune"}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else []) for path in RECIPES],
)
def test_a_recipe_trains_over_an_experiment(
    path: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = read_experiment(path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small(recipe)))
    files = ["--config", str(tiny), "--config", f"recipes/{path.stem}", "--config", "small.yaml"]
    assert main("vitrail", ["fit", *files, "--name", "recipe", "--runs", str(tmp_path / "runs")]) == 0
    run = Run(only_run(tmp_path / "runs"))
    model = run.config["model"]["init_args"]
    assert model["loss_options"]["label_smoothing"] == recipe["model"]["init_args"]["loss_options"]["label_smoothing"]
    groups = torch.load(run.checkpoint("last"), weights_only=True)["optimizer_states"][0]["param_groups"]
    frozen = [group["lr"] for group in groups if group["part"] == "backbone"]
    assert (set(frozen) == {0.0}) is (path.stem == "linear_probe")
    assert any("trust_clip" in group for group in groups) is (path.stem in ("deit3", "timm_a1"))  # LAMB's


def test_the_recipe_for_own_images_is_that_of_the_experiment_for_them() -> None:
    experiment = read_experiment(EXPERIMENTS / "my_images.yaml")
    assert merged(experiment, read_experiment(EXPERIMENTS / "recipes" / "finetune.yaml")) == experiment
