"""Parity of exported files with the model, measured on real samples: outputs, decisions, accuracy, size and speed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from datamodules.base import ImageDataModule
from evaluation.efficiency import BatchCost, ratio_text
from evaluation.statistics.intervals import wilson
from experiments.export.graphs import IMAGE_EMBEDDING, IMAGE_FEATURES, LOGITS, TEXT_EMBEDDING, Arrays, Runner
from experiments.export.predict_onnx import familiarity
from lightning_modules.base import VisionTask, real_rows
from lightning_modules.dual_encoder import DualEncoder
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.ood import Detector, outputs_with_features
from vitrail.predictions import DEFAULT_THRESHOLD, predicted_classes
from vitrail.types import UNKNOWN, kind_of

NEAREST = "nearest text"
SAME_VALUE = 0.1
"""Predicted numbers are the same if they differ by no more than this share of the standard deviation of the model's."""

AT_THRESHOLD = 1e-4
"""Probabilities this near to the threshold decide nothing: thresholds are probabilities of validation images."""

TOLERANCE: dict[str, float | None] = {"": 1e-3, "fp16": 2e-2, "bf16": 1e-1, "int8": None}
"""Largest difference by precision, as a share of the largest value, or of 1 where all are smaller: of float32, and of
16 bits with 10 and with 7 of them for digits; with eight bits decisions alone count."""

MAX_TEXTS = 1000
_TEXTS_AT_A_TIME, _IMAGES_AT_A_TIME = 64, 256
_STAND_IN_TEXTS = ("a photo", "a drawing of a dog")


@dataclass(frozen=True)
class Parity:
    """One output of one exported form compared with the model's own.

    Attributes:
        what: task, ``nearest text`` (of each image), or an embedding.
        n: samples.
        agreement: share of the samples for which both choose the same class, the same labels, or the same number up
            to ``SAME_VALUE``; NaN where nothing is chosen.
        difference: largest absolute difference of a value.
        largest: largest absolute value of the model's own.
        known: samples with a known target.
        accuracy: of the model and of the exported form on these, of multi-label tasks over single labels; NaN where
            there are none, and of numbers.
    """

    what: str
    n: int
    agreement: float
    difference: float
    largest: float
    known: int = 0
    accuracy: tuple[float, float] = (math.nan, math.nan)


def measure(
    task: VisionTask,
    datamodule: ImageDataModule,
    split: str,
    forms: Mapping[str, Mapping[str, Runner]],
    detector: Detector | None = None,
) -> dict[str, list[Parity]]:
    """Compare exported forms of a task with the task itself on every image of a split, in one pass.

    Args:
        task: with its weights, on the CPU.
        datamodule: set up.
        split: of its images.
        forms: for each form the runner of each tower, by its name.
        detector: of unknown images, whose scores are computed of each form's outputs without PyTorch, as well.

    Returns:
        For each form one row an output.

    Raises:
        UserError: if the split is empty.
    """
    task.eval()
    needs_features = detector is not None and detector.needs_features
    own, targets = _Outputs(), _Outputs()
    others = {form: _Outputs() for form in forms}
    texts: dict[str, None] = {}
    with torch.no_grad():
        for batch in datamodule.eval_dataloader(split):
            images = batch["image"][real_rows(batch)].numpy()
            outputs, features = outputs_with_features(task, batch, features=needs_features)
            logits = {f"{LOGITS}{name}": values.numpy() for name, values in outputs["logits"].items()}
            own.add({**logits, IMAGE_EMBEDDING: outputs["image_embedding"].numpy()})
            if features is not None:
                own.add({IMAGE_FEATURES: features[real_rows(batch).numpy()]})
            targets.add({name: values.numpy() for name, values in outputs["targets"].items()})
            for form, towers in forms.items():
                others[form].add(towers["image" if "image" in towers else "model"]({"image": images}))
            texts |= dict.fromkeys(text for several in batch.get("captions", []) for text in several if text)
    mine, truth = own.joined(), targets.joined()
    found = {form: _rows(task, mine, other.joined(), truth) for form, other in others.items()}
    if detector is not None:
        for form, other in others.items():
            found[form].append(_unknown_row(detector, mine, other.joined()))
    if isinstance(task, DualEncoder):
        prompts = [prompt for prompts in task.class_prompts for prompt in prompts]
        # Without texts of its own the text tower is compared all the same.
        some = list(dict.fromkeys([*prompts, *texts]))[:MAX_TEXTS] or [*_STAND_IN_TEXTS]
        for form, towers in forms.items():
            found[form] += _text_rows(
                task, some, mine[IMAGE_EMBEDDING], others[form].joined()[IMAGE_EMBEDDING], towers["text"]
            )
    return found


