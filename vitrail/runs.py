"""Run directories ``runs/<name>/<time>/``: their layout, model, data, files and predictions."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import yaml
from numpy.typing import NDArray

from vitrail.config import load_dumped, read_experiment
from vitrail.errors import UserError
from vitrail.files import (
    cache_directory,
    fetch,
    file_sha256,
    local_folder,
    timestamped_directory,
    write_text_atomically,
)
from vitrail.ood import Detector, marked, outputs_with_features, read_detector
from vitrail.predictions import (
    ImagePrediction,
    OperatingPoint,
    OutputCalibration,
    Predictions,
    image_predictions,
    read_predictions,
)
from vitrail.runtime import check_device
from vitrail.trust import refuse_foreign_code

if TYPE_CHECKING:
    import pandas as pd
    import torch


def write_temperatures(
    run: Path,
    temperatures: Mapping[str, float],
    facts: Mapping[str, Any],
    outputs: OutputCalibration | None = None,
) -> Path:
    """Save temperatures by task, each above 0, with the digest of the best checkpoint and further plain values.

    Args:
        run: its directory.
        temperatures: of tasks with a single class.
        facts: plain values.
        outputs: of the other tasks.
    """
    path = run / Run.CALIBRATION
    others = {name: dict(values) for name, values in vars(outputs or OutputCalibration()).items() if values}
    digest = _digest(run / Run.BEST)
    content = {"temperatures": dict(temperatures), **others, "checkpoint_sha256": digest, **facts}
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")
    return path


def read_temperatures(run: Path) -> dict[str, float]:
    """Read the temperatures that ``write_temperatures`` wrote; empty if none was fitted.

    Raises:
        UserError: the file cannot be read, or belongs to another checkpoint.
    """
    return read_calibration(run)[0]


def read_calibration(run: Path) -> tuple[dict[str, float], OutputCalibration]:
    """Read what ``write_temperatures`` wrote, of tasks with a single class and of others; empty if nothing was fitted.

    Raises:
        UserError: the file cannot be read, or belongs to another checkpoint.
    """
    path = run / Run.CALIBRATION
    again = f"run `python -m evaluation calibrate {run}` again"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        temperatures = {str(task): float(value) for task, value in content["temperatures"].items()}
        labels = {str(task): [float(one) for one in values] for task, values in content.get("labels", {}).items()}
        scales, deviations = (
            {str(task): float(value) for task, value in content.get(name, {}).items()}
            for name in ("scales", "deviations")
        )
        digest = content["checkpoint_sha256"]
    except FileNotFoundError:
        return {}, OutputCalibration()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable calibration ({type(error).__name__}: {error}); {again}") from error
    factors = [*temperatures.values(), *(values[0] for values in labels.values()), *scales.values()]
    if not all(math.isfinite(value) and value > 0 for value in (*factors, *deviations.values())):
        raise UserError(f"{path}: temperatures must be finite numbers above 0; {again}")
    if digest != _digest(run / Run.BEST):
        raise UserError(f"{path}: belongs to another checkpoint than {Run.BEST}; {again}")
    return temperatures, OutputCalibration(labels, scales, deviations)


def read_run_detector(run: Path) -> Detector:
    """Read what `vitrail ood` fitted for a run.

    Raises:
        UserError: it cannot be read, or belongs to another checkpoint.
    """
    detector = read_detector(run / Run.OOD)
    if detector.facts.get("checkpoint_sha256") != checkpoint_digest(run):
        raise UserError(
            f"{run / Run.OOD}: belongs to another checkpoint than {Run.BEST}; run `vitrail ood {run}` again"
        )
    return detector


def checkpoint_digest(run: Path) -> str | None:
    """Return the SHA-256 of a run's best checkpoint; None if there is none, as in a zero-shot run."""
    return _digest(run / Run.BEST)


