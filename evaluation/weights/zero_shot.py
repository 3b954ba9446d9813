"""Predictions of a task outside of the Trainer: what another set of weights says to the same samples.

What fine-tuning on some classes cost on the others: base-to-novel evaluation.

As in Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022, with the classes halved as in the
code of Zhou et al., Learning to Prompt for Vision-Language Models (CoOp), IJCV 2022: a model was trained on the base
classes, the first half in label order. Each half of the test samples is sorted into the classes of its own half only,
and the harmonic mean of both accuracies is what counts: it is high only where both are. The same model before
fine-tuning, on the same samples, says what was gained and lost.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.statistics.intervals import Estimate, Statistic, group_bootstrap, known, share_statistic
from evaluation.statistics.pooled import in_order_of, paired_difference
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.files import write_text_atomically
from vitrail.predictions import Predictions, predicted_classes, read_predictions, write_predictions
from vitrail.runs import Run, class_counts_of
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule
    from lightning_modules.base import VisionTask


@dataclass(frozen=True)
class BaseToNovel:
    """Accuracy on either half of the classes; shares from 0 to 1, higher is better.

    Attributes:
        base_classes: number of base classes, the first ones in label order.
        novel_classes: number of the other ones.
        n_base: test samples of base classes.
        n_novel: test samples of novel classes.
        base: accuracy on the former among base classes.
        novel: accuracy on the latter among novel classes.
        harmonic_mean: of both, 0 where either is.
    """

    base_classes: int
    novel_classes: int
    n_base: int
    n_novel: int
    base: Estimate
    novel: Estimate
    harmonic_mean: Estimate


@dataclass(frozen=True)
class Cost:
    """A model before and after fine-tuning on the same samples.

    Attributes:
        after: fine-tuned.
        before: not yet.
        base: paired difference of accuracy on base classes, after less before, -1 to 1; below 0 is a loss.
        novel: the same on novel classes: what fine-tuning cost there.
        harmonic_mean: the same of the harmonic mean.
    """

    after: BaseToNovel
    before: BaseToNovel
    base: Estimate
    novel: Estimate
    harmonic_mean: Estimate


class _Answers(NamedTuple):
    """Which of the N samples with a known target are of base classes, which answers are right, and the groups."""

    is_base: NDArray[np.bool_]
    right: NDArray[np.bool_]
    groups: NDArray[np.object_]


def base_to_novel(
    predictions: Predictions, base: int | None = None, *, n_resamples: int = 5_000, seed: int = 0
) -> BaseToNovel:
    """Accuracy on both halves, each among its own classes.

    The intervals of the two accuracies resample the groups of their half, that of the harmonic mean those of both
    together; a resample that lacks one half counts as 0 there, which can only widen the interval.

    Args:
        predictions: of samples of all classes.
        base: number of base classes; None for half of them, rounded up.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UserError: there is no such half, or no sample of it.
    """
    base = _checked_base(predictions, base)
    answers = _answers(predictions, base)
    n_base = int(answers.is_base.sum())

    def estimate(statistic: Statistic, rows: NDArray[np.bool_]) -> Estimate:
        value = statistic(np.ones((1, int(rows.sum()))))
        return Estimate(float(value[0]), group_bootstrap(statistic, answers.groups[rows], n_resamples, seed=seed))

    return BaseToNovel(
        base_classes=base,
        novel_classes=len(predictions.tasks[LABEL_TASK]) - base,
        n_base=n_base,
        n_novel=len(answers.right) - n_base,
        base=estimate(share_statistic(answers.right[answers.is_base]), answers.is_base),
        novel=estimate(share_statistic(answers.right[~answers.is_base]), ~answers.is_base),
        harmonic_mean=estimate(_harmonic_mean(answers), np.ones(len(answers.right), dtype=bool)),
    )


def compare(
    after: Predictions, before: Predictions, base: int | None = None, *, n_resamples: int = 5_000, seed: int = 0
) -> Cost:
    """What fine-tuning changed; the difference is paired, sample by sample.

    Args:
        after: predictions of the fine-tuned model; its groups are resampled.
        before: predictions of the same samples, in any order, by the model that fine-tuning began with.
        base: number of base classes; None for half of them, rounded up.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UserError: the samples, their targets or the classes are not the same; or as ``base-to-novel``.
    """
    before = in_order_of(after, before, LABEL_TASK)
    base = _checked_base(after, base)
    old, new = _answers(before, base), _answers(after, base)

    def difference(parts: tuple[Statistic, Statistic], rows: NDArray[np.bool_]) -> Estimate:
        earlier, later = parts
        agree = bool((old.right[rows] == new.right[rows]).all())
        return paired_difference(later, earlier, new.groups[rows], agree, n_resamples, seed=seed)

    def of_half(rows: NDArray[np.bool_]) -> Estimate:
        return difference((share_statistic(old.right[rows]), share_statistic(new.right[rows])), rows)

    means = _harmonic_mean(old), _harmonic_mean(new)
    return Cost(
        after=base_to_novel(after, base, n_resamples=n_resamples, seed=seed),
        before=base_to_novel(before, base, n_resamples=n_resamples, seed=seed),
        base=of_half(new.is_base),
        novel=of_half(~new.is_base),
        harmonic_mean=difference(means, np.ones(len(new.right), dtype=bool)),
    )


def read_run(path: Path, split: str) -> Predictions:
    """Predictions of a run directory, or of a file.

    Raises:
        UserError: they are missing or cannot be read.
    """
    return read_predictions(path / Run.PREDICTIONS / f"{split}.parquet" if path.is_dir() else path)


def check_novel(path: Path, predictions: Predictions, base: int | None = None) -> str:
    """Make sure that a run was not trained on the classes that are to be called novel, as far as it says.

    Args:
        path: of the run, or of a file with its predictions.
        predictions: of it.
        base: number of base classes; None for half of them, rounded up.

    Returns:
        What has to be said beside the result: empty where it was checked.

    Raises:
        UserError: where a novel class was trained, or a base class was not.
    """
    base = _checked_base(predictions, base)
    names = predictions.tasks[LABEL_TASK]
    record = Run(path).record if path.is_dir() else {}
    counts = class_counts_of(record, {LABEL_TASK: names}, str(path)).get(LABEL_TASK)
    stages: Any = record.get("stages")
    stages = stages if isinstance(stages, list) else []
    is_trained = any(isinstance(stage, dict) and stage.get("stage") == "fit" for stage in stages)
    if counts is None or not stages:
        return (
            "which classes were trained is not recorded with these predictions: whether the others are novel to the "
            "model was not checked"
        )
    if not is_trained:
        return "the run was not trained, so no class is novel to it in the sense of this comparison"
    trained = [name for name, count in zip(names[base:], counts[base:], strict=True) if count]
    if trained:
        raise UserError(
            f"base_to_novel: {path} was trained on {len(trained)} of the {len(names) - base} classes that would be "
            f"called novel, first '{trained[0]}'; train on base classes only (Flowers102: data.init_args.classes: "
            "base), or name their number with --base"
        )
    unseen = [name for name, count in zip(names[:base], counts[:base], strict=True) if not count]
    if unseen:
        raise UserError(
            f"base_to_novel: {path} was trained on none of the images of {len(unseen)} of the {base} base classes, "
            f"first '{unseen[0]}'; name the number of trained classes with --base"
        )
    return ""


def restricted_accuracy(
    targets: NDArray[np.int64], logits: NDArray[np.float32], base: int, *, novel: bool = False
) -> float:
    """Accuracy on the samples of one half of the classes, among these only; 0 to 1, higher is better, NaN for none.

    Args:
        targets: int64 ``(N,)``, all known.
        logits: float32 ``(N, C)``.
        base: number of base classes.
        novel: the other half.
    """
    rows = (targets >= base) == novel
    return float(_right(targets, logits, base)[rows].mean()) if rows.any() else math.nan


def accuracy_table(result: BaseToNovel | Cost, title: str, note: str = "") -> Table:
    """The result as a table for the terminal.

    Args:
        result: to show.
        title: above it.
        note: below it, such as what was not checked.
    """
    cost = result if isinstance(result, Cost) else None
    after = result.after if isinstance(result, Cost) else result
    columns = ("after [95 %]", "before [95 %]", "difference [95 %]") if cost else ("[95 %]",)
    rows = (
        ("base", f"base, among {after.base_classes} classes", after.n_base),
        ("novel", f"novel, among {after.novel_classes} classes", after.n_novel),
        ("harmonic_mean", "harmonic mean", after.n_base + after.n_novel),
    )
    lines = []
    for name, label, n in rows:
        cells = [_with_interval(getattr(after, name))]
        if cost:
            cells += [_with_interval(getattr(cost.before, name)), _with_interval(getattr(cost, name), "+")]
        lines.append([label, str(n), *cells])
    return Table(["accuracy", "n", *columns], lines, title=title, caption=note)


def write_json(path: Path, result: BaseToNovel | Cost, note: str = "") -> None:
    """Write the result whole; an estimate becomes an object of ``value``, ``low`` and ``high``.

    Args:
        path: of the file.
        result: to write.
        note: what was not checked; kept under ``note``.
    """
    content = _plain(result) | ({"note": note} if note else {})
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")


def _checked_base(predictions: Predictions, base: int | None) -> int:
    if LABEL_TASK not in predictions.tasks:
        raise UserError(f"base_to_novel: the predictions have no task '{LABEL_TASK}'; test a model of classes")
    num_classes = len(predictions.tasks[LABEL_TASK])
    base = (num_classes + 1) // 2 if base is None else base
    if not 0 < base < num_classes:
        raise UserError(f"--base: must be from 1 to {num_classes - 1}, as there are {num_classes} classes; got {base}")
    targets = predictions.targets[LABEL_TASK]
    for half, is_there in (("base", (targets[known(targets)] < base).any()), ("novel", (targets >= base).any())):
        if not is_there:
            raise UserError(
                f"base_to_novel: no sample is of the {half} classes ({base} of {num_classes} are base); test on data "
                f"with all classes"
            )
    return base


def _answers(predictions: Predictions, base: int) -> _Answers:
    rows = known(predictions.targets[LABEL_TASK])
    targets, logits = predictions.targets[LABEL_TASK][rows], predictions.logits[LABEL_TASK][rows]
    return _Answers(targets < base, _right(targets, logits, base), predictions.groups[rows])


def _right(targets: NDArray[np.int64], logits: NDArray[np.float32], base: int) -> NDArray[np.bool_]:
    """Which answers are right, each among the classes of the sample's own half."""
    # Within a half all logits may be equal, as where a generative model names a class of the other one: not to be luck.
    is_base = targets < base
    among_base = predicted_classes(logits[:, :base]) == targets
    among_novel = predicted_classes(logits[:, base:]) == targets - base
    right: NDArray[np.bool_] = np.where(is_base, among_base, among_novel & ~is_base)
    return right


