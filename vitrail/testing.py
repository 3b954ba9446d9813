"""Contract tests for data sets and tasks of one's own, without a test framework: call them in a test or a script.

Commands rely on more than that a class trains: checkpoints hold plain values, frozen networks stay as they are, a model
is built again from its file. Each part of the contract is checked by itself, and each failure is a line.

Example:
    >>> from datamodules import Wares
    >>> from vitrail.testing import check_datamodule
    >>> check_datamodule(Wares(n_samples=60, image={"size": 32}))[:3]
    ['class', 'arguments', 'table']
"""

from __future__ import annotations

import io
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.trust import PLUGINS, is_trusted, plugins
from vitrail.types import CLASS_KINDS, UNKNOWN, batch_targets, kind_of

if TYPE_CHECKING:
    import torch

_SPLITS = ("train", "val", "test")


def check_datamodule(data: Any) -> list[str]:
    """Check a data set: table, images, batches of all splits, order, copies in other processes, rebuilding, index.

    Args:
        data: an ``ImageDataModule`` with a few images in each split.

    Returns:
        Names of the parts that were checked.

    Raises:
        AssertionError: a line for each part that fails.
    """
    return _run(
        type(data).__name__,
        {
            "class": lambda: _check_class(type(data), "datamodules.base", "ImageDataModule"),
            "arguments": lambda: _plain_values(dict(data.hparams)),
            "table": lambda: _check_table(data),
            "images": lambda: _check_images(data),
            "batches": lambda: _check_batches(data),
            "order": lambda: _check_order(data),
            "copies": lambda: _check_copy(pickle.loads(pickle.dumps(data)), data),  # noqa: S301 -- our own bytes
            "rebuilding": lambda: _check_copy(type(data)(**data.hparams), data),
            "index": lambda: _check_facts(data),
        },
    )


def check_task(task: Any, data: Any) -> list[str]:
    """Check a task: training, checkpoint, frozen phases, prediction, features, index and export.

    Args:
        task: a ``VisionTask`` for the classes and the image size of the data, with random weights to be quick; it is
            trained for two steps.
        data: an ``ImageDataModule`` that ``check_datamodule`` accepts.

    Returns:
        Names of the parts that were checked. ``index`` is only checked where the extra ``retrieval`` is installed, and
        ``export`` for dual encoders and for classifiers whose tasks are single-label or ordinal: no others are exported
        as graphs.

    Raises:
        AssertionError: a line for each part that fails.
    """
    data.prepare_data()
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    parts: dict[str, Callable[[], None]] = {
        "class": lambda: _check_class(type(task), "lightning_modules.base", "VisionTask"),
        "arguments": lambda: _plain_values(dict(task.hparams)),
        "prediction": lambda: _check_prediction(task, batch),
        "features": lambda: _check_features(task, batch),
        "frozen": lambda: _check_frozen(task, data),
        "training": lambda: _check_training(task, data),
        "checkpoint": lambda: _check_checkpoint(task, batch),
    }
    if find_spec("lancedb") is not None:
        parts["index"] = lambda: _check_index(task, data)
    classification, dual = (
        import_module("lightning_modules.classification"),
        import_module("lightning_modules.dual_encoder"),
    )
    of_classes = {*getattr(task, "task_kinds", {}).values()} <= {*CLASS_KINDS}
    if of_classes and isinstance(task, (classification.ClassificationTask, dual.DualEncoder)):
        parts["export"] = lambda: _check_export(task, batch)
    with _trusted(type(task)):
        return _run(type(task).__name__, parts)


def _run(name: str, parts: Mapping[str, Callable[[], None]]) -> list[str]:
    failures = []
    for part, check in parts.items():
        try:
            check()
        # Whatever a user's class raises is a failure of that part.
        except Exception as error:
            text = " ".join(str(error).split())
            failures.append(f"{name}, {part}: {text if isinstance(error, AssertionError) else repr(error)[:300]}")
    if failures:
        raise AssertionError("\n".join(failures))
    return list(parts)


def _require(condition: object, message: str) -> None:
    if not condition:
        raise AssertionError(message)


@contextmanager
def _trusted(cls: type) -> Iterator[None]:
    """Let the class be named by checkpoints, as ``--plugins`` does."""
    before = os.environ.get(PLUGINS)
    os.environ[PLUGINS] = ",".join([*plugins(), cls.__module__])
    try:
        yield
    finally:
        os.environ.pop(PLUGINS)
        if before is not None:
            os.environ[PLUGINS] = before


def _check_class(cls: type, module: str, base: str) -> None:
    _require(issubclass(cls, getattr(import_module(module), base)), f"must be a subclass of {module}.{base}")
    with _trusted(cls):
        path = f"{cls.__module__}.{cls.__qualname__}"
        found = getattr(import_module(cls.__module__), cls.__qualname__, None)
        _require(
            is_trusted(path) and found is cls, f"{path} cannot be imported; define the class at a module's top level"
        )


