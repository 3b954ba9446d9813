"""The real W&B client, offline; what it wrote is read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.conftest import only_run


@pytest.fixture(autouse=True)
def real_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)


def records(run: Path) -> Iterator[Any]:
    """The records of the one offline run in a run directory."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    store = DataStore()
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        yield record


def test_offline_run_holds_metrics_config_and_figures(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("fit", "--wandb.mode=offline", "--wandb.project=shop", "--test_best=true") == 0
    directory = only_run(tmp_path / "runs")
    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    for record in records(directory):
        if record.WhichOneof("record_type") == "history":
            history.append(
                {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            )
        if record.WhichOneof("record_type") == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
        if record.WhichOneof("record_type") == "run":
            assert record.run.project == "shop"
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update if item.key}
    logged = {key for row in history for key in row}
    assert {"val/loss", "val/class/accuracy", "val/colour/f1_macro", "test/loss"} <= logged
    # One key for the whole configuration: the flat keys belong to a sweep.
    assert config["experiment"]["model"]["init_args"]["backbone"] == "test_resnet"
    assert list(directory.glob("wandb/offline-run-*/files/media/images/**/*confusion*.png"))
