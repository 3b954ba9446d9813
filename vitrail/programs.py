"""All commands: ``python -m PROGRAM COMMAND`` and ``vitrail COMMAND``.

Names and options have hyphens; the underscores of version 0.1 are accepted. Options that are keys of an experiment file
(``--seed_everything``, ``--ckpt_path``, ``--data.init_args.root``) keep their underscores.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitrail.errors import EXIT_USER_ERROR, refuse_passwords, run_program, run_reporting_user_errors
from vitrail.runtime import keep_freed_memory, lighten_torchmetrics
from vitrail.trust import PLUGINS, plugins
from vitrail.types import DATA_ARGUMENTS


class Command(NamedTuple):
    """A command of a program.

    Attributes:
        target: ``module`` with ``add_arguments(parser)`` and ``run(options, rest)``, in a module of several commands
            ``add_<name>_arguments`` and ``run_<name>``; or ``module:function``, which parses the arguments itself.
        help: one line.
        takes_data: whether ``rest`` may contain ``--data.init_args.KEY VALUE``, as for an experiment.
        passes_on: whether ``rest`` is what follows ``--``.
    """

    target: str
    help: str
    takes_data: bool = False
    passes_on: bool = False


class Program(NamedTuple):
    """A program, ``python -m NAME``.

    Attributes:
        help: one line.
        commands: by name.
    """

    help: str
    commands: Mapping[str, Command]


_STAGE = "experiments.train.cli:main"
PROGRAMS = {
    "experiments": Program(
        "Train, test and export models.",
        {
            "fit": Command(_STAGE, "train a model, with a run directory for everything that comes of it"),
            "validate": Command(_STAGE, "evaluate a checkpoint on the validation split"),
            "test": Command(_STAGE, "evaluate a checkpoint on the test split"),
            "evaluate": Command("experiments.train.evaluate", "evaluate a run on another data set", takes_data=True),
            "predict": Command("evaluation.commands.predict", "predict new images: files, folders, tables or shards"),
            "sweep": Command(
                "experiments.launch.sweep", "search hyper-parameters: grid, random, TPE or Hyperband", passes_on=True
            ),
            "ablate": Command("experiments.launch.ablation", "train and compare variants of one experiment"),
            "export": Command("experiments.export", "write a run's model as ONNX, torch.export or safetensors"),
            "push-to-hub": Command(
                "experiments.export.hub", "upload an export with its model card to the Hugging Face hub"
            ),
        },
    ),
    "evaluation": Program(
        "Evaluate, compare and explain runs.",
        {
            "summary": Command(
                "evaluation.commands.compare", "accuracy and macro F1 with intervals, next to the majority baseline"
            ),
            "report": Command("evaluation.commands.report", "all that is known of a run, on one page", takes_data=True),
            "compare": Command(
                "evaluation.commands.compare", "several runs on the same samples: paired differences, calibration, cost"
            ),
            "slices": Command(
                "evaluation.commands.slices", "a score on parts of a split: by column, condition, the worst"
            ),
            "calibrate": Command("evaluation.commands.calibrate", "fit a temperature for each task on validation"),
            "ood": Command(
                "evaluation.commands.ood",
                "recognise images unlike the training images: scores, threshold",
                takes_data=True,
            ),
            "explain": Command("evaluation.commands.explain", "saliency maps: Grad-CAM or attention rollout"),
            "efficiency": Command(
                "evaluation.commands.efficiency", "parameters, operations, latency and memory of models"
            ),
            "retrieval": Command("evaluation.commands.retrieval", "rankers on all queries made of attributes"),
            "ensemble": Command(
                "evaluation.commands.weights", "average the predictions of several runs, or of views, as a new run"
            ),
            "soup": Command("evaluation.commands.weights", "average the weights of several runs, as a new run"),
            "wise-ft": Command("evaluation.commands.weights", "interpolate between start and end of a fine-tuning"),
            "base-to-novel": Command(
                "evaluation.commands.transfer.base_to_novel",
                "accuracy on trained and other classes: the cost of fine-tuning",
            ),
            "linear-probe": Command(
                "evaluation.commands.transfer.linear_probe",
                "logistic regression on a frozen backbone's features",
                takes_data=True,
            ),
            "few-shot": Command(
                "evaluation.commands.transfer.few_shot",
                "methods for a few images of each class on a frozen encoder's features",
                takes_data=True,
            ),
            "explore": Command(
                "evaluation.commands.dataset.explore",
                "a data set on one page: classes, colours, leaks, suspected labels",
                takes_data=True,
            ),
            "export-dataset": Command(
                "evaluation.commands.dataset.export_dataset",
                "labels, predictions, vectors and findings for FiftyOne, or as Parquet",
            ),
            "label-issues": Command(
                "evaluation.commands.dataset.label_issues",
                "labels that a run's validation or test predictions disagree with",
            ),
            "select": Command(
                "evaluation.commands.dataset.active_learning", "which unlabelled images to label next", takes_data=True
            ),
            "learning-curve": Command(
                "evaluation.commands.dataset.active_learning",
                "accuracy by number of labels, over several seeds",
                takes_data=True,
            ),
        },
    ),
    "retrieval": Program(
        "Fill galleries with a model's embeddings and search them.",
        {
            "index": Command("retrieval.commands.gallery", "fill a gallery, or add what is new", takes_data=True),
            "search": Command("retrieval.commands.search", "find images or captions by a text or an image"),
            "build-index": Command("retrieval.commands.gallery", "approximate index of a very large gallery"),
            "upgrade": Command("retrieval.commands.gallery", "rename the tables of a gallery of version 0.1"),
            "info": Command("retrieval.commands.gallery", "what is in a gallery, and which model made it"),
        },
    ),
    "datamodules": Program(
        "Check data sets and pack them for streaming.",
        {
            "audit": Command(
                "evaluation.commands.dataset.audit", "what is in a data set and what is wrong with it", takes_data=True
            ),
            "relabel": Command("datamodules.commands.relabel", "apply corrected labels to a table, as a new table"),
            "pack": Command("datamodules.commands.pack", "write shards to stream from", takes_data=True),
        },
    ),
    "app": Program(
        "Classify, search and explore in the browser, or by HTTP.",
        {
            "app": Command("app.command", "serve the web application over runs and galleries"),
            "serve": Command("app.command", "serve a model as an HTTP API: classify, embed, zero-shot, search"),
        },
    ),
}
"""In the order of ``vitrail --help``; no two commands have the same name."""


def main(program: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        program: a key of ``PROGRAMS``, or ``vitrail`` for the commands of all.
        arguments: by default those of this process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _prefer_own_packages()
    return run_program(
        lambda: (
            _reported(lambda: _refuse_passwords(arguments))
            or _run(program, _with_config_files(_without_plugins(arguments)))
        )
    )


def _prefer_own_packages() -> None:
    """Search the working directory last: it may have folders called ``app``, ``callbacks`` or ``experiments``."""
    here = Path.cwd()
    if sys.path[:1] in ([""], [str(here)]) and Path(__file__).parents[1] != here:
        sys.path.append(sys.path.pop(0))


def _without_plugins(arguments: list[str]) -> list[str]:
    """Return arguments without ``--plugins MODULE``, which goes to ``$VITRAIL_PLUGINS``, for child processes too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plugins", action="append", default=[])
    own = list(itertools.takewhile(lambda argument: argument != "--", arguments))
    known, rest = parser.parse_known_args(own)
    if known.plugins:
        os.environ[PLUGINS] = ",".join([*plugins(), *known.plugins])
        here = str(Path.cwd())
        if here not in sys.path and "" not in sys.path:
            sys.path.append(here)  # the console script does not search it by itself
    return [*rest, *arguments[len(own) :]]