def _plain_values(values: Mapping[str, Any]) -> None:
    import torch

    for name, value in values.items():
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except Exception as error:
            raise AssertionError(
                f"{name}: is a {type(value).__name__}; checkpoints hold numbers, texts, lists, dictionaries and "
                "dataclasses of options only"
            ) from error


def _check_table(data: Any) -> None:
    table = data.table
    _require(len(table), "load_table(): has no rows")
    names = data.sample_names()
    _require(len(set(names)) == len(names), "load_table(): names of samples must be unique")
    _require(len(table.split_indices("train")), "load_table(): the train split is empty")
    for task, classes in data.tasks.items():
        if kind_of(data.task_kinds, task) == "regression":
            _require(not classes, f"tasks: {task} is a number, and must have no classes")
        else:
            _require(len(set(classes)) == len(classes) > 0, f"tasks: the classes of {task} must be different, and some")


def _check_images(data: Any) -> None:
    import torch

    for split in _SPLITS:
        for row in data.table.split_indices(split)[:2].tolist():
            image = data.read_image(row)
            shape = tuple(getattr(image, "shape", ()))
            _require(
                getattr(image, "dtype", None) == torch.uint8 and len(shape) == 3 and shape[0] == 3,
                f"read_image({row}): must return uint8 (3, H, W); got {getattr(image, 'dtype', type(image))} {shape}",
            )
            _require(torch.equal(image, data.read_image(row)), f"read_image({row}): returns another image each time")


def _check_batches(data: Any) -> None:
    data.prepare_data()
    data.setup("test")
    for split in _SPLITS:
        rows = data.split_indices(split).tolist()
        if not rows:
            continue
        seen: list[int] = []
        for batch in data.eval_dataloader(split):
            _check_batch(batch, data, split)
            padding = batch.get("is_padding")
            seen += [
                row for place, row in enumerate(batch["sample_id"].tolist()) if padding is None or not padding[place]
            ]
        _require(sorted(seen) == sorted(rows), f"{split}: its batches must have each of its {len(rows)} samples once")
    _check_batch(next(iter(data.train_dataloader())), data, "train")


def _check_batch(batch: Mapping[str, Any], data: Any, split: str) -> None:
    import torch

    image, size = batch["image"], data.image_size
    count = len(batch["sample_id"])
    _require(
        image.dtype == torch.uint8 and tuple(image.shape) == (count, 3, size, size),
        f"{split}: image must be uint8 {(count, 3, size, size)}; got {image.dtype} {tuple(image.shape)}",
    )
    targets = batch_targets(batch)  # type: ignore[arg-type]  # a batch of a class that is being checked
    for task, classes in data.tasks.items():
        _require(task in targets, f"{split}: batches have no target of {task}")
        kind = kind_of(data.task_kinds, task)
        dtype, highest = torch.int64, len(classes) - 1
        shape: tuple[int, ...] = (count,)
        if kind == "regression":
            dtype = torch.float32
        elif kind == "multi_label":
            dtype, shape, highest = torch.int8, (count, len(classes)), 1
        values = targets[task]
        right = values.dtype == dtype and tuple(values.shape) == shape
        _require(right, f"{split}: targets of {task} must be {dtype} {shape}; got {values.dtype} {tuple(values.shape)}")
        if kind == "regression":
            _require(not values.isinf().any(), f"{split}: targets of {task} must be finite, or NaN where not known")
        else:
            known = ((values >= UNKNOWN) & (values <= highest)).all()
            _require(known, f"{split}: targets of {task} must be from {UNKNOWN} to {highest}")


def _check_order(data: Any) -> None:
    first, again = ([batch["sample_id"].tolist() for batch in data.train_dataloader()] for _ in range(2))
    _require(first == again, "train_dataloader(): the order must be the same for the same seed and epoch")


def _check_copy(copy: Any, data: Any) -> None:
    _require(
        copy.table.fingerprint() == data.table.fingerprint(), "a copy has another table; load_table() must be pure"
    )
    row = int(data.table.split_indices("train")[0])
    _require(bool((copy.read_image(row) == data.read_image(row)).all()), "a copy reads other images")


def _check_facts(data: Any) -> None:
    rows = data.rows_of(_SPLITS)
    facts = data.image_facts(rows)
    _require(len(facts) == len(rows), f"image_facts(): must have {len(rows)} rows; got {len(facts)}")


def _outputs(task: Any, batch: Any) -> Any:
    import torch

    task.eval()
    with torch.inference_mode():
        return task.predict_step(batch, 0)


