"""Tiny data, tasks, runs and exports; as a program it evaluates a dual encoder on two processes."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from filelock import FileLock
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from callbacks import RetrievalMetrics
from datamodules.base import ImageDataModule
from datamodules.cli import load_datamodule
from datamodules.options import ImageOptions, LoaderOptions
from datamodules.table import SampleTable
from evaluation.__main__ import main as evaluation
from evaluation.dataset.sections import Collection, ImageStats, look_at
from experiments.__main__ import main as experiments
from lightning_modules.classification import ImageClassifier, MultiTaskClassifier
from retrieval.gallery import Gallery
from tests.support import models
from tests.support.data import write_flowers, write_products
from tests.support.galleries import identity, image_rows
from tests.support.models import write_clip
from tests.support.plain_figures import plain_figures
from vitrail.predictions import OutputCalibration, Predictions, write_predictions
from vitrail.runs import write_temperatures
from vitrail.types import UNKNOWN, Outputs

TASKS = {"class": ["bag", "cap", "mug"], "colour": ["blue", "red"]}
SPLIT_SIZES = {"train": 24, "val": 10, "test": 13}
SIZE = 32

tiny_trainer = models.tiny_trainer


class MadePhotos(ImageDataModule):
    """24 training, 10 validation and 13 test images of objects in three views; some colours are unknown."""

    generated: ClassVar[bool] = True

    def __init__(self, batch_size: int = 4, seed: int = 0) -> None:
        super().__init__(image=ImageOptions(size=SIZE), loader=LoaderOptions(batch_size=batch_size), seed=seed)

    def prepare_data(self) -> None:
        """There are no files to verify."""

    def load_table(self) -> SampleTable:
        splits = [split for split, size in SPLIT_SIZES.items() for _ in range(size)]
        rows = range(len(splits))
        frame = pd.DataFrame(
            {
                "name": [f"photo {row}" for row in rows],
                "source": [str(row) for row in rows],
                "split": splits,
                "group": [f"object {row // 3}" for row in rows],
                "class": [TASKS["class"][row * 7 % 3] for row in rows],
                "colour": [None if row % 5 == 4 else TASKS["colour"][row % 2] for row in rows],
            }
        )
        return SampleTable.from_frame(frame, ["class", "colour"], origin="made")

    def read_image(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


def tiny_task() -> MultiTaskClassifier:
    """Has BatchNorm and dropout in the backbone, and dropout in the heads; the same weights every time."""
    torch.manual_seed(0)
    task = MultiTaskClassifier("test_efficientnet", TASKS, pretrained=False, image_size=SIZE, weight_decay=0.1)
    backbone = task.encoder.backbone
    assert isinstance(backbone.global_pool, nn.Module)
    backbone.global_pool = nn.Sequential(backbone.global_pool, nn.Dropout(0.2))
    return task


def tiny_classifier() -> ImageClassifier:
    """Has BatchNorm but no dropout; the same weights every time."""
    torch.manual_seed(0)
    return ImageClassifier("test_efficientnet", TASKS["class"], pretrained=False, image_size=SIZE)


IMAGES = 23  # no multiple of two processes or of the batch size
BATCH_SIZE = 3
DIM = 6


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def embeddings() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings of images and of similar texts, 1 to 3 per image, and the image of each text."""
    images, owner = unit(IMAGES, 0), torch.arange(IMAGES).repeat_interleave(torch.arange(IMAGES) * 7 % 3 + 1)
    return images, F.normalize(images[owner] + 1.2 * unit(len(owner), 1), dim=1), owner


class TinyPairs(LightningDataModule):
    """Deals images to the processes unequally, or, ``padded``, equally by Lightning's sampler, which repeats some."""

    def __init__(self, padded: bool = False) -> None:
        super().__init__()
        self.padded = padded

    def train_dataloader(self) -> DataLoader[int]:
        return self._loader()

    def val_dataloader(self) -> DataLoader[int]:
        if self.padded or self.trainer is None:
            return self._loader()
        return self._loader(range(self.trainer.global_rank, IMAGES, self.trainer.world_size))

    def _loader(self, sampler: range | None = None) -> DataLoader[int]:
        return DataLoader(cast("Any", range(IMAGES)), batch_size=BATCH_SIZE, sampler=sampler)

    def test_dataloader(self) -> DataLoader[int]:
        return self.val_dataloader()


