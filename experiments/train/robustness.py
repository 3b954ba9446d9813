"""``vitrail evaluate RUN --corrupt NAMES``: how scores fall when images have faults.

Each corruption is one pass over the images: an image is read once, corrupted at every severity that is wanted, and
predicted. What a pass found is kept in ``RUN/robustness/DATA`` (``evaluation.robustness``), so the command goes on
where it was interrupted, and adds corruptions and severities to those that are there.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.loading.corruptions import LEVELS, SIDE, corrupted, scaled
from evaluation.robustness import (
    CLEAN,
    CONSISTENCY,
    IMAGENET_C,
    CorruptedResults,
    Robustness,
    measure,
    read_results,
    write_results,
)
from vitrail.console import tracked
from vitrail.errors import UserError
from vitrail.files import file_sha256
from vitrail.predictions import Predictions
from vitrail.runs import Run
from vitrail.seeding import derive_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.base import ImageDataModule
    from lightning_modules.base import VisionTask

SETS: dict[str, tuple[str, ...]] = {"imagenet-c": IMAGENET_C, "consistency": CONSISTENCY}
"""Names for several corruptions."""

_VERSION = 1
"""Counts up when a corruption changes, so that results of earlier versions are not taken for those of this one."""


def chosen(names: Sequence[str], severities: Sequence[int]) -> dict[str, list[int]]:
    """Return the severities of each corruption that is asked for; those that a corruption lacks are left out.

    Args:
        names: of corruptions or of ``SETS``.
        severities: all where there are none.

    Raises:
        UserError: there is no such corruption, or none has such a severity.
    """
    wanted = list(dict.fromkeys(one for name in names for one in SETS.get(name, (name,))))
    if unknown := [name for name in wanted if name not in LEVELS]:
        raise UserError(f"--corrupt: must be one of {', '.join([*SETS, *LEVELS])}; got {unknown[0]!r}")
    if severities and not set(severities) <= set(range(1, most := max(len(LEVELS[name]) for name in wanted) + 1)):
        raise UserError(f"--severities: must be from 1 to {most - 1}; got {', '.join(map(str, severities))}")
    asked = {name: range(1, len(LEVELS[name]) + 1) for name in wanted}
    return {name: [one for one in there if not severities or one in severities] for name, there in asked.items()}


def evaluate_corrupted(
    opened: Run,
    model: VisionTask,
    data: ImageDataModule,
    name: str,
    wanted: Mapping[str, Sequence[int]],
    *,
    batch_size: int = 32,
    limit: int = 0,
    seed: int = 0,
    change: Callable[[Predictions], Predictions] | None = None,
    restricted: bool = False,
    class_map: Mapping[str, Sequence[str]] | None = None,
) -> Robustness:
    """Measure a model on corrupted images of the test split.

    Args:
        opened: its run.
        model: the task.
        data: after ``setup``.
        name: of the results.
        wanted: severities by corruption.
        batch_size: images that pass through the network together.
        limit: images, chosen by the seed; 0 for all.
        seed: of the corruptions.
        change: what becomes of the predictions before they are scored.
        restricted: whether ``change`` restricts the classes; part of what results must have in common.
        class_map: by which ``change`` joins classes; likewise.
    """
    rows = data.split_indices("test")
    if limit and limit < len(rows):
        rows = np.sort(np.random.default_rng(derive_seed("limit", seed)).permutation(rows)[:limit])
    folder = opened.path / Run.ROBUSTNESS / name
    key = _key(opened, model, data, rows) | {"seed": seed, "limit": limit, "restricted": restricted}
    key |= {"class_map": {name: list(own) for name, own in class_map.items()}} if class_map else {}

    def predict(corruption: str, severities: Sequence[int], place: str) -> dict[int, Predictions]:
        images = _Corrupted(rows, data.read_image, data.transform(augmented=False), corruption, severities, seed)
        found = _predicted(model, data, images, batch_size, f"{corruption} ({place})")
        return {one: change(part) for one, part in found.items()} if change else found

    kept = _kept(folder, key)
    done = {corruption: results.severities for corruption, results in kept.items()}
    todo = {
        corruption: severities
        for corruption, asked in wanted.items()
        if (severities := [one for one in asked if one not in done.get(corruption, ())])
    }
    if todo or CLEAN not in kept:
        clean = predict(CLEAN, [0], "0 severities")[0]
        write_results(folder, CLEAN, measure(CLEAN, {0: ""}, {0: clean}, clean, key))
        for number, (corruption, severities) in enumerate(todo.items(), start=1):
            found = predict(corruption, severities, f"{number} of {len(todo)}")
            levels = {one: str(LEVELS[corruption][one - 1]) for one in severities}
            results = measure(corruption, levels, found, clean, key)
            write_results(folder, corruption, kept[corruption].joined(results) if corruption in kept else results)
    robustness = Robustness(folder)
    robustness.write_table()
    return robustness


def _predicted(
    model: VisionTask, data: ImageDataModule, images: _Corrupted, batch_size: int, description: str
) -> dict[int, Predictions]:
    """Predictions of corrupted images by severity."""
    severities = images.severities
    loader = DataLoader(images, max(1, batch_size // len(severities)), num_workers=data.worker_processes())
    logits: dict[str, list[torch.Tensor]] = {}
    for outputs in tracked(_outputs(model, loader), description, len(loader)):
        for task, values in outputs.items():
            logits.setdefault(task, []).append(values)
    joined = {task: torch.cat(values).numpy() for task, values in logits.items()}
    return {
        one: _predictions(model, data, images.rows, {task: values[:, number] for task, values in joined.items()})
        for number, one in enumerate(severities)
    }


def _key(opened: Run, model: VisionTask, data: ImageDataModule, rows: NDArray[np.int64]) -> dict[str, Any]:
    """What results must have in common to stand in one table."""
    digest = hashlib.sha256(data.table.fingerprint().encode())
    if not data.generated and (verification := data.verification()) is not None:
        digest.update(verification.content[rows].tobytes())
    digest.update(rows.tobytes())
    checkpoint = opened.checkpoints.get("best")
    return {
        "version": _VERSION,
        "checkpoint": file_sha256(checkpoint) if checkpoint else model.weights_digest(),
        "images": digest.hexdigest(),
        "inputs": json.loads(json.dumps(model.input_options)),
        "side": SIDE,
    }


def _kept(folder: Path, key: Mapping[str, Any]) -> dict[str, CorruptedResults]:
    """Results of an earlier command with the same key; those of others are reported."""
    found, other = {}, []
    for path in sorted(folder.glob("[!.]*.parquet")):
        if path.stem in (CLEAN, *LEVELS):
            results = read_results(path)
            if results.key == key:
                found[path.stem] = results
            else:
                other.append(path)
    if other:
        what = sorted(name for name in key if read_results(other[0]).key.get(name) != key[name])
        sys.stderr.write(f"{folder}: has results that differ in {', '.join(what)}, and is measured again\n")
        for path in other:
            path.unlink()
    return found


class _Corrupted(Dataset[torch.Tensor]):
    """For each image uint8 ``(severities, 3, size, size)``."""

    def __init__(
        self,
        rows: NDArray[np.int64],
        read_image: Callable[[int], torch.Tensor],
        transform: Callable[[torch.Tensor], torch.Tensor],
        corruption: str,
        severities: Sequence[int],
        seed: int,
    ) -> None:
        self.rows, self._read_image, self._transform = rows, read_image, transform
        self._corruption, self.severities, self._seed = corruption, severities, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> torch.Tensor:
        row = int(self.rows[place])
        image = scaled(self._read_image(row))
        if self._corruption == CLEAN:
            return self._transform(image)[None]
        key = (self._seed, row)
        return torch.stack(
            [self._transform(corrupted(image, self._corruption, severity, key)) for severity in self.severities]
        )


def _outputs(model: VisionTask, loader: DataLoader[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the logits of each batch by task, float32 ``(B, severities, C)``."""
    for images in loader:
        flat = images.flatten(0, 1).to(model.device)
        with torch.inference_mode():
            outputs = model.predict_step({"image": flat, "sample_id": torch.arange(len(flat), device=model.device)}, 0)
        yield {task: values.float().cpu().unflatten(0, (len(images), -1)) for task, values in outputs["logits"].items()}


def _predictions(
    model: VisionTask, data: ImageDataModule, rows: NDArray[np.int64], logits: Mapping[str, Any]
) -> Predictions:
    table = data.table
    tasks, kinds = getattr(model, "tasks", {}), getattr(model, "task_kinds", {})
    return Predictions(
        rows,
        np.array([table.name(row) for row in rows.tolist()], dtype=object),
        table.groups.take(rows).to_numpy(zero_copy_only=False).astype(object),
        {task: tasks[task] for task in logits},
        {task: table.targets[task][rows] for task in logits},
        {task: np.ascontiguousarray(values) for task, values in logits.items()},
        {task: kind for task, kind in kinds.items() if task in logits},
        {task: values for task, values in getattr(model, "thresholds", {}).items() if task in logits},
    )