def _with_config_files(arguments: list[str]) -> list[str]:
    """Return arguments with names such as ``--config quickstart`` replaced by the packaged files."""
    found = list(arguments)
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("--config", "-c") and equals:
            found[place] = f"{option}={packaged_config(value)}"
        elif place and (
            arguments[place - 1] in ("--config", "-c")
            or (place == 1 and arguments[0] in ("sweep", "ablate") and not argument.startswith("-"))
        ):
            found[place] = packaged_config(argument)
    return found


def packaged_config(name: str) -> str:
    """Return the file of an experiment, an overlay, a sweep or an ablation that comes with Vitrail.

    Args:
        name: such as ``quickstart``, ``overlays/ddp`` or ``experiments/quickstart.yaml``; a file that exists is itself.

    Example:
        >>> from pathlib import Path
        >>> Path(packaged_config("quickstart")).name
        'quickstart.yaml'
    """
    if not re.fullmatch(r"[\w./-]{1,200}", name) or ".." in name or Path(name).exists():
        return name
    spec = importlib.util.find_spec("experiments")
    if spec is None or spec.origin is None:
        return name
    folder = Path(spec.origin).parent
    below = name.removeprefix("experiments/")
    below = below if below.endswith(".yaml") else f"{below}.yaml"
    places = [folder / part / below for part in ("", "sweeps", "ablations")]
    return next((str(path) for path in places if path.is_file()), name)


