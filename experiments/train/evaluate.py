"""``vitrail evaluate RUN --data DATA``: a run's model on another data set, all of which is the test set.

The classes are the model's: labels are matched with them by name, or by ``--class-map``, and images of other classes
count as unknown. What comes of it is kept in ``RUN/evaluations/NAME``, laid out as a run, so ``summary``, ``report``
and ``compare`` take it. With ``--corrupt`` the images of these data, or of the run's own test split, have faults.

``vitrail evaluate RUN --class-map MAP``: folders or values of a data set that are called otherwise than the classes.

ImageNet-V2 numbers its folders, ImageNet-R, -A and -Sketch name them by WordNet, and ObjectNet has names of its own,
some of which stand for several classes. Such classes are one class in the results, whose logit is the largest of
theirs, so that a prediction counts as right if it is any of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.commands.compare import add_metrics
from evaluation.statistics.scores import checked_names
from experiments.train.options import (
    add_column_arguments,
    column_options,
    columns_of_table,
    is_own_data,
    own_data_section,
)
from vitrail.config import dump_yaml, read_experiment
from vitrail.errors import UserError
from vitrail.files import rename, write_text_atomically
from vitrail.predictions import Predictions, known_rows, read_predictions, write_predictions
from vitrail.runs import Run
from vitrail.runtime import check_device
from vitrail.trust import plain_name
from vitrail.types import CLASS_KINDS, LABEL_TASK, UNKNOWN, TaskKind

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule
    from lightning_modules.base import VisionTask


ClassMap = Mapping[str, Sequence[str]]
"""The model's classes that each name of the data set stands for; one or more."""

_SEPARATOR = ";"


def read_class_map(given: str, names: Sequence[str], classes: Sequence[str]) -> ClassMap:
    """Return which of the model's classes the names of a data set stand for.

    Args:
        given: ``index`` for numbers of the model's classes from 0, ``imagenet`` for WordNet's names (``n01440764``) as
            timm has them, or a file: CSV with a name and a class a row, after a header, or JSON of names and classes.
            Several classes of a name are rows of their own, a list, or have ``;`` between them.
        names: of the data set.
        classes: of the model.

    Raises:
        UserError: the map cannot be read, has no class of the model's, or gives one class to two names.
    """
    if given == "index":
        found = {name: [classes[int(name)]] for name in names if name.isdecimal() and int(name) < len(classes)}
    elif given == "imagenet":
        found = _imagenet(names, classes)
    else:
        found = {name: own for name, own in _file(given).items() if name in names}
    known = set(classes)
    found = {name: kept for name, own in found.items() if (kept := [one for one in own if one in known])}
    if not found:
        raise UserError(
            f"--class-map {given}: maps none of the names ({', '.join(names[:3])} …) to a class of the model's "
            f"({', '.join(classes[:3])} …); give a CSV file with a name and a class a row"
        )
    if twice := [one for one, count in Counter(one for own in found.values() for one in own).items() if count > 1]:
        both = [name for name, own in found.items() if twice[0] in own]
        raise UserError(f"--class-map {given}: class {twice[0]!r} is given to {' and '.join(both[:2])}; keep one")
    return found


