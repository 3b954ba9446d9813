"""``fit --from RUN``: a new run that goes on from the weights of a trained one, heads included.

Its configuration is that of the run, changed by the experiment files and flags of the command.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.train.opened_run import opened_config
from vitrail.config import dump_yaml, read_experiments, split_configs
from vitrail.errors import UserError
from vitrail.runs import Run, run_of_checkpoint

if TYPE_CHECKING:
    from lightning_modules.base import VisionTask

KEY = "from"


def parent_checkpoint(given: str) -> Path:
    """Return the checkpoint that ``--from`` names: a file in a run, or the best one of a run directory.

    Raises:
        UserError: there is none.
    """
    path = Path(given)
    checkpoint = Run(path).checkpoint() if path.is_dir() else path
    if run_of_checkpoint(checkpoint) is None or not checkpoint.is_file():
        raise UserError(f"--from {given}: no run; give a run directory (runs/NAME/TIME) or a checkpoint in it")
    return checkpoint


def from_parent(args: Sequence[str]) -> list[str]:
    """Return arguments of ``fit`` with the configuration of the run that ``--from`` names in front of all others.

    A resumed run has its whole configuration, so nothing is put in front of it.

    Raises:
        UserError: there is no such run, or it names classes that are not to be trusted.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in (KEY, "ckpt_path", "name"):
        parser.add_argument(f"--{option}", default=None)
    given = vars(parser.parse_known_args(list(args[1:]))[0])
    if not args or args[0] != "fit":
        return list(args)
    configs = split_configs(args)[0]
    source = given[KEY] or (read_experiments(configs).get(KEY) if configs else None)
    if not source or given["ckpt_path"]:
        return list(args)
    checkpoint = parent_checkpoint(str(source))
    content = opened_config(checkpoint.parents[1], "fit")
    if configs and not given["name"]:
        content.pop("name")  # that of the first experiment file
    text = dump_yaml({**content, KEY: str(source)}, one_line=True)
    name = [] if "name" in content or given["name"] else ["--name", Path(configs[0]).stem]
    return ["fit", "--config", text, *args[1:], *name]


def take_over(model: VisionTask, checkpoint: Path) -> list[str]:
    """Give a model the weights of a run's checkpoint; return what it does not take over, one line each.

    Raises:
        UserError: the weights do not fit.
    """
    from lightning_modules.checkpoint import read_checkpoint

    content: dict[str, Any] = read_checkpoint(checkpoint)
    state, notes = model.fitting_state(content)
    model.on_load_checkpoint({**content, "epoch_sums": {}, "monitored": []})
    try:
        model.load_state_dict(state)
    except UserError as error:
        raise UserError(
            f"--from {checkpoint}: {error}; --from needs the parent's model, with other classes at most"
        ) from error
    return notes
