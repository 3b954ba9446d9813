"""Attributes, classes and files that are called like our own columns, or like nothing sane, from fit to explain."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pandas as pd
import pytest

from evaluation.__main__ import main as evaluation
from experiments.train.cli import main as experiments
from retrieval.__main__ import main as retrieval
from retrieval.filters import filter_columns
from retrieval.gallery import Gallery
from tests.experiments.conftest import only_run
from tests.support.data import COLOURS, draw_image
from vitrail.files import read_csv

NAMES = [
    *("group", "caption", "split", "source", "row", "name", "id", "label", "image", "target", "embedding", "vector"),
    *("confidence", "size", "key", "content", "path", "text", "predicted", "logits", "accuracy", "loss", "total"),
    *("class with spaces", "$x", "[b]", "it's", 'a"b', "a/b", "é", "label_id", "*", "1st", "train"),
]
NO_COLUMNS = ["a.b", "x`y"]
"""Tasks as others, but a gallery's table cannot have such columns."""

DRAWN = [
    *("id", "name", "accuracy", "total", "class with spaces", "$x", "[b]", "it's", 'a"b', "a/b", "é", "*"),
    *NO_COLUMNS,
]
"""Tasks of the fast run: those of all these names that a figure or a table may stumble over."""

CLASSES = ["=sum", "a.b/c $1$ [d]"]
YAML = """
name: odd
data:
  class_path: datamodules.Products
  init_args:
    root: {root}
    image: {{size: 16}}
    loader: {{batch_size: 8}}
    checks: {{allow_leaks: [exact, near, groups]}}
model:
  class_path: lightning_modules.MultiTaskClassifier
  init_args: {{backbone: test_vit, pretrained: false}}
trainer:
  {{max_epochs: 1, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, num_sanity_val_steps: 0}}
predictions: {{splits: [test]}}
wandb: {{mode: disabled}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with odd names, and an experiment."""
    place = tmp_path_factory.mktemp("odd")
    (place / "data" / "images").mkdir(parents=True)
    rows = []
    for number in range(16):
        path = f"images/é #{number} [x].png"
        draw_image(number % 2, list(COLOURS)[number % 6], look=number).save(place / "data" / path)
        attributes = ";".join(f"{name}:v{number % 2}" for name in [*NAMES, *NO_COLUMNS])
        part = "train" if number < 8 else ("val", "test")[number % 4 // 2]
        rows.append([path, CLASSES[number % 2], attributes, "a caption", part])
    columns = ["image_path", "class_label", "attributes", "caption", "split"]
    pd.DataFrame(rows, columns=columns).to_csv(place / "data" / "labels.csv", index=False)
    (place / "odd.yaml").write_text(YAML.format(root=place / "data"), encoding="utf-8")
    return place


def trained(place: Path, names: list[str]) -> Path:
    """A tested run with these attributes."""
    runs = place / f"runs{len(names)}"
    attributes = f"--data.init_args.attributes={json.dumps(names)}"
    arguments = ["--config", str(place / "odd.yaml"), "--runs", str(runs), attributes]
    assert experiments(["fit", *arguments, "--test_best=true"]) == 0
    return only_run(runs)


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    return trained(place, DRAWN)


@pytest.fixture(scope="module")
def run_of_all_names(place: Path) -> Path:
    return trained(place, NAMES)


@pytest.mark.slow
def test_every_attribute_is_a_task_and_can_be_filtered_by(
    run_of_all_names: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "gallery")
    assert retrieval(["index", "--run", str(run_of_all_names), "--gallery", folder, "--device", "cpu"]) == 0
    gallery = Gallery.open(folder)
    assert gallery.identity.labels == ["class", *NAMES]
    assert len(filter_columns(gallery.columns(), gallery.identity)) >= len(NAMES)
    for name in NAMES:
        # An attribute is called label_id, so that the column label_id of the attribute id needs its longer name.
        column = "gallery_label_id" if name == "id" else f"label_{name}".replace('"', '""')
        where = f"\"{column}\" = 'v1'"
        rows = gallery.table(["id", f"label_{name}"], where)
        assert set(rows.column(f"label_{name}").to_pylist()) == {"v1"}, name
        assert len(rows) == 8, name
    first = gallery.table(["id"]).column("id")[0].as_py()
    capsys.readouterr()
    apart = unicodedata.normalize("NFD", first)
    assert apart != first
    where = unicodedata.normalize("NFD", "\"label_é\" = 'v1'")
    assert retrieval(["search", "--gallery", folder, "--like", apart, "--where", where, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["query"]["like"] == first


def test_what_cannot_be_a_column_is_refused_by_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = ["index", "--run", str(run), "--gallery", str(tmp_path / "gallery"), "--device", "cpu"]
    assert retrieval(index) == 2
    assert "attribute 'a.b' cannot be a column of a gallery; rename it" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_are_compared_and_reported(run: Path, run_of_all_names: Path, tmp_path: Path) -> None:
    assert evaluation(["compare", str(run_of_all_names), str(run), "--html", str(tmp_path / "c.html")]) == 0
    assert evaluation(["report", str(run), "--to", str(tmp_path / "r")]) == 0
    config = str(run / "config.yaml")
    assert evaluation(["explore", "--config", config, "--to", str(tmp_path / "e"), "--task", "a/b"]) == 0


def test_what_explain_is_asked_for_may_be_in_another_normal_form(run: Path, tmp_path: Path) -> None:
    name = unicodedata.normalize("NFD", "images/é #10 [x].png")
    task = unicodedata.normalize("NFD", "é")
    assert evaluation(["explain", str(run), "--ids", name, "--task", task, "--to", str(tmp_path)]) == 0
    assert read_csv(tmp_path / "explained.csv")["name"].tolist() == ["images/é #10 [x].png"]
