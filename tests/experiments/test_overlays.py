"""Overlays for several processes, precision and compilation take nothing away; the loss guard is set by its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.train.cli import main
from tests.experiments.conftest import only_run

FOLDER = Path(__file__).parents[2] / "experiments"


def merged(overlay: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The trainer of an experiment with a callback of its own, below the overlay."""
    configs = ["--config", str(FOLDER / "products_multitask_regnetx.yaml")]
    configs += ["--config", str(FOLDER / "overlays" / f"{overlay}.yaml")]
    with pytest.raises(SystemExit) as end:
        main(["fit", *configs, "--print_config"])
    assert end.value.code in (0, None)
    found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)["trainer"]
    return found


@pytest.mark.parametrize(
    ("overlay", "changes", "callbacks"),
    [
        ("ddp", {"strategy": "ddp", "devices": "auto"}, ["BackboneUnfreezing"]),
        ("fsdp", {"strategy": "fsdp", "devices": "auto"}, []),
        ("bf16", {"precision": "bf16-mixed"}, ["BackboneUnfreezing"]),
        ("compile", {}, ["BackboneUnfreezing", "CompileModel"]),
        ("ensemble", {}, []),
    ],
)
def test_overlays_add_to_an_experiment(
    overlay: str, changes: dict[str, str], callbacks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = merged(overlay, capsys)
    assert {key: trainer[key] for key in changes} == changes
    assert [callback["class_path"].rpartition(".")[2] for callback in trainer["callbacks"]] == callbacks


def test_the_loss_guard_is_set_by_keys(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--config", str(tiny), "--runs", str(tmp_path / "runs"), "--trainer.max_epochs", "1"]
    broken = ["--model.init_args.lr", "1.0e+30", "--model.init_args.schedule", "constant"]
    assert main(["fit", *runs, *broken]) == 2
    stopped = only_run(tmp_path / "runs") / "non_finite.json"
    error = capsys.readouterr().err
    assert str(stopped) in error.replace("\n", "")
    assert "Traceback" not in error
    assert main(["fit", *runs, "--non_finite.action", "ignore"]) == 2
    assert "ignore" in capsys.readouterr().err
