"""The model card, the upload, and exports that are loaded back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from experiments.__main__ import main as experiments
from experiments.export import hub
from experiments.export.hub import check_card, write_card
from experiments.export.parity import Form
from experiments.export.predict_onnx import Model
from experiments.export.weights import metadata_of
from lightning_modules.base import VisionTask
from lightning_modules.checkpoint import load_task
from tests.support.hub_server import TOKEN, Hub, hub_server, log_in
from tests.support.runs import data_of, exported, flowers_onnx, kinds_onnx, products_onnx, products_run
from vitrail.errors import UserError
from vitrail.predictions import read_predictions
from vitrail.runs import Run


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub of this machine, and a user who is logged in there."""
    with hub_server() as served:
        log_in(served, monkeypatch, tmp_path / "hub")
        yield served


def test_a_push_is_one_private_commit_and_comes_back(served: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    export = products_onnx()
    capsys.readouterr()  # making it, if no other test has yet, prints too
    assert experiments(["push-to-hub", str(export), "--repo", "owner/name"]) == 0
    repository = served.repositories["models/owner/name"]
    assert capsys.readouterr().out == f"{served.url}/owner/name/commit/{repository.sha}\n"
    assert (repository.private, repository.commits) == (True, ["Export of Vitrail"])
    assert repository.files == {path.name: path.read_bytes() for path in export.iterdir()}
    fetched = Run.from_hub("owner/name").path
    known = {path.name for path in fetched.iterdir()}
    assert known == {path.name for path in export.iterdir() if path.suffix != ".py"}  # no scripts
    assert all((fetched / name).read_bytes() == (export / name).read_bytes() for name in known)
    assert experiments(["push-to-hub", str(export), "--repo", "owner/public", "--public"]) == 0
    assert served.repositories["models/owner/public"].private is False


def test_exports_come_back_from_a_folder_and_from_the_hub(served: Hub) -> None:
    weights = exported(products_run(), "safetensors")
    assert experiments(["push-to-hub", str(weights), "--repo", "owner/name"]) == 0
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own = load_task(products_run() / "checkpoints" / "best.ckpt")
    with torch.no_grad():
        logits = own(image)
    for name in (weights, "owner/name"):
        task = hub.load(name)
        assert isinstance(task, VisionTask)
        with torch.no_grad():
            assert torch.equal(task(image)["class"], logits["class"])
    # What was fetched is in the hub's cache: no server is asked for it once more than needed.
    served.repositories.clear()
    with pytest.raises(UserError, match=r"owner/other: cannot be fetched from the hub \(.*\); check the name"):
        hub.load("owner/other")
    model = hub.load(products_onnx())
    assert isinstance(model, Model)
    np.testing.assert_allclose(model(image.numpy())["logits_class"], logits["class"].numpy(), atol=1e-4)


@pytest.mark.parametrize("large", [2**40, 1_000])
def test_a_pushed_run_predicts_the_same_from_a_fresh_cache(
    served: Hub, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    """Once with small files within the commit, once by LFS."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    served.large = large
    export, own = exported(products_run(), "safetensors"), Run(products_run())
    assert experiments(["push-to-hub", str(export), "--repo", "owner/name"]) == 0
    assert ("model.safetensors" in served.repositories["models/owner/name"].large) is (large == 1_000)
    data = data_of(products_run())
    photos = [data.table.source(row) for row in data.split_indices("test").tolist()]
    found = Run.from_hub("owner/name").predict(photos)
    assert [one.row() for one in found] == [one.row() for one in own.predict(photos)]


_PUSH_AND_PREDICT = """
import json, sys
from experiments.__main__ import main
from vitrail import Run
assert main(["push-to-hub", sys.argv[1], "--repo", "owner/name"]) == 0
print(json.dumps([one.row() for one in Run.from_hub("owner/name").predict(sys.argv[2:])]))
"""


@pytest.mark.slow  # in one process above
def test_another_hub_is_named_by_the_environment(tmp_path: Path) -> None:
    data = data_of(products_run())
    photos = [data.table.source(row) for row in data.split_indices("test").tolist()][:3]
    with hub_server() as hub:
        hub.large = 1_000
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", _PUSH_AND_PREDICT, str(exported(products_run(), "safetensors")), *photos]
        done = subprocess.run(command, check=False, env={**os.environ, **environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "model.safetensors" in hub.repositories["models/owner/name"].large
    own = [one.row() for one in Run(products_run()).predict(photos)]
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(json.dumps(own))


def test_only_whole_exports_are_pushed(served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = Path(shutil.copytree(products_onnx(), tmp_path / "onnx"))
    (copied / "model.onnx").unlink()
    changed = Path(shutil.copytree(products_onnx(), tmp_path / "changed"))
    with (changed / "model.onnx").open("ab") as file:
        file.write(b"x")
    for folder, repository, message in (
        (products_run(), "owner/name", "is not an export"),
        (copied, "owner/name", "lacks model.onnx"),
        (changed, "owner/name", "model.onnx changed since the export"),
        (products_onnx(), "no name", "owner/name on the hub"),
    ):
        assert experiments(["push-to-hub", str(folder), "--repo", repository]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert served.repositories == {}


def test_without_a_network_the_push_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert experiments(["push-to-hub", str(products_onnx()), "--repo", "owner/name"]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_a_refusal_of_the_hub_is_one_line_without_the_token(
    served: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_token")
    export = products_onnx()
    capsys.readouterr()
    assert experiments(["push-to-hub", str(export), "--repo", "owner/name"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "401" in line
    assert "set HF_TOKEN to a token that may write" in line
    assert "hf_wrong_token" not in line
    assert served.repositories == {}


def test_the_card_is_valid_and_its_scores_are_those_of_the_predictions() -> None:
    card = ModelCard.load(products_onnx() / "README.md")
    assert card.data.library_name == "vitrail"
    assert card.data.pipeline_tag == "image-classification"
    predictions = read_predictions(products_run() / "predictions" / "test.parquet")
    found = {
        (result.dataset_split, result.dataset_config, result.metric_type): result.metric_value
        for result in card.data.eval_results or []
    }
    for task in ("class", "colour"):
        known = predictions.targets[task] >= 0
        right = (predictions.predicted(task) == predictions.targets[task])[known].mean()
        assert found["test", task, "accuracy"] == pytest.approx(right, abs=1e-4)
        assert ("val", task, "f1") in found


def test_the_card_describes_data_training_and_classes() -> None:
    text = (products_onnx() / "README.md").read_text(encoding="utf-8")
    record = json.loads((products_run() / "run.json").read_text())
    assert record["data"]["fingerprint"][:16] in text
    assert f"train {record['data']['samples']['train']}" in text
    assert record["git"]["revision"][:12] in text
    assert "seed 42" in text
    assert "clothing_wrist_watch" in text
    assert "python predict.py" in text
    # Names of folders of the machine are not published.
    assert str(products_run().parent) not in text
    assert "--text" in (flowers_onnx() / "README.md").read_text(encoding="utf-8")


def test_a_run_without_scores_claims_none(tmp_path: Path) -> None:
    run = tmp_path / "shop" / "1"
    shutil.copytree(products_run(), run, ignore=shutil.ignore_patterns("export", "predictions", "run.json"))
    task = load_task(run / "checkpoints" / "best.ckpt")
    files = Run(run)
    forms = [Form("PyTorch", 1, [], {})]
    write_card(tmp_path / "README.md", files, metadata_of(task, files, "best"), "safetensors", forms, "test")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    check_card(tmp_path / "README.md")
    assert "no score is claimed" in text
    assert "Not recorded." in text
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


def test_scores_of_another_checkpoint_are_not_those_of_the_export(tmp_path: Path) -> None:
    run = products_run()
    task = load_task(run / "checkpoints" / "last.ckpt")
    files = Run(run)
    forms = [Form("PyTorch", 1, [], {})]
    write_card(tmp_path / "README.md", files, metadata_of(task, files, "last"), "safetensors", forms, "test")
    assert "no score is claimed" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


def test_a_missing_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a model card"):
        check_card(tmp_path / "README.md")


@pytest.mark.slow  # trains another run
def test_the_card_lists_kinds_and_their_scores() -> None:
    text = (kinds_onnx() / "README.md").read_text(encoding="utf-8")
    assert "- condition (ordinal): new < used < worn" in text
    assert "- tags (multi-label): fragile, household, soft, wearable. Predicted from these probabilities: " in text
    assert "- price (regression): the value in the units of the data" in text
    scores = text[text.index("## Results") : text.index("## Exported")]
    for score in ("quadratic kappa", "mAP", "exact match", "R²"):
        assert score in scores
    results = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"]
    measured = {(one["dataset"]["config"], metric["type"]) for one in results for metric in one["metrics"]}
    assert {("tags", "mAP"), ("price", "mae"), ("condition", "quadratic_kappa"), ("class", "accuracy")} <= measured
