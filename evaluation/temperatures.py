"""The temperatures that `calibrate` fitted, in ``checkpoints/calibration.json`` beside their checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.schema import UserError
from evaluation.artefacts import written_whole

CALIBRATION_FILE = "checkpoints/calibration.json"
_CHECKPOINT = "checkpoints/best.ckpt"


def write_temperatures(run: Path, temperatures: Mapping[str, float], facts: Mapping[str, Any]) -> Path:
    """Save temperatures with the digest of the best checkpoint, so that they are never used for another one.

    Args:
        run: the run directory.
        temperatures: above 0, by task.
        facts: what else is known of how they were fitted; plain values.

    Returns:
        The file.
    """
    path = run / CALIBRATION_FILE
    content = {"temperatures": dict(temperatures), "checkpoint_sha256": _digest(run / _CHECKPOINT), **facts}
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def read_temperatures(run: Path) -> dict[str, float]:
    """Read what ``write_temperatures`` wrote.

    Returns:
        By task; empty where no temperature was fitted.

    Raises:
        UserError: the file cannot be read, or belongs to another checkpoint than the one that is there.
    """
    path = run / CALIBRATION_FILE
    again = f"run `python -m evaluation calibrate {run}` again"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        temperatures = {str(task): float(value) for task, value in content["temperatures"].items()}
        digest = content["checkpoint_sha256"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable calibration ({type(error).__name__}: {error}); {again}") from error
    if not all(math.isfinite(value) and value > 0 for value in temperatures.values()):
        raise UserError(f"{path}: temperatures must be finite numbers above 0; {again}")
    if digest != _digest(run / _CHECKPOINT):
        raise UserError(f"{path}: belongs to another checkpoint than {_CHECKPOINT}; {again}")
    return temperatures


def _digest(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none, as in a run of pretrained weights."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