def _arrays(values: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    return {name: np.asarray(value, dtype=np.float32) for name, value in values.items()}


def _digest(path: Path) -> str | None:
    """SHA-256 of a checkpoint; None if there is none, as in a zero-shot run."""
    return file_sha256(path) if path.is_file() else None


_HOW_TO_PREDICT = {
    "test": "`python -m experiments test --ckpt_path {run}/checkpoints/best.ckpt`",
    "val": "`python -m experiments validate --ckpt_path {run}/checkpoints/best.ckpt`",
}
_STAGE = {"val": "validate"}
"""Stage that predicts a split, if its name differs from the split's."""

_FROM_HUB = (
    "*.json",
    "*.md",
    "*.safetensors",
    "*.onnx",
    "*.xml",
    "model.bin",
    "image.bin",
    "text.bin",
    "*.yaml",
    "*.csv",
    "*.parquet",
    "*.ckpt",
)
"""Files fetched from the hub: data and weights, no scripts."""


class Run:
    """A run directory, or the folder of an export: its files, model and data, and predictions for new images.

    Files are read on first access. Absent or damaged ones, as of killed runs, are empty, and listed by ``missing``. The
    class attributes are the names of the files in a run directory.

    Args:
        path: the run directory, such as ``runs/quickstart/20260101-120000``.

    Raises:
        UserError: there is no such directory, or it is not a run.

    Example:
        >>> run = Run.latest("tiny", runs=runs)
        >>> run.name
        'tiny/20260101-120000'
        >>> sorted(run.checkpoints)
        ['best', 'last']
        >>> prediction = run.predict(photo)[0]
        >>> prediction.label in run.model.tasks["class"], 0 <= prediction.confidence <= 1
        (True, True)
        >>> run.predictions("test").tasks["class"] == run.model.tasks["class"]
        True
    """

    CONFIG, RECORD, METRICS, SOUP = "config.yaml", "run.json", "metrics.csv", "soup.json"
    CHECKPOINTS, PREDICTIONS, FIGURES, REPORTS = "checkpoints", "predictions", "figures", "reports"
    BEST, LAST, START = "checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/start.ckpt"
    CALIBRATION, OOD = "checkpoints/calibration.json", "checkpoints/ood.safetensors"
    EVALUATIONS, ROBUSTNESS = "evaluations", "robustness"
    AUDIT, LABEL_ISSUES = "reports/audit.json", "reports/label_issues.json"
    GALLERY, EXPORTS, EXPORT, WEIGHTS = "gallery", "export", "export.json", "model.safetensors"

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise UserError(f"{path}: a file, not a run directory; give the directory that `fit` or `test` printed")
        if not self.path.is_dir():
            raise UserError(f"{path}: no such run directory; give the directory that `fit` or `test` printed")
        if not is_run(self.path) and not (self.path / self.EXPORT).is_file():
            raise UserError(
                f"{path}: not a run directory (no {self.CONFIG}, {self.RECORD}, {self.METRICS} or {self.PREDICTIONS}/)"
            )
        self._problems: dict[str, str] = {}
        self._predictions: dict[str, Predictions | None] = {}

    @classmethod
    def latest(cls, name: str, runs: Path | str = "runs") -> Run:
        """Return the newest run of an experiment.

        Args:
            name: of the experiment, such as ``quickstart``.
            runs: directory of all runs.

        Raises:
            UserError: there is none.
        """
        folder = Path(runs) / name
        found = [path for path in folder.glob("*") if is_run(path)]
        if not found:
            raise UserError(f"{folder}: has no run; train one with `python -m experiments fit`, or check the name")
        return cls(max(found, key=_begun))

    @classmethod
    def from_hub(cls, name: str, revision: str | None = None) -> Run:
        """Fetch an export or a run from the Hugging Face hub, or take it from the hub's local cache.

        Args:
            name: ``owner/name`` of the repository.
            revision: branch, tag or commit.

        Raises:
            UserError: it cannot be fetched.
        """
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(name, revision=revision, allow_patterns=list(_FROM_HUB), etag_timeout=5)
        except Exception as error:  # errors of several libraries: network, name, rights
            raise UserError(
                f"{name}: cannot be fetched from the hub ({_first_line(error)}); check the name and the network, or "
                "open a local folder with Run(...)"
            ) from error
        return cls(folder)

    def checkpoint(self, name: str = "best") -> Path:
        """Return the file of a checkpoint.

        Raises:
            UserError: the run has no such checkpoint.
        """
        if name in self.checkpoints:
            return self.checkpoints[name]
        if self.checkpoints:
            raise UserError(f"{self.path}: has no {self.CHECKPOINTS}/{name}.ckpt; it has {', '.join(self.checkpoints)}")
        raise UserError(
            f"{self.path}: has no {self.CHECKPOINTS}/{name}.ckpt, as of a run that was never trained; train it with "
            f"`python -m experiments fit --config {self.path / self.CONFIG}`, or use what needs no weights: config, "
            "metrics, datamodule, predictions"
        )

    @cached_property
    def model(self) -> Any:
        """The task of the best checkpoint, in evaluation mode, on the GPU if there is one."""
        return self.load_model(device=check_device("auto"))

    def load_model(self, checkpoint: str = "best", device: str = "cpu") -> Any:
        """Load a task with its weights, in evaluation mode, without running code of the run's author.

        Args:
            checkpoint: such as ``best`` or ``last``; ignored for an export.
            device: such as ``cpu`` or ``cuda:0``.

        Returns:
            A ``lightning_modules.VisionTask``.

        Raises:
            UserError: the run has no such checkpoint, or it is damaged or of another version.
        """
        # By name: the core imports no other package of ours.
        if (self.path / self.WEIGHTS).is_file():
            return import_module("experiments.export.weights").read_weights(self.path).to(device)
        if (self.path / self.EXPORT).is_file():
            raise UserError(f"{self.path}: an export without {self.WEIGHTS}; export with --format safetensors")
        return import_module("lightning_modules.checkpoint").load_task(self.checkpoint(checkpoint), device)

    @cached_property
    def datamodule(self) -> Any:
        """The run's DataModule; call ``prepare_data()`` and ``setup("test")`` before asking for its loaders."""
        return self.load_datamodule()

    def load_datamodule(self, args: Sequence[str] = ()) -> Any:
        """Build the run's DataModule, without running code of the run's author.

        Args:
            args: command-line arguments that change it, such as ``--data.init_args.root=FOLDER``.

        Returns:
            A ``datamodules.ImageDataModule``.

        Raises:
            UserError: the configuration cannot be read, or names a class of neither this project nor a plugin.
        """
        config = self.path / self.CONFIG
        refuse_foreign_code({"data": read_experiment(config).get("data")}, config)
        return import_module("datamodules.cli").load_datamodule([config], args)

    def predict(self, images: Any, batch_size: int = 32, max_pixels: int | None = None) -> list[ImagePrediction]:
        """Predict every task of the model for new images, with the preprocessing of the run's evaluation.

        A dual encoder predicts zero-shot by the class prompts of its data. Confidences are calibrated by the
        temperatures of ``python -m evaluation calibrate``, if there are any.

        Args:
            images: a path, a folder, a pattern such as ``photos/*.jpg``, a table or a shard (see
                ``datamodules.files.image_sources``), a PIL image, a uint8 array ``(H, W, 3)`` or ``(N, H, W, 3)``, a
                uint8 tensor ``(3, H, W)`` or ``(N, 3, H, W)``, or a list of these; RGB.
            batch_size: images per batch.
            max_pixels: larger images are refused undecoded; by default as ``image.max_pixels`` of the run's data.

        Returns:
            One prediction per image, in order; files of a folder by name.

        Raises:
            UserError: an image cannot be read, or the model has neither classes nor captions.

        Example:
            >>> predictions = Run.latest("tiny", runs=runs).predict([photo, photo])
            >>> predictions[0].label == predictions[1].label
            True
            >>> len(predictions[0].top_k(2)), predictions[0].calibrated
            (2, False)
        """
        return list(self.iter_predictions(_named_images(images), batch_size, max_pixels=max_pixels))

    @property
    def max_pixels(self) -> int | None:
        """``image.max_pixels`` of the run's data; None for the usual limit."""
        found: Any = self.config
        for key in ("data", "init_args", "image", "max_pixels"):
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, int) and found > 0 else None

    def iter_predictions(
        self,
        named: Iterable[tuple[str, Any]],
        batch_size: int = 32,
        *,
        keep_unreadable: bool = False,
        max_pixels: int | None = None,
    ) -> Iterator[ImagePrediction]:
        """Predict images one batch after another, while the next one is being decoded.

        Args:
            named: name and source of each image; sources as of ``predict``, or the content of a file.
            batch_size: images that pass through the network together.
            keep_unreadable: yield a prediction with an ``error`` for an image that cannot be read.
            max_pixels: of an image, as of ``predict``.

        Raises:
            UserError: as ``predict``.
        """
        import torch

        model = self.model
        tasks = getattr(model, "tasks", {})
        if not tasks and getattr(model, "captioner", None) is None:
            raise UserError(
                f"{self.path}: its data have no classes to predict; its images are compared with texts by "
                "vitrail index and search"
            )
        transform = import_module("datamodules.loading.transforms").eval_transform({**model.input_options})
        limits = _limits(max_pixels or self.max_pixels)
        value_range = model.input_options.get("value_range", "auto")

        def decoded(name: str, source: Any) -> torch.Tensor | str:
            try:
                return cast("torch.Tensor", transform(_pixels(name, source, value_range, limits)))
            except UserError as error:
                if not keep_unreadable:
                    raise
                return str(error)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for batch, found in _one_ahead(
                (batch, [pool.submit(decoded, *one) for one in batch]) for batch in _batches(named, batch_size)
            ):
                images = [one.result() for one in found]
                pixels = [image for image in images if not isinstance(image, str)]
                inputs = {"image": torch.stack(pixels), "sample_id": torch.arange(len(pixels))} if pixels else None
                names = [name for (name, _), image in zip(batch, images, strict=True) if not isinstance(image, str)]
                predicted = iter(self._predict_batch(inputs, names) if inputs else [])
                for (name, _), image in zip(batch, images, strict=True):
                    yield ImagePrediction(name, {}, image) if isinstance(image, str) else next(predicted)

    def _predict_batch(self, inputs: Mapping[str, torch.Tensor], names: Sequence[str]) -> list[ImagePrediction]:
        import torch

        detector = self.detector
        batch = {key: value.to(self.model.device) for key, value in inputs.items()}
        with torch.inference_mode():
            needed = detector is not None and detector.needs_features
            outputs, features = outputs_with_features(self.model, batch, features=needed)
            captions = self.model.captions_of(batch["image"]) if getattr(self.model, "captioner", None) else []
        logits = {task: values.float().cpu().numpy() for task, values in outputs["logits"].items()}
        kinds, thresholds = (getattr(self.model, name, {}) for name in ("task_kinds", "thresholds"))
        found = image_predictions(
            names, logits, self.model.tasks, self.temperatures, kinds, thresholds, self.output_calibration
        )
        if captions:
            found = [replace(one, caption=caption) for one, caption in zip(found, captions, strict=True)]
        decided = [one.decided(self.operating_points) for one in found]
        return decided if detector is None else marked(decided, detector, logits, features)

    @property
    def name(self) -> str:
        """Name of the experiment and of the run directory, as in tables."""
        path = self.path.resolve()
        if path.parent.name == self.EVALUATIONS:
            return f"{Run(path.parents[1]).name} on {path.name}"
        return "/".join(path.parts[-2:])

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole configuration; empty if there is none."""
        return self._parse(self.CONFIG, load_dumped, "there is no configuration: the run ended before it was trained")

    @cached_property
    def record(self) -> dict[str, Any]:
        """The run record; empty if there is none."""
        return self._parse(
            self.RECORD, json.loads, "there is no record: revision, versions, data and times are unknown"
        )

    def _parse(self, name: str, parse: Callable[[str], Any], absent: str) -> dict[str, Any]:
        try:
            found = parse((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            problem = absent
        except (OSError, ValueError, yaml.YAMLError) as error:
            problem = f"cannot be read ({_first_line(error)})"
        else:
            if isinstance(found, dict):
                return found
            problem = "holds no mapping"
        self._problems[name] = f"{name}: {problem}"
        return {}

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """The metrics log, float64 with NaN for missing values; empty if nothing was logged."""
        import pandas as pd

        try:
            # The last row may be cut short by a kill.
            frame = pd.read_csv(self.path / self.METRICS, on_bad_lines="skip")
        except FileNotFoundError:
            frame = pd.DataFrame()
        except (OSError, ValueError) as error:
            self._problems[self.METRICS] = f"{self.METRICS}: not readable ({_first_line(error)}); no curves"
            return pd.DataFrame()
        if frame.empty:
            self._problems[self.METRICS] = f"{self.METRICS}: nothing was logged, so there are no curves"
        return pd.DataFrame({name: pd.to_numeric(frame[name], errors="coerce") for name in frame.columns})

    @property
    def checkpoints(self) -> dict[str, Path]:
        """Checkpoints by their names without suffix, such as ``best`` and ``last``."""
        return {path.stem: path for path in sorted((self.path / self.CHECKPOINTS).glob("*.ckpt"))}

    @property
    def splits(self) -> list[str]:
        """Splits with a file of predictions."""
        return [path.stem for path in sorted((self.path / self.PREDICTIONS).glob("[!.]*.parquet"))]

    def predictions(self, split: str = "test") -> Predictions | None:
        """Predictions of a split; None if there are none or they are damaged, see ``missing``."""
        if split not in self._predictions:
            self._predictions[split] = None
            path = self.path / self.PREDICTIONS / f"{split}.parquet"
            if not path.is_file():
                how = _HOW_TO_PREDICT.get(split, "`python -m experiments predict`").format(run=self.path)
                problem = f"{self.PREDICTIONS}/{path.name}: there are no predictions; write them with {how}"
                self._problems[path.name] = problem
                return None
            try:
                found = read_predictions(path)
            except UserError as error:
                self._problems[path.name] = str(error)
                return None
            if len(found):
                self._predictions[split] = found
            else:
                self._problems[path.name] = f"{self.PREDICTIONS}/{path.name}: holds no samples"
        return self._predictions[split]

    @cached_property
    def evaluations(self) -> dict[str, Run]:
        """What ``vitrail evaluate`` left of other data sets, by their names; each is laid out as a run."""
        folder = self.path / self.EVALUATIONS
        return {path.name: Run(path) for path in sorted(folder.glob("[!.]*")) if path.is_dir() and is_run(path)}

    @property
    def restricted_to(self) -> dict[str, list[str]]:
        """Classes by task that ``vitrail evaluate --restrict-classes`` let the model choose among; empty without it."""
        evaluation = self.record.get("evaluation")
        classes = evaluation.get("classes") if isinstance(evaluation, dict) else None
        return classes if isinstance(classes, dict) else {}

    def predicted_by(self, split: str) -> str:
        """Name of the checkpoint that predicted a split in its latest finished stage, such as ``best``, or empty."""
        name = _STAGE.get(split, split)
        done = [stage for stage in self.stages if stage.get("stage") == name and stage.get("exit") == "finished"]
        checkpoint = done[-1].get("checkpoint") if done else None
        return Path(checkpoint).stem if isinstance(checkpoint, str) else ""

    def other_checkpoint(self, split: str) -> str:
        """Name of the checkpoint that predicted a split if it is not ``best``, otherwise empty."""
        name = self.predicted_by(split)
        return "" if name == "best" else name

    def temperatures_for(self, split: str) -> dict[str, float]:
        """Temperatures for the predictions of a split; none if another checkpoint than the best predicted it."""
        return {} if self.other_checkpoint(split) and "best" in self.checkpoints else self.temperatures

    def output_calibration_for(self, split: str) -> OutputCalibration:
        """Calibration of tasks without a single class, likewise."""
        of_other = self.other_checkpoint(split) and "best" in self.checkpoints
        return OutputCalibration() if of_other else self.output_calibration

    def calibrated(self, predictions: Predictions, split: str = "test") -> Predictions:
        """Return predictions of a split with calibrated outputs; tasks for which nothing was fitted stay as they are.

        Raises:
            UserError: nothing was fitted for the checkpoint that made them.
        """
        temperatures, outputs = self.temperatures_for(split), self.output_calibration
        if not self.is_calibrated or (self.other_checkpoint(split) and "best" in self.checkpoints):
            raise UserError(f"{self.path}: is not calibrated; run `vitrail calibrate {self.path}` first")
        scaled = {task: logits / np.float32(temperatures.get(task, 1.0)) for task, logits in predictions.logits.items()}
        return outputs.apply(replace(predictions, logits=scaled))

    def problem_of(self, split: str) -> str:
        """Why there are no predictions of a split; empty if there are."""
        return "" if self.predictions(split) is not None else self._problems[f"{split}.parquet"]

    def class_counts(self, tasks: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
        """Training samples of each class, for those of the tasks (with their class names) whose counts are known."""
        try:
            return class_counts_of(self.record, tasks, self.RECORD)
        except UserError as error:
            self._problems["class_counts"] = str(error)
            return {}

    @cached_property
    def temperatures(self) -> dict[str, float]:
        """Temperatures that `calibrate` fitted, by task; empty if there are none, or they are of another checkpoint."""
        if (self.path / self.EXPORT).is_file():
            return {str(task): float(value) for task, value in self._export.get("temperatures", {}).items()}
        if self.path.resolve().parent.name == self.EVALUATIONS:
            return Run(self.path.resolve().parents[1]).temperatures  # of the same checkpoint
        try:
            return read_temperatures(self.path)
        except UserError as error:
            self._problems[self.CALIBRATION] = str(error)
            return {}

    @cached_property
    def output_calibration(self) -> OutputCalibration:
        """What `calibrate` fitted for tasks without a single class, see ``temperatures``."""
        if (self.path / self.EXPORT).is_file():
            return OutputCalibration(**self._export.get("calibration", {}))
        if self.path.resolve().parent.name == self.EVALUATIONS:
            return Run(self.path.resolve().parents[1]).output_calibration
        try:
            return read_calibration(self.path)[1]
        except UserError as error:
            self._problems[self.CALIBRATION] = str(error)
            return OutputCalibration()

    @property
    def is_calibrated(self) -> bool:
        """Whether `calibrate` fitted anything for the best checkpoint."""
        return bool(self.temperatures) or self.output_calibration != OutputCalibration()

    @cached_property
    def operating_points(self) -> dict[str, OperatingPoint]:
        """Operating points that ``calibrate --operating-point`` chose, by task; see ``temperatures``."""
        if self.path.resolve().parent.name == self.EVALUATIONS:
            return Run(self.path.resolve().parents[1]).operating_points
        if (self.path / self.EXPORT).is_file():
            return {task: OperatingPoint(**one) for task, one in self._export.get("operating_points", {}).items()}
        if not self.is_calibrated:
            return {}
        try:
            content = json.loads((self.path / self.CALIBRATION).read_text(encoding="utf-8"))
            return {task: OperatingPoint(**values) for task, values in content.get("operating_points", {}).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            self._problems[self.CALIBRATION] = f"{self.CALIBRATION}: operating points cannot be read ({error})"
            return {}

    @cached_property
    def detector(self) -> Detector | None:
        """What `vitrail ood` fitted to recognise unknown images; None if there is none for this checkpoint."""
        if (self.path / self.EXPORT).is_file():
            found = self._export.get("ood")
            if found and found.get("file"):
                return read_detector(self.path / Path(self.OOD).name)
            return Detector(**{**found, "arrays": _arrays(found["arrays"])}) if found else None
        if self.path.resolve().parent.name == self.EVALUATIONS:
            return Run(self.path.resolve().parents[1]).detector
        if not (self.path / self.OOD).is_file():
            return None
        try:
            return read_run_detector(self.path)
        except UserError as error:
            self._problems[self.OOD] = str(error)
            sys.stderr.write(f"{error}; until then no image is unknown\n")
            return None

    @cached_property
    def _export(self) -> dict[str, Any]:
        """Content of ``export.json``."""
        path = self.path / self.EXPORT
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable as JSON ({_first_line(error)}); export again") from error
        return found if isinstance(found, dict) else {}

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Stages of this run in order, each with ``stage``, ``started``, ``exit`` and more."""
        stages = self.record.get("stages")
        return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []

    @property
    def interrupted(self) -> bool:
        """Whether the latest training of this run did not finish."""
        fits = [stage for stage in self.stages if stage.get("stage") == "fit"]
        return bool(fits) and fits[-1].get("exit") != "finished"

    @property
    def missing(self) -> list[str]:
        """Missing or damaged parts, one sentence each; empty for a complete run."""
        # Reading each part records its problems.
        _ = self.config, self.record, self.metrics, self.temperatures, self.detector
        for split in self.splits or ["test"]:
            self.predictions(split)
        latest = {str(stage.get("stage")): stage for stage in self.stages}
        endings = []
        for name, stage in latest.items():
            if (how := stage.get("exit")) != "finished":
                reason = "it was killed, or still runs" if how in (None, "unfinished") else str(how)
                endings.append(f"{name}, begun {stage.get('started', 'at an unknown time')}, did not finish: {reason}")
        problems = [*endings, *self._problems.values()]
        if "fit" in latest and "best" not in self.checkpoints:
            problems.append(f"{self.BEST}: training left no best checkpoint")
        return problems


