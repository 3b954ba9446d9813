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
from vitrail.files import timestamped_directory, write_text_atomically
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


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
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