def refuse_disagreement(form: str, rows: Iterable[Parity], *, tolerance: float | None, min_agreement: float) -> None:
    """Refuse an exported form that does not reproduce the model.

    Args:
        form: what messages call it.
        rows: of ``measure``.
        tolerance: see ``TOLERANCE``; None where values may differ, as those of eight bits do.
        min_agreement: smallest share of samples for which both must choose the same.

    Raises:
        UserError: names the first output that fails.
    """
    for row in rows:
        allowed = math.inf if tolerance is None else tolerance * max(1.0, row.largest)
        # Written so that NaN, which is larger than nothing, fails.
        if not row.difference <= allowed or (not math.isnan(row.agreement) and row.agreement < min_agreement):
            same = "" if math.isnan(row.agreement) else f"the same for {row.agreement:.1%} of {row.n} samples, "
            raise UserError(
                f"export: {form} does not reproduce the model: {row.what}: {same}largest difference "
                f"{row.difference:.2g}; needed are {min_agreement:.0%} and at most {allowed:.2g}; nothing was written"
            )


class _Outputs:
    def __init__(self) -> None:
        self._parts: dict[str, list[NDArray[np.generic]]] = {}

    def add(self, arrays: Arrays) -> None:
        for name, values in arrays.items():
            self._parts.setdefault(name, []).append(values)

    def joined(self) -> Arrays:
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


def _rows(own: VisionTask, mine: Arrays, other: Arrays, targets: Arrays) -> list[Parity]:
    rows = []
    kinds, thresholds = getattr(own, "task_kinds", {}), getattr(own, "thresholds", {})
    for name, values in mine.items():
        difference, largest = _difference(values, other[name])
        if name in (IMAGE_EMBEDDING, IMAGE_FEATURES):
            rows.append(Parity(name, len(values), math.nan, difference, largest))
            continue
        task = name.removeprefix(LOGITS)
        if kind_of(kinds, task) == "regression":
            apart = np.abs(values[:, 0] - other[name][:, 0])
            same = float((apart <= SAME_VALUE * values[:, 0].std()).mean())
            rows.append(Parity(task, len(values), same, difference, largest))
            continue
        if kind_of(kinds, task) == "multi_label":
            marks = np.asarray(thresholds.get(task, DEFAULT_THRESHOLD))
            rows.append(_labels_row(task, expit(values), expit(other[name]), marks, targets[task], difference, largest))
            continue
        choices = [predicted_classes(values), predicted_classes(other[name])]
        # A single class is no choice.
        same = float((choices[0] == choices[1]).mean()) if values.shape[1] > 1 else math.nan
        known = targets[task] != UNKNOWN
        right = [float((choice == targets[task])[known].mean()) if known.any() else math.nan for choice in choices]
        rows.append(Parity(task, len(values), same, difference, largest, int(known.sum()), (right[0], right[1])))
    return rows


def _unknown_row(detector: Detector, mine: Arrays, other: Arrays) -> Parity:
    """Compare which images are unknown by the run's own scores and by those that are computed without PyTorch."""
    logits = f"{LOGITS}{detector.task}"
    own = detector.scores(mine[logits], mine.get(IMAGE_FEATURES))
    features = other.get(IMAGE_FEATURES)
    found = np.concatenate(
        [
            familiarity(
                detector.method,
                other[logits][start : start + _IMAGES_AT_A_TIME],
                None if features is None else features[start : start + _IMAGES_AT_A_TIME],
                detector.arrays,
                detector.kind,
            )
            for start in range(0, len(own), _IMAGES_AT_A_TIME)
        ]
    )
    # The threshold is the score of a validation image.
    undecided = np.abs(own - detector.threshold) <= AT_THRESHOLD * max(1.0, abs(detector.threshold))
    same = float((((own < detector.threshold) == (found < detector.threshold)) | undecided).mean())
    return Parity(f"unknown ({detector.method})", len(own), same, *_difference(own, found))


def _labels_row(
    task: str,
    mine: NDArray[np.float32],
    other: NDArray[np.float32],
    thresholds: NDArray[np.float64],
    targets: NDArray[np.int8],
    difference: float,
    largest: float,
) -> Parity:
    """Compare which labels of N images reach their thresholds, by probabilities float32 ``(N, C)``."""
    chosen, chosen_other = mine >= thresholds, other >= thresholds
    undecided = np.abs(mine - thresholds) <= AT_THRESHOLD
    same = float(((chosen == chosen_other) | undecided).all(axis=1).mean())
    known = targets != UNKNOWN
    right = [
        float((one == (targets == 1))[known].mean()) if known.any() else math.nan for one in (chosen, chosen_other)
    ]
    return Parity(task, len(mine), same, difference, largest, int(known.any(axis=1).sum()), (right[0], right[1]))