_NOT_OF_AN_EXPERIMENT = (Run.RECORD, Run.METRICS, Run.CHECKPOINTS, Run.PREDICTIONS)


def is_run(path: Path) -> bool:
    """Return whether a directory has any file of a run."""
    return (path / Run.CONFIG).exists() or any((path / part).exists() for part in _NOT_OF_AN_EXPERIMENT)


def run_of_config(path: Path | str) -> Path | None:
    """Return the run directory that a configuration belongs to; None for an experiment file."""
    file = Path(path)
    is_own = file.name == Run.CONFIG and any((file.parent / part).exists() for part in _NOT_OF_AN_EXPERIMENT)
    return file.parent if is_own else None


def _begun(run: Path) -> float:
    """Time at which a run began: its configuration is written once."""
    config = run / Run.CONFIG
    return (config if config.exists() else run).stat().st_mtime


def load_checkpoint(path: Path, device: str = "cpu") -> Any:
    """Load the ``lightning_modules.VisionTask`` of a checkpoint, in evaluation mode; ``UserError`` where it is none."""
    return import_module("lightning_modules.checkpoint").load_task(path, device)


def prepared_image(path: Path, input_options: Mapping[str, Any]) -> torch.Tensor:
    """Prepare an image as those that a model is evaluated on.

    Args:
        path: of the file.
        input_options: how the model's images are made (``vitrail.types.InputOptions``).

    Returns:
        uint8 ``(3, size, size)``, RGB.

    Raises:
        UserError: the file cannot be read.
    """
    transform = import_module("datamodules.loading.transforms").eval_transform({**input_options})
    return cast("torch.Tensor", transform(_pixels(str(path), path, input_options.get("value_range", "auto"))))


