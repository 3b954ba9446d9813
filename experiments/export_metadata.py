"""What an exported file says of itself: classes, preprocessing, temperatures and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.summary import plain
from lightning_modules.base import VisionTask
from lightning_modules.dual_encoder import EmbeddingTask
from vitrail.errors import UserError
from vitrail.runs import RunFiles

KEY = "vitrine"
"""Under which JSON of it stands in the metadata of ONNX and safetensors files, and in PyTorch's exported programs."""

VERSION = 1
SUMMARY = "export.json"
TOKENIZER = "tokenizer.json"


def metadata_of(task: VisionTask, files: RunFiles, checkpoint: str) -> dict[str, Any]:
    """Everything that who only has the exported files needs to use them.

    Args:
        task: with its weights.
        files: of its run.
        checkpoint: name of the checkpoint, such as ``best``; temperatures belong to the best one only.

    Returns:
        Plain values. ``temperatures`` by which logits are to be divided for calibrated probabilities are there for the
        tasks that were calibrated.
    """
    tasks: dict[str, list[str]] = {name: list(classes) for name, classes in getattr(task, "tasks", {}).items()}
    temperatures = files.temperatures if checkpoint == "best" else {}
    git = files.record.get("git")
    return {
        "version": VERSION,
        "name": str(files.record.get("name") or files.path.resolve().parent.name),
        "kind": type(task).__name__,
        "tasks": tasks,
        "temperatures": {name: value for name, value in temperatures.items() if name in tasks},
        "image": dict(task.input_options),
        "pixels": "uint8 RGB, 0 to 255, (batch, 3, size, size); normalisation is part of the graph",
        "text": _text(task),
        "run": files.name,
        "checkpoint": checkpoint,
        "weights": task.weights_digest(),
        "revision": git.get("revision") if isinstance(git, dict) else None,
    }


def as_strings(metadata: Mapping[str, Any]) -> dict[str, str]:
    """As files keep it: one key with JSON."""
    return {KEY: json.dumps(metadata, ensure_ascii=False)}


def from_strings(strings: Mapping[str, str], origin: str | Path) -> dict[str, Any]:
    """Undoes ``as_strings``.

    Args:
        strings: metadata of a file.
        origin: of the file, for messages.

    Raises:
        UserError: if it was not written by an export that this version reads.
    """
    try:
        found = json.loads(strings[KEY])
        if found["version"] != VERSION:
            raise UserError(f"{origin}: was exported in format {found['version']}, this reads {VERSION}; export again")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{origin}: is no exported model; make one with `python -m experiments export RUN`") from error
    return dict(found)


def write_tokenizer(task: VisionTask, folder: Path) -> None:
    """Writes ``tokenizer.json`` of a task that reads texts."""
    if isinstance(task, EmbeddingTask) and task.towers.tokenizer is not None:
        (folder / TOKENIZER).write_text(task.towers.tokenizer.state["pipeline"], encoding="utf-8")


def write_summary(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes ``export.json``: the metadata, and what parity and speed were measured to be."""
    (folder / SUMMARY).write_text(json.dumps(plain(values), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _text(task: VisionTask) -> dict[str, Any] | None:
    if not isinstance(task, EmbeddingTask) or task.towers.tokenizer is None:
        return None
    state = task.towers.tokenizer.state
    return {
        "max_length": state["max_length"],
        "pad_id": state["pad_id"],
        "pad_token": task.towers.tokenizer.pad_token,
        "fixed_length": state["fixed_length"],
        "class_prompts": task.class_prompts,
    }
