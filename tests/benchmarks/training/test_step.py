"""The comparison is fair: every contender computes the same losses and ends with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.harness.data import LongEpoch
from benchmarks.training import step
from benchmarks.training.step import CONTENDERS, Kind, Training, measure
from datamodules.options import ImageOptions, LoaderOptions


def test_ours_is_compared_with_every_other(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"Vitrail": [9.9, 5.0], "hand-written loop": [10.0, 5.0], "transformers.Trainer": [9.0, 5.5]}
    rates["open_clip loss, plain loop"] = [1.0, 1.0]
    monkeypatch.setattr(step, "measure", lambda *arguments: rates)
    by_hand, trainer, *_ = step.run(1)
    assert (by_hand.peer, by_hand.promise, by_hand.kept) == ("hand-written loop", "≥ 0.98", True)
    assert (by_hand.low, by_hand.high) == pytest.approx((0.99, 1.0))
    assert (trainer.peer, trainer.promise) == ("transformers.Trainer", "> 1")
    assert (trainer.low, trainer.high) == pytest.approx((5 / 5.5, 1.1))


@pytest.mark.slow
def test_the_loops_take_turns() -> None:
    rates = measure("contrastive", ["Vitrail", "transformers.Trainer"], turns=2, chunk=1)
    assert {name: len(found) for name, found in rates.items()} == {"Vitrail": 2, "transformers.Trainer": 2}
    assert all(rate > 0 for found in rates.values() for rate in found)


STEPS = 5


class PlainAdamW(torch.optim.AdamW):
    """The same for all: a fused one rounds otherwise, and where a gradient is 0 AdamW makes a step of the rounding."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "fused": False})


class Trained(NamedTuple):
    losses: list[float]
    weights: list[torch.Tensor]
    batches: list[list[int]]


def trained(kind: Kind, name: str, folder: Path) -> Trained:
    """Train as one contender, watching what goes into its collation and what comes to ``backward``."""
    losses: list[float] = []
    batches: list[list[int]] = []
    backward = torch.Tensor.backward

    class Watching:
        def pace(self, collate: Any) -> Any:
            def watched(samples: Any) -> Any:
                batches.append([sample["sample_id"] for sample in samples])
                return collate(samples)

            return watched

    def recorded(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(self.item())
        backward(self, *args, **kwargs)  # type: ignore[no-untyped-call]  # torch's own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", recorded)
        patch.setattr(torch.optim, "AdamW", PlainAdamW)
        patch.setattr(LongEpoch, "pacer", Watching())
        folder.mkdir()
        training = Training(kind, STEPS, folder, batch_size=4, image_size=32, backbone="test_resnet", text_width=16)
        module = CONTENDERS[kind][name](training)
    return Trained(losses, sorted((p.detach().clone() for p in module.parameters()), key=_by_content), batches)


def _by_content(weights: torch.Tensor) -> tuple[Any, ...]:
    """Parameters stand in another order in other modules."""
    return tuple(weights.shape), round(float(weights.double().square().sum()), 3)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Kind, Trained]]:
    folder = tmp_path_factory.mktemp("ours")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRAIL_CACHE", str(folder))
        yield {kind: trained(kind, "Vitrail", folder / kind) for kind in CONTENDERS}


PEERS = [
    pytest.param(kind, name, marks=[] if "hand-written" in name else [pytest.mark.slow])
    for kind, contenders in CONTENDERS.items()
    for name in contenders
    if name != "Vitrail"
]


@pytest.mark.parametrize(("kind", "name"), PEERS)
def test_a_peer_trains_the_same(kind: Kind, name: str, ours: dict[Kind, Trained], tmp_path: Path) -> None:
    peer = trained(kind, name, tmp_path / "peer")
    assert len(peer.losses) == STEPS
    assert peer.losses == pytest.approx(ours[kind].losses, abs=1e-5)
    assert peer.batches == ours[kind].batches
    assert len(peer.weights) == len(ours[kind].weights)
    for theirs, own in zip(peer.weights, ours[kind].weights, strict=True):
        torch.testing.assert_close(theirs, own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", list(CONTENDERS))
def test_losses_move(kind: Kind, ours: dict[Kind, Trained]) -> None:
    losses = ours[kind].losses
    assert len(losses) == STEPS
    assert max(losses) - min(losses) > 1e-3
    assert [len(batch) for batch in ours[kind].batches] == [4] * STEPS
    assert len({row for batch in ours[kind].batches for row in batch}) == 4 * STEPS


def test_an_epoch_has_as_many_batches_as_asked_for() -> None:
    data = LongEpoch(steps=7, image=ImageOptions(size=16), loader=LoaderOptions(batch_size=3, drop_last=True), seed=1)
    batches = list(data.train_dataloader())
    assert [tuple(batch["image"].shape) for batch in batches] == [(3, 3, 16, 16)] * 7
    assert sorted(int(row) for batch in batches for row in batch["sample_id"]) == list(range(21))
    assert all("a photo of a" in caption for batch in batches for caption in batch["caption"])