def _harmonic_mean(answers: _Answers) -> Statistic:
    """Of the accuracies on both halves, as a function of sample weights."""
    sides = answers.is_base.astype(np.float64), (~answers.is_base).astype(np.float64)
    hits = [side * answers.right for side in sides]

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        # A resample may lack one side: accuracy 0.
        base, novel = (weights @ hit / np.maximum(weights @ side, 1) for hit, side in zip(hits, sides, strict=True))
        values: NDArray[np.float64] = 2 * base * novel / np.where(base + novel > 0, base + novel, 1)
        return values

    return statistic


def _with_interval(estimate: Estimate, sign: str = "") -> str:
    (low, high), form = estimate.interval, f"{sign}.3f"
    return f"{estimate.value:{form}} [{low:{form}}, {high:{form}}]"


def _plain(result: BaseToNovel | Cost | Estimate | int) -> Any:
    if isinstance(result, int):
        return result
    if isinstance(result, Estimate):
        return {"value": result.value, "low": result.interval.low, "high": result.interval.high}
    return {field.name: _plain(getattr(result, field.name)) for field in fields(result)}


@torch.inference_mode()
def predict_classes(task: VisionTask, datamodule: ImageDataModule, split: str) -> Predictions:
    """Class predictions of all samples of a split, on the task's device.

    Raises:
        UserError: if the data have no classes.
    """
    from lightning.fabric.utilities import move_data_to_device

    if LABEL_TASK not in datamodule.tasks:
        raise UserError("the data have no classes to count right answers of")
    datamodule.adopt_image_options(task.input_options)
    device = next(task.parameters()).device
    task.eval()
    task.on_predict_epoch_start()
    outputs: list[Any] = [
        task.predict_step(move_data_to_device(batch, device), index)
        for index, batch in enumerate(datamodule.eval_dataloader(split))
    ]
    sample_id = torch.cat([output["sample_id"] for output in outputs]).cpu().numpy()
    names, groups = datamodule.sample_names(), datamodule.group_names()
    return Predictions(
        sample_id=sample_id,
        names=np.array([names[index] for index in sample_id], dtype=object),
        groups=np.array([groups[index] for index in sample_id], dtype=object),
        tasks={LABEL_TASK: datamodule.class_names},
        targets={LABEL_TASK: torch.cat([output["targets"][LABEL_TASK] for output in outputs]).cpu().numpy()},
        logits={LABEL_TASK: torch.cat([output["logits"][LABEL_TASK] for output in outputs]).float().cpu().numpy()},
    )


def start_weights_of(run: Path) -> Path:
    """Checkpoint of what a fine-tuning began with.

    Args:
        run: the run directory.

    Raises:
        UserError: the run kept none.
    """
    path = run / Run.START
    if not path.is_file():
        raise UserError(f"{path}: the run kept no weights from before training; train it with callbacks.StartWeights")
    return path


def finetuning_cost(run: Path, datamodule: ImageDataModule, base_classes: int) -> Cost:
    """What a fine-tuning on some of the classes did to them and to the others.

    Args:
        run: directory with ``checkpoints/start.ckpt`` and ``predictions/test.parquet``; the predictions of the former
            are written beside the latter as ``test_start.parquet``.
        datamodule: of the run.
        base_classes: number of classes that were trained, the first in label order.

    Raises:
        UserError: if a file is missing or does not fit.
    """
    from lightning_modules.checkpoint import load_task

    before = predict_classes(load_task(start_weights_of(run)), datamodule, "test")
    write_predictions(run / Run.PREDICTIONS / "test_start.parquet", before)
    return compare(read_predictions(run / Run.PREDICTIONS / "test.parquet"), before, base_classes)
