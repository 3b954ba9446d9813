"""The shipped sweep files in the hands of Weights & Biases' own client: ``wandb sweep``, and the agent's command."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb
import yaml
from click.testing import CliRunner
from wandb.cli import cli
from wandb.wandb_agent import Agent

from tests.experiments.launch.test_sweep_file import FILES, ROOT
from tests.experiments.test_every_experiment import tiny
from tests.support.data import write_flowers, write_products
from tests.support.models import write_clip


class Server:
    """Stands for W&B's API: keeps what the client sends."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.settings = {"entity": "somebody", "project": None, "base_url": "https://api.wandb.ai"}
        self.default_entity = "somebody"
        self.api_key = "0" * 40
        self._service_api = self

    def execute_graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        assert "upsertSweep" in query
        self.sent.append(variables)
        return {"upsertSweep": {"sweep": {"name": "abc", "project": None}, "configValidationWarnings": []}}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_wandb_sweep_sends_the_file_unchanged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setattr(wandb, "Api", lambda *_, **__: server)
    result = CliRunner().invoke(cli.sweep, [str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    [variables] = server.sent
    assert yaml.safe_load(variables["config"]) == yaml.safe_load(path.read_text())
    assert variables["projectName"] == "vitrail"


@pytest.fixture(scope="module", autouse=True)
def generated_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root = tmp_path_factory.mktemp("data")
    write_products(root / "products")
    write_flowers(root / "flowers102")
    write_clip(root / "clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRAIL_DATA", str(root))
        patch.setenv("VITRAIL_CACHE", str(root / "cache"))
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    FILES,
    ids=lambda path: path.stem,
)
def test_the_agent_builds_a_command_that_trains(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's agent makes the command line, starts it and waits for it; only an overlay makes it small."""
    sweep = yaml.safe_load(path.read_text())
    config = ROOT / "experiments" / Path(sweep["command"][-2]).name
    overlay = tmp_path / "tiny.yaml"
    overlay.write_text(yaml.safe_dump(tiny(yaml.safe_load(config.read_text()))))
    command = sweep["command"]
    place = ["--config", str(overlay), "--name", "agent", "--runs", str(tmp_path / "runs")]
    # `python` must be this one, as it is where an environment is active.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_SWEEP_ID"):
        monkeypatch.setenv(name, "unset")
    agent = Agent(api=None, queue=None, sweep_id="abc")
    agent._sweep_command = [*command[:-1], *place, command[-1]]
    values = {name: _second(entry) for name, entry in sweep["parameters"].items()}
    response = agent._process_command(
        {
            "id": 1,
            "type": "run",
            "run_id": "def",
            "program": sweep["program"],
            "args": {name: {"value": value} for name, value in values.items()},
        }
    )
    assert "exception" not in response
    assert agent._run_processes["def"].wait(timeout=200) == 0
    [run] = (tmp_path / "runs" / "agent").glob("*")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    for name, value in values.items():
        assert _at(saved, name) == value, name
    assert pd.read_csv(run / "metrics.csv")[sweep["metric"]["name"]].notna().sum() >= 1
    assert (run / "checkpoints" / "best.ckpt").is_file()
    shutil.rmtree(run)


def _second(entry: dict[str, Any]) -> Any:
    """A value that is not the experiment's own."""
    return entry["values"][1] if "values" in entry else entry["max"] / 2


def _at(config: dict[str, Any], key: str) -> Any:
    """A value by its dotted key; ``model.lr`` is short for ``model.init_args.lr``."""
    place: Any = config
    for part in key.split("."):
        place = place[-1] if isinstance(place, list) else place
        place = place[part] if part in place else place["init_args"][part]
    return place


def test_false_and_lists_reach_fit_as_the_agent_writes_them(tmp_path: Path) -> None:
    """What the files hold today is not all that a sweep may hold."""
    from wandb.sdk.launch.sweeps import utils

    from experiments.train.cli import main
    from tests.support.runs import TINY

    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    args: dict[str, dict[str, Any]] = {
        "test_best": {"value": False},
        "trainer.enable_model_summary": {"value": False},
        "predictions.splits": {"value": ["val", "test"]},
        "model.lr": {"value": 1e-05},
        "trainer.max_epochs": {"value": 1},
    }
    flags = utils.create_sweep_command_args({"args": args})["args"]
    assert "--test_best=False" in flags
    assert "--predictions.splits=['val', 'test']" in flags
    assert main(["fit", "--config", str(config), "--runs", str(tmp_path / "runs"), *flags]) == 0
    [run] = (tmp_path / "runs" / "tiny").glob("*")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    for name, entry in args.items():
        assert _at(saved, name) == entry["value"], name
