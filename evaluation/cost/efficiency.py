"""What a model costs: parameters, floating-point operations, bytes, seconds and memory.

Counts need no weights and no memory: a model on PyTorch's ``meta`` device has shapes only. Seconds and memory are
measured by ``evaluation.cost.workers``; here is what is made of them.

The model of a run or of an experiment file, as the efficiency commands and their processes build it.

How many parameters a network has, also where a library packs several of them into one number.
"""

from __future__ import annotations

import inspect
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from evaluation.tables.summary import markdown_rows
from vitrail.errors import UserError

if TYPE_CHECKING:
    from lightning_modules.base import VisionTask


def parameter_count(module: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of parameters, each tensor once.

    Four-bit weights of bitsandbytes lie packed, two in a byte, and count as those that they stand for.

    Args:
        module: network.
        trainable_only: leave out those that are frozen.
    """
    return sum(_size(one) for one in module.parameters() if one.requires_grad or not trainable_only)


def _size(parameter: nn.Parameter) -> int:
    packed: Any = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if packed is None else packed.shape.numel())


COLUMNS = ("parameters [M]", "learning [M]", "image [GFLOP]", "text [GFLOP]", "weights [MB]")
_COST_COLUMNS = ("p50 [ms]", "p95 [ms]", "images/s", "time, ratio [low, high]", "peak memory [MB]")


@dataclass(frozen=True)
class Counts:
    """What follows from an architecture alone.

    Attributes:
        parameters: all of them.
        trainable: those that learn under the experiment's freeze mode, at the end of training.
        image_flops: floating-point operations of one image, a multiplication and an addition counting as two.
        text_flops: the same of one text of the greatest length; None for a model that reads no texts.
        weight_bytes: of weights and buffers on disk, as the model holds them.
        image_size: side of the images in pixels.
    """

    parameters: int
    trainable: int
    image_flops: int
    text_flops: int | None
    weight_bytes: int
    image_size: int


@dataclass(frozen=True)
class BatchCost:
    """What images cost in batches of one size.

    Attributes:
        seconds: of a batch, one a round; rounds are the same for all models that were measured together.
        ratios: to the first model, round by round; ones for itself.
        peak_bytes: how much memory the process, or the GPU, needed at most for the model and one batch; None where
            the system does not tell.
    """

    seconds: list[float]
    ratios: list[float]
    peak_bytes: int | None

    @property
    def p50(self) -> float:
        """Median seconds of a batch."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """95th percentile by linear interpolation; of few rounds it lies near the slowest one."""
        ordered = sorted(self.seconds)
        place = 0.95 * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios."""
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Costs:
    """What was measured of one model.

    Attributes:
        device: ``cpu`` or the GPU's name.
        threads: of the CPU.
        first: name of the model that ratios are to.
        batches: by batch size.
        error: why nothing could be measured; empty where it could.
    """

    device: str = ""
    threads: int = 0
    first: str = ""
    batches: dict[int, BatchCost] = field(default_factory=dict)
    error: str = ""


def count(model: nn.Module, image_size: int) -> Counts:
    """Counts of a task.

    Args:
        model: a task of ``lightning_modules`` on the device ``meta``. On others PyTorch has kernels of attention that
            its counter does not know.
        image_size: side of the images in pixels.
    """
    model.eval()
    device = next(model.parameters()).device
    image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=device)
    state = model.state_dict()
    return Counts(
        parameters=parameter_count(model),
        trainable=parameter_count(model, trainable_only=True),
        image_flops=_flops(model, image),
        text_flops=_text_flops(model, device),
        weight_bytes=sum(one.numel() * one.element_size() for one in state.values()),
        image_size=image_size,
    )