def _imagenet(names: Sequence[str], classes: Sequence[str]) -> dict[str, list[str]]:
    """Match by WordNet's name, its description, or one of the words in it that no other class of ImageNet has."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    descriptions = {name: info.label_name_to_description(name) for name in info.label_names()}
    words = {name: [part.strip() for part in text.split(",")] for name, text in descriptions.items()}
    count = Counter(one for name, own in words.items() for one in {*map(_plain, own), _plain(descriptions[name])})
    place = {_plain(name): name for name in classes}
    found = {}
    for name in names:
        if name in words:
            # "crane" is a bird and a machine: what two classes are called means neither.
            own = [one for one in (descriptions[name], *words[name]) if count[_plain(one)] == 1]
            called = [name, *own]
            if matches := [place[_plain(one)] for one in called if _plain(one) in place]:
                found[name] = matches[:1]
    return found


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _file(path: str) -> dict[str, list[str]]:
    import pandas as pd

    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--class-map {path}: must be index, imagenet, or a CSV or JSON file; there is no such file")
    try:
        if file.suffix.lower() == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            pairs = [(str(name), own) for name, own in content.items()]
        else:
            frame = pd.read_csv(file, dtype=str, keep_default_na=False)
            pairs = list(zip(frame.iloc[:, 0], frame.iloc[:, 1], strict=True))
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"--class-map {path}: must have names and classes ({error})") from error
    found: dict[str, list[str]] = {}
    for name, own in pairs:
        several = own if isinstance(own, list) else str(own).split(_SEPARATOR)
        found.setdefault(name.strip(), []).extend(one for part in several if (one := str(part).strip()))
    return found


def merged_classes(predictions: Predictions, mapped: ClassMap) -> Predictions:
    """Return predictions in which classes that one name stands for are one class, called like the first of them."""
    if LABEL_TASK not in predictions.tasks:
        return predictions
    old = list(predictions.tasks[LABEL_TASK])
    first = {one: own[0] for own in mapped.values() for one in own}
    names = list(dict.fromkeys(first.get(name, name) for name in old))
    members = [[place for place, name in enumerate(old) if first.get(name, name) == kept] for kept in names]
    own = predictions.logits[LABEL_TASK]
    logits: Any = np.stack([own[:, places].max(axis=1) for places in members], axis=1)
    targets = predictions.targets[LABEL_TASK]
    place = np.array([*(names.index(first.get(name, name)) for name in old), UNKNOWN], dtype=np.int64)
    return replace(
        predictions,
        tasks={**predictions.tasks, LABEL_TASK: names},
        logits={**predictions.logits, LABEL_TASK: logits},
        targets={**predictions.targets, LABEL_TASK: place[targets]},
    )


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``evaluate``."""
    command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    command.add_argument(
        "--data",
        metavar="DATA",
        help="folder of class folders, table (CSV, Parquet, JSON Lines), experiment file, or a class such as Wares; "
        "with --corrupt by default the run's own test split",
    )
    add_column_arguments(command, with_split=False)
    command.add_argument("--name", default="", help="of the results (default: that of the data)")
    command.add_argument(
        "--restrict-classes",
        action="store_true",
        help="let the model choose among the classes that the data have; recorded with the results",
    )
    command.add_argument(
        "--class-map",
        default="",
        metavar="MAP",
        help="what the data's classes are called by the model: index (numbers from 0), imagenet (n01440764), or a CSV "
        "or JSON file of names and classes",
    )
    add_metrics(command)
    command.add_argument("--device", default="auto", help="such as cpu, cuda, cuda:1 or mps (default: auto)")
    command.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")
    command.add_argument("--markdown", action="store_true", help="print Markdown tables")
    faults = command.add_argument_group("images with faults")
    faults.add_argument(
        "--corrupt",
        nargs="+",
        default=[],
        metavar="NAME",
        help="imagenet-c (fifteen of them), consistency (flip and shift), or single ones: fog, jpeg, resolution …",
    )
    faults.add_argument(
        "--severities", nargs="+", type=int, default=[], metavar="N", help="only these (default: all of a corruption)"
    )
    faults.add_argument("--limit", type=int, default=0, metavar="N", help="only N images, chosen at random, seeded")


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Evaluate, and print the scores.

    Raises:
        UserError: the data have no class of the model's, or run and data cannot be read.
    """
    opened, metrics = Run(options.run), checked_names(options.metrics)
    _refuse_without_effect(options)
    if options.calibrated and not opened.is_calibrated:
        raise UserError(f"{opened.path}: is not calibrated; run `vitrail calibrate {opened.path}` first")
    wanted: dict[str, list[int]] = {}
    if options.corrupt:
        from experiments.train.robustness import chosen

        wanted = chosen(options.corrupt, options.severities)
    if not options.data and not wanted:
        raise UserError("evaluate: give --data DATA, or --corrupt NAME for the run's own test split with faults")
    device = check_device(options.device)
    model: VisionTask = opened.load_model(device=device)
    classes = list(getattr(model, "tasks", {}).get(LABEL_TASK, []))
    if not options.data:
        _corrupt(options, opened, model, _own_test_set(opened, rest, model, options.batch_size), wanted, "test", {})
        return
    section = _data_section(options, opened)
    name = plain_name(options.name or _name(options.data), "--name")
    _refuse_taken(name, section, opened, corrupt=bool(wanted))
    if is_own_data(options.data):
        section = _with_kinds(section, getattr(model, "task_kinds", {}))
    data, mapped = _test_set(section, rest, model, options.batch_size, options.class_map, classes)
    if wanted:
        _corrupt(options, opened, model, data, wanted, name, mapped)
        return
    final = opened.path / Run.EVALUATIONS / name
    unfinished = final.with_name(f".{name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    _test(model, data, unfinished, opened, device)
    facts = {
        "run": str(opened.path),
        "checkpoint": str(opened.checkpoint()),
        "restricted": options.restrict_classes,
        "class_map": mapped,
        "unknown_classes": data.table.unseen,
        "in_training": _in_training(opened, data),
    }
    file = unfinished / Run.PREDICTIONS / "test.parquet"
    if (options.restrict_classes or mapped) and file.exists():
        changed = _changed(read_predictions(file), mapped, restricted=options.restrict_classes)
        write_predictions(file, changed)
        facts["classes"] = {task: list(names) for task, names in changed.tasks.items()}
    _describe(unfinished, opened, section, facts)
    shutil.rmtree(final, ignore_errors=True)
    rename(unfinished, final)
    _report(final, facts, file.name, metrics, calibrated=options.calibrated, as_markdown=options.markdown)


def _refuse_without_effect(options: argparse.Namespace) -> None:
    """Refuse options that would change nothing in what is asked for, and numbers that are too small."""
    for name in ("batch_size", "limit"):
        if getattr(options, name) < (name == "batch_size"):
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1; got {getattr(options, name)}")
    of_table = column_options(options)
    of_faults = "is of images with faults, --corrupt NAME; leave it out"
    of_others = "leave it out where the images are those of the run's own test split"
    without = {} if options.corrupt else dict.fromkeys(("severities", "limit"), of_faults)
    if options.corrupt:
        without = dict.fromkeys(("metrics", "calibrated"), "images with faults have the main scores only; leave it out")
        without |= {} if options.data else dict.fromkeys(("name", "class_map", *of_table), of_others)
    for name, why in without.items():
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: {why}")
    if options.data and of_table and not is_own_data(options.data):
        raise UserError(f"--{of_table[0]}: is about the columns of a table, which {options.data} is not; leave it out")


def _refuse_taken(name: str, section: Mapping[str, Any], opened: Run, *, corrupt: bool) -> None:
    """Refuse a name under which the run keeps results of other data."""
    if corrupt and name == "test":
        raise UserError("--name: test are the results of the run's own test split; give these data another --name")
    folder = opened.path / Run.EVALUATIONS / name
    if corrupt or not (folder / Run.CONFIG).is_file():
        return
    before = _source(Run(folder).config.get("data") or {})
    if before and before != _source(section):
        raise UserError(f"--name: {folder} has the results of {before}; give these another --name, or delete it")


def _source(section: Mapping[str, Any]) -> str:
    """Where a ``data:`` section has its images from."""
    arguments = section.get("init_args") or {}
    path = arguments.get("path") or arguments.get("root")
    return str(Path(path).expanduser().resolve()) if isinstance(path, str) else str(section.get("class_path", ""))


def _corrupt(
    options: argparse.Namespace,
    opened: Run,
    model: VisionTask,
    data: ImageDataModule,
    wanted: Mapping[str, Sequence[int]],
    name: str,
    mapped: ClassMap,
) -> None:
    """Evaluate on images with faults, and print the tables."""
    from experiments.train.robustness import evaluate_corrupted

    data.prepare_data()
    data.setup("test")
    restricted = options.restrict_classes
    parts = [name, f"limit{options.limit}" if options.limit else "", "restricted" if restricted else ""]
    found = evaluate_corrupted(
        opened,
        model,
        data,
        "_".join(part for part in parts if part),
        wanted,
        batch_size=options.batch_size,
        limit=options.limit,
        change=partial(_changed, mapped=mapped, restricted=restricted) if mapped or restricted else None,
        restricted=restricted,
        class_map=mapped,
    )
    for task in found.tasks:
        found.table(task).show(as_markdown=options.markdown)
        sys.stdout.write("\n" if options.markdown else "")
    sys.stdout.writelines(f"{'* ' if options.markdown else ''}{sentence}\n" for sentence in found.sentences())
    if not options.markdown:
        sys.stdout.write(f"Results: {found.folder}\n")


def _own_test_set(opened: Run, rest: Sequence[str], model: VisionTask, batch_size: int) -> ImageDataModule:
    """Return the run's own data with the model's preprocessing."""
    data: ImageDataModule = opened.load_datamodule(rest)
    data.loader_options = replace(data.loader_options, batch_size=batch_size)
    data.image_options = {**model.input_options}
    return data


def _data_section(options: argparse.Namespace, opened: Run) -> dict[str, Any]:
    if is_own_data(options.data):
        theirs: dict[str, Any] = (opened.config.get("data") or {}).get("init_args") or {}
        # Classes are the model's: here, others are unknown and no mistake.
        of_run = columns_of_table(opened.config)
        columns = {key: value for key, value in of_run.items() if key not in ("kinds", "classes")}
        own = own_data_section(options, columns)[0]
        if missing := (theirs.get("checks") or {}).get("missing"):
            own["init_args"]["checks"] = {"missing": missing}
        return own
    if options.data.endswith((".yaml", ".yml")):
        section = read_experiment(options.data).get("data")
        if not isinstance(section, dict):
            raise UserError(f"--data {options.data}: has no data: section; give an experiment file or a folder")
        return section
    return {"class_path": options.data if "." in options.data else f"datamodules.{options.data}"}


def _with_kinds(section: dict[str, Any], kinds: Mapping[str, TaskKind]) -> dict[str, Any]:
    """Return the section of a table whose columns have the kinds of the model's tasks, where none is given.

    A few numbers, or lists of few labels, are not recognised as such.
    """
    arguments = section["init_args"]
    columns = arguments.get("columns", {})
    labels = [name for name in (columns.get("label"), *columns.get("labels", [])) if name]
    own = {labels[0] if task == LABEL_TASK else task: kind for task, kind in kinds.items()} if labels else {}
    known = {name: kind for name, kind in own.items() if name in labels and kind not in CLASS_KINDS}
    if not known:
        return section
    columns = {**columns, "kinds": {**known, **columns.get("kinds", {})}}
    return {**section, "init_args": {**arguments, "columns": columns}}


def _name(data: str) -> str:
    path = Path(data).expanduser()
    return (path.resolve().name if path.is_dir() else path.stem) or "data"


def _test_set(
    section: Mapping[str, Any],
    rest: Sequence[str],
    model: VisionTask,
    batch_size: int,
    class_map: str,
    classes: Sequence[str],
) -> tuple[ImageDataModule, ClassMap]:
    """Return the data, all of them the test split, with the model's classes and preprocessing, and what names mean."""
    from datamodules.cli import load_datamodule

    data = load_datamodule({"data": dict(section)}, rest, "vitrail evaluate")
    data.loader_options = replace(data.loader_options, batch_size=batch_size)
    data.image_options = {**model.input_options}
    mapped = read_class_map(class_map, data.class_names, classes) if class_map else {}
    names = {name: own[0] for name, own in mapped.items()}
    data.as_test_set(getattr(model, "tasks", {}), getattr(model, "task_kinds", {}), names)
    has_labels = any(known_rows(targets).any() for targets in data.table.targets.values())
    if not has_labels and not (data.own_captions and hasattr(model, "encode_text")):
        raise UserError(
            f"{data.table.origin}: has no labels of the tasks {', '.join(data.tasks) or '(none)'}, and no captions for "
            "a dual encoder; name their columns, or predict without labels: vitrail predict"
        )
    return data, mapped