def program_name(program: str) -> str:
    """Return the program as it was called: ``vitrail``, or ``python -m`` with its name."""
    called = Path(sys.argv[0])
    return "vitrail" if "vitrail" in (called.name, called.parent.name) else f"python -m {program}"


def _run(program: str, arguments: list[str]) -> int:
    groups = {program: PROGRAMS[program]} if program in PROGRAMS else PROGRAMS
    owners = {name: owner for owner, group in groups.items() for name in group.commands}
    first, *rest = arguments or [""]
    if first == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"vitrail {version('vitrail')}\n")
        return 0
    if program == "app":
        first, rest = "app", arguments
    elif first in ("", "-h", "--help"):
        (sys.stdout if first else sys.stderr).write(_overview(program, groups))
        return 0 if first else EXIT_USER_ERROR
    elif program == "experiments" and first.startswith("-"):
        first, rest = "fit", arguments  # Lightning's parser takes --config before the stage, too
    name = first.replace("_", "-")
    if name not in owners:
        near = difflib.get_close_matches(name, owners, n=1)
        hint = f"did you mean {near[0]}?" if near else f"must be one of {', '.join(owners)}"
        sys.stderr.write(f"error: {program_name(program)}: unknown command {first!r}; {hint}\n")
        return EXIT_USER_ERROR
    owner = owners[name]
    if owner in ("app", "experiments"):
        # Before torch is imported: spinning threads would take the cores from other processes.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if owner == "experiments":
        keep_freed_memory()
    if not plugins():
        lighten_torchmetrics()
    command = PROGRAMS[owner].commands[name]
    if name == "predict" and rest and rest[0].startswith("-") and rest[0] not in ("-h", "--help"):
        command = Command(_STAGE, command.help)  # Lightning's stage: the data of an experiment, `predict --config FILE`
    if command.target == _STAGE:
        return _stage(name, command, arguments)
    if ":" in command.target:
        return _call(command, hyphenated(rest))
    return _reported(lambda: _parse(owner, name, command, hyphenated(rest)))


def _refuse_passwords(arguments: list[str]) -> None:
    """Refuse addresses with passwords; that of a database for sweeps may have one, and is not recorded."""
    for before, argument in itertools.pairwise(["", *arguments]):
        option, _, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        if option != "--storage":
            refuse_passwords(value, option if option.startswith("-") else "argument")


