"""Weights between the start and the end of a fine-tuning: what it cost elsewhere, and how to get it back.

Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), CVPR 2022. α = 0 is the model before training, 1
the one after it; often something between keeps the gain and most of what was there before. α is chosen on the
validation split; the test columns are there to be looked at, nothing is chosen by them.

Weights between two models, to get back what fine-tuning has cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from evaluation.statistics.intervals import accuracy, known
from evaluation.tables.summary import share
from evaluation.weights.zero_shot import predict_classes, restricted_accuracy
from lightning_modules.encoders.weights import misfits
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.files import write_atomically, write_csv
from vitrail.predictions import predicted_classes
from vitrail.runs import Run
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.base import ImageDataModule
    from lightning_modules.base import VisionTask


class Mixture(NamedTuple):
    """What one mixture of weights reaches; accuracies in [0, 1], higher is better.

    Attributes:
        alpha: share of the weights at the end.
        val: accuracy on the validation split.
        test: accuracy on the test split.
        base: accuracy on the test samples of base classes, among those classes; None where all classes are trained.
        novel: the same of the classes that training never saw.
    """

    alpha: float
    val: float
    test: float
    base: float | None
    novel: float | None

    @property
    def harmonic(self) -> float | None:
        """Harmonic mean of base and novel accuracy."""
        if self.base is None or self.novel is None:
            return None
        return 2 * self.base * self.novel / (self.base + self.novel) if self.base + self.novel else 0.0


def sweep(
    task: VisionTask,
    start: dict[str, torch.Tensor],
    end: dict[str, torch.Tensor],
    datamodule: ImageDataModule,
    *,
    alphas: Sequence[float],
    base_classes: int,
) -> Iterable[Mixture]:
    """Evaluate mixtures of weights, one after the other.

    Args:
        task: takes the weights; zero-shot classes are computed anew for each.
        start: weights at the beginning.
        end: weights at the end.
        datamodule: gives the validation and test splits.
        alphas: shares of the end, in [0, 1].
        base_classes: number of classes that were trained, the first in label order; 0 for all.

    Raises:
        UserError: if a share is out of range, or the data have no classes.
    """
    if not all(0 <= alpha <= 1 for alpha in alphas):
        raise UserError(f"--alphas: must be in [0, 1], got {' '.join(map(str, alphas))}")
    for alpha in alphas:
        task.load_state_dict(interpolated_weights(start, end, alpha))
        val_targets, val_logits = _known_classes(task, datamodule, "val")
        targets, logits = _known_classes(task, datamodule, "test")
        parts: list[float | None] = [None, None]
        if base_classes:
            parts = [restricted_accuracy(targets, logits, base_classes, novel=novel) for novel in (False, True)]
        trained = slice(None, base_classes or None)
        # The validation split has base classes only: among those it is judged.
        val = accuracy(val_targets, predicted_classes(val_logits[:, trained]))
        yield Mixture(alpha, val, accuracy(targets, predicted_classes(logits)), *parts)


def _known_classes(
    task: VisionTask, datamodule: ImageDataModule, split: str
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Targets int64 ``(N,)`` and logits float32 ``(N, C)`` of the samples of a split whose class is known."""
    predictions = predict_classes(task, datamodule, split)
    rows = known(predictions.targets[LABEL_TASK])
    return predictions.targets[LABEL_TASK][rows], predictions.logits[LABEL_TASK][rows]


def best_mixture(mixtures: Sequence[Mixture]) -> Mixture:
    """The one with the highest validation accuracy; of equal ones the nearest to the start, which has lost least.

    Raises:
        UserError: no validation sample has a known class.
    """
    if any(math.isnan(mixture.val) for mixture in mixtures):
        raise UserError("wise_ft: no sample of the validation split has a known class, so α cannot be chosen")
    return max(mixtures, key=lambda mixture: (mixture.val, -mixture.alpha))


def save_mixture(path: Path, start: dict[str, torch.Tensor], end: dict[str, Any], alpha: float) -> None:
    """Write a checkpoint with the weights of a mixture, whole or not at all.

    Args:
        path: of the new file.
        start: weights at the beginning.
        end: the checkpoint at the end, whose settings are kept.
        alpha: share of the end.
    """
    training = {"optimizer_states", "lr_schedulers", "callbacks", "loops"}
    kept = {key: value for key, value in end.items() if key not in training}
    with write_atomically(path) as partial, partial.open("wb") as file:
        torch.save({**kept, "state_dict": interpolated_weights(start, end["state_dict"], alpha)}, file)


def write_report(folder: Path, mixtures: Sequence[Mixture]) -> None:
    """Write ``reports/wise_ft.csv`` and ``figures/wise_ft.png`` of a run directory."""
    import pandas as pd
    from matplotlib.figure import Figure

    from evaluation.report.figures import save_figure

    columns = ["alpha", "val", "test", "base", "novel"]
    frame = pd.DataFrame([mixture[:] for mixture in mixtures], columns=columns).dropna(axis=1)
    write_csv(folder / Run.REPORTS / "wise_ft.csv", frame)
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for column in frame.columns[1:]:
        axes.plot(frame["alpha"], frame[column], marker="o", label=column)
    axes.set(xlabel="α: 0 before, 1 after fine-tuning", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, folder / Run.FIGURES / "wise_ft.png")


def mixtures_table(mixtures: Sequence[Mixture], chosen: Mixture) -> Table:
    """The mixtures, the chosen one marked."""
    has_parts = chosen.base is not None
    rows = []
    for mixture in mixtures:
        parts = (mixture.base, mixture.novel, mixture.harmonic) if has_parts else ()
        values = (mixture.val, mixture.test, *parts)
        rows.append([f"{mixture.alpha:g}", *(share(value) for value in values if value is not None)])
    columns = ["α", "val", "test", *(("base", "novel", "harmonic mean") if has_parts else ())]
    bold = {number: "bold" for number, mixture in enumerate(mixtures) if mixture is chosen}
    return Table(columns, rows, title="WiSE-FT: α chosen on val", styles=bold)


def interpolated_weights(
    start: dict[str, torch.Tensor], end: dict[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """Weights on the way from one model to another: (1 - α) · start + α · end (WiSE-FT, Wortsman et al., CVPR 2022).

    An adapter's update is a product of two matrices, the second of which begins as zero: that one alone is scaled, so
    that the sum of base and update is what is interpolated.

    Args:
        start: weights at the beginning.
        end: weights at the end, of the same names and shapes.
        alpha: 0 for the beginning, 1 for the end.

    Raises:
        UserError: if the names or shapes differ.
    """
    if wrong := misfits(end, start):
        raise UserError(f"the end's weights do not fit the start: {wrong}; give the start and the end of one run")
    mixed = {}
    for name, last in end.items():
        if not last.is_floating_point() or ".lora_A." in name:
            mixed[name] = last
        else:
            mixed[name] = torch.lerp(start[name].double(), last.double(), alpha).to(last.dtype)
    return mixed
