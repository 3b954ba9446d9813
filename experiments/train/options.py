"""Options of ``fit``, ``validate``, ``test`` and ``predict`` that belong to no class, and the help in short.

``fit --data PATH``: a folder or a table of one's own becomes an experiment.

What is trained is ``my_images.yaml`` (labels) or ``my_captions.yaml`` (captions only), with the data set, the size of
the weights' images and the cores at hand filled in. The experiment is kept in the run directory, to be edited.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from experiments.train.opened_run import parent_checkpoint
from vitrail.config import dump_yaml, merged, read_experiment
from vitrail.errors import UserError
from vitrail.runs import Run
from vitrail.types import DEFAULT_SEED, LABEL_TASK, Resize, kind_of

EXPERIMENT = "experiment.yaml"
"""File in the run directory."""

_YAMLS = Path(__file__).parents[1]
_OF_ONE_CLASS = ("root", "path", "columns")
_ROLES = ("image", "label", "labels", "group", "split", "caption")


def own_data(args: Sequence[str]) -> tuple[list[str], str]:
    """Return arguments of ``fit`` with ``--data PATH`` and what belongs to it made an experiment, and its YAML.

    Args:
        args: as the user gave them.

    Returns:
        The arguments, and the experiment's text; the same arguments and no text where ``--data`` is not a path.

    Raises:
        UserError: the data or the options do not fit each other.
    """
    if not args or args[0] != "fit":
        return list(args), ""
    if len(args) == 1:
        raise UserError(NOTHING_TO_TRAIN)
    try:
        options, rest = _parser().parse_known_args(list(args[1:]))
    except argparse.ArgumentError as error:
        if "--data" not in args and not any(one.startswith("--data=") for one in args):
            return list(args), ""
        raise UserError(f"fit --data: {error}") from error
    if not options.data or not is_own_data(options.data):
        return list(args), ""
    if options.epochs is not None and options.epochs < 1:
        raise UserError(f"--epochs: must be at least 1; got {options.epochs}")
    content = own_experiment(options) if not options.parent else _data_for(options)
    for path in options.config:
        content = merged(content, read_experiment(path))
    if options.epochs:
        _set_epochs(content.setdefault("trainer", {}), options.epochs)
    text = "" if options.parent else dump_yaml(content)
    rest += ["--from", options.parent] if options.parent else []
    name = [] if any(one == "--name" or one.startswith("--name=") for one in rest) else ["--name", _name(options.data)]
    return ["fit", "--config", dump_yaml(content, one_line=True), *name, *rest], text


def own_experiment(options: argparse.Namespace) -> dict[str, Any]:
    """Return the experiment that ``fit --data`` trains.

    Args:
        options: ``data``, the roles of columns, ``sep``, ``root``, ``backbone``, ``pretrained`` and ``fit``.

    Raises:
        UserError: the data have neither labels nor captions, or options do not belong to them.
    """
    data, tasks = own_data_section(options)
    content = read_experiment(_YAMLS / ("my_images.yaml" if tasks else "my_captions.yaml"))
    if tasks:
        _set_backbone(content["model"]["init_args"], options)
        data["init_args"]["image"] = {"size": _image_size(content["model"]["init_args"]["backbone"])}
        if len(tasks) > 1:
            content["model"]["class_path"] = "lightning_modules.MultiTaskClassifier"
        content["checkpoint"] |= _selection(data["init_args"])
    elif options.pretrained:
        raise UserError(
            f"--pretrained {options.pretrained}: is about a classifier's backbone, and {options.data} has captions "
            "only; leave it out, or name the weights' folder with --backbone"
        )
    elif options.backbone:
        content["model"]["init_args"]["towers"]["model"] = options.backbone
    if options.fit:
        data["init_args"]["image"] = {**data["init_args"].get("image", {}), "resize": options.fit}
    # The data set's class may be another one than the YAML's, its shared options are not.
    shared = {key: value for key, value in content["data"]["init_args"].items() if key not in _OF_ONE_CLASS}
    content["data"] = {**data, "init_args": merged(shared, data["init_args"])}
    return content


def _data_for(options: argparse.Namespace) -> dict[str, Any]:
    """The data section alone, with images as those of the run that ``--from`` names."""
    if given := [name for name in ("backbone", "pretrained") if getattr(options, name)]:
        raise UserError(f"--{given[0]}: backbone and weights are those of --from {options.parent}; leave one out")
    run = parent_checkpoint(options.parent).parents[1]
    theirs = (read_experiment(run / Run.CONFIG).get("data") or {}).get("init_args") or {}
    data, _ = own_data_section(options, columns_of_table(read_experiment(run / Run.CONFIG)))
    shared = {key: theirs[key] for key in ("image", "augment", "loader") if theirs.get(key)}
    if options.fit:
        data["init_args"]["image"] = {"resize": options.fit}
    return {"data": {**data, "init_args": merged(shared, data["init_args"])}}


def own_data_help() -> str:
    """Return the section of ``fit --help`` about ``--data FOLDER`` and ``--data TABLE``."""
    text = _parser().format_help()
    return text[text.index("your own images:") :]


NOTHING_TO_TRAIN = (
    "fit: name what to train: `vitrail fit --data FOLDER_OR_TABLE` for your own images, or `vitrail fit --config "
    "quickstart` for an experiment that comes with Vitrail; `vitrail fit --help` lists the options"
)


def _selection(arguments: Mapping[str, Any]) -> dict[str, str]:
    """What chooses the best epoch by the kind of a table's main task; nothing where that is one class."""
    from datamodules.table_file import TableColumns

    columns = arguments.get("columns")
    kind = "" if columns is None else kind_of(TableColumns.of(columns).task_kinds, LABEL_TASK)
    if kind == "multi_label":
        # F1 is measured at thresholds chosen on the same samples: always predicting every label may look best.
        return {"monitor": f"val/{LABEL_TASK}/mAP", "mode": "max"}
    return {"monitor": f"val/{LABEL_TASK}/rmse", "mode": "min"} if kind == "regression" else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    group = parser.add_argument_group("your own images")
    group.add_argument(
        "--data", default="", metavar="PATH", help="folder of class folders, or a table: CSV, Parquet, JSON Lines"
    )
    group.add_argument(
        "--backbone", default="", metavar="NAME", help="of timm; for captions alone a folder or name of a dual encoder"
    )
    group.add_argument(
        "--pretrained", default="", metavar="true|false|FILE", help="weights to start with (default: those of the name)"
    )
    group.add_argument("--epochs", type=int, metavar="N", help="(default: those of my_images.yaml or my_captions.yaml)")
    group.add_argument(
        "--fit",
        choices=get_args(Resize),
        help="what becomes of the aspect ratio: crop the center, pad with gray, or squash (default: crop)",
    )
    group.add_argument(
        "--config", "-c", action="append", default=[], metavar="FILE", help="recipes and overlays that change it"
    )
    group.add_argument("--from", dest="parent", default="", metavar="RUN", help="go on from this run's weights")
    add_column_arguments(parser)
    return parser


