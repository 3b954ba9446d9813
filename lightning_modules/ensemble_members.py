"""The members of an ensemble: read from run directories, and refused where they do not belong together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextvars import Context
from pathlib import Path
from typing import Any, NamedTuple

from lightning_modules.base import VisionTask
from lightning_modules.checkpoint import read_checkpoint, task_from, untrained_task
from vitrail.errors import UserError
from vitrail.types import with_image_defaults

_BEST = "checkpoints/best.ckpt"


class Member(NamedTuple):
    """One model of an ensemble.

    Attributes:
        name: its run directory.
        task: the model.
        hyper_parameters: what it can be built of again, ``_class_path`` among them.
    """

    name: str
    task: VisionTask
    hyper_parameters: dict[str, Any]


def read_members(runs: Sequence[str]) -> list[Member]:
    """The best checkpoints of runs, with their weights.

    Args:
        runs: run directories.

    Raises:
        UserError: if there are none, one occurs twice, one has no best checkpoint, or they learned from other data.
    """
    if not runs:
        raise UserError("members: there are none; name run directories such as runs/<name>/<time>")
    twice = [run for run in runs if [Path(other).resolve() for other in runs].count(Path(run).resolve()) > 1]
    if twice:
        raise UserError(f"members: {twice[0]} is named twice, and would count twice; name each run once")
    _refuse_other_data(runs)
    found = []
    for run in runs:
        checkpoint = read_checkpoint(Path(run) / _BEST)
        # Lightning tells what it makes the hyper-parameters of by a context variable; these are of another model.
        task = Context().run(task_from, checkpoint, Path(run) / _BEST)
        found.append(Member(run, task, _without_private(checkpoint["hyper_parameters"])))
    return found


def built_members(runs: Sequence[str], hyper_parameters: Sequence[Mapping[str, Any]]) -> list[Member]:
    """Members without weights, which a checkpoint of the ensemble is going to bring.

    Args:
        runs: run directories, which need not be there any more.
        hyper_parameters: of each, as ``Member`` has them.

    Raises:
        UserError: if these are not as many as runs, or not of our tasks.
    """
    if len(runs) != len(hyper_parameters):
        raise UserError(
            f"architectures: {len(hyper_parameters)} for {len(runs)} members; leave them out, the runs have them"
        )
    return [
        Member(run, Context().run(untrained_task, given, run), dict(given))
        for run, given in zip(runs, hyper_parameters, strict=True)
    ]


def common_tasks(members: Sequence[Member]) -> dict[str, list[str]]:
    """Class names of the tasks that all members have.

    Raises:
        UserError: if there are none, or the same task has other classes, or the same ones in another order.
    """
    first, *others = members
    tasks = _tasks_of(first)
    common = {task: list(names) for task, names in tasks.items() if all(task in _tasks_of(one) for one in others)}
    for task, names in common.items():
        for other in others:
            if list(_tasks_of(other)[task]) != names:
                raise UserError(
                    f"members: {other.name} has other classes of {task!r} than {first.name}, or another order of them; "
                    "only runs with the same classes can be averaged"
                )
    if not common:
        raise UserError(
            f"members: {', '.join(member.name for member in members)} have no task in common; only models that sort "
            "pictures into the same classes can be averaged"
        )
    return common


def refuse_other_pictures(members: Sequence[Member]) -> None:
    """Refuse members that learned from pictures made in another way.

    Raises:
        UserError: names the two and what differs.
    """
    first, *others = members
    wanted = with_image_defaults(first.task.input_options)
    for other in others:
        made = with_image_defaults(other.task.input_options)
        for key, value in wanted.items():
            if made.get(key) != value:
                raise UserError(
                    f"members: {first.name} saw pictures of {key} {value}, {other.name} of "
                    f"{made.get(key)}; fit both with the same data.init_args.image"
                )


def _tasks_of(member: Member) -> dict[str, list[str]]:
    found: dict[str, list[str]] = getattr(member.task, "tasks", {})
    return found


def _without_private(hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Without what Lightning's command line has added."""
    kept = {name: value for name, value in hyper_parameters.items() if not name.startswith("_")}
    return {**kept, "_class_path": str(hyper_parameters.get("_class_path", ""))}


def _refuse_other_data(runs: Sequence[str]) -> None:
    """One member's test pictures may be those that another one has learned by heart."""
    seen = {run: _data_of(Path(run)) for run in runs}
    first = runs[0]
    for run, data in seen.items():
        if data != seen[first]:
            raise UserError(
                f"members: {run} learned from other data than {first}, or from another division of them, so one may "
                "know the other's test pictures; average runs of the same data and splits"
            )


def _data_of(run: Path) -> tuple[Any, Any]:
    """What tells data and their division apart."""
    try:
        data = json.loads((run / "run.json").read_text(encoding="utf-8")).get("data") or {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"members: {run} has no readable run.json, which says what data it saw; name directories that `fit` made"
        ) from error
    return data.get("fingerprint"), data.get("samples")
