"""Cost of models: parameters, floating-point operations, bytes, seconds and memory.

Counts need no weights and no memory: a model on PyTorch's ``meta`` device has shapes only. Seconds are measured by
``torch.utils.benchmark``, of several models in turn: a machine is never quiet, so every round times one model after the
other, in an order that moves on from round to round, and a ratio is taken within a round. Models that do not fit into
memory together are measured in groups; the first model is in each.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.runtime import memory_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.benchmark import Timer

    from vitrail.runs import Run

    Build = Callable[[str], tuple[nn.Module, int]]
    """Builds a model in evaluation mode on ``meta``, ``cpu`` or ``cuda``; the number is the side of its images."""

FILE = "efficiency.json"
"""In a run directory."""


def parameter_count(module: nn.Module, *, trainable_only: bool = False) -> int:
    """Return the number of parameters, each tensor once.

    Four-bit weights of bitsandbytes are packed, two in a byte, and count as those that they represent.
    """
    return sum(_size(one) for one in module.parameters() if one.requires_grad or not trainable_only)


def _size(parameter: nn.Parameter) -> int:
    packed: Any = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if packed is None else packed.shape.numel())


COLUMNS = ("parameters [M]", "trainable [M]", "image [GFLOP]", "text [GFLOP]", "weights [MB]")
_COST_COLUMNS = ("p50 [ms]", "p95 [ms]", "images/s", "time, ratio [low, high]", "peak memory [MB]")


@dataclass(frozen=True)
class Counts:
    """What follows from an architecture alone.

    Attributes:
        parameters: all of them.
        trainable: those that the experiment's freeze mode trains, at the end of training.
        image_flops: floating-point operations of one image, a multiplication and an addition counting as two.
        text_flops: the same of one text of the greatest length; None for a model without a text encoder.
        weight_bytes: of weights and buffers on disk, in the model's own types.
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
    """Cost of batches of one size.

    Attributes:
        seconds: of a batch, one a round; rounds are the same for all models that were measured together.
        ratios: to the first model, round by round; ones for itself.
        peak_bytes: memory of the weights and of what one batch adds to them at its peak; None where the system does
            not report it.
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
        """95th percentile by linear interpolation; of few rounds it is near the slowest one."""
        return float(np.percentile(self.seconds, 95))

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios."""
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Costs:
    """Measured costs of one model.

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
    """Return a task's counts.

    Args:
        model: a task of ``lightning_modules`` on the device ``meta``. On others PyTorch has kernels of attention that
            its counter does not know.
        image_size: side of the images in pixels.
    """
    import torch

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


def _flops(function: Any, *inputs: Any) -> int:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class NothingIsMasked(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it without types
        """Returns True where a network on ``meta`` asks whether its mask is all ones: there it has shapes only."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
                return True  # which is a number too
            return func(*args, **(kwargs or {}))

    mode = NothingIsMasked()  # type: ignore[no-untyped-call]  # likewise
    with torch.no_grad(), mode, FlopCounterMode(display=False) as counter:
        function(*inputs)
    return int(counter.get_total_flops())


def _text_flops(model: nn.Module, device: torch.device) -> int | None:
    import torch

    towers = getattr(model, "towers", None)
    if towers is None:
        return None
    length = int(getattr(towers, "max_length", 0) or towers.text.max_length)
    ids = torch.ones(1, length, dtype=torch.long, device=device)
    return _flops(towers.encode_text, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def columns(batch_sizes: Sequence[int]) -> list[str]:
    """Return the headings of ``cells``."""
    return [*COLUMNS, *(f"{name}, batch {size}" for size in batch_sizes for name in _COST_COLUMNS)]


def cells(counts: Counts | None, costs: Costs | None, batch_sizes: Sequence[int]) -> list[str]:
    """Return one model's numbers as text; a dash where it could not be built or was not measured."""
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
        ratio_text(one),
        "–" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:,.0f}",
    ]


def ratio_text(one: BatchCost) -> str:
    """Return the ratio and the lowest and highest of its rounds, where there are several."""
    spread = f" [{min(one.ratios):.2f}, {max(one.ratios):.2f}]" if len(one.ratios) > 1 else ""
    return f"{one.ratio:.2f}{spread}"


def ratios_to(rows: Mapping[str, tuple[Counts | None, Costs | None]]) -> str:
    """Return what ratios are to where the first model could not be measured; otherwise an empty text."""
    first = next(iter(rows), "")
    others = {name: costs.first for name, (_, costs) in rows.items() if costs and costs.batches}
    strange = {name: to for name, to in others.items() if to != first}
    if not strange:
        return ""
    others_to = "; ".join(f"of {name} to {to}" for name, to in strange.items())
    return f"{first} could not be measured with all the others, so ratios are not to it: {others_to}."


def by_model(rows: Mapping[str, tuple[Counts | None, Costs | None]], batch_sizes: Sequence[int]) -> Table:
    """Return one row per model."""
    return Table(["model", *columns(batch_sizes)], [[name, *cells(*row, batch_sizes)] for name, row in rows.items()])


def costs_from_values(values: Mapping[str, Any]) -> Costs:
    """Return the costs that ``dataclasses.asdict`` and JSON made these values of."""
    batches = {int(size): BatchCost(**one) for size, one in cast("dict[str, Any]", values["batches"]).items()}
    return Costs(**{**values, "batches": batches})