def _test(model: VisionTask, data: ImageDataModule, directory: Path, opened: Run, device: str) -> None:
    from lightning.pytorch import Trainer

    from callbacks.outputs import PredictionWriter
    from callbacks.retrieval_metrics import RetrievalMetrics
    from experiments.train.cli import quieten
    from experiments.train.run_record import RunRecorder

    quieten()
    directory.mkdir(parents=True)
    kind, _, number = device.partition(":")
    recorder = RunRecorder(directory, opened.name, int(opened.config.get("seed_everything", 42)), opened.checkpoint())
    trainer = Trainer(
        accelerator={"cuda": "gpu"}.get(kind, kind),
        devices=[int(number)] if number else 1,
        logger=False,
        default_root_dir=str(directory),
        callbacks=[PredictionWriter(["test"]), RetrievalMetrics(), recorder],
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.test(model, datamodule=data, verbose=False)


def _changed(predictions: Predictions, mapped: ClassMap, *, restricted: bool) -> Predictions:
    """Join classes that one name stands for, and leave only the classes that occur where asked."""
    whole = merged_classes(predictions, mapped)
    if not restricted:
        return whole
    tasks: dict[str, Sequence[str]] = dict(whole.tasks)
    targets, logits = dict(whole.targets), dict(whole.logits)
    for task, names in whole.tasks.items():
        if whole.kind(task) != "single_label":
            continue
        there = np.unique(whole.targets[task][whole.targets[task] >= 0])
        place = np.full(len(names) + 1, -1, dtype=np.int64)
        place[there] = np.arange(len(there))
        tasks[task] = [names[index] for index in there.tolist()]
        targets[task] = place[whole.targets[task]]  # -1 is the last entry
        logits[task] = whole.logits[task][:, there]
    kept = [task for task in tasks if known_rows(targets[task]).any()]
    return replace(
        whole,
        tasks={task: tasks[task] for task in kept},
        targets={task: targets[task] for task in kept},
        logits={task: logits[task] for task in kept},
        kinds={task: kind for task, kind in whole.kinds.items() if task in kept},
    )


def _in_training(opened: Run, data: ImageDataModule) -> int | None:
    """Return how many images have the same pixels as one that the run was trained on; None where that is not known."""
    try:
        own = opened.load_datamodule()
        trained = None if own.generated or data.generated else own.verification()
    except UserError:
        return None
    ours = None if trained is None else data.verification()
    if trained is None or ours is None or {trained.mode, ours.mode} != {"full"}:
        return None
    known = {row.tobytes() for row in trained.content[own.table.split_indices("train")]}
    return sum(row.tobytes() in known for row in ours.content[ours.readable])


def _describe(directory: Path, opened: Run, section: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the configuration, and add to the record what was evaluated."""
    config = {**opened.config, "data": dict(section), "name": directory.name}
    write_text_atomically(directory / Run.CONFIG, dump_yaml(config))
    path = directory / Run.RECORD
    record = json.loads(path.read_text(encoding="utf-8"))
    # Constant predictions are chosen on the training data: the most frequent class, the median.
    trained = opened.record.get("data") or {}
    counts = trained.get("class_counts") or {}
    if kept := facts.get("classes"):
        joined = {one: own[0] for own in facts["class_map"].values() for one in own}
        first = {task: joined if task == LABEL_TASK else {} for task in kept}
        counts = {
            task: [_sum(counts[task], opened.model.tasks[task], name, first[task]) for name in names]
            for task, names in kept.items()
            if task in counts
        }
    record["data"] |= {
        "class_counts": counts,
        "train_samples": (trained.get("samples") or {}).get("train", 0),
        **{name: trained.get(name, {}) for name in ("target_stats", "target_medians")},
    }
    write_text_atomically(path, json.dumps({**record, "evaluation": dict(facts)}, indent=2) + "\n")


def _sum(counts: Sequence[int], classes: Sequence[str], name: str, first: Mapping[str, str]) -> int:
    """Training samples of a class, and of those that are joined with it."""
    return sum(count for count, one in zip(counts, classes, strict=True) if first.get(one, one) == name)


def _report(
    directory: Path,
    facts: Mapping[str, Any],
    predictions: str,
    metrics: Sequence[str],
    *,
    calibrated: bool,
    as_markdown: bool,
) -> None:
    from evaluation.tables.summary import show_summaries, summarise_run

    if (directory / Run.PREDICTIONS / predictions).exists():
        show_summaries(summarise_run(directory, "test", metrics, calibrated=calibrated), as_markdown=as_markdown)
    for task, counts in facts["unknown_classes"].items():
        if counts:
            shown = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:5])
            sys.stdout.write(f"{task}: {sum(counts.values())} images of classes that the model lacks: {shown}\n")
    if facts["in_training"]:
        sys.stdout.write(f"Warning: {facts['in_training']} images are in the run's training split, pixel by pixel.\n")
    elif facts["in_training"] is None:
        sys.stdout.write("Not checked: whether images are in the run's training split; its data are not at hand.\n")
    sys.stdout.write(f"Results: {directory}\n")
