"""``python -m evaluation soup``, ``wise-ft`` and ``ensemble``: several trained models as one, chosen on validation.

* Model soups: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
  increasing inference time", ICML 2022. ``uniform`` averages all members; ``greedy`` begins with the best one and takes
  each further one, the better first, only if the validation metric does not fall. The result is a run like any other.
* WiSE-FT: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022: weights between the start (α = 0) and
  the end (α = 1) of a fine-tuning, which often keep the gain and most of what was there before.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from evaluation.commands.transfer.base_to_novel import predict_main_task, start_weights_of
from evaluation.statistics.scores import HEADINGS, LOWER_IS_BETTER, MAIN, scores_of
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.files import read_csv, timestamped_directory, write_csv, write_text_atomically
from vitrail.predictions import Predictions
from vitrail.runs import Run, runs_among
from vitrail.runtime import check_device
from vitrail.trust import plain_name
from vitrail.types import LABEL_TASK, kind_of

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from datamodules.base import ImageDataModule
    from lightning_modules.base import VisionTask
    from lightning_modules.checkpoint import State
    from lightning_modules.classification import ScoredTask

    Score = Callable[[State, Sequence[int]], tuple[float, State]]
    "Validation metric of an average of some members, and its weights with statistics that fit them."


_CLASS_PATH = "lightning_modules.Ensemble"

_EPILOG = """\
examples:
  python -m evaluation ensemble runs/products_multitask_deit/TIME runs/products_multitask_mobilevit/TIME
  python -m evaluation ensemble runs/products_multitask_deit/TIME --tta hflip zoom      # one model, three views
"""


def add_ensemble_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ensemble``."""
    command.description = (
        "Keeps the best checkpoints of runs as one model that predicts the mean of their "
        "probabilities. Nothing is chosen or trained. The new run is tested, compared and calibrated like any other."
    )
    command.epilog = _EPILOG
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories; one is enough with --tta")
    command.add_argument(
        "--tta",
        nargs="+",
        default=[],
        metavar="VIEW",
        help="also average over these views of each image: hflip, vflip, zoom (the image as it is always counts)",
    )
    command.add_argument("--name", help="of the new experiment (default: the runs' names, joined)")
    command.add_argument("--to", type=Path, metavar="DIR", help="directory of all runs (default: that of the first)")


