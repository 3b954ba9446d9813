from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.export.weights import as_strings, from_strings, metadata_of, write_summary, write_tokenizer
from lightning_modules.checkpoint import load_task
from lightning_modules.dual_encoder import DualEncoder
from tests.experiments.exports import flowers_run, products_run
from vitrail.errors import UserError
from vitrail.runs import RunFiles


def test_a_dual_encoders_text_rules_are_there(tmp_path: Path) -> None:
    task = load_task(flowers_run() / "checkpoints" / "best.ckpt")
    found = metadata_of(task, RunFiles(flowers_run()), "best")
    assert isinstance(task, DualEncoder)
    assert task.towers.tokenizer is not None
    assert found["text"]["max_length"] == task.towers.tokenizer.state["max_length"]
    assert found["text"]["pad_token"] == "<end>"
    assert len(found["text"]["class_prompts"]) == len(found["tasks"]["class"])
    assert from_strings(as_strings(found), "x") == found
    write_tokenizer(task, tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_a_classifier_reads_no_texts(tmp_path: Path) -> None:
    task = load_task(products_run() / "checkpoints" / "best.ckpt")
    found = metadata_of(task, RunFiles(products_run()), "best")
    assert found["text"] is None
    assert set(found["temperatures"]) == set(found["tasks"]) == {"class", "colour"}
    assert found["run"] == "/".join(products_run().parts[-2:])
    write_tokenizer(task, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strings", [{}, {"vitrail": "no JSON"}, {"vitrail": "[]"}, {"vitrail": "{}"}])
def test_metadata_of_others_are_refused(strings: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"file\.onnx: is no exported model"):
        from_strings(strings, "file.onnx")


def test_what_is_no_number_is_null_in_the_summary(tmp_path: Path) -> None:
    write_summary(tmp_path, {"agreement": float("nan"), "name": "Übung"})
    assert json.loads((tmp_path / "export.json").read_text(encoding="utf-8")) == {"agreement": None, "name": "Übung"}
