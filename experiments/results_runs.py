"""Which run directory is the run that a command would make, judged by what the directory itself records.

A run counts as that of a command if it was begun with the same options, and its configuration still agrees with the
experiment files as they are now. So a run that somebody made by hand counts, and one of an older version does not.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vitrail.config import read_experiments
from vitrail.errors import UserError
from vitrail.runs import CHECKPOINTS, RunFiles

_ELSEWHERE = {"config", "name", "runs", "ckpt_path", "test_best"}
_SILENT = ("wandb", "trainer.logger", "trainer.enable_progress_bar", "trainer.enable_model_summary")
"""Options that change nothing about what a run computes."""

Options = dict[str, list[Any]]


def run_name(arguments: Sequence[str]) -> str:
    """Name of the run that a command makes: ``--name``, else that of its first experiment file."""
    options = _options(arguments)
    return str(options["name"][-1]) if "name" in options else Path(str(options["config"][0])).stem


def find_run(arguments: Sequence[str], roots: Sequence[Path]) -> Path | None:
    """The newest finished run that a command would make again; None where there is none.

    Args:
        arguments: after ``python -m experiments``.
        roots: directories of runs, ``<root>/<name>/<time>``.

    Raises:
        UserError: an experiment file of the command cannot be read.
    """
    found = [run for root in roots for run in _candidates(arguments, root) if _has_finished(run, arguments[0])]
    return max(found, key=_begun).path if found else None


def find_interrupted(arguments: Sequence[str], root: Path) -> Path | None:
    """Last checkpoint of the newest run of a command's that did not end, or None."""
    found = [run for run in _candidates(arguments, root) if "last" in run.checkpoints and run.interrupted]
    return max(found, key=_begun).path / CHECKPOINTS / "last.ckpt" if found and arguments[0] == "fit" else None


def revision(run: Path) -> str:
    """Revision of the source that made a run, shortened, with what is known of changes; empty where not known."""
    git: Any = RunFiles(run).record.get("git")
    if not isinstance(git, dict) or not isinstance(git.get("revision"), str):
        return ""
    return f"{git['revision'][:7]}{' with changes' if git.get('changed_files') else ''}"


def _candidates(arguments: Sequence[str], root: Path) -> Iterator[RunFiles]:
    """Runs below a root that the command would make again."""
    expected = _experiment(arguments)
    wanted = _options(arguments)
    for path in sorted((root / run_name(arguments)).glob("*/")):
        try:
            run = RunFiles(path)
        except UserError:  # an empty directory of a run that was killed at once
            continue
        begun_by = [str(stage.get("command", "")) for stage in run.stages if stage.get("stage") == arguments[0]]
        given = shlex.split(begun_by[0])[3:] if begun_by else []
        if given[:1] != [arguments[0]] or not run.config:
            continue
        same = _telling(_options(given), arguments[0]) == _telling(wanted, arguments[0])
        if same and agrees(expected, run.config):
            yield run


def agrees(expected: Any, found: Any) -> bool:
    """Whether a configuration says all that is expected; it may say more, such as defaults."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return all(key in found and agrees(value, found[key]) for key, value in expected.items())
    if isinstance(expected, list) and isinstance(found, list):
        pairs = zip(expected, found, strict=False)
        return len(expected) == len(found) and all(agrees(one, other) for one, other in pairs)
    # As above: a number may be written as YAML does not know it.
    return bool(expected == found) or _number(expected) == _number(found) is not None


def _experiment(arguments: Sequence[str]) -> dict[str, Any]:
    """What the experiment files say, without what the command's options say differently."""
    options = _options(arguments)
    content = read_experiments([str(name) for name in options.get("config", [])])
    return _without(content, {*options, *_ELSEWHERE})


def _without(content: Mapping[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    """Without keys that options name, which may leave ``init_args`` out, and those that change nothing."""
    kept: dict[str, Any] = {}
    for name, value in content.items():
        key = _short(f"{prefix}{name}")
        if key in keys or key.startswith(_SILENT):
            continue
        kept[name] = _without(value, keys, f"{key}.") if isinstance(value, dict) else value
    return kept


def _options(arguments: Sequence[str]) -> Options:
    """Values by dotted key; a flag without a value is true, and ``--key+=``, which adds to a list, names the list."""
    options: Options = {}
    place = 1
    while place < len(arguments):
        key, equals, value = arguments[place].removeprefix("--").partition("=")
        place += 1
        if not equals:
            alone = place >= len(arguments) or arguments[place].startswith("--")
            value = "true" if alone else arguments[place]
            place += not alone
        key = {"c": "config"}.get(key.lstrip("-"), key).removesuffix("+")
        options.setdefault(_short(key), []).append(_value(value))
    return options


def _telling(options: Options, stage: str) -> Options:
    """Options that say what a run computes. Of several experiment files the names count, not the folders."""
    kept = {key: values for key, values in options.items() if key not in _ELSEWHERE and not key.startswith(_SILENT)}
    # A resumed training begins from a checkpoint of its own; a test is one of its checkpoint.
    also = {"ckpt_path": options["ckpt_path"]} if stage == "test" and "ckpt_path" in options else {}
    return {**kept, **also, "config": [Path(str(name)).name for name in options.get("config", [])]}


def _short(key: str) -> str:
    """A key as both ways of writing it have it: ``init_args`` may be left out."""
    return ".".join(part for part in key.split(".") if part != "init_args")


def _value(text: str) -> Any:
    # YAML takes 1e-3 for a text, the command line for a number.
    if re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", text, re.IGNORECASE):
        return _number(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _has_finished(run: RunFiles, stage: str) -> bool:
    latest = [one for one in run.stages if one.get("stage") == stage]
    return bool(latest) and latest[-1].get("exit") == "finished"


def _begun(run: RunFiles) -> str:
    return str(run.stages[0].get("started", ""))