def run_ensemble(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Make the run and print the commands to go on with.

    Raises:
        UserError: the runs cannot be averaged.
    """
    from lightning_modules.ensemble import Ensemble, checked_views
    from vitrail.config import dump_yaml

    if options.name is not None:
        plain_name(options.name, "--name")
    runs = runs_among(options.runs, "ensemble", Run.BEST, unfinished_only=True)
    config = config_of(runs[0])
    members = [str(run) for run in runs]
    task = Ensemble(members, tta_views=checked_views(list(dict.fromkeys(["identity", *options.tta]))))
    place = options.to or runs[0].absolute().parent.parent
    name = options.name or _joined_name(runs, options.tta)
    directory = timestamped_directory(place / name)
    arguments = {"members": members, "tta_views": list(task.views), "architectures": task.architectures}
    config |= {
        "name": name,
        "runs": str(place),
        "ckpt_path": None,
        "model": {"class_path": _CLASS_PATH, "init_args": json.loads(json.dumps(arguments))},  # lists for tuples
        # What surrounded the training of one member has nothing to do here.
        "trainer": {**(config.get("trainer") or {}), "callbacks": []},
    }
    _save(directory / Run.BEST, task)
    write_text_atomically(directory / Run.CONFIG, dump_yaml(config))
    checkpoint = shlex.quote(str(directory / Run.BEST))
    sys.stdout.write(
        f"Run directory: {directory}\nGo on with\n"
        f"  python -m experiments test --ckpt_path {checkpoint}\n"
        f"  python -m evaluation compare {shlex.join(map(str, [directory, *runs]))}\n"
    )


def config_of(run: Path) -> dict[str, Any]:
    """Return a run's configuration.

    Raises:
        UserError: the run has none.
    """
    files = Run(run)
    if not files.config:
        raise UserError(f"{run}: {files.missing[0]}; give run directories such as runs/<name>/<time>")
    return dict(files.config)


def _save(path: Path, task: Any) -> None:
    """Write a checkpoint without a trainer."""
    import lightning

    from lightning_modules.checkpoint import write_weights

    checkpoint: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": task.state_dict(),
        # Under the name by which config.yaml knows it, because the two are compared.
        "hyper_parameters": {**task.hparams, "_class_path": _CLASS_PATH},
    }
    task.on_save_checkpoint(checkpoint)
    write_weights(path, checkpoint, checkpoint["state_dict"])


def _joined_name(runs: Sequence[Path], views: Sequence[str]) -> str:
    """Names of the experiments, each once, and of the views."""
    names = list(dict.fromkeys(run.absolute().parent.name for run in runs))
    alone = f"{names[0]}_ensemble" if len(runs) > 1 else names[0]
    name = "_and_".join(names)[:150] if len(names) > 1 else alone  # names of directories are short on every system
    return f"{name}_tta" if views else name


_SAME = ("_class_path", "tasks", "class_names", "task_kinds", "image_size")
"""Hyper-parameters that the members of a soup must share."""


_TOP = 5
"""Trials of a sweep that are averaged by default."""


def add_soup_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``soup``."""
    command.description = "Averages the weights of several runs of one experiment, chosen on validation, as a new run."
    command.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories, at least two")
    command.add_argument("--sweep", type=Path, metavar="DIR", help="the best members of a sweep instead")
    command.add_argument("--top", type=int, metavar="N", help=f"how many of the sweep (default: {_TOP})")
    command.add_argument(
        "--method",
        choices=("uniform", "greedy"),
        default="greedy",
        help="all, or only those that do not make the validation metric fall (default: greedy)",
    )
    command.add_argument("--metric", help="val/… metric to choose by (default: that of the runs' best checkpoints)")
    command.add_argument("--test", action="store_true", help="test the best member and the soup as well")


def run_soup(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Average checkpoints, keep the result as a new run, and print what it was chosen by.

    Raises:
        UserError: the runs do not fit together, or do not measure the metric.
    """
    from lightning_modules.checkpoint import read_checkpoint, write_weights
    from vitrail.config import dump_yaml

    if bool(options.runs) == (options.sweep is not None):
        raise UserError("soup: name either run directories, or one sweep with --sweep DIR --top N")
    if options.top is not None and (options.sweep is None or options.top < 2):
        what = "goes with --sweep DIR; leave it out" if options.sweep is None else "must be at least 2"
        raise UserError(f"--top {options.top}: {what}")
    named = runs_among(options.runs, "soup", Run.BEST, unfinished_only=True)
    runs = named or best_of_sweep(options.sweep, options.top or _TOP)
    configs = [config_of(run) for run in runs]
    checkpoints = [read_checkpoint(run / Run.BEST) for run in runs]
    refuse_strangers(runs, checkpoints, [_data_of(run) for run in runs])
    metric, maximize = _metric(configs[0], options.metric, runs[0])
    states = [checkpoint["state_dict"] for checkpoint in checkpoints]
    evaluator = _Evaluator(runs[0], configs[0], states)
    soup = make_soup(options.method, states, evaluator.score_by(metric), maximize=maximize)

    best = soup.members[0]
    place = soup_folder(runs[0]) if options.runs else _sweep_soup_folder(options.sweep)
    directory = timestamped_directory(place)
    write_weights(directory / Run.BEST, checkpoints[best] | evaluator.thresholds_of(soup.state), soup.state)
    config = configs[best] | {"name": directory.parent.name, "runs": str(directory.parent.parent)}
    write_text_atomically(directory / Run.CONFIG, dump_yaml(config))
    members = [
        {"run": str(runs[member]), metric: score, "kept": member in soup.kept}
        for member, score in zip(soup.members, soup.scores, strict=True)
    ]
    record = {"method": options.method, metric: soup.score, "members": members}
    write_text_atomically(directory / Run.SOUP, json.dumps(record, indent=2) + "\n")

    rows = [
        [str(runs[member]), "yes" if member in soup.kept else "no", f"{score:.4f}"]
        for member, score in zip(soup.members, soup.scores, strict=True)
    ]
    rows.append(["soup", "", f"{soup.score:.4f}"])
    columns = ["run", "in the soup", metric]
    if options.test:
        on_test = metric.replace("val/", "test/", 1)
        columns.append(on_test)
        tested = {0: evaluator.measure(states[best], on_test), len(runs): evaluator.measure(soup.state, on_test)}
        rows = [[*row, f"{tested[place]:.4f}" if place in tested else ""] for place, row in enumerate(rows)]
    chosen = ", chosen on val" if options.method == "greedy" else ""
    title = f"{options.method} soup of {len(soup.kept)} of {len(runs)} runs{chosen}"
    Table(columns, rows, columns[:2], title, styles={len(rows) - 1: "bold"}).show()
    sys.stdout.write(f"{directory / Run.BEST} has the weights of the soup\n")


class Soup(NamedTuple):
    """An average of weights.

    Attributes:
        members: numbers of all members, the best first.
        scores: validation metric of each alone, in this order.
        kept: numbers of those that were averaged.
        score: validation metric of the average.
        state: its weights.
    """

    members: list[int]
    scores: list[float]
    kept: list[int]
    score: float
    state: State


def make_soup(method: str, states: Sequence[State], score: Score, *, maximize: bool) -> Soup:
    """Average all members (``uniform``), or those that do not make the validation metric fall (``greedy``).

    Raises:
        UserError: the metric is a number for no member.
    """
    from lightning_modules.checkpoint import averaged_weights

    alone = np.array([score(state, [number])[0] for number, state in enumerate(states)])
    if np.isnan(alone).all():
        raise UserError("soup: the metric of no member is a number on the validation split, so none can be chosen")
    order = np.argsort(-alone if maximize else alone, kind="stable").tolist()  # NaN last
    kept, best, state = [order[0]], float(alone[order[0]]), states[order[0]]
    if method == "uniform":
        if count := int(np.isnan(alone).sum()):
            raise UserError(
                f"soup: the metric of {count} of {len(alone)} members is not a number on the validation split, and "
                "uniform averages all of them; leave these out, or use --method greedy"
            )
        kept = order
        best, state = score(averaged_weights(states), kept)
    else:
        for number in order[1:]:
            tried = [*kept, number]
            value, candidate = score(averaged_weights([states[member] for member in tried]), tried)
            if (value >= best) if maximize else (value <= best):
                kept, best, state = tried, value, candidate
    return Soup(order, alone[order].tolist(), kept, best, state)


def refuse_strangers(members: Sequence[Path], checkpoints: Sequence[dict[str, Any]], data: Sequence[Any]) -> None:
    """Refuse members whose mean would mean nothing.

    Args:
        members: run directories.
        checkpoints: content of their checkpoints.
        data: what identifies each member's data and division.

    Raises:
        UserError: there are fewer than two, or a member has another network, other classes or other data.
    """
    if len(members) < 2:
        raise UserError(f"a soup needs at least two runs, got {len(members)}; name more of the same experiment")
    places = [run.resolve() for run in members]
    if twice := next((run for run, place in zip(members, places, strict=True) if places.count(place) > 1), None):
        raise UserError(f"{twice}: is named twice, and would count twice in the mean; name each run once")
    first = checkpoints[0]
    if adapters := [name for name in first["state_dict"] if ".lora_" in name]:
        raise UserError(
            f"{members[0]}: has low-rank adapters ({adapters[0]}); the mean of two products is not the product of the "
            "means, so adapters cannot be averaged; fine-tune without lora: for a soup"
        )
    shapes = [{name: tuple(one.shape) for name, one in each["state_dict"].items()} for each in checkpoints]
    for run, other, theirs, fingerprint in zip(members[1:], checkpoints[1:], shapes[1:], data[1:], strict=True):
        own, others = (
            {**each["hyper_parameters"], **(each["hyper_parameters"].get("task_facts") or {})}
            for each in (first, other)
        )
        for key in _SAME:
            if own.get(key) != others.get(key):
                raise UserError(f"{run}: {key} differs from that of {members[0]}; only runs of one experiment average")
        if key := _other_inputs(first, other):
            raise UserError(f"{run}: {key} differs from that of {members[0]}; only runs of one experiment average")
        names = shapes[0].keys() | theirs.keys()
        if different := sorted(name for name in names if shapes[0].get(name) != theirs.get(name)):
            both = [one.get(different[0], "absent") for one in (theirs, shapes[0])]
            raise UserError(
                f"{run}: is another network ({different[0]} is {both[0]} there, {both[1]} in {members[0]}); only the "
                "same networks average"
            )
        if fingerprint != data[0]:
            raise UserError(f"{run}: has other data or another division of them than {members[0]}; train on the same")


def _other_inputs(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs of two checkpoints so that the same weights mean something else: pixels, token ids or pooling."""
    from lightning_modules.ensemble import differing_inputs

    inputs = [each.get("input_options", {}) for each in (first, other)]
    if different := differing_inputs(*inputs):
        return f"image.{different[0][0]}"
    if first.get("tokenizer") != other.get("tokenizer"):
        return "the tokenizer"
    rules = [(each["hyper_parameters"].get("architectures") or {}).get("pooling") for each in (first, other)]
    return "" if rules[0] == rules[1] else "towers.pooling"


def best_of_sweep(folder: Path, top: int) -> list[Path]:
    """Return the run directories of a sweep's best ``top`` trials, the best first.

    Raises:
        UserError: there is no finished sweep, or too few of its trials are complete.
    """
    path = folder / "sweep.csv"
    if not path.is_file():
        raise UserError(f"--sweep {folder}: has no sweep.csv; give the directory of a sweep that has ended")
    frame = read_csv(path)
    complete = frame[frame["state"] == "complete"].head(top)
    if len(complete) < 2:
        raise UserError(f"{path}: {len(complete)} complete trials, and a soup needs at least two (--top {top})")
    runs = []
    for run in map(Path, complete["run"]):
        # Next to the table first: the sweep's directory may have been moved.
        moved = folder / "trials" / run.parent.name / run.name
        runs.append(moved if moved.is_dir() else run)
    return runs


def soup_folder(run: Path) -> Path:
    """Return ``runs/<name>_soup`` for ``runs/<name>/<time>``; for a trial that of its sweep."""
    run = run if len(run.parts) > 2 else run.absolute()
    if run.parent.parent.name == "trials":
        return _sweep_soup_folder(run.parents[2])
    return run.parent.parent / f"{run.parent.name}_soup"


def _sweep_soup_folder(folder: Path) -> Path:
    """``runs/<name>_soup`` for ``runs/sweeps/<name>``."""
    folder = folder if len(folder.parts) > 2 else folder.absolute()
    root = folder.parent.parent if folder.parent.name == "sweeps" else folder.parent
    return root / f"{folder.name}_soup"


class _Evaluator:
    """Measures weights on the data of a run, as the run was validated itself."""

    def __init__(self, run: Path, config: dict[str, Any], states: Sequence[State]) -> None:
        import torch

        from lightning_modules.checkpoint import load_task

        self._task = load_task(run / Run.BEST)
        self._datamodule: ImageDataModule = Run(run).datamodule
        self._datamodule.prepare_data()
        self._datamodule.setup("fit")
        self._datamodule.adopt_image_options(self._task.input_options)
        trainer: dict[str, Any] = config.get("trainer") or {}
        self._settings: dict[str, Any] = {key: trainer.get(key) for key in ("precision", "limit_val_batches")}
        if getattr(self._task, "thresholds", {}):
            cast("ScoredTask", self._task).chooses_thresholds = True
        self._states = states
        self._device = torch.device(check_device("auto"))

    def score_by(self, metric: str) -> Score:
        """The function that soups are chosen by."""
        from lightning_modules.checkpoint import differing_batchnorm, refresh_batchnorm

        def score(state: State, members: Sequence[int]) -> tuple[float, State]:
            self._task.load_state_dict(state)
            layers = differing_batchnorm(self._task, [self._states[number] for number in members])
            if layers:
                self._task.to(self._device)
                refresh_batchnorm(self._task, layers, self._task.image_features, self._train_images())
                state = {name: value.detach().cpu().clone() for name, value in self._task.state_dict().items()}
            return self.measure(state, metric), state

        return score

    def measure(self, state: State, metric: str) -> float:
        """A metric of the validation or the test split, as a run logs it."""
        if metric.startswith("test/"):
            self.thresholds_of(state)
        self._task.load_state_dict(state)
        measured = _measured(
            self._task, self._datamodule, "test" if metric.startswith("test/") else "val", self._settings
        )
        if metric not in measured:
            raise UserError(f"--metric {metric}: the task does not measure it; it has {', '.join(sorted(measured))}")
        return float(measured[metric])

    def thresholds_of(self, state: State) -> dict[str, Any]:
        """The part of a checkpoint with the thresholds of multi-label tasks for some weights, chosen on validation."""
        self._task.load_state_dict(state)
        return chosen_thresholds(self._task, self._datamodule, self._settings)

    def _train_images(self) -> Iterator[torch.Tensor]:
        """Training images without augmentation."""
        for batch in self._datamodule.eval_dataloader("train"):
            yield batch["image"].to(self._device)


def chosen_thresholds(task: VisionTask, datamodule: ImageDataModule, settings: dict[str, Any]) -> dict[str, Any]:
    """Choose the thresholds of multi-label tasks on validation for new weights; return a checkpoint's part of them.

    Those of the checkpoint that the weights were made from belong to other probabilities.
    """
    if not getattr(task, "thresholds", {}):
        return {}
    scored = cast("ScoredTask", task)
    scored.chooses_thresholds = True
    _measured(task, datamodule, "val", settings)
    return {"thresholds": {name: list(values) for name, values in scored.thresholds.items()}}


def _measured(task: VisionTask, datamodule: ImageDataModule, split: str, settings: dict[str, Any]) -> Mapping[str, Any]:
    """All metrics of the validation or the test split."""
    from lightning.pytorch import Trainer

    with _quiet():
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **settings,
        )
        stage = trainer.test if split == "test" else trainer.validate
        [measured] = stage(task, datamodule=datamodule, verbose=False)
    return measured


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the lines that each new trainer writes."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _data_of(run: Path) -> Any:
    """What identifies data and their division."""
    if not (run / Run.RECORD).is_file():
        raise UserError(f"{run}: has no run.json, so its data are not known; give directories that `fit` has made")
    data = Run(run).record.get("data") or {}
    return data.get("fingerprint"), data.get("samples")


def _metric(config: dict[str, Any], asked: str | None, run: Path) -> tuple[str, bool]:
    """The metric that soups are chosen by, and whether higher is better."""
    chosen = config.get("checkpoint") or {}
    if not (isinstance(chosen, dict) and {"monitor", "mode"} <= chosen.keys()):
        raise UserError(
            f"{run / Run.CONFIG}: has no checkpoint.monitor and checkpoint.mode; give runs that `fit` has made"
        )
    metric = asked or chosen["monitor"]
    if not metric.startswith("val/"):
        raise UserError(f"--metric {metric}: a soup is chosen on the validation split; name a val/… metric")
    lower_is_better = metric.rpartition("/")[2] in (*LOWER_IS_BETTER, "loss", "median_rank")
    return metric, chosen["mode"] == "max" if metric == chosen["monitor"] else not lower_is_better


def add_wise_ft_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``wise-ft``."""
    command.description = (
        "Evaluates weights between start and end of a fine-tuning (callbacks.StartWeights) and keeps the best on "
        "validation."
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory with checkpoints/start.ckpt")
    command.add_argument(
        "--alphas",
        type=float,
        nargs="+",
        default=[number / 10 for number in range(11)],
        help="shares of the end, 0 to 1 (default: 0 to 1 in tenths)",
    )


def run_wise_ft(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Evaluate the mixtures, save the best one, and print the table."""
    from lightning_modules.checkpoint import interpolated_weights, read_checkpoint, write_weights

    if not all(0 <= alpha <= 1 for alpha in options.alphas):
        raise UserError(f"--alphas: must be in [0, 1], got {' '.join(map(str, options.alphas))}")
    run = Run(options.run)
    datamodule = run.datamodule
    datamodule.prepare_data()
    datamodule.setup("test")
    start, end = (read_checkpoint(path) for path in (start_weights_of(options.run), run.checkpoint()))
    weights = start["state_dict"], end["state_dict"]
    base_classes = getattr(datamodule, "base_classes", 0)
    task, score = run.load_model(), MAIN[kind_of(datamodule.task_kinds, LABEL_TASK)]
    mixtures = evaluate_mixtures(task, *weights, datamodule, options.alphas, base_classes)
    chosen = best_mixture(mixtures, score)
    mixed, state = run.path / Run.CHECKPOINTS / "wise_ft.ckpt", interpolated_weights(*weights, chosen)
    task.load_state_dict(state)
    write_weights(mixed, end | chosen_thresholds(task, datamodule, {}), state)
    _write_report(run.path, mixtures, score)
    mixtures_table(mixtures, chosen, score).show()
    sys.stdout.write(f"{mixed} has the weights of α = {chosen:g}\n")


def evaluate_mixtures(
    task: VisionTask, start: State, end: State, datamodule: ImageDataModule, alphas: Sequence[float], base_classes: int
) -> pd.DataFrame:
    """Measure weights between the start and the end of a fine-tuning by the main score of the main task's kind.

    Args:
        task: takes the weights; zero-shot classes are computed again for each.
        start: weights at the beginning.
        end: weights at the end.
        datamodule: gives the validation and test splits.
        alphas: shares of the end, in [0, 1].
        base_classes: number of classes that were trained, the first in label order; 0 for all, and for tasks without
            a single class.

    Returns:
        A row for each α; columns ``alpha``, ``val``, ``test`` and, where only some classes were trained, ``base`` and
        ``novel``: accuracy on the test samples of these and of the other classes, each among its own.
    """
    import pandas as pd
    from rich.console import Console
    from rich.progress import track

    from evaluation.statistics.base_to_novel import restricted_accuracy
    from lightning_modules.checkpoint import interpolated_weights

    rows = []
    for alpha in track(alphas, "evaluating mixtures", console=Console(stderr=True)):
        task.load_state_dict(interpolated_weights(start, end, alpha))
        val, test = (predict_main_task(task, datamodule, split) for split in ("val", "test"))
        row = {"alpha": alpha, "val": _main_score(val, base_classes), "test": _main_score(test, 0)}
        if base_classes:
            kept = test.known(LABEL_TASK)
            on_test = test.targets[LABEL_TASK][kept], test.logits[LABEL_TASK][kept], base_classes
            row["base"], row["novel"] = restricted_accuracy(*on_test), restricted_accuracy(*on_test, novel=True)
        rows.append(row)
    return pd.DataFrame(rows)


def _main_score(predictions: Predictions, base_classes: int) -> float:
    """Main score of the main task over its known targets, among the first classes where there are base classes; NaN."""
    if not len(predictions.known(LABEL_TASK)):
        return math.nan
    if base_classes:  # the validation split has no others
        names, logits = predictions.tasks[LABEL_TASK][:base_classes], predictions.logits[LABEL_TASK][:, :base_classes]
        predictions = replace(predictions, tasks={LABEL_TASK: names}, logits={LABEL_TASK: logits})
    score = scores_of(predictions, LABEL_TASK)[MAIN[predictions.kind(LABEL_TASK)]]
    return float(score.statistic(np.ones((1, len(predictions.known(LABEL_TASK)))))[0])


def best_mixture(mixtures: pd.DataFrame, score: str = "accuracy") -> float:
    """Return the α that is best on validation; of equal ones the nearest to the start, which has lost least.

    Raises:
        UserError: the score is not defined, as where no validation sample has a known target.
    """
    if mixtures["val"].isna().any():
        raise UserError("wise-ft: no sample of the validation split has a known target, so α cannot be chosen")
    best = mixtures["val"].min() if score in LOWER_IS_BETTER else mixtures["val"].max()
    return float(mixtures.loc[mixtures["val"] == best, "alpha"].min())


def mixtures_table(mixtures: pd.DataFrame, chosen: float, score: str = "accuracy") -> Table:
    """Return the mixtures as a table with the chosen one in bold."""
    from evaluation.tables.summary import number_text

    columns = {"val": mixtures["val"], "test": mixtures["test"]}
    if "base" in mixtures:
        base, novel = mixtures["base"], mixtures["novel"]
        total = base + novel
        columns |= {"base": base, "novel": novel}
        columns["harmonic mean"] = (2 * base * novel / total.where(total != 0, 1)).astype(float)
    values = zip(mixtures["alpha"], *columns.values(), strict=True)
    rows = [[f"{alpha:g}", *(number_text(score, value) for value in of_alpha)] for alpha, *of_alpha in values]
    bold = {place: "bold" for place, alpha in enumerate(mixtures["alpha"]) if alpha == chosen}
    return Table(["α", *columns], rows, title=f"WiSE-FT: {HEADINGS[score]}; α chosen on val", styles=bold)


def _write_report(folder: Path, mixtures: pd.DataFrame, score: str) -> None:
    """Write ``reports/wise_ft.csv`` and ``figures/wise_ft.png`` of a run directory."""
    from evaluation.report.figures import blank_figure, save_figure

    frame = mixtures.dropna(axis=1)
    write_csv(folder / Run.REPORTS / "wise_ft.csv", frame)
    figure = blank_figure(5, 3.5, dpi=100)
    axes = figure.add_subplot()
    for column in frame.columns[1:]:
        axes.plot(frame["alpha"], frame[column], marker="o", label=column)
    axes.set(xlabel="α: 0 before, 1 after fine-tuning", ylabel=HEADINGS[score])
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, folder / Run.FIGURES / "wise_ft.png")