def _named_images(images: Any) -> Iterator[tuple[str, Any]]:
    """Names and sources of single images; paths are resolved by ``datamodules.files.image_sources``."""
    number = 0
    for is_path, group in groupby(_flatten(images), key=lambda one: isinstance(one, str | Path)):
        if is_path:
            for source in import_module("datamodules.files.image_sources").find_images(list(group)):
                yield from zip(source.names, source.read(np.arange(len(source))), strict=True)
                number += len(source)
        else:
            for image in group:
                yield f"image {number}", image
                number += 1


def _flatten(images: Any) -> Iterator[Any]:
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        for one in images:
            yield from _flatten(one)
    else:
        yield images


_Value = TypeVar("_Value")


def _batches(values: Iterable[_Value], size: int) -> Iterator[list[_Value]]:
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch


def _one_ahead(values: Iterable[_Value]) -> Iterator[_Value]:
    """Yield values, each when the next one has been asked for."""
    waiting: list[_Value] = []
    for value in values:
        waiting.append(value)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _limits(max_pixels: int | None) -> dict[str, int]:
    """Argument of ``datamodules.loading.decode.read_image``, where it is not the default."""
    return {} if max_pixels is None else {"max_pixels": max_pixels}


def _pixels(name: str, source: Any, value_range: Any, limits: Mapping[str, int] | None = None) -> torch.Tensor:
    """Return uint8 ``(3, H, W)``, decoded as the images of every data set."""
    import torch

    decode = import_module("datamodules.loading.decode")
    if isinstance(source, UserError):
        raise source
    if isinstance(source, Path):
        return cast("torch.Tensor", decode.read_image(source, value_range=value_range, **(limits or {})))
    if isinstance(source, bytes):
        return cast("torch.Tensor", decode.read_image(source, name, value_range, **(limits or {})))
    if hasattr(source, "getexif"):
        try:
            return cast("torch.Tensor", decode.image_pixels(source, value_range))
        except Exception as error:  # Pillow decodes lazily and raises whatever a damaged file leads to
            raise UserError(f"{name}: cannot be decoded ({_first_line(error)})") from error
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 3 and source.shape[2] == 3:
        return torch.from_numpy(source).permute(2, 0, 1)
    if isinstance(source, torch.Tensor) and source.dtype == torch.uint8 and source.ndim == 3 and len(source) == 3:
        return source.cpu()
    given = f"{source.dtype} {tuple(source.shape)}" if hasattr(source, "shape") else type(source).__name__
    raise UserError(
        f"{name}: must be a path, a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W); got {given}"
    )


