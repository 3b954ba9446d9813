"""Training and evaluation on 1, 2 and 3 processes (gloo); called by ``test_several_processes.py``.

A program of its own: everything is imported once, and each process is a fork that has computed nothing yet. It gets the
environment that torchrun gives, so that everything goes the way that it goes on a cluster.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from callbacks import BestCheckpoint, ClassReport, NonFiniteLoss, PredictionWriter, RetrievalMetrics
from callbacks.averaged_weights import AveragedWeights, EmaOptions
from datamodules.base import ImageDataModule
from datamodules.table import SampleTable
from experiments.train.cli import main
from lightning_modules import (
    DualEncoder,
    Ensemble,
    FullySharded,
    GenerativeClassifier,
    ImageClassifier,
    MultiTaskClassifier,
)
from lightning_modules.base import VisionTask
from lightning_modules.options import AnswerOptions
from tests.support.models import write_clip, write_qwen2_vl
from tests.support.processes import begin_fork, end_of_fork
from tests.support.runs import tiny_trainer
from vitrail.errors import UserError

SIZES = (5, 53, 1020)
"""The first one leaves all processes but the first without an image."""

WORLDS = (1, 2, 3)


def is_costly(world: int, size: int, task: str) -> bool:
    """Evaluations for the slow tests; of all models but ``multitask`` two processes have 53 images, three have 5."""
    return size > 1000 or task in ALIKE or (task != "multitask" and (world, size) in ((2, 5), (3, 53)))


ALIKE = ("classifier",)
"""Trained and evaluated as ``multitask`` is, so only the slow tests do it."""


SIDE = 16
OVERLAYS = Path(__file__).parents[2] / "experiments" / "overlays"
CLASSES = ("bag", "cap", "mug", "pen")
COLOURS = ("blue", "red")
EPOCHS = 3
STEP_SAMPLES = 8
"""Of each training step, on all processes together."""


class Made(ImageDataModule):
    """48 training images, as many test images as are asked for; some of the latter have no known colour.

    Args:
        test_size: number of test images.
        batch_size: on each process.
        captions: whether there are one to three captions an image instead of classes.
    """

    generated: ClassVar[bool] = True

    def __init__(self, test_size: int = 53, batch_size: int = 8, captions: bool = False) -> None:
        prompts = None if captions else {"templates": ["a {}", "a photo of a {}."]}
        super().__init__(image={"size": SIDE}, loader={"batch_size": batch_size}, prompts=prompts)  # type: ignore[arg-type]
        self.test_size = test_size
        self.captions = captions

    def prepare_data(self) -> None:
        """There are no files to verify."""

    def load_table(self) -> SampleTable:
        splits = ["train"] * 48 + ["val"] * 10 + ["test"] * self.test_size
        rows = range(len(splits))
        columns: dict[str, list[Any]] = {
            "name": [f"photo {row}" for row in rows],
            "source": [str(row) for row in rows],
            "split": splits,
        }
        if self.captions:
            columns["caption"] = [[f"{CLASSES[row % 4]} {row} {word}" for word in "abc"[: row % 3 + 1]] for row in rows]
            return SampleTable.from_frame(pd.DataFrame(columns), [], origin="made")
        columns["class"] = [CLASSES[row % 4] for row in rows]
        columns["colour"] = [None if row > 60 and row % 5 == 4 else COLOURS[row // 4 % 2] for row in rows]
        return SampleTable.from_frame(pd.DataFrame(columns), ["class", "colour"], origin="made")

    def read_image(self, index: int) -> torch.Tensor:
        noise = torch.randint(0, 120, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(index))
        colour = torch.tensor([30 * (index % 4), 100 * (index // 4 % 2), 40 * (index % 3)]).view(3, 1, 1)
        return (noise + colour).to(torch.uint8)


def classifier(folder: Path) -> VisionTask:
    return ImageClassifier("test_vit", list(CLASSES), image_size=SIDE, pretrained=False, lr=1e-3)


def multitask(folder: Path) -> VisionTask:
    tasks = {"class": list(CLASSES), "colour": list(COLOURS)}
    task = MultiTaskClassifier("test_vit", tasks, image_size=SIDE, pretrained=False, lr=1e-3)
    for module in task.modules():
        # Dropout differs from process to process; without it, two processes do what one does.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return task


def zero_shot(folder: Path) -> VisionTask:
    prompts = [[f"a {name}", f"a photo of a {name}."] for name in CLASSES]
    return DualEncoder(_towers(folder), list(CLASSES), prompts, image_size=SIDE, lr=1e-3)


def captioned(folder: Path) -> VisionTask:
    return DualEncoder(_towers(folder), image_size=SIDE, lr=1e-3)


def generative(folder: Path) -> VisionTask:
    tasks = {"class": list(CLASSES), "colour": list(COLOURS)}
    answers = AnswerOptions({"class": "What is it?", "colour": "Which colour?"})
    return GenerativeClassifier(str(folder / "qwen2_vl"), tasks, image_size=SIDE, answers=answers, lr=1e-3)


def ensemble(folder: Path) -> VisionTask:
    return Ensemble([str(folder / "members" / name) for name in MEMBERS])


def _towers(folder: Path) -> Any:
    return {"model": str(folder / "clip")}


TASKS: dict[str, Callable[[Path], VisionTask]] = {
    "classifier": classifier,
    "multitask": multitask,
    "zero_shot": zero_shot,
    "captioned": captioned,
    "generative": generative,
    "ensemble": ensemble,
}
TRAINED = tuple(name for name in TASKS if name != "ensemble")
"""An ensemble has nothing to train."""

MEMBERS = ("classifier", "multitask")


def build(name: str, folder: Path) -> VisionTask:
    """The same weights every time."""
    torch.manual_seed(0)
    return TASKS[name](folder)


def write_models(folder: Path) -> None:
    """Writes what the tasks are built of: pretrained models, and the runs that the ensemble averages."""
    write_clip(folder / "clip", image_size=SIDE)
    texts = ["What is it?", "Which colour?", *CLASSES, *COLOURS]
    write_qwen2_vl(folder / "qwen2_vl", texts=texts, scale=8.0)
    data = Made()
    for name in MEMBERS:
        task = build(name, folder)
        task.input_options = cast("Any", data.image_options)
        checkpoint: dict[str, Any] = {"state_dict": task.state_dict()}
        task.on_save_checkpoint(checkpoint)
        run = folder / "members" / name
        (run / "checkpoints").mkdir(parents=True)
        torch.save(checkpoint, run / "checkpoints" / "best.ckpt")
        record = {"data": {"fingerprint": "made", "samples": {"train": 48}}}
        (run / "run.json").write_text(json.dumps(record), encoding="utf-8")


def evaluate(name: str, size: int, folder: Path, here: Path, world: int) -> None:
    """Tests and predicts, and writes what was logged."""
    data = Made(size, 16, captions=name == "captioned")
    watching = [PredictionWriter(["test", "predict"]), ClassReport(), RetrievalMetrics()]
    trainer = trainer_of(here, world, callbacks=watching)
    task = build(name, folder)
    trainer.test(task, datamodule=data, verbose=False)
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    (here / f"metrics_{trainer.global_rank}.json").write_text(json.dumps(logged), encoding="utf-8")
    if size < 1000:
        trainer.predict(task, datamodule=data, return_predictions=False)


class Losses(Callback):
    """Keeps the average loss of each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The task logs it after the callbacks' end of the epoch.
        if "train/loss" in trainer.callback_metrics:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def train(name: str, folder: Path, here: Path, world: int) -> None:
    """Trains, and writes weights and losses of each process."""
    losses = Losses()
    task = build(name, folder)
    changes = {"max_epochs": EPOCHS, "limit_val_batches": 0, "strategy": "ddp" if world > 1 else "auto"}
    trainer = trainer_of(here, world, callbacks=[losses, NonFiniteLoss()], **changes)
    trainer.fit(task, datamodule=Made(10, STEP_SAMPLES // world, captions=name == "captioned"))
    state = {"weights": task.state_dict(), "losses": losses.losses}
    torch.save(state, here / f"trained_{trainer.global_rank}.pt")


def train_sharded(name: str, folder: Path, here: Path, world: int) -> None:
    """Trains, weights shared out if there are several processes, tests the checkpoint, and goes on from it."""
    data = Made(10, STEP_SAMPLES // world, captions=name == "captioned")
    changes: dict[str, Any] = {"limit_val_batches": 0, "gradient_clip_val": 1.0}
    if world > 1:
        changes["strategy"] = FullySharded()
    first = trainer_of(here, world, max_epochs=2, callbacks=[NonFiniteLoss()], **changes)
    task = build(name, folder)
    first.fit(task, datamodule=data)
    first.save_checkpoint(here / "half.ckpt", weights_only=False)
    tested = Made(10, STEP_SAMPLES, captions=name == "captioned")
    metrics = first.test(task, datamodule=tested, ckpt_path=here / "half.ckpt", weights_only=True, verbose=False)
    if world > 1:
        changes["strategy"] = FullySharded()
    second = trainer_of(here, world, max_epochs=EPOCHS, callbacks=[NonFiniteLoss()], **changes)
    second.fit(build(name, folder), datamodule=data, ckpt_path=here / "half.ckpt", weights_only=True)
    second.save_checkpoint(here / "whole.ckpt", weights_only=False)
    (here / f"tested_{first.global_rank}.json").write_text(json.dumps(metrics[0]), encoding="utf-8")


class Validated(Callback):
    """Keeps the weights of each validation."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        if arguments[1] == 0:
            self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def train_averaged(folder: Path, here: Path, world: int) -> None:
    """Trains with averaged weights, and writes what each process validated."""
    validated, best = Validated(), BestCheckpoint(here, monitor="val/loss", filename="best")
    average = EmaOptions(decay=0.8, start_step=2).callback()
    changes = {"max_epochs": EPOCHS, "strategy": "ddp" if world > 1 else "auto", "enable_checkpointing": True}
    trainer = trainer_of(here, world, callbacks=[AveragedWeights(), average, validated, best], **changes)
    trainer.fit(build("classifier", folder), datamodule=Made(10, STEP_SAMPLES // world))
    state = {"validated": validated.weights, "best_epoch": best.best_epoch}
    torch.save(state, here / f"averaged_{trainer.global_rank}.pt")


class SpoilOne(Callback):
    """Makes the images' features not a number, on the second process only, in one batch."""

    hook: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and trainer.global_rank == 1:
            normalize = pl_module.get_submodule("encoder.normalize")
            self.hook = normalize.register_forward_hook(lambda module, inputs, output: output * float("nan"))

    def on_train_batch_end(self, *arguments: Any, **named: Any) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None


def spoil(action: Any, folder: Path, here: Path, world: int) -> None:
    """Trains with a loss that is not a number on one process."""
    task = build("classifier", folder)
    watching = [SpoilOne(), NonFiniteLoss(action)]
    trainer = trainer_of(here, world, callbacks=watching, limit_val_batches=0, strategy="ddp")
    message = ""
    try:
        trainer.fit(task, datamodule=Made(10, STEP_SAMPLES // world))
    except UserError as error:
        message = str(error)
    torch.save({"weights": task.state_dict(), "message": message}, here / f"spoilt_{trainer.global_rank}.pt")


def trainer_of(here: Path, world: int, **changes: Any) -> Trainer:
    here.mkdir(parents=True, exist_ok=True)
    return tiny_trainer(here, devices=world, **changes)


def all_of_one_process(folder: Path, world: int) -> None:
    """What each process of a world does."""
    here = folder / str(world)
    for name in TASKS:
        for size in SIZES:
            if not is_costly(world, size, name):
                evaluate(name, size, folder, here / f"{name}-{size}", world)
        if world < 3 and name in TRAINED and name not in ALIKE:
            train(name, folder, here / f"{name}-trained", world)
    if world < 3:
        train_averaged(folder, here / "averaged", world)
    if world == 2:
        for action in ("skip", "stop"):
            spoil(action, folder, here / action, world)


def costly_ones_of_one_process(folder: Path, world: int) -> None:
    """What each process of a world does for the slow tests."""
    here = folder / str(world)
    for name in TASKS:
        for size in SIZES:
            if is_costly(world, size, name):
                evaluate(name, size, folder, here / f"{name}-{size}", world)
        if world < 3 and name in ALIKE:
            train(name, folder, here / f"{name}-trained", world)
        if world == 1 and name in TRAINED:
            train_sharded(name, folder, here / f"{name}-sharded", world)


def through_the_command_line(folder: Path, overlay: str) -> None:
    """Trains and tests as torchrun would start it."""
    configs = ["--config", str(folder / "torchrun.yaml"), "--config", str(OVERLAYS / f"{overlay}.yaml")]
    code = main(["fit", *configs, "--runs", str(folder / "runs"), "--name", overlay, "--trainer.devices", "2"])
    if code:
        raise RuntimeError(f"exit code {code}")


def in_forks(world: int, work: Callable[[], None], log: Path) -> None:
    """Run the same on several processes, in torchrun's environment.

    Raises:
        RuntimeError: if one of them fails.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    processes = []
    for rank in range(world):

        def one(rank: int = rank) -> None:
            torchrun: dict[str, Any] = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": world,
            }
            torchrun |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "7"}
            os.environ.update({key: str(value) for key, value in torchrun.items()} if world > 1 else {})
            work()

        processes.append(begin_fork(one, log.with_name(f"{log.name}-{rank}")))
    codes = [end_of_fork(pid) for pid in processes]
    if any(codes):
        raise RuntimeError(f"{world} processes ended with {codes}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root, part = Path(sys.argv[1]), sys.argv[2] if sys.argv[2:] else "all"
    if part == "costly":
        for size_of_world in WORLDS:
            in_forks(size_of_world, lambda world=size_of_world: costly_ones_of_one_process(root, world), root / "log")  # type: ignore[misc]
    elif part == "sharded":
        # Under torchrun and not in forks, where sharding on CPUs crashed inside torch (2.15, gloo) now and then.
        for task_name in (name for name in TRAINED if name in sys.argv[3:]):
            train_sharded(task_name, root, root / "2" / f"{task_name}-sharded", 2)
        for overlay in (name for name in ("ddp", "fsdp") if name in sys.argv[3:]):
            # Passed on to the ranks that one command starts; here one process runs two commands.
            os.environ.pop("VITRAIL_RUN_DIRECTORY", None)
            through_the_command_line(root, overlay)
    else:
        in_forks(1, lambda: write_models(root), root / "log")
        for size_of_world in WORLDS:
            in_forks(size_of_world, lambda world=size_of_world: all_of_one_process(root, world), root / "log")  # type: ignore[misc]