def _check_prediction(task: Any, batch: Any) -> None:
    import torch

    outputs, count = _outputs(task, batch), len(batch["sample_id"])
    _require(outputs["sample_id"].tolist() == batch["sample_id"].tolist(), "predict_step: must return each sample_id")
    for name, classes in getattr(task, "tasks", {}).items():
        logits = outputs["logits"].get(name)
        shape = None if logits is None else (logits.dtype, tuple(logits.shape))
        # Of a number its value, and perhaps the logarithm of its variance.
        is_number = kind_of(getattr(task, "task_kinds", {}), name) == "regression"
        wanted = [(torch.float32, (count, width)) for width in ((1, 2) if is_number else (len(classes),))]
        text = " or ".join(f"{dtype} {size}" for dtype, size in wanted)
        _require(shape in wanted, f"predict_step: logits of {name} must be {text}; got {shape}")
        _require(bool(torch.isfinite(logits).all()), f"predict_step: logits of {name} are not finite")


def _check_features(task: Any, batch: Any) -> None:
    import torch

    task.eval()
    with torch.inference_mode():
        features = task.image_features(batch["image"])
        _require(len(features) == len(batch["image"]), "image_features: must have a row for each image")
        if not getattr(task, "tasks", {}):
            return
        cached = {**{key: value for key, value in batch.items() if key != "image"}, "features": {"image": features}}
        one, other = task.predict_step(batch, 0), task.predict_step(cached, 0)
    for name, logits in one["logits"].items():
        same = torch.allclose(logits, other["logits"][name], atol=1e-4)
        _require(same, f"image_features: a batch with these as features['image'] predicts {name} differently")


def _check_frozen(task: Any, data: Any) -> None:
    trainable = {name for name, value in task.backbone.named_parameters() if value.requires_grad}
    task.freeze_backbone()
    try:
        before = _state(task.backbone)
        _fit(task, data)
        modes = [module.training for network in task.backbones.values() for module in network.modules()]
        _require(not any(modes), "freeze_backbone: the backbone must stay in evaluation mode in training")
        changed = [name for name, value in _state(task.backbone).items() if not _same(value, before[name])]
        _require(not changed, f"freeze_backbone: training changed {', '.join(changed[:3])}")
    finally:
        task.unfreeze_backbone()
    after = {name for name, value in task.backbone.named_parameters() if value.requires_grad}
    _require(after == trainable, "unfreeze_backbone: must make the same parameters trainable again")


def _check_training(task: Any, data: Any) -> None:
    before = _state(task)
    trainer = _fit(task, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    _require("val/loss" in metrics, f"log_epoch: must log val/loss; got {', '.join(metrics) or 'nothing'}")
    infinite = [name for name, value in metrics.items() if name.endswith("loss") and not abs(value) < float("inf")]
    _require(not infinite, f"training: {', '.join(infinite)} is not finite")
    changed = any(not _same(value, before[name]) for name, value in _state(task).items())
    _require(changed, "training: no weight has changed after two steps")


def _check_checkpoint(task: Any, batch: Any) -> None:
    import torch

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "best.ckpt"
        checkpoint: dict[str, Any] = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
        task.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, path)
        loaded = import_module("lightning_modules.checkpoint").load_task(path)
    _require(type(loaded) is type(task), f"a checkpoint is loaded as {type(loaded).__name__}")
    for name in ("tasks", "task_kinds"):
        _require(getattr(loaded, name, {}) == getattr(task, name, {}), f"a loaded task has other {name}")
    _require(loaded.input_options == task.input_options, "a loaded task has other input_options")
    one, other = _outputs(task, batch), _outputs(loaded, batch)
    for name, logits in one["logits"].items():
        same = torch.allclose(logits, other["logits"][name], atol=1e-5)
        _require(same, f"a loaded task predicts {name} differently; call save_hyperparameters() in the constructor")


def _check_index(task: Any, data: Any) -> None:
    schema, gallery = import_module("retrieval.schema"), import_module("retrieval.gallery")
    fill = import_module("retrieval.fill").fill
    task.eval()
    identity = schema.identity_of(task, "", data.image_options, data.tasks, getattr(data, "task_kinds", {}))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opened = gallery.Gallery.open_or_create(f"{folder}/gallery", identity)
        report = fill(task, data, opened, splits=["test"], thumbnails="never")
    _require(report.added == len(data.split_indices("test")), "index: not all images of the test split were stored")


def _check_export(task: Any, batch: Any) -> None:
    import torch

    graphs = import_module("experiments.export.graphs")
    task.eval()
    tower = graphs.towers_of(task)[0]
    exported = graphs.graph_of(tower).module()(batch["image"])
    outputs = _outputs(task, batch)["logits"]
    for name, values in zip(tower.outputs, exported, strict=True):
        own = outputs.get(name.removeprefix(graphs.LOGITS))
        same = own is None or torch.allclose(values, own, atol=1e-3)
        _require(same, f"export: the graph's {name} differs from predict_step")


def _state(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items() if hasattr(value, "detach")}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return torch.equal(one, other)


def _fit(task: Any, data: Any) -> Any:
    """Train two steps and validate two batches, without a file that stays."""
    from lightning.pytorch import Trainer

    task.train()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_train_batches=2,
            limit_val_batches=2,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.fit(task, datamodule=data)
    data.trainer = None
    return trainer


__all__: Sequence[str] = ["check_datamodule", "check_task"]