def _text_rows(
    task: DualEncoder, texts: Sequence[str], mine: NDArray[np.float32], other: NDArray[np.float32], runner: Runner
) -> list[Parity]:
    """Compare the text tower by its embeddings, and both towers by the text nearest to each image."""
    assert task.towers.tokenizer is not None
    own, theirs = _Outputs(), _Outputs()
    for start in range(0, len(texts), _TEXTS_AT_A_TIME):
        some = list(texts[start : start + _TEXTS_AT_A_TIME])
        tokens = task.towers.tokenizer(some)
        with torch.no_grad():
            own.add({TEXT_EMBEDDING: task.encode_text(some).numpy()})
        theirs.add(
            runner({"input_ids": tokens["input_ids"].numpy(), "attention_mask": tokens["attention_mask"].numpy()})
        )
    text, text_other = own.joined()[TEXT_EMBEDDING], theirs.joined()[TEXT_EMBEDDING]
    difference, largest = _difference(text, text_other)
    nearest, nearest_other = (mine @ text.T), (other @ text_other.T)
    # A single text is no choice.
    same = float((nearest.argmax(axis=1) == nearest_other.argmax(axis=1)).mean()) if len(texts) > 1 else math.nan
    gap = _difference(nearest, nearest_other)
    return [
        Parity(TEXT_EMBEDDING, len(texts), math.nan, difference, largest),
        Parity(f"{NEAREST} of {len(texts)}", len(mine), same, *gap),
    ]


def _difference(mine: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """Return the largest absolute difference, and the largest absolute value of the first; NaN where a value is."""
    return float(np.abs(mine - other).max()), float(np.abs(mine).max())


@dataclass(frozen=True)
class Form:
    """One way to run the model.

    Attributes:
        name: as tables have it; the first of several is what ratios are to.
        size: of its files in bytes.
        parity: its outputs compared with the model's own.
        costs: of the images' tower by batch size; empty where nothing was timed.
        unmeasured: why it was not compared with the model; empty where it was.
    """

    name: str
    size: int
    parity: list[Parity]
    costs: dict[int, BatchCost]
    unmeasured: str = ""


def interleaved(
    runners: Mapping[str, Runner], images: NDArray[np.uint8], sizes: Sequence[int], repeats: int
) -> dict[str, dict[int, BatchCost]]:
    """Time a batch in turn: the runner that begins changes from round to round.

    Args:
        runners: of the images' tower; ratios are to the first, within a round.
        images: real ones, uint8 ``(N, 3, S, S)``, repeated where a batch is larger.
        sizes: of batches.
        repeats: rounds that count; one before them does not.
    """
    names = list(runners)
    found: dict[str, dict[int, BatchCost]] = {name: {} for name in names}
    for size in sizes:
        batch = {"image": images[np.arange(size) % len(images)]}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(repeats + 1):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                runners[name](batch)
                if number:
                    seconds[name].append(time.perf_counter() - start)
        for name in names:
            ratios = [one / base for one, base in zip(seconds[name], seconds[names[0]], strict=True)]
            found[name][size] = BatchCost(seconds[name], ratios, None)
    return found


def parity_table(forms: Sequence[Form]) -> Table:
    """One row per form; sizes and times are ratios to the first, agreement has Wilson's interval of 95 %."""
    first = forms[0]
    choices = [row for row in first.parity if not math.isnan(row.agreement)]
    headings = [
        "form",
        "size",
        *(f"{row.what}: agrees{', accuracy' if row.known else ''}" for row in choices),
        "largest difference",
        *(f"time, batch {size} [low, high]" for size in first.costs),
    ]
    rows = []
    for form in forms:
        size = f"{form.size / 1e6:.2f} MB, {form.size / first.size:.2f}"
        if form.unmeasured:
            rows.append([form.name, size, *["not measured"] * (len(headings) - 2)])
            continue
        differences = [row.difference for row in form.parity]
        agreements = [_agreement(row) for row in form.parity if not math.isnan(row.agreement)]
        times = [f"{one.p50 * 1e3:.3g} ms" if form is first else ratio_text(one) for one in form.costs.values()]
        rows.append([form.name, size, *agreements, f"{max(differences):.1g}" if differences else "–", *times])
    return Table(headings, rows)


def _agreement(row: Parity) -> str:
    low, high = wilson(row.agreement, row.n)
    return f"{row.agreement:.3f} [{low:.3f}, {high:.3f}] of {row.n}{f', {row.accuracy[1]:.3f}' if row.known else ''}"