def runs_among(paths: Sequence[Path], command: str, needs: str, *, unfinished_only: bool = False) -> list[Path]:
    """Filter paths, such as of ``runs/NAME/*``, to the runs that a command can use; report the others on stderr.

    Args:
        paths: given by the user; a single one is kept, and its problems are reported by the command.
        command: name for messages.
        needs: file in a run directory that the command reads.
        unfinished_only: leave out a run without that file only if none of its stages has finished.

    Raises:
        UserError: a path does not exist, or none is a run.
    """
    # A broken link comes from a pattern, not from a typing error.
    if absent := [path for path in paths if not path.exists() and not path.is_symlink()]:
        raise UserError(f"{absent[0]}: no such run directory; give the directory that `fit` or `test` printed")
    if len(paths) < 2:
        return list(paths)
    no_run, lacking = {}, {}
    for path in paths:
        if (path / needs).exists():
            continue
        try:
            run = Run(path)
        except UserError as error:
            no_run[path] = str(error)
            continue
        finished = any(stage.get("exit") == "finished" for stage in run.stages)
        if not (unfinished_only and finished):
            lacking[path] = f"{path}: a run without {needs}"
    if len(no_run) == len(paths):
        raise UserError(f"{command}: none of these {len(paths)} is a run; the first is {no_run[paths[0]]}")
    if len(no_run) + len(lacking) == len(paths):
        lacking = {}  # the command reports how to make what they lack
    for reason in (*no_run.values(), *lacking.values()):
        sys.stderr.write(f"{command}: left out {reason}\n")
    return [path for path in paths if path not in no_run and path not in lacking]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def class_counts_of(record: Any, tasks: Mapping[str, Sequence[str]], origin: str) -> dict[str, list[int]]:
    """Class counts of the train split in a run record, by task; tasks without counts are left out.

    Raises:
        UserError: the counts do not fit the class names.
    """
    data = record.get("data") if isinstance(record, dict) else None
    counts = data.get("class_counts") if isinstance(data, dict) else None
    if not isinstance(counts, dict):
        return {}
    for task, names in tasks.items():
        values = counts.get(task)
        if values is not None and len(values) != len(names):
            raise UserError(
                f"{origin}: data.class_counts.{task} has {len(values)} counts for {len(names)} classes; "
                f"the record belongs to other predictions: run `test` again"
            )
    return {task: [int(count) for count in counts[task]] for task in tasks if task in counts}