def add_column_arguments(parser: argparse.ArgumentParser, *, with_split: bool = True) -> None:
    """Add what a table's columns are: ``--image``, ``--label``, ``--labels`` …, and ``--sep`` and ``--root``."""
    group = parser.add_argument_group("columns of a table", "by default found by their usual names; '' for none")
    for role in _ROLES:
        if role == "split" and not with_split:
            parser.set_defaults(split="")
            continue
        group.add_argument(f"--{role}", metavar="COLUMN", nargs="+" if role == "labels" else None)
    group.add_argument(
        "--kinds",
        nargs="+",
        default=[],
        metavar="COLUMN=KIND",
        help="columns of multi_label, ordinal or regression targets; others are recognised or classes",
    )
    group.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="COLUMN=VALUE",
        help="use only rows with these values, such as domain=2; several of one column are alternatives",
    )
    group.add_argument("--sep", default="", metavar="CHARACTER", help="between the fields of a CSV file")
    group.add_argument("--root", default="", metavar="FOLDER", help="that relative paths of images start from")


def columns_of_table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return which column is what in the table of an experiment; nothing where its data are no ``Table``."""
    data = config.get("data") or {}
    columns = (data.get("init_args") or {}).get("columns")
    return columns if columns and str(data.get("class_path")).rpartition(".")[2] == "Table" else {}


def column_options(options: argparse.Namespace) -> list[str]:
    """Return those of the options of ``add_column_arguments`` that are given."""
    return [name for name in (*_ROLES, "kinds", "rows", "sep", "root") if getattr(options, name)]


def own_data_section(
    options: argparse.Namespace, columns: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the ``data:`` section of a folder or a table, and its tasks.

    Args:
        options: ``data``, and those of ``add_column_arguments``.
        columns: of a run's own table, which are meant where the options name none and the table has them.

    Raises:
        UserError: there is no such folder or file, or options do not belong to it.
    """
    path = Path(options.data).expanduser()
    if not path.exists():
        raise UserError(f"--data {options.data}: no such folder or file; give a folder of images or a table")
    return _folder(path, options) if path.is_dir() else _table(path, options, columns or {})