class TinyDualEncoder(LightningModule):
    """Looks embeddings up.

    Args:
        noise: distance of texts from their images in each epoch of training.
        keys: outputs to return; None for all.
        images_alone: number of the first images without a text.
    """

    def __init__(
        self, noise: tuple[float, ...] = (0.0,), keys: tuple[str, ...] | None = None, images_alone: int = 0
    ) -> None:
        super().__init__()
        self.noise, self.keys, self.images_alone = noise, keys, images_alone
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.weight * 1.0

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> Outputs:
        images, texts, owner = embeddings()
        noise = self.noise[min(self.current_epoch, len(self.noise) - 1)]
        texts = F.normalize(texts + noise * unit(len(texts), 2), dim=1)
        rows = [row for sample in batch.tolist() for row in (owner == sample).nonzero()[:, 0].tolist()]
        rows = [row for row in rows if int(owner[row]) >= self.images_alone]
        outputs: dict[str, Any] = {"sample_id": batch, "logits": {}, "targets": {}, "image_embedding": images[batch]}
        outputs |= {"text_embedding": texts[rows], "text_image": owner[rows]}
        return cast("Outputs", {key: outputs[key] for key in self.keys or outputs})

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> Outputs:
        return self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LogKeeper(Callback):
    """Writes what was logged, of each process."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write("val", trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write("test", trainer)

    def _write(self, split: str, trainer: Trainer) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        text = json.dumps({name: value for name, value in logged.items() if name.startswith(f"{split}/")})
        (Path(trainer.default_root_dir) / f"{split}_{trainer.global_rank}.json").write_text(text, encoding="utf-8")


def evaluate(folder: Path, *, padded: bool = False, **changes: Any) -> None:
    """Validate and test."""
    folder.mkdir(parents=True, exist_ok=True)
    watching = [RetrievalMetrics(), LogKeeper()]
    trainer = tiny_trainer(folder, callbacks=watching, use_distributed_sampler=padded, **changes)
    trainer.validate(TinyDualEncoder(), datamodule=TinyPairs(padded), verbose=False)
    trainer.test(TinyDualEncoder(), datamodule=TinyPairs(padded), verbose=False)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    both: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"}
    evaluate(folder / "dealt", **both)
    evaluate(folder / "padded", padded=True, **both)


EPOCHS = 6


def write_run(folder: Path, name: str = "shop", *, seed: int = 0, wrong: float = 0.4, gallery: bool = True) -> Path:
    """Write ``<folder>/<name>/20260101-100000``, with a share of wrong predictions, and ``<folder>/photos``."""
    photos = folder / "photos"
    if not photos.exists():
        write_products(photos, classes=3, instances=6, views=3, grey=False)
    run = folder / name / f"20260101-10000{seed}"
    table = pd.read_csv(photos / "labels.csv")
    test = table[table["split"] == "test"].reset_index(names="row")
    predictions = predictions_of(test, seed, wrong)
    write_predictions(run / "predictions" / "test.parquet", predictions)
    (run / "config.yaml").write_text(yaml.safe_dump(config(name, seed, photos)), encoding="utf-8")
    (run / "run.json").write_text(json.dumps(record(name, seed, predictions)), encoding="utf-8")
    metrics().to_csv(run / "metrics.csv", index=False)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best.ckpt").write_bytes(b"weights")
    if gallery:
        write_gallery(run / "gallery", test, predictions)
    return run


def predictions_of(test: pd.DataFrame, seed: int, wrong: float) -> Predictions:
    rng = np.random.default_rng(seed)
    classes = sorted(test["class_label"].unique())
    targets = np.array([classes.index(label) for label in test["class_label"]])
    predicted = np.where(rng.random(len(test)) < wrong, (targets + 1) % len(classes), targets)
    logits = np.eye(len(classes))[predicted] * rng.uniform(1, 4, (len(test), 1)) + rng.normal(size=(len(test), 3)) * 0.1
    colours = rng.integers(UNKNOWN, 2, len(test))
    return Predictions(
        sample_id=test["row"].to_numpy(np.int64),
        names=test["image_path"].to_numpy(object),
        groups=test["instance_id"].to_numpy(object),
        tasks={"class": classes, "colour": ["blue", "red"]},
        targets={"class": targets, "colour": colours},
        logits={"class": logits.astype(np.float32), "colour": rng.normal(size=(len(test), 2)).astype(np.float32)},
    )


def config(name: str, seed: int, photos: Path) -> dict[str, Any]:
    unfreezing = {"class_path": "callbacks.BackboneUnfreezing", "init_args": {"unfreeze_epoch": 4, "lr": 0.003}}
    return {
        "seed_everything": seed,
        "name": name,
        "trainer": {"max_epochs": EPOCHS, "callbacks": [unfreezing]},
        "model": {"class_path": "lightning_modules.MultiTaskClassifier", "init_args": {"lr": 0.001}},
        "data": {"class_path": "datamodules.Products", "init_args": {"root": str(photos), "attributes": []}},
    }


def record(name: str, seed: int, predictions: Predictions) -> dict[str, Any]:
    best = {"monitor": "val/class/accuracy", "score": 0.5 + 0.05 * (EPOCHS - 2)}
    stages = [
        {"stage": "fit", "command": "python -m experiments fit --config shop.yaml", "exit": "finished", "best": best}
        | {"started": "2026-01-01T10:00:00.000", "ended": "2026-01-01T10:03:30.000", "epochs": EPOCHS},
        {"stage": "test", "exit": "finished", "started": "2026-01-01T10:03:31.000", "ended": "2026-01-01T10:03:32.000"},
    ]
    data = {
        "data": "Products",
        "origin": "labels.csv",
        "fingerprint": "f" * 64,
        "samples": {"train": 36, "val": 9, "test": len(predictions)},
        "groups": {"train": 12, "val": 3, "test": 3},
        "unseen": {"class": {}, "colour": {"gold": 5}},
        "class_counts": {"class": [12, 12, 12], "colour": [20, 16]},
        "skipped": [],
    }
    return {
        "name": name,
        "seed": seed,
        "git": {"revision": "a" * 40, "changed_files": 0},
        "python": "3.11.7",
        "packages": {"torch": "2.15.0"},
        "hardware": {"machine": "x86_64", "cpu_count": 2, "gpus": []},
        "processes": 1,
        "data": data,
        "model": {"class": "MultiTaskClassifier", "parameters": 1000 * (1 + seed)},
        "stages": stages,
    }


def metrics() -> pd.DataFrame:
    rows: list[dict[str, float]] = []
    for epoch in range(EPOCHS):
        step = 10 * (epoch + 1) - 1
        rows += [
            {"step": step - 5, "lr-AdamW/head_decay": 0.003 / (1 + epoch)},
            {"epoch": epoch, "step": step, "val/loss": 2 - epoch / 5, "val/class/accuracy": 0.5 + 0.05 * (epoch % 5)},
            {"epoch": epoch, "step": step, "train/loss": 2 - epoch / 4, "train/loss_step": 9.0},
        ]
    rows.append({"epoch": EPOCHS, "step": 10 * EPOCHS, "test/class/accuracy": 0.5})
    return pd.DataFrame(rows)


def write_gallery(folder: Path, test: pd.DataFrame, predictions: Predictions) -> None:
    made_by = identity(encodes_text=False, labels=["class"], predicts={"class": list(predictions.tasks["class"])})
    rng = np.random.default_rng(0)
    matrix = np.eye(made_by.dim)[predictions.targets["class"]] + rng.normal(size=(len(test), made_by.dim)) * 0.1
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    columns = {"group": test["instance_id"].tolist(), "label_class": test["class_label"].tolist()}
    with Gallery.create(str(folder), made_by).writing() as writer:
        writer.add(image_rows(made_by, test["image_path"].tolist(), matrix.astype(np.float32), **columns))


COLOURS = {"red": (220, 20, 20), "green": (20, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}

MATERIALS = ["metal", "wood"]


def image(row: int) -> NDArray[np.uint8]:
    """Image of a row: 20 × 30 pixels (every fifth 24 × 24) of its class's colour, a little darker with each row."""
    height, width = (24, 24) if row % 5 == 0 else (20, 30)
    colour = np.array(list(COLOURS.values())[row % 4], np.float64) * (1 - 0.005 * row)
    return np.broadcast_to(colour.astype(np.uint8), (height, width, 3)).copy()


