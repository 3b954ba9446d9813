"""What the load test of the web application serves: two runs that trained for a moment, and a large gallery."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.search import random_directions

CLASSIFIER, PAIRS, LARGE = "classifier", "pairs", "large"
"""Folders of the runs and of the gallery, and their names in the application."""

DEIT_TINY = "deit_tiny_patch16_224"

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
_SHORT: dict[str, Any] = {
    "test_best": False,
    "trainer": {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "enable_progress_bar": False},
    "wandb": {"mode": "disabled"},
}
_DEIT: dict[str, Any] = {
    "data": {"init_args": {"n_samples": 120, "image": {"size": 224}, "loader": {"batch_size": 4}}},
}
WORDS = ("red", "blue", "green", "metal", "glass", "plastic", "new", "used", "worn")
_CHUNK = 20_000


def make_runs(folder: Path, backbone: str = DEIT_TINY) -> None:
    """Run directories ``classifier`` and ``pairs`` with a checkpoint each."""
    deit = {**_DEIT, "model": {"init_args": {"backbone": backbone}}}
    pairs = {"data": {"init_args": {"n_samples": 240}}}
    for name, experiment, overlay in ((CLASSIFIER, "quickstart", deit), (PAIRS, "quickstart_pairs", pairs)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**_SHORT, **overlay}), encoding="utf-8")
        configs = ["--config", str(EXPERIMENTS / f"{experiment}.yaml"), "--config", str(path)]
        command = ["experiments", "fit", *configs, "--runs", str(folder / "runs"), "--name", name]
        done = subprocess.run([sys.executable, "-m", *command], check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        (made,) = (folder / "runs" / name).glob("*")
        made.rename(folder / name)


def make_gallery(folder: Path, pictures: int) -> None:
    """A gallery of the dual encoder, of random vectors with words and classes; its first pictures can be looked at."""
    import pyarrow as pa

    from lightning_modules.checkpoint import load_task
    from retrieval.gallery import Gallery
    from retrieval.schema import identity_of, picture_schema

    task = load_task(folder / PAIRS / "checkpoints" / "best.ckpt")
    identity = identity_of(task, str(folder / PAIRS), getattr(task, "input_options"), [])  # noqa: B009 -- of no base
    schema = picture_schema(identity)
    random = np.random.default_rng(0)
    photo = a_photo()
    with Gallery.create(str(folder / LARGE), identity).writing() as writer:
        for start in range(0, pictures, _CHUNK):
            rows = min(_CHUNK, pictures - start)
            columns: dict[str, Any] = {field.name: pa.nulls(rows, field.type) for field in schema}
            columns |= {
                name: pa.array([""] * rows) for name in ("path", "caption", "group", "content", "run", "weights")
            }
            columns["id"] = pa.array([str(number) for number in range(start, start + rows)])
            columns["split"] = pa.array(["test"] * rows)
            columns["thumbnail"] = pa.array(
                [photo if start + place < 100 else None for place in range(rows)], pa.binary()
            )
            columns["vector"] = pa.FixedSizeListArray.from_arrays(
                pa.array(random_directions(random, rows, identity.dim).ravel()), identity.dim
            )
            said = {name: random.choice(classes, rows) for name, classes in identity.predicts.items()}
            drawn = random.choice(WORDS, (rows, 3))
            texts = [" ".join(words) for words in np.column_stack([*said.values(), drawn]).tolist()]
            columns["text"] = columns["caption"] = pa.array(texts)
            for name, classes in said.items():
                columns[f"predicted_{name}"] = pa.array(classes.tolist())
                columns[f"confidence_{name}"] = pa.array(random.random(rows), schema.field(f"confidence_{name}").type)
            writer.add(pa.table([columns[name] for name in schema.names], schema=schema))


def a_photo(size: int = 1024) -> bytes:
    """JPEG of smooth noise, as large as a photo that somebody uploads."""
    from PIL import Image

    pixels = np.random.default_rng(1).integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return content.getvalue()