def _stage(name: str, command: Command, arguments: list[str]) -> int:
    if arguments[1:] in (["-h"], ["--help"]):
        # The whole help needs the classes that it describes, and with them torch.
        short_help = importlib.import_module("experiments.train.options").short_help
        sys.stdout.write(short_help(program_name("experiments"), name, f"{command.help[0].upper()}{command.help[1:]}."))
        return 0
    return _call(command, ["--help" if one == "--help=all" else one for one in underscored(arguments)])


def _call(command: Command, arguments: list[str]) -> int:
    module, function = command.target.split(":")
    return _reported(lambda: getattr(importlib.import_module(module), function)(arguments))


def _parse(owner: str, name: str, command: Command, arguments: list[str]) -> int | None:
    module: Any = importlib.import_module(command.target)
    function = name.replace("-", "_")
    add_arguments = getattr(module, f"add_{function}_arguments", None) or module.add_arguments
    run = getattr(module, f"run_{function}", None) or module.run
    program = program_name(owner)
    parser = argparse.ArgumentParser(
        prog=program if owner == name and program != "vitrail" else f"{program} {name}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.description = textwrap.fill(parser.description or f"{command.help[0].upper()}{command.help[1:]}.", _width())
    own = list(itertools.takewhile(lambda argument: argument != "--", arguments)) if command.passes_on else arguments
    options, rest = parser.parse_known_args(own)
    if command.passes_on and not rest:
        rest = arguments[len(own) + 1 :]
    elif rest and not (command.takes_data and rest[0].startswith(DATA_ARGUMENTS)):
        parser.error(f"unknown argument {rest[0]!r}")
    return _start(run, options, rest)


def _start(run: Callable[..., int | None], options: argparse.Namespace, rest: list[str]) -> int | None:
    if getattr(options, "split", ""):
        from vitrail.trust import plain_name

        plain_name(options.split, "--split")  # it becomes a part of files' names
    return run(options, rest)


def _reported(command: Callable[[], int | None]) -> int:
    codes: list[int] = []
    return run_reporting_user_errors(lambda: codes.append(command() or 0)) or codes[0]


def hyphenated(arguments: Sequence[str]) -> list[str]:
    """Return arguments with hyphens in the options of version 0.1, such as ``--image_size``."""
    old = re.compile(r"--(?!seed_everything|ckpt_path)[a-z0-9]+(_[a-z0-9]+)+(?=$|=)")
    own = list(itertools.takewhile(lambda argument: argument != "--", arguments))
    return [*(old.sub(lambda match: match[0].replace("_", "-"), one) for one in own), *arguments[len(own) :]]


def underscored(arguments: Sequence[str]) -> list[str]:
    """Return arguments with underscores in options such as ``--test-best``, keys of an experiment file."""
    return [
        re.sub(r"^--[a-z]+(-[a-z]+)+(?=$|=|\.)", lambda match: "--" + match[0][2:].replace("-", "_"), argument)
        for argument in arguments
    ]


def _overview(program: str, groups: Mapping[str, Program]) -> str:
    name = program_name(program) if program in PROGRAMS else "vitrail"
    lines = [f"usage: {name} [-h] [--version] COMMAND …"]
    widest = max(len(command) for group in groups.values() for command in group.commands)
    for group in groups.values():
        lines += ["", group.help]
        for command, entry in group.commands.items():
            lines.append(
                textwrap.fill(
                    entry.help, _width(), initial_indent=f"  {command:{widest}}  ", subsequent_indent=" " * (widest + 4)
                )
            )
    more = [
        f"{name} COMMAND --help describes a command.",
        "--config NAME: a file, or an experiment that comes with Vitrail, such as quickstart or overlays/ddp.",
        "--plugins MODULE: also use the tasks and data sets of this module, with every command.",
    ]
    return "\n".join([*lines, "", *(textwrap.fill(line, _width()) for line in more), ""])


def _width() -> int:
    return shutil.get_terminal_size().columns - 2