def read_class_counts(path: Path, tasks: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Class counts of the train split in a file ``run.json``, by task; empty if there is none.

    Raises:
        UserError: the record is no JSON, or its counts do not fit the class names.
    """
    if not path.is_file():
        return {}
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); restore or delete it") from error
    return class_counts_of(record, tasks, str(path))


RESERVED = {"ablations": "`ablate`", "results": "`results`", "sweeps": "`sweep`"}
"""Folders in the directory of all runs that belong to a command."""

_SHARED_WITH_RANKS = "VITRAIL_RUN_DIRECTORY"
_NOT_OF_THE_EXPERIMENT = {"ckpt_path", "runs", "name", "config", "weights_only", "verbose", "return_predictions"}


def new_run_directory(root: Path, name: str) -> Path:
    """Make a directory for a new run of an experiment below ``root``.

    All processes of one run get the same directory: Lightning's launcher passes the environment on, torchrun and SLURM
    have an identifier of the job.
    """
    shared = os.environ.get(_SHARED_WITH_RANKS)
    if shared and "LOCAL_RANK" in os.environ:
        return Path(shared)
    job = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID")
    if job and job != "none":
        directory = root / name / f"job-{job}"
        directory.mkdir(parents=True, exist_ok=True)
    else:
        while True:
            directory = timestamped_directory(root / name)
            with suppress(FileExistsError):  # made by another process meanwhile
                directory.mkdir(parents=True)
                break
    os.environ[_SHARED_WITH_RANKS] = str(directory.resolve())
    return directory


def discard_empty(directory: Path) -> None:
    """Remove a run directory without any file, as of a run that was refused, and its empty parent."""
    # Another process of the same run may do so at the same time, and the parent may contain other runs.
    with suppress(OSError):
        if any(path.is_file() for path in directory.rglob("*")):
            return
        for folder in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
            folder.rmdir()
        directory.rmdir()
        directory.parent.rmdir()


def resolve_checkpoint(ckpt_path: str, root: Path, name: str) -> Path:
    """Return the checkpoint that ``ckpt_path`` names: a file, or ``best`` or ``last`` of the experiment's newest run.

    One at an object store is fetched into ``$VITRAIL_CACHE/checkpoints``, with what was copied next to it.

    Raises:
        UserError: there is no such file.
    """
    if ckpt_path in ("best", "last"):
        file = Run.BEST if ckpt_path == "best" else Run.LAST
        found = sorted((root / name).glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(
                f"--ckpt_path {ckpt_path}: no run under {root / name} has a {ckpt_path}.ckpt; "
                "run `fit` first or give the path of a checkpoint"
            )
        return found[-1]
    if local_folder(ckpt_path) is None:
        return _fetched_checkpoint(ckpt_path)
    path = Path(ckpt_path)
    if not path.is_file():
        raise UserError(f"--ckpt_path {ckpt_path}: no such file; a run keeps its checkpoints in {Run.CHECKPOINTS}/")
    return path


def _fetched_checkpoint(url: str) -> Path:
    folder = cache_directory() / "checkpoints" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = fetch(url, folder)
    # A training that goes on keeps the best checkpoint so far, if the run had the same validation.
    for name in {Path(Run.BEST).name, Run.CONFIG} - {path.name}:
        try:
            fetch(f"{url.rpartition('/')[0]}/{name}", folder)
        except UserError:
            (folder / name).unlink(missing_ok=True)
    return path


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint belongs to, or None."""
    directory = checkpoint.parent.parent
    inside = checkpoint.parent.name == Run.CHECKPOINTS and (directory / Run.CONFIG).is_file()
    return directory if inside else None


def same_data(run: Path, data: dict[str, Any]) -> bool:
    """Whether a run has this ``data:`` section, apart from the splits of ``predict``."""
    saved = read_experiment(run / Run.CONFIG)
    return _without_predict(saved.get("data")) == _without_predict(data)


def _without_predict(data: dict[str, Any] | None) -> dict[str, Any] | None:
    arguments = (data or {}).get("init_args") or {}
    loader = {key: value for key, value in (arguments.get("loader") or {}).items() if key != "predict"}
    return data and {**data, "init_args": {**arguments, "loader": loader or None}}


def same_experiment(run: Path, values: dict[str, Any]) -> bool:
    """Whether a run has this configuration, apart from directory and checkpoint, so that it can be resumed."""
    saved = read_experiment(run / Run.CONFIG)
    return all(saved.get(key) == values.get(key) for key in {*saved, *values} - _NOT_OF_THE_EXPERIMENT)


def same_validation(run: Path, values: dict[str, Any]) -> bool:
    """Whether a run was validated on the same samples as this configuration would be."""
    saved = read_experiment(run / Run.CONFIG)
    ours, theirs = values.get("trainer") or {}, saved.get("trainer") or {}
    parts = ("limit_val_batches", "overfit_batches")
    return (
        same_data(run, values.get("data") or {})
        and saved.get("seed_everything") == values.get("seed_everything")
        and all(ours.get(part) == theirs.get(part) for part in parts)
    )


def resumed_run_directory(run: Path) -> Path:
    """Continue a run in its directory, in this process and those that it starts."""
    os.environ[_SHARED_WITH_RANKS] = str(run.resolve())
    return run
