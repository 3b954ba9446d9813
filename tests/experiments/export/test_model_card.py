from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from experiments.export.hub import check_card, write_card
from experiments.export.parity import Form
from experiments.export.weights import metadata_of
from lightning_modules.checkpoint import load_task
from tests.experiments.exports import flowers_onnx, products_onnx, products_run
from vitrail.errors import UserError
from vitrail.predictions import read_predictions
from vitrail.runs import RunFiles


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


def test_the_card_tells_of_data_training_and_classes() -> None:
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
    files = RunFiles(run)
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
    files = RunFiles(run)
    forms = [Form("PyTorch", 1, [], {})]
    write_card(tmp_path / "README.md", files, metadata_of(task, files, "last"), "safetensors", forms, "test")
    assert "no score is claimed" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


def test_what_is_no_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model card"):
        check_card(tmp_path / "README.md")
