"""``Run.predict``: new images are prepared and predicted as those of the run's own evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.support.runs import data_of, exported, flowers_run, products_run
from vitrail import Run
from vitrail.errors import UserError
from vitrail.predictions import image_predictions


@pytest.fixture(scope="module")
def products() -> Run:
    return Run(products_run())


@pytest.fixture(scope="module")
def flowers() -> Run:
    return Run(flowers_run())


def files_of(run: Run, count: int) -> tuple[list[Path], np.ndarray[Any, Any]]:
    """The first test images of a run, and their rows in its predictions."""
    predictions = run.predictions("test")
    assert predictions is not None
    paths = data_of(run.path).image_facts(predictions.sample_id[:count]).column("path").to_pylist()
    return [Path(path) for path in paths], np.arange(count)


@pytest.mark.parametrize("name", ["products", "flowers"])
def test_predictions_are_those_of_the_evaluation(name: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(name)
    paths, rows = files_of(run, 5)
    recorded = run.predictions("test")
    assert recorded is not None
    found = run.predict(paths, batch_size=2)
    assert [one.name for one in found] == [str(path) for path in paths]
    for task, classes in recorded.tasks.items():
        expected = recorded.probabilities(task, run.temperatures.get(task, 1.0))[rows]
        np.testing.assert_allclose([one.tasks[task].probabilities for one in found], expected, atol=1e-5)
        assert [one.tasks[task].label for one in found] == [classes[at] for at in recorded.predicted(task)[rows]]
        assert all(one.tasks[task].calibrated == (task in run.temperatures) for one in found)
    assert found[0].calibrated == (name == "products")
    assert found[0].top_k(2)[0] == (found[0].label, found[0].confidence)


def test_every_kind_of_image_is_predicted_alike(products: Run, tmp_path: Path) -> None:
    (path, *_), _ = files_of(products, 1)
    pixels = np.array(Image.open(path).convert("RGB"))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    turned = Image.fromarray(np.rot90(pixels, -1).copy())
    exif = turned.getexif()
    exif[0x0112] = 8  # to be turned back when shown
    turned.save(tmp_path / "turned.png", exif=exif)
    shutil.copy(path, tmp_path / path.name)
    given = [str(path), Image.open(path), pixels, pixels[None], tensor, tensor[None], tmp_path / "turned.png"]
    found = products.predict([*given, tmp_path])
    assert len(found) == len(given) + 2
    for one in found[1:]:
        assert one.label == found[0].label
        np.testing.assert_allclose(one.tasks["class"].probabilities, found[0].tasks["class"].probabilities, atol=1e-6)
    assert [one.name for one in found[:3]] == [str(path), "image 1", "image 2"]
    assert found[0].label in repr(found[0])
    assert products.predict([]) == []


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("nowhere.jpg", "nowhere.jpg: "),
        (3, "image 0: must be a path, .* got int"),
        (np.zeros((8, 8, 3)), r"got float64 \(8, 8, 3\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"got torch.uint8 \(8, 8, 3\)"),
    ],
)
def test_what_is_no_image_is_one_line(products: Run, images: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        products.predict([images])
    assert "\n" not in str(caught.value)


def test_the_limit_of_pixels_is_that_of_the_run_s_data_or_given(products: Run, tmp_path: Path) -> None:
    photo = tmp_path / "a.png"
    Image.new("RGB", (30, 20), (200, 0, 0)).save(photo)
    [usual] = products.predict(photo)
    with pytest.raises(UserError, match=r"a\.png: too large .* --max-pixels of predict"):
        products.predict(photo, max_pixels=599)
    strict = Run(shutil.copytree(products.path, tmp_path / "run" / "1"))
    config = {**products.config, "data": {"class_path": "x", "init_args": {"image": {"max_pixels": 599}}}}
    (strict.path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(UserError, match="too large"):
        strict.predict(photo)
    assert strict.predict(photo, max_pixels=600)[0].label == usual.label


def test_bad_files_and_folders_are_named(products: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: has neither images"):
        products.predict(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.jpg: "):
        products.predict(tmp_path)


def test_outputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="'class' are not finite"):
        image_predictions(["a"], {"class": np.array([[np.nan, 1]], np.float32)}, {"class": ["x", "y"]}, {})


def test_equal_classes_are_no_prediction() -> None:
    (found,) = image_predictions(["a"], {"class": np.zeros((1, 2), np.float32)}, {"class": ["x", "y"]}, {})
    assert (found.label, found.confidence, found.calibrated) == ("", 0.5, False)


def test_an_export_predicts_what_its_run_predicts(
    products: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = exported(products.path, "safetensors")
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    found = Run.from_hub("owner/name", revision="v1")
    assert (asked[0]["name"], asked[0]["revision"]) == ("owner/name", "v1")
    assert not [pattern for pattern in asked[0]["allow_patterns"] if pattern.endswith((".py", "*"))]
    (path, *_), _ = files_of(products, 1)
    (exported_one,), (own,) = found.predict(path), products.predict(path)
    np.testing.assert_array_equal(exported_one.tasks["class"].probabilities, own.tasks["class"].probabilities)
    assert exported_one.calibrated


def test_what_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, **options: Any) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(UserError, match=r"owner/name: cannot be fetched from the hub \(no network\); check"):
        Run.from_hub("owner/name")


def test_checkpoints_by_name(products: Run) -> None:
    best, last = products.load_model(), products.load_model("last")
    assert not best.training
    assert best.weights_digest() == products.model.weights_digest()
    assert last.tasks == best.tasks
    with pytest.raises(UserError, match=r"has no checkpoints/third\.ckpt; it has best, last"):
        products.load_model("third")


def test_the_datamodule_is_the_runs_own(products: Run) -> None:
    assert products.datamodule.tasks == products.model.tasks
    changed = products.load_datamodule(["--data.init_args.loader.batch_size=3"])
    assert changed.loader_options.batch_size == 3


def test_a_datamodule_of_foreign_code_is_refused(products: Run, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {class_path: os.system}")
    with pytest.raises(UserError, match="no class of this project"):
        _ = Run(tmp_path).datamodule


def test_the_latest_run(products: Run, tmp_path: Path) -> None:
    name, runs = products.path.parent.name, products.path.parent.parent
    assert Run.latest(name, runs).path == products.path
    with pytest.raises(UserError, match=f"{tmp_path / 'shop'}: has no run"):
        Run.latest("shop", tmp_path)