class _NothingIsHidden(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it without types
    """Answers yes where a network on ``meta`` asks whether its mask is all ones, because there it has shapes only."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True  # which is a number too
        return func(*args, **(kwargs or {}))


def _flops(function: Any, *inputs: Any) -> int:
    answers = _NothingIsHidden()  # type: ignore[no-untyped-call]  # likewise
    with torch.no_grad(), answers, FlopCounterMode(display=False) as counter:
        function(*inputs)
    return int(counter.get_total_flops())


def _text_flops(model: nn.Module, device: torch.device) -> int | None:
    towers = getattr(model, "towers", None)
    if towers is None:
        return None
    length = int(getattr(towers, "max_length", 0) or towers.text.max_length)
    ids = torch.ones(1, length, dtype=torch.long, device=device)
    return _flops(towers.encode_text, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def columns(batch_sizes: Sequence[int]) -> list[str]:
    """Headings of ``cells``."""
    return [*COLUMNS, *(f"{name}, batch {size}" for size in batch_sizes for name in _COST_COLUMNS)]


def cells(counts: Counts | None, costs: Costs | None, batch_sizes: Sequence[int]) -> list[str]:
    """One model's numbers as text; a dash where there is none.

    Args:
        counts: None where the model could not be built.
        costs: None where they were not measured.
        batch_sizes: those that have columns.
    """
    return [*_count_cells(counts), *(cell for size in batch_sizes for cell in _cost_cells(costs, size))]


def _count_cells(counts: Counts | None) -> list[str]:
    if counts is None:
        return ["–"] * len(COLUMNS)
    return [
        f"{counts.parameters / 1e6:,.2f}",
        f"{counts.trainable / 1e6:,.2f}",
        f"{counts.image_flops / 1e9:,.2f}",
        "–" if counts.text_flops is None else f"{counts.text_flops / 1e9:,.2f}",
        f"{counts.weight_bytes / 1e6:,.1f}",
    ]


def _cost_cells(costs: Costs | None, size: int) -> list[str]:
    one = costs.batches.get(size) if costs else None
    if one is None:
        return ["–"] * len(_COST_COLUMNS)
    return [
        f"{1e3 * one.p50:,.1f}",
        f"{1e3 * one.p95:,.1f}" if len(one.seconds) > 1 else "–",
        f"{size / one.p50:,.1f}" if size / one.p50 >= 10 else f"{size / one.p50:.2f}",
        ratio_told(one),
        "–" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:,.0f}",
    ]


def ratio_told(one: BatchCost) -> str:
    """The ratio and the lowest and highest of its rounds, where there are several."""
    spread = f" [{min(one.ratios):.2f}, {max(one.ratios):.2f}]" if len(one.ratios) > 1 else ""
    return f"{one.ratio:.2f}{spread}"


def ratios_to(rows: Mapping[str, tuple[Counts | None, Costs | None]]) -> str:
    """What ratios are to where that is not the first model, because it could not be measured; else empty."""
    first = next(iter(rows), "")
    others = {name: costs.first for name, (_, costs) in rows.items() if costs and costs.batches}
    strange = {name: to for name, to in others.items() if to != first}
    if not strange:
        return ""
    told = "; ".join(f"of {name} to {to}" for name, to in strange.items())
    return f"{first} could not be measured beside all the others, so ratios are not to it: {told}."


def markdown(rows: Mapping[str, tuple[Counts | None, Costs | None]], batch_sizes: Sequence[int]) -> str:
    """The models as a Markdown table, without a line feed at the end."""
    names = ["model", *columns(batch_sizes)]
    return markdown_rows(names, [[name, *cells(*row, batch_sizes)] for name, row in rows.items()])


def costs_from_values(values: Mapping[str, Any]) -> Costs:
    """The costs that ``dataclasses.asdict`` and JSON made these values of."""
    batches = {int(size): BatchCost(**one) for size, one in cast("dict[str, Any]", values["batches"]).items()}
    return Costs(**{**values, "batches": batches})


_LINKED = ("class_names", "class_prompts", "tasks", "class_counts", "chunk_size")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: one of the two.

    Attributes:
        experiment: content of an experiment file, overlays merged in; built with random weights.
        checkpoint: a run's checkpoint; empty for none.
    """

    experiment: Mapping[str, Any]
    checkpoint: str = ""

    def as_json(self) -> str:
        """For a process of its own."""
        return json.dumps({"experiment": self.experiment, "checkpoint": self.checkpoint})


def build(source: ModelSource, device: str) -> tuple[VisionTask, int]:
    """The model in evaluation mode, and the side of its images in pixels.

    Weights are random, or a checkpoint's. On the device ``meta`` there are none at all.

    Args:
        source: which model.
        device: ``meta``, ``cpu`` or ``cuda``.

    Raises:
        UserError: if it cannot be built; what the experiment says of model and data must fit.
    """
    import torch

    if source.checkpoint:
        from lightning_modules.checkpoint import load_task

        task = load_task(source.checkpoint)
        return task.to(device).eval(), int(task.input_options["size"])
    arguments, size = _arguments(source.experiment)
    # On meta nothing is drawn and nothing allocated; elsewhere all is built where it is to be.
    with torch.device(device):
        task = _task(arguments)
    return task.eval(), size


def source_of(path: Path, overlays: list[Path]) -> ModelSource:
    """The source that a run directory or an experiment file is.

    A run that was evaluated as it came, without training, has its own configuration for one.

    Args:
        path: either of them.
        overlays: laid over experiment files; runs are what they are.

    Raises:
        UserError: if it is neither.
    """
    from vitrail.config import read_experiments
    from vitrail.runs import Run
    from vitrail.trust import refuse_foreign_code

    if path.is_dir():
        run = Run(path)
        if "best" in run.checkpoints:
            return ModelSource({}, str(run.checkpoints["best"]))
        if run.config and not run.checkpoints and not any(stage.get("stage") == "fit" for stage in run.stages):
            refuse_foreign_code({key: run.config.get(key) for key in ("data", "model")}, run.path / Run.CONFIG)
            return ModelSource(run.config)
        raise UserError(f"{path}: has no checkpoints/best.ckpt; give a run that was trained, or its experiment file")
    return ModelSource(read_experiments([path, *overlays]))


def _arguments(experiment: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The model part, with random weights and what only the data know.

    The data are asked only for what the model cannot be built without, so that most are not needed on disk.
    """
    import lightning_modules
    from datamodules.cli import load_datamodule

    model = experiment.get("model")
    if not isinstance(model, dict) or "class_path" not in model or not isinstance(experiment.get("data"), dict):
        raise UserError("experiment: needs data: and model: with class_path:, as the files in experiments/ have them")
    task_class = getattr(lightning_modules, str(model["class_path"]).removeprefix("lightning_modules."), None)
    if task_class is None:
        raise UserError(f"model.class_path: {model['class_path']} is no task of lightning_modules")
    datamodule = load_datamodule(experiment, program="python -m evaluation efficiency")
    known = inspect.signature(task_class).parameters
    init = {**model.get("init_args", {}), "image_size": datamodule.image_size}
    init |= {name: getattr(datamodule, name) for name in _LINKED if _is_needed(known.get(name))}
    if "pretrained" in known:
        init["pretrained"] = False
    return {"class_path": model["class_path"], "init_args": init}, datamodule.image_size


def _is_needed(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _task(arguments: dict[str, Any]) -> VisionTask:
    """The task, its arguments checked by their types as the command line does."""
    from jsonargparse import ArgumentError, ArgumentParser

    from lightning_modules.base import VisionTask

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VisionTask, "model", required=True)
    try:
        task = parser.instantiate(parser.parse_args(["--model", json.dumps(arguments)])).model
    except ArgumentError as error:
        raise UserError(f"model: {' '.join(str(error).split())}") from error
    except ValueError as error:
        # The parser wraps what a constructor says into a report about types.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    assert isinstance(task, VisionTask)
    return task
