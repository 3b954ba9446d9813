"""``python -m evaluation ensemble RUN RUN …``: several runs, and views of the image, kept as one run to be tested.

The result is a directory like any other run's, with ``config.yaml`` and ``checkpoints/best.ckpt``, so that
``python -m experiments test --ckpt_path …/checkpoints/best.ckpt`` needs nothing else, and leaves the same records.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrail.errors import UserError
from vitrail.files import timestamped_directory, write_atomically, write_text_atomically
from vitrail.runs import Run, runs_among
from vitrail.trust import plain_name

_CLASS_PATH = "lightning_modules.Ensemble"

_EPILOG = """\
examples:
  python -m evaluation ensemble runs/products_multitask_deit/TIME runs/products_multitask_mobilevit/TIME
  python -m evaluation ensemble runs/products_multitask_deit/TIME --tta hflip zoom      # one model, three views
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ensemble``."""
    command.description = (
        "Keeps the best checkpoints of runs as one model that answers with the mean of their "
        "probabilities. Nothing is chosen or learned. The new run is tested, compared and calibrated like any other."
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


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Make the run and say how to go on.

    Raises:
        UserError: the runs cannot be averaged.
    """
    if options.name is not None:
        plain_name(options.name, "--name")
    options.runs = runs_among(options.runs, "ensemble", Run.BEST, unfinished_only=True)
    directory = make_ensemble(options.runs, options.tta, name=options.name, place=options.to)
    checkpoint = shlex.quote(str(directory / Run.BEST))
    runs = shlex.join(map(str, [directory, *options.runs]))
    sys.stdout.write(
        f"Run directory: {directory}\nGo on with\n"
        f"  python -m experiments test --ckpt_path {checkpoint}\n"
        f"  python -m evaluation compare {runs}\n"
    )


def make_ensemble(
    runs: Sequence[Path], views: Sequence[str] = (), *, name: str | None = None, place: Path | None = None
) -> Path:
    """Keep runs as one.

    Args:
        runs: run directories.
        views: besides the image as it is.
        name: of the new experiment.
        place: directory of all runs.

    Returns:
        The new run's directory, ``<place>/<name>/<time>``.

    Raises:
        UserError: the runs cannot be averaged.
    """
    from lightning_modules.ensemble import Ensemble, checked_views
    from vitrail.config import dump_yaml

    members = [str(run) for run in runs]
    config = _config(runs[0])
    task = Ensemble(members, tta_views=checked_views(list(dict.fromkeys(["identity", *views]))))
    place = place or runs[0].absolute().parent.parent
    name = name or _joined_name(runs, views)
    directory = timestamped_directory(place / name)
    arguments = {"members": members, "tta_views": list(task.views), "architectures": _plain(task.architectures)}
    config |= {
        "name": name,
        "runs": str(place),
        "ckpt_path": None,
        "model": {"class_path": _CLASS_PATH, "init_args": arguments},
        # What surrounded the training of one member has nothing to do here.
        "trainer": {**(config.get("trainer") or {}), "callbacks": []},
    }
    _save(directory / Run.BEST, task)
    write_text_atomically(directory / Run.CONFIG, dump_yaml(config))
    return directory


def _save(path: Path, task: Any) -> None:
    """Write a checkpoint without a trainer, whole or not at all."""
    import lightning
    import torch

    checkpoint: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": task.state_dict(),
        # Under the name by which config.yaml knows it, because the two are compared.
        "hyper_parameters": {**task.hparams, "_class_path": _CLASS_PATH},
    }
    task.on_save_checkpoint(checkpoint)
    with write_atomically(path) as partial, partial.open("wb") as file:
        torch.save(checkpoint, file)


def _config(run: Path) -> dict[str, Any]:
    """The first member's configuration, whose data and trainer are the ensemble's."""
    files = Run(run)
    if not files.config:
        raise UserError(f"{run}: {files.missing[0]}; give run directories such as runs/<name>/<time>")
    return dict(files.config)


def _joined_name(runs: Sequence[Path], views: Sequence[str]) -> str:
    """Names of the experiments, each once, and of the views."""
    names = list(dict.fromkeys(run.absolute().parent.name for run in runs))
    more = "_tta" if views else ""
    # The names of files and directories are short on every system.
    return (
        "_and_".join(names)[:150] if len(names) > 1 else f"{names[0]}_ensemble" if len(runs) > 1 else names[0]
    ) + more


def _plain(value: object) -> Any:
    """As YAML knows it: lists for tuples."""
    return json.loads(json.dumps(value))
