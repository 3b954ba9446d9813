"""One model from several fine-tunings of the same start: the mean of their weights.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time", ICML 2022. ``uniform`` averages all members; ``greedy`` begins with the best one and takes each further
one, the better first, only if the validation metric does not fall. Everything is chosen on the validation split.

The mean of BatchNorm's running statistics is not the statistics of the mean network, so they are counted anew on the
training images, unless all members share them (a backbone whose BatchNorm stood still).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.files import write_atomically

State = dict[str, torch.Tensor]
Score = Callable[[State, Sequence[int]], tuple[float, State]]
"""Validation metric of an average of members, and its weights with statistics that fit them."""

_TRAINING = {"optimizer_states", "lr_schedulers", "callbacks", "loops"}
_SAME = ("_class_path", "tasks", "class_names", "image_size")


@dataclass(frozen=True)
class Soup:
    """An average and what it is worth.

    Attributes:
        method: ``uniform`` or ``greedy``.
        members: run directories, best first.
        scores: validation metric of each member alone.
        kept: numbers of the members that were averaged.
        score: validation metric of the average.
        state: its weights.
    """

    method: str
    members: Sequence[Path]
    scores: Sequence[float]
    kept: Sequence[int]
    score: float
    state: State


def averaged(states: Sequence[State]) -> State:
    """Mean of weights, computed in float64; whole numbers (counters, positions) are the first member's.

    Args:
        states: of the same names and shapes.
    """
    mean = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            mean[name] = (sum(state[name].double() for state in states) / len(states)).to(first.dtype)  # type: ignore[union-attr]  # a tensor, not 0
        else:
            mean[name] = first
    return mean


def uniform_soup(states: Sequence[State], members: Sequence[Path], score: Score, maximize: bool) -> Soup:
    """Average of all members.

    Args:
        states: weights of each member.
        members: their run directories.
        score: the validation metric.
        maximize: whether higher is better.
    """
    alone, order = _ranked(states, score, maximize)
    value, state = score(averaged(states), range(len(states)))
    return Soup("uniform", [members[i] for i in order], [alone[i] for i in order], range(len(states)), value, state)


def greedy_soup(states: Sequence[State], members: Sequence[Path], score: Score, maximize: bool) -> Soup:
    """Average of those members that do not make the validation metric fall, tried from the best to the worst.

    Args:
        states: weights of each member.
        members: their run directories.
        score: the validation metric.
        maximize: whether higher is better.
    """
    alone, order = _ranked(states, score, maximize)
    kept, best, state = [0], alone[order[0]], states[order[0]]
    for rank in range(1, len(order)):
        tried = [order[place] for place in (*kept, rank)]
        value, candidate = score(averaged([states[number] for number in tried]), tried)
        if (value >= best) if maximize else (value <= best):
            kept, best, state = [*kept, rank], value, candidate
    return Soup("greedy", [members[i] for i in order], [alone[i] for i in order], kept, best, state)


def _ranked(states: Sequence[State], score: Score, maximize: bool) -> tuple[list[float], list[int]]:
    """Metric of each member alone, and their numbers from the best to the worst; last where it is not a number.

    Raises:
        UserError: it is a number for none.
    """
    alone = [score(state, [number])[0] for number, state in enumerate(states)]
    if all(math.isnan(value) for value in alone):
        raise UserError("soup: the metric of no member is a number on the validation split, so none can be chosen")

    def place(number: int) -> tuple[bool, float]:
        value = alone[number]
        return math.isnan(value), 0.0 if math.isnan(value) else -value if maximize else value

    return alone, sorted(range(len(states)), key=place)


def refuse_strangers(members: Sequence[Path], checkpoints: Sequence[dict[str, Any]], data: Sequence[Any]) -> None:
    """Refuse members whose mean would mean nothing.

    Args:
        members: run directories.
        checkpoints: content of their checkpoints.
        data: what tells each member's data and division from another's.

    Raises:
        UserError: there are fewer than two, or a member has another network, other classes or other data.
    """
    if len(members) < 2:
        raise UserError(f"a soup needs at least two runs, got {len(members)}; name more of the same experiment")
    places = [run.resolve() for run in members]
    if twice := next((run for run, place in zip(members, places, strict=True) if places.count(place) > 1), None):
        raise UserError(f"{twice}: is named twice, and would count twice in the mean; name each run once")
    first = checkpoints[0]
    if adapters := [name for name in first["state_dict"] if ".lora_" in name]:
        raise UserError(
            f"{members[0]}: has low-rank adapters ({adapters[0]}); the mean of two products is not the product of the "
            "means, so adapters cannot be averaged; fine-tune without lora: for a soup"
        )
    for run, other, seen in zip(members[1:], checkpoints[1:], data[1:], strict=True):
        for key in _SAME:
            ours, theirs = (checkpoint["hyper_parameters"].get(key) for checkpoint in (first, other))
            if ours != theirs:
                raise UserError(f"{run}: {key} differs from that of {members[0]}; only runs of one experiment average")
        ours, theirs = (
            {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
            for checkpoint in (first, other)
        )
        if different := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
            shapes = f"{theirs.get(different[0], 'absent')} there, {ours.get(different[0], 'absent')} in {members[0]}"
            raise UserError(f"{run}: is another network ({different[0]} is {shapes}); only the same networks average")
        if seen != data[0]:
            raise UserError(f"{run}: has other data or another division of them than {members[0]}; train on the same")


def moving_statistics(network: nn.Module, states: Sequence[State]) -> list[nn.Module]:
    """BatchNorm layers whose running statistics are not the same in all members."""
    layers: list[nn.Module] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            for key in (f"{name}.running_mean", f"{name}.running_var"):
                if any(not torch.equal(states[0][key], state[key]) for state in states[1:]):
                    layers.append(module)
                    break
    return layers


@torch.no_grad()
def refresh_batchnorm(
    network: nn.Module,
    layers: Sequence[nn.Module],
    features: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[torch.Tensor],
) -> None:
    """Count BatchNorm's running statistics anew: their mean over all batches; nothing else of the network changes.

    Args:
        network: all of it, left in evaluation mode (no dropout).
        layers: whose statistics are counted.
        features: runs the part of the network that has these layers.
        batches: images uint8 ``(B, 3, H, W)``, on the network's device.

    Raises:
        UserError: a layer has not seen a single batch.
    """
    network.eval()
    before = []
    for layer in layers:
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        before.append(layer.momentum)
        layer.reset_running_stats()
        layer.momentum = None  # torch's sign for a plain mean instead of a moving one
        layer.train()
    for images in batches:
        # One image alone may have no variance.
        if len(images) > 1:
            features(images)
    network.eval()
    for layer, momentum in zip(layers, before, strict=True):
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        layer.momentum = momentum
        if not layer.num_batches_tracked:
            raise UserError(
                "BatchNorm of this network cannot be counted anew on images alone (or there are fewer than two); "
                "train with a backbone whose BatchNorm stands still (fixed_batchnorm) for a soup"
            )


def save_soup(path: Path, like: dict[str, Any], soup: Soup) -> None:
    """Write a checkpoint with the weights of a soup, whole or not at all.

    Args:
        path: of the new file.
        like: content of the best member's checkpoint, whose settings are kept.
        soup: the weights.
    """
    kept = {key: value for key, value in like.items() if key not in _TRAINING}
    with write_atomically(path) as partial, partial.open("wb") as file:
        torch.save({**kept, "state_dict": soup.state}, file)


def soup_table(soup: Soup, metric: str, test: Sequence[float | None] | None = None) -> Table:
    """The members and the soup.

    Args:
        soup: what was made.
        metric: what was measured on the validation split.
        test: the same on the test split, for each member and the soup; None where it was not measured.
    """
    chosen = ", chosen on val" if soup.method == "greedy" else ""
    rows = [
        [str(run), "yes" if number in soup.kept else "no", _cell(value)]
        for number, (run, value) in enumerate(zip(soup.members, soup.scores, strict=True))
    ]
    rows.append(["soup", "", _cell(soup.score)])
    columns = ["run", "in the soup", metric]
    if test is not None:
        columns.append(metric.replace("val/", "test/", 1))
        rows = [[*row, _cell(value)] for row, value in zip(rows, test, strict=True)]
    title = f"{soup.method} soup of {len(soup.kept)} of {len(soup.members)} runs{chosen}"
    return Table(columns, rows, columns[:2], title, styles={len(rows) - 1: "bold"})


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
