"""Tests of a run as it is served: the same answers as its files hold, calibrated, and from several threads."""

from __future__ import annotations

import math
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax

from app.state.context import AppContext
from app.state.runs import ServedRun
from datamodules.base import ImageDataModule
from datamodules.cli import load_datamodule
from evaluation.saliency import class_scores, explainable, grad_cam
from evaluation.saliency.overlays import explain_task
from lightning_modules.checkpoint import load_task
from lightning_modules.dual_encoder import DualEncoder
from tests.support.runs import kinds_run
from vitrail.errors import UserError
from vitrail.ood import Detector, write_detector
from vitrail.predictions import read_predictions
from vitrail.runs import Run, checkpoint_digest, write_temperatures

ANY = Image.new("RGB", (60, 40), (200, 30, 30))


@pytest.fixture(scope="module")
def datasets(quickstart_run: Path, pairs_run: Path) -> dict[str, ImageDataModule]:
    """The images of both runs."""
    runs = {"quickstart": quickstart_run, "pairs": pairs_run}
    return {name: load_datamodule(run / "config.yaml") for name, run in runs.items()}


@pytest.fixture
def copied(quickstart_run: Path, tmp_path: Path) -> Path:
    """A run directory that may be damaged."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(quickstart_run / "config.yaml", tmp_path / "run")
    shutil.copy(quickstart_run / "checkpoints" / "best.ckpt", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def images_of(data: ImageDataModule, rows: list[int]) -> list[Image.Image]:
    return [Image.fromarray(data.read_image(row).permute(1, 2, 0).numpy()) for row in rows]


@pytest.mark.parametrize("name", ["quickstart", "pairs"])
def test_predictions_and_vectors_are_those_of_the_tested_run(
    context: AppContext, datasets: dict[str, ImageDataModule], name: str
) -> None:
    run, data, gallery = context.run(name), datasets[name], context.gallery(name)
    tested = read_predictions(run.path / "predictions" / "test.parquet").take(np.arange(20))
    # More than pass through the network at once.
    found = run.predict(images_of(data, tested.sample_id.tolist()))
    assert list(found[0].tasks) == list(tested.tasks)
    for task, logits in tested.logits.items():
        probabilities = np.stack([one.tasks[task].probabilities for one in found])
        np.testing.assert_allclose(probabilities, softmax(logits.astype(float), axis=1), atol=1e-4)
    assert run.predict([]) == []
    rows = [3, 77, 200]
    stored = gallery.gallery.vectors([data.sample_names()[row] for row in rows])
    np.testing.assert_allclose(run.encode_images(images_of(data, rows)), stored, atol=1e-5)
    assert run.weights == gallery.identity.weights


def test_fitted_temperatures_make_the_confidences(copied: Path, context: AppContext) -> None:
    write_temperatures(copied, {"class": 2.5, "colour": 0.5}, {})
    run = ServedRun(copied)
    [plain], [scaled] = context.run("quickstart").predict([ANY]), run.predict([ANY])
    for task, temperature in (("class", 2.5), ("colour", 0.5), ("material", 1.0)):
        logits = np.log(plain.tasks[task].probabilities)
        np.testing.assert_allclose(scaled.tasks[task].probabilities, softmax(logits / temperature), atol=1e-5)
    assert [one.calibrated for one in scaled.tasks.values()] == [True, True, False, False]
    [note] = run.notes
    assert "Confidences of material, condition are not calibrated" in note


@pytest.mark.parametrize("content", ["{", '{"temperatures": {"class": 2.0}, "checkpoint_sha256": "of another"}'])
def test_a_calibration_that_cannot_be_used_is_noted(copied: Path, content: str) -> None:
    (copied / "checkpoints" / "calibration.json").write_text(content)
    run = ServedRun(copied)
    assert run.temperatures == {}
    assert not run.predict([ANY])[0].tasks["class"].calibrated
    [note] = run.notes
    assert "not calibrated" in note
    assert str(copied) not in note  # browsers see it


def test_labels_are_encoded_as_the_classes_are(context: AppContext, pairs_run: Path) -> None:
    task = load_task(pairs_run / "checkpoints" / "best.ckpt")
    assert isinstance(task, DualEncoder)
    prompts = [["a mug", "one blue mug", "the mug"], ["a cap"], ["a lamp", "lamps"]]
    task.class_prompts = prompts
    with torch.inference_mode():
        expected = task.class_embeddings().numpy()
    run = context.run("pairs")
    np.testing.assert_allclose(run.encode_labels(prompts), expected, atol=1e-5)
    assert run.logit_scale == pytest.approx(float(task.objective.logit_scale()[0].detach()))


def test_texts_are_read(context: AppContext) -> None:
    run = context.run("pairs")
    assert run.kind == "dual encoder"
    vectors = run.encode_texts(["a red mug", "a lamp"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert run.reading("a red mug").known >= 3


def test_a_classifier_reads_no_texts(context: AppContext) -> None:
    run = context.run("quickstart")
    assert run.kind == "classifier"
    with pytest.raises(UserError, match="has no text encoder"):
        _ = run.logit_scale
    with pytest.raises(UserError, match="has no text encoder"):
        run.encode_texts(["a mug"])


def test_saliency_is_that_of_the_evaluation(
    context: AppContext, quickstart_run: Path, datasets: dict[str, ImageDataModule]
) -> None:
    run, [image] = context.run("quickstart"), images_of(datasets["quickstart"], [9])
    before = run.predict([image])[0].tasks["colour"].probabilities
    explained = run.saliency(image, "colour", "red")
    task = load_task(quickstart_run / "checkpoints" / "best.ckpt")
    pixels = torch.from_numpy(explained.image).permute(2, 0, 1)[None]
    shown = run.tasks["colour"].index("red")
    [expected] = explain_task(task, "colour", pixels, ["x"], [shown], shown=shown)
    np.testing.assert_allclose(explained.heats[0].values, expected.heats[0].values, atol=1e-5)
    assert explained.image.shape == (48, 48, 3)
    np.testing.assert_array_equal(run.predict([image])[0].tasks["colour"].probabilities, before)


def test_saliency_of_labels_and_numbers() -> None:
    run = ServedRun(kinds_run(), device="cpu")
    for task, label in (("tags", run.tasks["tags"][1]), ("price", "lower"), ("condition", "new")):
        explained = run.saliency(ANY, task, label)
        pixels = torch.from_numpy(explained.image).permute(2, 0, 1)[None]
        model = load_task(kinds_run() / "checkpoints" / "best.ckpt")
        wanted = torch.tensor([[explainable(model, task).index(label)]])
        expected = grad_cam(model, class_scores(model, task), pixels, wanted)[0, 0]
        np.testing.assert_allclose(explained.heats[0].values, expected.numpy(), atol=1e-5)
    with pytest.raises(UserError, match="choose one"):
        run.saliency(ANY, "price", "cheap")


def test_saliency_of_a_text(context: AppContext) -> None:
    explained = context.run("pairs").saliency(ANY, "", "a red mug")
    assert explained.heats[0].values.shape == (48, 48)


@pytest.mark.parametrize(("task", "label"), [("size", "red"), ("colour", "mug")])
def test_saliency_of_what_it_does_not_know_is_refused(context: AppContext, task: str, label: str) -> None:
    with pytest.raises(UserError, match="choose one"):
        context.run("quickstart").saliency(ANY, task, label)


def test_many_at_once_get_the_same_answers(context: AppContext) -> None:
    run = context.run("quickstart")
    images = [Image.new("RGB", (50, 50), (shade * 25, 90, 160)) for shade in range(10)]
    alone = [run.predict([image])[0].tasks["class"].probabilities for image in images]

    def ask(place: int) -> np.ndarray[Any, Any]:
        # Saliency hooks into the network that others are asking.
        run.saliency(images[place], "class", run.tasks["class"][0])
        return run.predict([images[place]])[0].tasks["class"].probabilities

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(ask, list(range(10)) * 2))
    np.testing.assert_allclose(np.stack(together), np.stack(alone * 2), atol=1e-6)


def test_the_name_is_experiment_and_run_unless_given(copied: Path) -> None:
    assert ServedRun(copied, device="cpu").name == f"{copied.parent.name}/run"
    assert ServedRun(copied, "mine").name == "mine"


def test_what_is_no_trained_run_is_refused(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        ServedRun(tmp_path / "nothing")
    (copied / "checkpoints" / "best.ckpt").rename(copied / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"has no checkpoints/best\.ckpt"):
        ServedRun(copied)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_no_code_of_a_checkpoint_is_run(copied: Path, tmp_path: Path, way: str) -> None:
    checkpoint = copied / "checkpoints" / "best.ckpt"
    content = {"state_dict": {}, "hyper_parameters": {"evil": _Evil(tmp_path / "ran")}}
    if way == "torch":
        torch.save(content, checkpoint)
    else:
        checkpoint.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="can be read safely"):
        ServedRun(copied)
    assert not (tmp_path / "ran").exists()


def test_a_diverged_model_is_refused(copied: Path) -> None:
    path = copied / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if name.startswith("heads"))
    checkpoint["state_dict"][name].fill_(float("nan"))
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="not finite"):
        ServedRun(copied).predict([ANY])


@pytest.mark.parametrize("method", ["energy", "mahalanobis"])
def test_unknown_images_are_those_of_predict(copied: Path, context: AppContext, method: str) -> None:
    data = load_datamodule(copied / "config.yaml")
    images = images_of(data, list(range(6)))
    plain = Run(copied).predict(images)
    features = Run(copied).model.image_features
    pixels = torch.stack([ServedRun(copied, device="cpu").prepared(data.read_image(row)) for row in range(6)])
    with torch.inference_mode():
        found = features(pixels.to(Run(copied).model.device)).float().cpu().numpy()
    arrays = {"whitening": np.eye(found.shape[1], dtype=np.float32), "means": found[:1]}
    detector = Detector(method, "class", "single_label", -math.inf, 0.9, arrays)
    with torch.inference_mode():
        logits = Run(copied).model.predict_step({"image": pixels, "sample_id": torch.arange(6)}, 0)["logits"]["class"]
    threshold = float(np.median(detector.scores(logits.numpy(), found)))
    facts = {"checkpoint_sha256": checkpoint_digest(copied)}
    write_detector(copied / Run.OOD, replace(detector, threshold=threshold, facts=facts))

    served = [one.unknown for one in ServedRun(copied, device="cpu").predict(images)]

    assert served == [one.unknown for one in Run(copied).predict(images)]
    assert served.count(True) == 3
    assert [one.unknown for one in plain] == [None] * 6


def test_a_detector_that_cannot_be_used_is_noted(copied: Path) -> None:
    (copied / Run.OOD).write_bytes(b"no tensors")

    run = ServedRun(copied, device="cpu")

    assert any("Unknown images are not recognised" in note for note in run.notes)
    assert run.predict([ANY])[0].unknown is None
