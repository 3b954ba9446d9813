"""Tiny runs on image files and their ONNX exports, made once for a test session; whoever changes one copies it.

Where several processes test side by side, the first one that needs one makes it.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from datamodules.base import ImageDataModule
from datamodules.cli import data_parser, parse_data
from evaluation.__main__ import main as evaluation
from experiments.export import main as export
from experiments.train.cli import main as experiments
from tests.experiments.plain_figures import plain_figures
from tests.fakes import write_products
from tests.fakes_flowers import write_flowers
from tests.fakes_models import write_clip

_END = """
trainer:
  max_epochs: {epochs}
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
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
    """Where all of them lie; whichever process ends last removes it."""
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
    if process != os.getpid():  # a child of who uses it
        return
    with FileLock(f"{path}.lock"):
        (path / f"{process}.user").unlink(missing_ok=True)
        if not list(path.glob("*.user")):
            shutil.rmtree(path, ignore_errors=True)
            Path(f"{path}.lock").unlink(missing_ok=True)


def _once(name: str, make: Callable[[], Path]) -> Path:
    """What is made, by whichever process comes first; none sees half of it."""
    made = folder() / f"{name}.made"
    with FileLock(folder() / f"{name}.lock"):
        if not made.exists():
            made.write_text(str(make()))
    return Path(made.read_text())


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
def flowers_onnx() -> Path:
    """Both towers as ONNX."""
    return _once("flowers_onnx", lambda: exported(flowers_run(), "onnx"))


def exported(run: Path, kind: str, *arguments: str) -> Path:
    """The folder of an export that must succeed."""
    assert export([str(run), "--format", kind, *arguments]) == 0
    return run / "export" / (f"{kind}_int8" if "--quantize" in arguments else kind)


def data_of(run: Path) -> ImageDataModule:
    """The run's own data, set up."""
    datamodule, _ = parse_data(data_parser("test"), ["--config", str(run / "config.yaml")])
    datamodule.prepare_data()
    datamodule.setup("test")
    return datamodule


def _fitted(root: Path, text: str, epochs: int) -> Path:
    config = root / "tiny.yaml"
    config.write_text(text.format(root=root) + _END.format(epochs=epochs))
    with plain_figures():
        assert experiments(["fit", "--config", str(config), "--runs", str(root / "runs"), "--test_best=true"]) == 0
    [run] = (root / "runs").glob("*/*")
    return run