def is_own_data(data: str) -> bool:
    """Return whether a value of ``--data`` is a path, not a class such as ``Wares`` or a part of an experiment."""
    from datamodules.table_file import SUFFIXES

    path = Path(data).expanduser()
    return (
        path.is_dir() or path.suffix.lower() in SUFFIXES or (path.name != data and path.suffix not in (".yaml", ".yml"))
    )


def _name(data: str) -> str:
    path = Path(data).expanduser().resolve()
    return (path.name if path.is_dir() else path.stem) or "images"


def _folder(path: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    if given := column_options(options):
        raise UserError(f"--{given[0]}: is about the columns of a table, and {path} is a folder; leave it out")
    return {"class_path": "datamodules.ImageFolder", "init_args": {"root": str(path)}}, [LABEL_TASK]


def _table(path: Path, options: argparse.Namespace, of_run: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    from datamodules.table_file import Table, TableColumns, read_table

    columns = {role: value for role in _ROLES if (value := getattr(options, role)) is not None}
    if wrong := [given for given in options.kinds if "=" not in given]:
        raise UserError(f"--kinds {wrong[0]}: must be COLUMN=KIND, such as price=regression")
    if wrong := [given for given in options.rows if "=" not in given]:
        raise UserError(f"--rows {wrong[0]}: must be COLUMN=VALUE, such as domain=2")
    if of_run:
        columns = _as_in_run(of_run, columns, read_table(path, options.sep)[0].column_names)
    columns["kinds"] = {**columns.get("kinds", {}), **dict(given.rsplit("=", 1) for given in options.kinds)}
    arguments: dict[str, Any] = {"path": str(path)}
    for name, value in (given.split("=", 1) for given in options.rows):
        arguments.setdefault("rows", {}).setdefault(name, []).append(value)
    arguments |= {name: value for name in ("sep", "root") if (value := getattr(options, name))}
    table = Table(**arguments, columns=TableColumns(**columns))
    resolved = table.resolved_columns()
    if not resolved.tasks and not resolved.caption:
        raise UserError(
            f"--data {path}: no column has a usual name of labels or captions; name it with --label COLUMN, "
            "several with --labels COLUMN COLUMN, or --caption COLUMN"
        )
    # Names that were found, not `auto`: the experiment means the same when columns are added.
    arguments["columns"] = {
        role: value for role, value in asdict(resolved).items() if value or (role in _ROLES and value == "")
    }
    return {"class_path": "datamodules.Table", "init_args": arguments}, list(resolved.tasks)


def _as_in_run(of_run: Mapping[str, Any], given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the columns that are given, and those of a run's table that this one has too."""
    labels = [name for name in (of_run.get("label"), *(of_run.get("labels") or [])) if name]
    of_labels = ("label", "labels", "kinds", "classes", "one_hot", "label_sep")
    # Without its column the main task would be the next one.
    no_labels = {"label", "labels"} & set(given) or (labels and labels[0] not in names)
    found = {}
    for key, value in of_run.items():
        if key in of_labels and no_labels:
            continue
        if key == "label_sep":
            found[key] = value
        elif isinstance(value, str):
            found |= {key: value} if value in names else {}
        elif isinstance(value, Mapping):
            found[key] = {
                name: own for name, own in value.items() if set(own if key == "one_hot" else [name]) <= set(names)
            }
        else:
            found[key] = [name for name in value if name in names]
    return {**found, **given}


def _set_backbone(arguments: dict[str, Any], options: argparse.Namespace) -> None:
    if options.backbone:
        arguments["backbone"] = options.backbone
    if options.pretrained:
        arguments["pretrained"] = {"true": True, "false": False}.get(options.pretrained.lower(), options.pretrained)


def _image_size(backbone: str) -> int:
    """Return the side of the images that the weights were trained with."""
    import timm

    config = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    size = getattr(config, "input_size", None)
    return int(size[-1]) if size else 224


def _set_epochs(trainer: dict[str, Any], epochs: int) -> None:
    """Change the number of epochs; the phases keep their shares, each at least one epoch."""
    before, trainer["max_epochs"] = trainer.get("max_epochs", epochs), epochs
    if epochs < 2:
        # One phase: everything is trained at once.
        trainer["callbacks"] = [one for one in trainer.get("callbacks", []) if not _unfreezes(one)]
    for arguments in (one["init_args"] for one in trainer.get("callbacks", []) if _unfreezes(one)):
        if "unfreeze_epoch" in arguments:
            share = round(arguments["unfreeze_epoch"] / before * epochs)
            arguments["unfreeze_epoch"] = min(max(1, share), epochs - 1)
        for phase in arguments.get("phases", [])[:-1]:
            phase["epochs"] = max(1, round(phase["epochs"] / before * epochs))


def _unfreezes(callback: Mapping[str, Any]) -> bool:
    return bool({"unfreeze_epoch", "phases"} & set(callback.get("init_args", {})))


_RUN_OPTIONS: dict[str, tuple[Any, str]] = {
    "seed_everything": (DEFAULT_SEED, "Seed of weights, order, augmentation and dropout."),
    "name": (None, "Name of the experiment; by default that of its YAML."),
    "runs": ("runs", "Directory of all runs."),
    "from": (None, "In `fit`, go on from the best weights of this run, heads included, with its configuration."),
    "test_best": (False, "After `fit`, test the best checkpoint in the same process."),
    "report": (False, "After `test_best`, write the run's report, report.html."),
    "ema": (None, "Averaged weights, in training."),
    "wandb": (None, "Weights & Biases."),
    "trackers": (
        [],
        "Further experiment trackers, with their files in the run directory: tensorboard, mlflow.",
    ),
}

SECTIONS = {
    "data": "the data set: a class and its arguments",
    "model": "the task: a class and its arguments",
    "trainer": "Lightning's Trainer: max_epochs, accelerator, devices, precision, callbacks …",
    "checkpoint": "the best epoch: monitor, mode",
    "last": "how often the checkpoint to resume from is written",
    "non_finite": "what happens where the loss is not finite",
    "predictions": "of which splits predictions are written",
    "confusion_matrix": "how often confusion matrices are drawn in training",
    "class_report": "scores of each class",
    "retrieval": "retrieval metrics of dual encoders",
    "features": "cached features of a frozen backbone",
}
"""Keys of an experiment file that hold several options."""


def add_run_options(parser: argparse.ArgumentParser, types: Mapping[str, Any] | None = None) -> None:
    """Add the options of a run.

    Args:
        parser: of argparse or jsonargparse.
        types: of each option, for jsonargparse.
    """
    for name, (default, text) in _RUN_OPTIONS.items():
        add: Callable[..., Any] = parser.add_argument
        add(f"--{name}", default=default, help=text, **({"type": types[name]} if types else {}))


def short_help(program: str, stage: str, description: str) -> str:
    """Return the help of a stage without the arguments of classes, whose modules take seconds to load.

    Args:
        program: as the user called it.
        stage: fit, validate, test or predict.
        description: one line.
    """
    parser = argparse.ArgumentParser(
        prog=f"{program} {stage}",
        usage="%(prog)s --config NAME [--config OVERLAY …] [--SECTION.KEY VALUE …] [options]"
        + ("\n       %(prog)s --data FOLDER_OR_TABLE [options]" if stage == "fit" else " --ckpt_path CHECKPOINT"),
        description=description,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser)
    parser.add_argument("--ckpt_path", help="Checkpoint: a path, or best or last of the newest run of that name.")
    widest = max(map(len, SECTIONS))
    lines = [f"  {name:{widest}}  {text}" for name, text in SECTIONS.items()]
    classes = textwrap.fill(
        f"`{program} {stage} --help=all` has every key with its default, `--model.help CLASS` and `--data.help CLASS` "
        "have the arguments of a class, `--print_config` the whole configuration.",
        width=100,
    )
    sections = "\n".join(["sections of an experiment file:", *lines, "", classes])
    return "\n".join([parser.format_help(), sections, *(["", own_data_help()] if stage == "fit" else [""])])
