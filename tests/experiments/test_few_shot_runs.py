"""A few-shot run of a dual encoder in every command that takes a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch

from evaluation.__main__ import main as evaluation
from experiments.__main__ import main as experiments
from retrieval.__main__ import main as retrieval
from tests.support.data import write_flowers
from tests.support.galleries import rows_of
from tests.support.models import write_clip
from tests.support.plain_figures import plain_figures
from tests.support.runs import FLOWERS, data_of
from vitrail.predictions import Predictions
from vitrail.runs import Run

TRAINER = """
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
wandb: {mode: disabled}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tip-Adapter-F, whose checkpoint has a cache with a row per shot: all ten, one or two a class."""
    root = write_flowers(tmp_path_factory.mktemp("few_shot"), lists={"trnid": [1, 2, 7, 13, 14, 19, 25, 31, 37, 43]})
    write_clip(root / "clip")
    text = FLOWERS.replace("lora: {{rank: 2}}", "few_shot: {{method: tip_adapter_f, steps: 4}}")
    text = text.replace("    image:", "    shots: 3\n    image:").format(root=root)
    (root / "tiny.yaml").write_text(text + TRAINER, encoding="utf-8")
    with plain_figures():
        assert (
            experiments(["fit", "--config", str(root / "tiny.yaml"), "--runs", str(root / "runs"), "--test_best=true"])
            == 0
        )
    [run] = (root / "runs").glob("*/*")
    return run


@pytest.fixture(scope="module")
def known(run: Path) -> Predictions:
    predictions = Run(run).predictions("test")
    assert predictions is not None
    return predictions


@pytest.fixture(scope="module")
def photos(run: Path) -> list[Path]:
    """The test images in the order of the predictions."""
    data = data_of(run)
    return [Path(data.table.source(row)) for row in data.split_indices("test").tolist()]


def test_its_predictions_are_those_of_the_solved_classifier(run: Path, known: Predictions, photos: list[Path]) -> None:
    task = Run(run).load_model()
    assert len(task.few_shot.keys) == 10
    found = Run(run).predict(photos)
    labels = [known.tasks["class"][number] for number in known.predicted("class")]
    assert [one.label for one in found] == labels
    task.few_shot = None
    zero_shot = torch.cat(
        [task.predict_step(batch, 0)["logits"]["class"] for batch in data_of(run).eval_dataloader("test")]
    )
    assert not np.allclose(known.logits["class"], zero_shot.detach(), atol=0.1)


def test_it_is_evaluated_explained_and_searched(
    run: Path, known: Predictions, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiments(["evaluate", str(run), "--data", str(run / "config.yaml"), "--name", "again"]) == 0
    again = Run(run / "evaluations" / "again").predictions("test")
    assert again is not None
    place = {name: row for row, name in enumerate(again.names)}  # these are all images, not the test split alone
    rows = [place[name] for name in known.names]
    np.testing.assert_allclose(again.logits["class"][rows], known.logits["class"], atol=1e-4)

    assert experiments(["predict", str(run), str(photos[0]), "--to", str(tmp_path / "out.csv")]) == 0
    first = known.tasks["class"][known.predicted("class")[0]]
    assert pd.read_csv(tmp_path / "out.csv")["class"].tolist() == [first]
    assert evaluation(["explain", str(run), "--image", str(photos[0]), "--to", str(tmp_path / "maps")]) == 0
    assert first in (tmp_path / "maps" / "explain.html").read_text(encoding="utf-8")

    assert retrieval(["index", "--run", str(run), "--splits", "test", "--device", "cpu"]) == 0
    assert rows_of(run / "gallery").num_rows == len(known)
    capsys.readouterr()
    assert retrieval(["search", "--gallery", str(run / "gallery"), "a photo of a rose", "--top-k", "2"]) == 0
    assert "image_" in capsys.readouterr().out


def test_an_export_has_the_classifier_or_is_refused(
    run: Path, known: Predictions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiments(["export", str(run), "--format", "safetensors", "--to", str(tmp_path)]) == 0
    task = Run(tmp_path / "safetensors").load_model()
    with torch.no_grad():
        outputs = [task.predict_step(batch, 0) for batch in data_of(run).eval_dataloader("test")]
    logits = torch.cat([one["logits"]["class"] for one in outputs])
    np.testing.assert_allclose(logits.numpy(), known.logits["class"], atol=1e-4)
    capsys.readouterr()
    for layout in ("transformers", "peft"):
        assert experiments(["export", str(run), "--format", layout, "--to", str(tmp_path)]) == 2
        assert not (tmp_path / layout).exists()
    assert "--format transformers has no place for the few-shot classifier; choose --format" in capsys.readouterr().err


@pytest.mark.slow  # the safetensors file has the same weights
def test_the_onnx_graph_of_the_images_has_the_classifier(run: Path, known: Predictions, tmp_path: Path) -> None:
    assert experiments(["export", str(run), "--format", "onnx", "--to", str(tmp_path)]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "image.onnx")
    images = torch.cat([batch["image"] for batch in data_of(run).eval_dataloader("test")]).numpy()
    (logits,) = session.run(["logits_class"], {"image": images})
    np.testing.assert_allclose(logits, known.logits["class"], atol=1e-3)
