"""A whole run directory for tests, made without training: photos, configuration, record, log, predictions, gallery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from retrieval.gallery import Gallery
from tests.fakes import write_products
from tests.retrieval.small_gallery import identity, image_rows
from vitrail.predictions import Predictions, write_predictions
from vitrail.types import UNKNOWN

EPOCHS = 6


def write_run(folder: Path, name: str = "shop", *, seed: int = 0, wrong: float = 0.4, gallery: bool = True) -> Path:
    """Write ``<folder>/<name>/20260101-100000`` and, if need be, the photos in ``<folder>/photos``.

    Args:
        folder: for both.
        name: of the experiment.
        seed: of what is drawn; also the run's own.
        wrong: share of the answers that are wrong.
        gallery: whether there is one.
    """
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
    """Of the class and of a colour that is known of some."""
    rng = np.random.default_rng(seed)
    classes = sorted(test["class_label"].unique())
    targets = np.array([classes.index(label) for label in test["class_label"]])
    answers = np.where(rng.random(len(test)) < wrong, (targets + 1) % len(classes), targets)
    logits = np.eye(len(classes))[answers] * rng.uniform(1, 4, (len(test), 1)) + rng.normal(size=(len(test), 3)) * 0.1
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
    """As ``config.yaml`` has it, in short."""
    unfreezing = {"class_path": "callbacks.BackboneUnfreezing", "init_args": {"unfreeze_epoch": 4, "lr": 0.003}}
    return {
        "seed_everything": seed,
        "name": name,
        "trainer": {"max_epochs": EPOCHS, "callbacks": [unfreezing]},
        "model": {"class_path": "lightning_modules.MultiTaskClassifier", "init_args": {"lr": 0.001}},
        "data": {"class_path": "datamodules.Products", "init_args": {"root": str(photos), "attributes": []}},
    }


def record(name: str, seed: int, predictions: Predictions) -> dict[str, Any]:
    """As ``run.json`` has it, in short."""
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
    """As ``metrics.csv`` has it: rates by step, epochs in rows of training and of validation, the test last."""
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
    """Vectors near one corner for each class."""
    made_by = identity(encodes_text=False, labels=["class"], predicts={"class": list(predictions.tasks["class"])})
    rng = np.random.default_rng(0)
    matrix = np.eye(made_by.dim)[predictions.targets["class"]] + rng.normal(size=(len(test), made_by.dim)) * 0.1
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    columns = {"group": test["instance_id"].tolist(), "label_class": test["class_label"].tolist()}
    with Gallery.create(str(folder), made_by).writing() as writer:
        writer.add(image_rows(made_by, test["image_path"].tolist(), matrix.astype(np.float32), **columns))