def read_efficiency(run: Run) -> tuple[dict[str, Any], Costs | None] | str:
    """Return a run's counts by name and its costs (None where only counts were wanted), or why there are none."""
    command = f"`python -m evaluation efficiency {run.path}`"
    try:
        content = json.loads((run.path / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"Not measured: run {command}."
    except (OSError, ValueError) as error:
        return f"{FILE}: cannot be read ({type(error).__name__}); measure again with {command}."
    try:
        (own,) = content.values()
        return dict(own["counts"]), own["costs"] and costs_from_values(own["costs"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{FILE}: has no measurement of one model; measure again with {command}."


def cpu_latency(costs: Costs | None) -> float:
    """Return the median milliseconds of one image alone on the CPU; NaN where that was not measured."""
    if costs is None or costs.device != "cpu" or 1 not in costs.batches:
        return math.nan
    return 1e3 * costs.batches[1].p50


_UNKNOWN_MEMORY = 8 * 2**30
_SHARE_OF_MEMORY = 0.4
"""Of the machine, for the weights of one group: activations and other processes need the rest."""


def measure(
    builders: Mapping[str, Build],
    weight_bytes: Mapping[str, int],
    batch_sizes: Sequence[int],
    repeats: int,
    *,
    device: str = "cpu",
    threads: int = 0,
    available: int | None = None,
) -> dict[str, Costs]:
    """Measure what batches cost; the first model is what ratios are to.

    Args:
        builders: the models, by name.
        weight_bytes: size of each, for the groups.
        batch_sizes: each is measured apart.
        repeats: rounds that count, at least 1; before each timing a batch runs twice.
        device: ``cpu``, ``cuda`` or ``mps``.
        threads: of the CPU; 0 leaves the choice to PyTorch.
        available: bytes for all weights of a group; by default a share of the machine's memory.
    """
    names = list(builders)
    room = available or int(_SHARE_OF_MEMORY * (memory_bytes() or _UNKNOWN_MEMORY))
    found: dict[str, Costs] = {}
    for group in groups(names, weight_bytes, room):
        chosen = {name: builders[name] for name in group}
        measured = _measure_group(chosen, sorted(batch_sizes), repeats, device, threads)
        found |= {name: costs for name, costs in measured.items() if name not in found}
    return found


def groups(names: Sequence[str], weight_bytes: Mapping[str, int], available: int) -> list[list[str]]:
    """Return the models that are in memory at once, in order; the first is in each group, any other in one."""
    first, *others = names
    made: list[list[str]] = [[first]]
    left = free = available - weight_bytes[first]
    for name in others:
        if weight_bytes[name] > left and len(made[-1]) > 1:
            made.append([first])
            left = free
        made[-1].append(name)
        left -= weight_bytes[name]
    return made


@dataclass
class _Timed:
    """One model's batches, ready to run, and what was measured of them by batch size."""

    timers: dict[int, Timer]
    peaks: dict[int, int | None]
    seconds: dict[int, list[float]]


def _measure_group(
    builders: Mapping[str, Build], batch_sizes: Sequence[int], repeats: int, device: str, threads: int
) -> dict[str, Costs]:
    import torch

    models: dict[str, _Timed] = {}
    errors: dict[str, str] = {}

    def attempt(name: str, step: Any, *arguments: Any) -> None:
        # Any model may fail, by a UserError or for want of memory; the others are measured all the same.
        try:
            step(name, *arguments)
        except (UserError, RuntimeError, ValueError, TypeError, MemoryError) as error:
            errors[name] = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            models.pop(name, None)

    def prepare(name: str) -> None:
        models[name] = _prepared(builders[name], batch_sizes, device, threads or torch.get_num_threads())

    def time(name: str, size: int) -> None:
        models[name].seconds[size].append(models[name].timers[size].timeit(1).median)

    for name in builders:
        attempt(name, prepare)
    for number in range(repeats):
        for size in batch_sizes:
            names = list(models)
            for place in range(len(names)):
                attempt(names[(number + place) % len(names)], time, size)
    peer = next(iter(models), "")
    costs = {name: Costs(error=error) for name, error in errors.items()}
    for name, one in models.items():
        batches = {}
        for size, seconds in one.seconds.items():
            ratios = [own / other for own, other in zip(seconds, models[peer].seconds[size], strict=True)]
            batches[size] = BatchCost(seconds, ratios, one.peaks[size])
        where = torch.cuda.get_device_name() if device == "cuda" else device
        costs[name] = Costs(where, threads or torch.get_num_threads(), peer, batches)
    return {name: costs[name] for name in builders}


def _prepared(build: Build, batch_sizes: Sequence[int], device: str, threads: int) -> _Timed:
    """Build a model, measure the memory of each batch, and make its timers."""
    import torch
    from torch.utils.benchmark import Timer  # importing it looks for CUDA and logs so

    task, side = build(device)
    weights = sum(one.numel() * one.element_size() for one in [*task.parameters(), *task.buffers()])
    timed = _Timed({}, {}, {size: [] for size in batch_sizes})
    for size in batch_sizes:
        # Pixels that differ, because some kernels are quicker on zeros.
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)

        def batch(images: torch.Tensor = images) -> None:
            with torch.inference_mode():
                task(images.to(device))
            if device == "mps":
                torch.mps.synchronize()  # which the timer does for CUDA only

        timed.timers[size] = Timer("batch()", globals={"batch": batch}, num_threads=threads)
        # Apple's driver reports no peak.
        added = None if device == "mps" else _added_cuda(batch) if device == "cuda" else _added_cpu(batch)
        timed.peaks[size] = None if added is None else weights + added
    return timed


def _added_cuda(batch: Any) -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    batch()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _added_cpu(batch: Any) -> int | None:
    """Return by how many bytes the process grew at its peak; None where the system does not report it."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what other models gave back would hide what this one needs
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins again
        before = _status("VmRSS")
    except (OSError, AttributeError, TypeError):
        batch()
        return None
    batch()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    """Return bytes, by the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
