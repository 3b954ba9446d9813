"""``python -m evaluation few-shot``: methods for a few images of each class, compared on one frozen encoder's features.

Every image is encoded once. Then, for each seed and number of shots, the shots are those of ``data.shots``, and each
method is solved as ``fit`` with ``few_shot`` does (``lightning_modules.few_shot``), never by looking at the test split.
Two kinds of chance are shown: over seeds, which sample the shots (Student's interval), and over the groups of the test
split. Methods are compared with the baseline on the same samples.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from evaluation.commands.compare import add_forms
from evaluation.statistics.base_to_novel import over_seeds
from evaluation.statistics.intervals import half_width
from evaluation.statistics.paired import compare_joined, holm
from evaluation.statistics.pooled import JoinedScore, join_runs
from vitrail.console import Table, tracked
from vitrail.errors import UserError
from vitrail.predictions import Predictions, refuse_kinds
from vitrail.runtime import check_device
from vitrail.types import LABEL_TASK, UNKNOWN, kind_of

if TYPE_CHECKING:
    import torch

    from datamodules.base import ImageDataModule
    from lightning_modules.few_shot import ClassTexts, Shots

ZERO_SHOT = "zero_shot"
_RESAMPLES = 100
"""Accuracy, all that is shown, needs none."""

Cells = Mapping[tuple[str, int], Sequence[Predictions]]
"""Predictions of the test split of each seed, by method and number of shots."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``few-shot``."""
    command.description = (
        "Accuracy of methods for a few images of each class, on the features of one frozen encoder: mean over seeds ± "
        "Student's interval, then the interval by group of the test split."
    )
    command.epilog = "The data can be changed by --data.init_args.KEY VALUE, as in an experiment."
    command.add_argument(
        "--config", action="append", required=True, help="experiment YAML; only its `data:` part is read; repeatable"
    )
    command.add_argument("--run", type=Path, help="run of a dual encoder or a classifier, whose encoder is taken")
    command.add_argument("--backbone", help="timm name of an encoder instead, for example resnet18")
    command.add_argument("--pretrained", default="true", help="its weights: true (hub), false, or a local file")
    command.add_argument("--image-size", type=int, default=224, help="its images in pixels (default: 224)")
    command.add_argument("--methods", nargs="+", help="(default: all that the encoder allows, but cocoop)")
    command.add_argument("--shots", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="(default: 1 2 4 8 16)")
    command.add_argument("--seeds", type=int, default=3, help="number of seeds, which sample the shots (default: 3)")
    command.add_argument(
        "--select", choices=("shots", "val"), default="shots", help="what the methods choose on (default: shots)"
    )
    command.add_argument("--steps", type=int, default=100, help="most steps of methods that are trained (default: 100)")
    command.add_argument(
        "--base-to-novel",
        action="store_true",
        help="shots of the first half of the classes only; accuracy on either half, and their harmonic mean",
    )
    add_forms(command)


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Encode, solve, and print the tables.

    Raises:
        UserError: the encoder, the data or an option is not as it should be.
    """
    from datamodules.cli import load_datamodule

    if (options.run is None) == (options.backbone is None):
        raise UserError("few-shot: name either the --run of a model, or the --backbone of an encoder in timm")
    if options.seeds < 1 or min(options.shots) < 1 or options.steps < 1:
        raise UserError("few-shot: --seeds, --shots and --steps must be at least 1")
    datamodule = load_datamodule(options.config, rest, "python -m evaluation few-shot")
    datamodule.shots = 0  # shots are sampled of all training images
    encoded = encode_data(datamodule, options)
    methods = _methods(options, encoded.texts is not None)
    cells = solve_all(encoded, methods, options)
    show = base_to_novel_tables if options.base_to_novel else accuracy_tables
    tables, notes = show(cells, methods, sorted(set(options.shots)), options.seeds)
    if options.json:
        sys.stdout.write(f"{json.dumps([table.values for table in tables], indent=2)}\n")
    elif options.markdown:
        sys.stdout.write("".join(f"{table.markdown()}\n\n" for table in tables))
        sys.stdout.write("".join(f"* {note}\n" for note in notes))
    else:
        for table in tables:
            table.show()
        sys.stdout.write("".join(f"{note}\n" for note in notes))


class Encoded(NamedTuple):
    """A data set as one encoder outputs it.

    Attributes:
        train: all training images with a known class, of which shots are sampled.
        names: of these.
        validation: likewise, where something is chosen on it.
        test: features, float32 ``(N, D)``, of unit length.
        predictions: of the test split, without logits.
        texts: of the classes; None without a text tower.
    """

    train: Shots
    names: list[str]
    validation: Shots | None
    test: torch.Tensor
    predictions: Callable[[torch.Tensor], Predictions]
    texts: ClassTexts | None


def encode_data(datamodule: ImageDataModule, options: argparse.Namespace) -> Encoded:
    """Encode every image of the splits that are needed, once."""
    encode, texts = _encoder(datamodule, options)
    if LABEL_TASK not in datamodule.tasks:
        raise UserError("few-shot: the data have no classes; give data with labels")
    refuse_kinds({LABEL_TASK: kind_of(datamodule.task_kinds, LABEL_TASK)}, "few-shot")
    train, train_ids = _features(datamodule, encode, "train")
    validation = _features(datamodule, encode, "val")[0] if options.select == "val" else None
    test, test_ids = _features(datamodule, encode, "test", known=False)
    names, groups = datamodule.sample_names(), datamodule.group_names()

    def predictions(logits: torch.Tensor) -> Predictions:
        return Predictions(
            sample_id=test_ids,
            names=np.array([names[index] for index in test_ids], dtype=object),
            groups=np.array([groups[index] for index in test_ids], dtype=object),
            tasks={LABEL_TASK: datamodule.class_names},
            targets={LABEL_TASK: test.label.cpu().numpy()},
            logits={LABEL_TASK: logits.float().cpu().numpy()},
        )

    return Encoded(train, [names[index] for index in train_ids], validation, test.image, predictions, texts)


def _encoder(
    datamodule: ImageDataModule, options: argparse.Namespace
) -> tuple[Callable[[torch.Tensor], torch.Tensor], ClassTexts | None]:
    """The encoder of unit-length features, and what its text tower knows of the classes; prepares the data for it."""
    import torch
    import torch.nn.functional as F

    from lightning_modules.dual_encoder import DualEncoder
    from lightning_modules.encoders.image import ImageEncoder
    from lightning_modules.options import FewShotOptions
    from vitrail.runs import Run

    device = torch.device(check_device("auto"))
    network: Any
    if options.run is None:
        datamodule.image_options = {**datamodule.image_options, "size": options.image_size}
        pretrained = {"true": True, "false": False}.get(options.pretrained.lower(), options.pretrained)
        network = ImageEncoder(options.backbone, options.image_size, pretrained)
        network.load_pretrained()
        if network.own_inputs is not None:
            datamodule.adopt_image_options(network.own_inputs)
    else:
        network = Run(options.run).load_model()
        datamodule.image_options = network.input_options.copy()
    network = network.to(device).eval()
    datamodule.prepare_data()
    datamodule.setup("fit")
    texts = None
    if isinstance(network, DualEncoder):
        of_context = options.methods is None or {"coop", "cocoop"} & set(options.methods)
        context = FewShotOptions().context if of_context else 0
        texts = network.texts_of(datamodule.class_names, datamodule.class_prompts, context)
    features = network if isinstance(network, ImageEncoder) else network.image_features
    features = network.encode_image if isinstance(network, DualEncoder) else features
    return lambda image: F.normalize(features(image.to(device)).float(), dim=-1), texts


def _features(
    datamodule: ImageDataModule, encode: Callable[[torch.Tensor], torch.Tensor], split: str, *, known: bool = True
) -> tuple[Shots, np.ndarray[Any, np.dtype[np.int64]]]:
    """Features and sample ids of a split; of the samples with a known class, where asked."""
    import torch

    from lightning_modules.few_shot import Shots

    parts, ids = [], []
    loader = datamodule.eval_dataloader(split)
    with torch.no_grad():
        for batch in tracked(loader, f"encoding {split}, in batches", len(loader)):
            rows = batch["label"] != UNKNOWN if known else torch.ones_like(batch["label"], dtype=torch.bool)
            image = encode(batch["image"][rows])
            parts.append((image, batch["label"][rows].to(image.device), batch["group_id"][rows].to(image.device)))
            ids.append(batch["sample_id"][rows])
    return Shots(*(torch.cat(part) for part in zip(*parts, strict=True))), torch.cat(ids).numpy()


def _methods(options: argparse.Namespace, has_texts: bool) -> list[str]:
    from lightning_modules.few_shot import TEXT_METHODS, refuse_without_texts
    from lightning_modules.options import FewShotMethod, FewShotOptions

    known = get_args(FewShotMethod)
    if options.methods is None:
        return [one for one in known if one != "cocoop" and (has_texts or one not in TEXT_METHODS)]
    if strange := [one for one in options.methods if one not in known]:
        raise UserError(f"--methods: must be among {', '.join(known)}; got {strange[0]!r}")
    if not has_texts:
        for one in options.methods:
            refuse_without_texts(FewShotOptions(method=one))
    return list(dict.fromkeys(options.methods))


def solve_all(encoded: Encoded, methods: Sequence[str], options: argparse.Namespace) -> Cells:
    """Solve every method for every number of shots and seed; predict the test split.

    Returns:
        With a text tower also the zero-shot predictions, the same for all.
    """
    import torch

    from datamodules.splits import few_shots
    from lightning_modules.few_shot import build_head, solve_head
    from lightning_modules.options import FewShotOptions, checked

    label, group = (part.cpu().numpy() for part in (encoded.train.label, encoded.train.group))
    classes, texts = len(encoded.predictions(encoded.test[:, :1]).tasks[LABEL_TASK]), encoded.texts
    base = label < (classes + 1) // 2 if options.base_to_novel else np.ones(len(label), dtype=np.bool_)
    validation = encoded.validation
    if validation is not None and options.base_to_novel:
        validation = validation.take(validation.label < (classes + 1) // 2)
    cells: dict[tuple[str, int], list[Predictions]] = {}
    planned = [(shots, seed, method) for shots in options.shots for seed in range(options.seeds) for method in methods]
    for shots, seed, method in tracked(planned, "solving", len(planned)):
        chosen = few_shots(label, group, encoded.names, shots, seed) & base
        how = checked(FewShotOptions, {"method": method, "select": options.select, "steps": options.steps}, "few_shot")
        width = texts.context.width if texts is not None and texts.context is not None else 0
        head = build_head(how, classes, encoded.test.shape[1], width).to(encoded.test.device)
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(encoded.test.device)
        solve_head(head, encoded.train.take(rows), validation, texts)
        with torch.no_grad():
            logits = head(encoded.test, None if texts is None else texts.context)
        cells.setdefault((method, shots), []).append(encoded.predictions(logits))
    if texts is not None:
        zero_shot = encoded.predictions(texts.scale * encoded.test @ texts.embedding.T)
        cells |= {(ZERO_SHOT, shots): [zero_shot] * options.seeds for shots in options.shots}
    return cells


def accuracy_tables(
    cells: Cells, methods: Sequence[str], shots: Sequence[int], seeds: int
) -> tuple[list[Table], list[str]]:
    """Accuracy by method and shots, and the differences to the baseline; with sentences that explain them."""
    baseline = ZERO_SHOT if (ZERO_SHOT, shots[0]) in cells else methods[0]
    rows = [ZERO_SHOT, *methods] if baseline == ZERO_SHOT else list(methods)
    joined = {key: join_runs(runs, LABEL_TASK, n_resamples=_RESAMPLES) for key, runs in cells.items()}
    first = joined[rows[0], shots[0]]
    heads = ["method", *(f"{count} shot{'s' if count > 1 else ''}" for count in shots)]
    scores = {key: one.accuracy for key, one in joined.items()}
    table = Table(
        heads,
        [[method, *(score_cell(scores[method, count], seeds) for count in shots)] for method in rows],
        title=f"accuracy on {first.n} images of {first.groups} groups",
        values=[_values(method, count, scores[method, count]) for method in rows for count in shots],
    )
    others = [(method, count) for method in rows if method != baseline for count in shots]
    if not others:
        return [table], [_meaning(seeds)]
    with warnings.catch_warnings():
        # Zero-shot predictions are the same for all seeds, which scipy warns of.
        warnings.simplefilter("ignore", RuntimeWarning)
        compared = {
            (method, count): compare_joined(
                cells[method, count],
                cells[baseline, count],
                LABEL_TASK,
                (method, baseline),
                n_resamples=_RESAMPLES,
            )
            for method, count in others
        }
    corrected = dict(zip(compared, holm([one.p_value for one in compared.values()]), strict=True))
    differences = []
    for method in rows:
        if method != baseline:
            cells_of = []
            for count in shots:
                one = compared[method, count]
                value, (low, high) = one.difference
                clear = " *" if one.differs(corrected[method, count]) else ""
                cells_of.append(f"{value:+.3f} [{low:+.3f}, {high:+.3f}]{clear}")
            differences.append([method, *cells_of])
    notes = [
        _meaning(seeds),
        f"Differences are to {baseline}, paired on the same images, with their interval by group; * where the test by "
        f"group (Holm, {len(compared)} comparisons) and the interval over seeds agree that there is one.",
    ]
    return [table, Table(heads, differences, title=f"difference to {baseline}", values=[])], notes


def base_to_novel_tables(
    cells: Cells, methods: Sequence[str], shots: Sequence[int], seeds: int
) -> tuple[list[Table], list[str]]:
    """Accuracy on either half of the classes by method and shots, and their harmonic mean."""
    rows = [one for one in (ZERO_SHOT, *methods) if (one, shots[0]) in cells]
    lines, values = [], []
    for count in shots:
        for method in rows:
            found = over_seeds(cells[method, count])
            lines.append([method, str(count), *(score_cell(one, seeds) for one in found.values())])
            values.append({name: _values(method, count, one) for name, one in found.items()})
    heads = ["method", "shots", "base", "novel", "harmonic mean"]
    return [Table(heads, lines, title="base to novel", values=values)], [_meaning(seeds)]


def score_cell(score: JoinedScore, seeds: int) -> str:
    """Mean over seeds ± half of Student's interval, then the interval by group."""
    low, high = score.pooled.interval
    half = half_width(score.values)
    spread = f" ± {half:.3f}" if seeds > 1 and not math.isnan(half) else ""
    return f"{score.mean:.3f}{spread} [{low:.3f}, {high:.3f}]"


def _meaning(seeds: int) -> str:
    return (
        f"Mean over {seeds} seeds ± half of Student's 95 % interval over seeds (other shots); in brackets the 95 % "
        "interval by group (other test images, the shots as they are). Neither includes the other."
    )


def _values(method: str, shots: int, score: JoinedScore) -> dict[str, Any]:
    low, high = score.pooled.interval
    return {
        "method": method,
        "shots": shots,
        "values": list(score.values),
        "mean": score.mean,
        "low": low,
        "high": high,
    }