def small_collection(n: int = 40, **changes: Any) -> Collection:
    """40 samples of 20 objects: the first half train, then val; test is empty; material follows from the class."""
    rows = np.arange(n)
    classes = rows % 4
    fields: dict[str, Any] = {
        "name": "Small",
        "names": np.array([f"photo {row}" for row in rows], dtype=object),
        "groups": np.array([f"object {row % (n // 2)}" for row in rows], dtype=object),
        "splits": np.where(rows < n // 2, "train", "val").astype(object),
        "tasks": {"class": list(COLOURS), "material": MATERIALS},
        "targets": {"class": classes, "material": np.where(rows == 1, UNKNOWN, classes % 2)},
        "usable": rows,
        "unreadable": {},
        "read": image,
        "captions": lambda chosen: [["an image"] if row % 2 else ["a b c d", ""] for row in chosen.tolist()],
    }
    return Collection(**{**fields, **changes})


def looks_of(collection: Collection) -> ImageStats:
    """All its images, looked at."""
    return look_at(collection, collection.usable)


TINY = """
name: tiny
data:
  class_path: datamodules.Wares
  init_args:
    n_samples: 60
    resolution: 32
    image: {size: 32}
    loader: {batch_size: 8}
model:
  class_path: lightning_modules.MultiTaskClassifier
  init_args:
    backbone: test_resnet
    pretrained: false
    lr: 0.001
    task_weights: {class: 1.0, colour: 1.0}  # whatever is done for each task is done half as often
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  num_sanity_val_steps: 0
wandb: {mode: disabled}
"""

_END = """
trainer:
  max_epochs: {epochs}
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
wandb: {{mode: disabled}}
"""

PRODUCTS = """
name: shop
data:
  class_path: datamodules.Products
  init_args:
    root: {root}
    attributes: [colour]
    vocabulary: {{aliases: {{colour: {{grey: gray}}}}}}
    image: {{size: 32, crop_fraction: 0.8}}
    loader: {{batch_size: 8}}
    checks: {{allow_leaks: [exact, near]}}
model:
  class_path: lightning_modules.MultiTaskClassifier
  init_args: {{backbone: test_resnet, pretrained: false, lr: 0.01}}
"""

EVERY_KIND = """
name: kinds
data:
  class_path: datamodules.Wares
  init_args:
    n_samples: 90
    views: 3
    resolution: 48
    every_kind: true
    image: {{size: 32}}
    loader: {{batch_size: 16}}
model:
  class_path: lightning_modules.MultiTaskClassifier
  init_args:
    backbone: test_resnet
    pretrained: false
    loss_options: {{regression: gaussian_nll}}
    lr: 0.01
"""

FLOWERS = """
name: flowers
data:
  class_path: datamodules.Flowers102
  init_args:
    root: {root}
    image: {{size: 32}}
    loader: {{batch_size: 8}}
    checks: {{allow_leaks: [exact, near]}}
model:
  class_path: lightning_modules.DualEncoder
  init_args:
    towers: {{model: {root}/clip}}
    lora: {{rank: 2}}
    lr: 0.003
"""


@functools.cache
def folder() -> Path:
    """Directory of all exports; the last process removes it."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if session is None:
        path = Path(tempfile.mkdtemp(prefix="vitrail-exports-"))
        atexit.register(shutil.rmtree, path, ignore_errors=True)
        return path
    path = Path(tempfile.gettempdir(), f"vitrail-exports-{session}")
    with FileLock(f"{path}.lock"):
        path.mkdir(mode=0o700, exist_ok=True)
        (path / f"{os.getpid()}.user").touch()
    atexit.register(_leave, path, os.getpid())
    return path


def _leave(path: Path, process: int) -> None:
    if process != os.getpid():  # a fork
        return
    with FileLock(f"{path}.lock"):
        (path / f"{process}.user").unlink(missing_ok=True)
        if not list(path.glob("*.user")):
            shutil.rmtree(path, ignore_errors=True)
            Path(f"{path}.lock").unlink(missing_ok=True)


def _once(name: str, make: Callable[[], Path]) -> Path:
    """Let the first of several processes make a directory."""
    made = folder() / f"{name}.made"
    with FileLock(folder() / f"{name}.lock"):
        if not made.exists():
            made.write_text(str(make()))
    return Path(made.read_text())


@functools.cache
def tiny_run() -> Path:
    """The tiny experiment, trained for two epochs and tested; tests change copies of it."""
    return _once("tiny_run", lambda: _fit(folder() / "tiny", TINY))


@functools.cache
def products_run() -> Path:
    """A classifier of two tasks, tested and calibrated."""
    return _once("products_run", _make_products_run)


def _make_products_run() -> Path:
    root = folder() / "products"
    write_products(root, classes=3, instances=5, views=3, size=48)
    run = _fitted(root, PRODUCTS, epochs=8)
    with plain_figures():
        assert experiments(["validate", "--ckpt_path", str(run / "checkpoints" / "best.ckpt")]) == 0
        assert evaluation(["calibrate", str(run)]) == 0
    return run


@functools.cache
def kinds_run() -> Path:
    """A classifier with tasks of every kind on generated images, tested; class, tags and price are calibrated."""
    return _once("kinds_run", _make_kinds_run)


def _make_kinds_run() -> Path:
    run = _fitted(folder() / "kinds", EVERY_KIND, epochs=2)
    outputs = OutputCalibration({"tags": [1.5, 0.25, -0.5, 0.0, 0.5]}, {"price": 1.25})
    write_temperatures(run, {"class": 1.5}, {}, outputs)
    return run


@functools.cache
def flowers_run() -> Path:
    """A CLIP with low-rank adapters."""
    return _once("flowers_run", _make_flowers_run)


def _make_flowers_run() -> Path:
    root = folder() / "flowers"
    write_flowers(root)
    write_clip(root / "clip")
    return _fitted(root, FLOWERS, epochs=1)


@functools.cache
def products_onnx() -> Path:
    """The classifier as ONNX."""
    return _once("products_onnx", lambda: exported(products_run(), "onnx"))


@functools.cache
def kinds_onnx() -> Path:
    """The classifier with tasks of every kind as ONNX."""
    return _once("kinds_onnx", lambda: exported(kinds_run(), "onnx"))


@functools.cache
def flowers_onnx() -> Path:
    """Both towers as ONNX."""
    return _once("flowers_onnx", lambda: exported(flowers_run(), "onnx"))


def exported(run: Path, kind: str, *arguments: str) -> Path:
    """The folder of an export that must succeed."""
    assert experiments(["export", str(run), "--format", kind, *arguments]) == 0
    return run / "export" / (f"{kind}_int8" if "--quantize" in arguments else kind)


def data_of(run: Path) -> ImageDataModule:
    """The run's own data, set up."""
    datamodule = load_datamodule(run / "config.yaml")
    datamodule.prepare_data()
    datamodule.setup("test")
    return datamodule


def _fitted(root: Path, text: str, epochs: int) -> Path:
    return _fit(root, text.format(root=root) + _END.format(epochs=epochs))


def _fit(root: Path, text: str) -> Path:
    root.mkdir(exist_ok=True)
    config = root / "tiny.yaml"
    config.write_text(text)
    with plain_figures():
        assert experiments(["fit", "--config", str(config), "--runs", str(root / "runs"), "--test_best=true"]) == 0
    [run] = (root / "runs").glob("*/*")
    return run


Event = tuple[str, Path]


def recorded_files(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Renames and flushes to the disk from now on: ``("flush", file or folder)``, ``("rename", new name)``."""
    events: list[Event] = []
    fsync, replace = os.fsync, Path.replace

    def flushed(number: int) -> None:
        events.append(("flush", Path(f"/proc/self/fd/{number}").resolve()))
        fsync(number)

    def renamed(self: Path, target: Any) -> Path:
        events.append(("rename", Path(target)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    return events


if __name__ == "__main__":
    main(Path(sys.argv[1]))
