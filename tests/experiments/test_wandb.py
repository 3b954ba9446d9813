"""The real W&B client, offline; what it wrote is read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.conftest import only_run
from tests.support.wandb_store import records


@pytest.fixture(autouse=True)
def real_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_offline_run_holds_metrics_config_and_figures(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("fit", "--wandb.mode=offline", "--wandb.project=shop", "--test_best=true") == 0
    directory = only_run(tmp_path / "runs")
    (store,) = directory.glob("wandb/offline-run-*/*.wandb")
    logged: set[str] = set()
    config: dict[str, Any] = {}
    for record in records(store):
        logged |= {item.key or "/".join(item.nested_key) for item in record.history.item}
        if record.WhichOneof("record_type") == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
        if record.WhichOneof("record_type") == "run":
            assert record.run.project == "shop"
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update if item.key}
    assert {"val/loss", "val/class/accuracy", "val/colour/f1_macro", "test/loss"} <= logged
    # One key for the whole configuration: the flat keys belong to a sweep.
    assert config["experiment"]["model"]["init_args"]["backbone"] == "test_resnet"
    assert list(directory.glob("wandb/offline-run-*/files/media/images/confusion/**/*.png"))
