from __future__ import annotations

import base64
import csv
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.__main__ import main
from evaluation.saliency.overlays import worst_mistakes
from experiments.train.cli import main as experiments
from tests.support.data import write_flowers, write_products
from tests.support.models import write_clip
from tests.support.runs import kinds_run
from vitrail.predictions import read_predictions, target_texts, write_predictions
from vitrail.types import UNKNOWN

SHARED = """
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
wandb: {mode: disabled}
"""
PRODUCTS = """
data:
  class_path: datamodules.Products
  init_args:
    root: ROOT/products
    vocabulary: {aliases: {colour: {grey: gray}}}
    image: {size: 32}
    loader: {batch_size: 8}
    checks: {allow_leaks: [exact, near]}
model:
  class_path: lightning_modules.MultiTaskClassifier
  init_args: {backbone: test_vit, pretrained: false}
predictions: {splits: [test]}
"""
FLOWERS = """
data:
  class_path: datamodules.Flowers102
  init_args:
    root: ROOT/flowers
    classes: base
    image: {size: 32}
    loader: {batch_size: 8}
    checks: {allow_leaks: [exact, near]}
model:
  class_path: lightning_modules.DualEncoder
  init_args: {towers: {model: ROOT/clip}}
checkpoint: {monitor: val/class/accuracy, mode: max}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    write_products(folder / "products")
    write_flowers(folder / "flowers")
    write_clip(folder / "clip")
    for name, content in (("products", PRODUCTS), ("flowers", FLOWERS)):
        (folder / f"{name}.yaml").write_text(content.replace("ROOT", str(folder)) + SHARED)
        arguments = ["--config", str(folder / f"{name}.yaml"), "--runs", str(folder / "runs"), "--test_best=true"]
        assert experiments(["fit", *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    [found] = (root / "runs" / "products").iterdir()
    return found


@pytest.fixture(scope="module")
def dual(root: Path) -> Path:
    [found] = (root / "runs" / "flowers").iterdir()
    return found


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "explained.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("task", "method"), [("class", "gradcam"), ("colour", "rollout")])
def test_the_worst_mistakes_are_those_of_the_predictions(run: Path, tmp_path: Path, task: str, method: str) -> None:
    arguments = ["--worst", "4", "--task", task, "--method", method, "--to", str(tmp_path)]
    assert main(["explain", str(run), *arguments]) == 0
    written = read_predictions(run / "predictions" / "test.parquet")
    worst = worst_mistakes(written.logits[task], written.targets[task], 4)
    assert len(worst) > 1
    found = rows(tmp_path)
    assert [row["name"] for row in found] == written.names[worst].tolist()
    for row, place in zip(found, worst, strict=True):
        chosen = written.logits[task][place].argmax()
        assert row["predicted"] == written.tasks[task][chosen]
        assert float(row["confidence"]) == pytest.approx(written.probabilities(task)[place, chosen], abs=1e-4)
        assert row["right"] == written.tasks[task][written.targets[task][place]]
    page = (tmp_path / "explain.html").read_text(encoding="utf-8")
    embedded = [base64.b64decode(code) for code in re.findall(r"src=\"data:image/jpeg;base64,([^\"]+)", page)]
    assert embedded == [path.read_bytes() for path in sorted(tmp_path.glob("*.jpg"))]
    assert len(embedded) == len(worst) * (3 if method == "gradcam" else 2)
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    for name in written.names[worst]:
        assert Path(name).name in page


def test_images_by_name_and_by_file_are_seen_alike(run: Path, root: Path, tmp_path: Path) -> None:
    name = str(read_predictions(run / "predictions" / "test.parquet").names[0])
    assert main(["explain", str(run), "--ids", name, "--shown-class", "clothing_cap"]) == 0
    file = root / "products" / name
    assert main(["explain", str(run), "--image", str(file), "--to", str(tmp_path)]) == 0
    [by_name], [by_file] = rows(run / "figures" / "explain"), rows(tmp_path)
    assert by_name["right"]
    assert not by_file["right"]
    assert by_name["confidence"] == by_file["confidence"]
    for path in tmp_path.glob("*.jpg"):
        with Image.open(path) as image:
            assert image.size == (224, 224)


@pytest.mark.parametrize("method", ["gradcam", "rollout"])
def test_likeness_to_texts(dual: Path, root: Path, tmp_path: Path, method: str) -> None:
    file = next((root / "products" / "images").iterdir())
    texts = ["--text", "a photo of a rose.", "--text", "two dogs"]
    assert main(["explain", str(dual), "--image", str(file), *texts, "--method", method, "--to", str(tmp_path)]) == 0
    [row] = rows(tmp_path)
    assert re.fullmatch(r"“a photo of a rose\.” -?0\.\d\d.*; “two dogs” -?0\.\d\d.*", row["likeness"])


def test_zero_shot_classes_of_a_dual_encoder(dual: Path, tmp_path: Path) -> None:
    assert main(["explain", str(dual), "--worst", "2", "--to", str(tmp_path)]) == 0
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "weight"], "class, colour"),
        (["--worst", "0"], "at least 1"),
        (["--ids", "nowhere.jpg"], "no image of that name"),
        (["--shown-class", "zebra"], "clothing_cap"),
        (["--checkpoint", "middle"], "it has best, last"),
        (["--checkpoint", "last"], "test.parquet are of checkpoint best, so they do not show the mistakes of last"),
        (["--text", "a dog", "--worst", "2"], "has no text encoder"),
        (["--text", "a dog"], "name the images with"),
        (["--text", "a dog", "--task", "class"], "does not go with"),
        (["--split", "val"], "no predictions"),
        (["--image", "nowhere.jpg"], "nowhere.jpg"),
    ],
)
def test_mistakes_are_one_line(run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["explain", str(run), *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert says in line


def test_without_a_known_target_mistakes_are_not_known(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "part"
    shutil.copytree(run / "checkpoints", part / "checkpoints")
    found = read_predictions(run / "predictions" / "test.parquet")
    targets = {task: np.full(len(found), UNKNOWN) for task in found.tasks}
    write_predictions(part / "predictions" / "test.parquet", replace(found, targets=targets))
    assert main(["explain", str(part)]) == 2
    assert "no sample of test has a known target of 'class'" in capsys.readouterr().err


def test_a_run_that_is_not_whole_says_what_it_lacks(
    run: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "part"
    shutil.copytree(run / "checkpoints", part / "checkpoints")
    assert main(["explain", str(part)]) == 2
    assert "there are no predictions" in capsys.readouterr().err
    name = str(read_predictions(run / "predictions" / "test.parquet").names[0])
    assert main(["explain", str(part), "--ids", name]) == 2
    assert "name images with --image" in capsys.readouterr().err
    assert main(["explain", str(part), "--image", str(root / "products" / name), "--to", str(tmp_path)]) == 0
    shutil.rmtree(part / "checkpoints")
    shutil.copytree(run / "predictions", part / "predictions")
    assert main(["explain", str(part)]) == 2
    assert "has no checkpoints/best.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "label"), [("tags", True), ("price", True), ("condition", False)])
def test_tasks_of_every_kind_are_explained(tmp_path: Path, task: str, label: bool) -> None:
    of_kinds = kinds_run()
    written = read_predictions(of_kinds / "predictions" / "test.parquet")
    name = next(iter(written.tasks[task]), "lower") if label else ""
    chosen = ["--label", name] if label else []
    assert main(["explain", str(of_kinds), "--task", task, *chosen, "--worst", "2", "--to", str(tmp_path)]) == 0
    thresholds = written.thresholds_of(task) if task == "tags" else ()
    worst = worst_mistakes(written.logits[task], written.targets[task], 2, written.kind(task), thresholds)
    found = rows(tmp_path)
    assert [row["name"] for row in found] == written.names[worst].tolist()
    assert [row["right"] or None for row in found] == target_texts(written.targets[task][worst], written.tasks[task])
    assert ("confidence" in found[0]) == (task != "price")


def test_a_label_that_the_task_lacks_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(kinds_run()), "--task", "price", "--label", "cheap"]) == 2
    assert "--label cheap: price has higher, lower; name one of them" in capfd.readouterr().err
