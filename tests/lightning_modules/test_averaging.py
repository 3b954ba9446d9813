from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_modules.averaging import (
    State,
    averaged_weights,
    differing_batchnorm,
    interpolated_weights,
    refresh_batchnorm,
)
from tests.support.models import pair_batch, tiny_pair
from vitrail.errors import UserError


def state(*values: float) -> State:
    return {"w": torch.tensor(values), "count": torch.tensor(len(values))}


def test_the_mean_is_computed_weight_by_weight() -> None:
    mean = averaged_weights([state(1.0, 2.0), state(3.0, 6.0), state(5.0, 1.0)])
    assert torch.equal(mean["w"], torch.tensor([3.0, 3.0]))
    assert mean["count"] == 2
    half = averaged_weights([{"w": torch.tensor([1.0]).half()}, {"w": torch.tensor([2.0]).half()}])
    assert half["w"].dtype == torch.float16
    # In float32 the sum of these would lose the small one.
    large = averaged_weights(
        [{"w": torch.tensor([2.0**25])}, {"w": torch.tensor([1.0])}, {"w": torch.tensor([-(2.0**25)])}]
    )
    assert large["w"].item() == pytest.approx(1 / 3)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.moving = nn.BatchNorm2d(4)
        self.fixed = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.dropout(self.fixed(self.moving(self.conv(image.float()))))
        return features


def test_batchnorm_is_recomputed_where_members_differ() -> None:
    torch.manual_seed(0)
    network = Network()
    states = [{name: value.clone() for name, value in network.state_dict().items()} for _ in range(2)]
    assert differing_batchnorm(network, states) == []
    states[1]["moving.running_mean"] += 1
    layers = differing_batchnorm(network, states)
    assert layers == [network.moving]
    batches = [torch.randint(0, 255, (8, 3, 6, 6), dtype=torch.uint8) for _ in range(3)]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    refresh_batchnorm(network, layers, network, [*batches, batches[0][:1]])
    after = network.state_dict()
    with torch.no_grad():
        features = [network.conv(batch.float()) for batch in batches]
    mean = torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0)
    variance = torch.stack([f.var((0, 2, 3)) for f in features]).mean(0)
    torch.testing.assert_close(after["moving.running_mean"], mean)
    torch.testing.assert_close(after["moving.running_var"], variance)
    for name in before.keys() - {"moving.running_mean", "moving.running_var", "moving.num_batches_tracked"}:
        assert torch.equal(before[name], after[name]), name
    assert network.moving.momentum == 0.1
    assert not network.moving.training
    with pytest.raises(UserError, match="cannot be recomputed"):
        refresh_batchnorm(network, layers, lambda images: network.conv(images.float()), batches)


def test_the_ends_are_the_models_and_the_middle_is_between() -> None:
    start, end = (
        {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(3)},
        {"w": torch.tensor([1.0, 4.0]), "n": torch.tensor(5)},
    )
    assert torch.equal(interpolated_weights(start, end, 0.0)["w"], start["w"])
    assert torch.equal(interpolated_weights(start, end, 1.0)["w"], end["w"])
    assert torch.equal(interpolated_weights(start, end, 0.25)["w"], torch.tensor([0.25, 2.5]))
    assert interpolated_weights(start, end, 0.25)["n"] == 5


@torch.no_grad()
def test_an_adapter_is_scaled_as_its_product(tmp_path: Path) -> None:
    task = tiny_pair(tmp_path, lora={"rank": 2, "alpha": 2}).eval()
    start = {name: value.clone() for name, value in task.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    end = {
        name: torch.randn(value.shape, generator=generator) if "lora_" in name else value
        for name, value in start.items()
    }
    key = next(name for name in start if name.endswith("lora_B.default.weight"))
    adapter = key.removesuffix("lora_B.default.weight") + "lora_A.default.weight"
    half = interpolated_weights(start, end, 0.5)
    torch.testing.assert_close(half[key] @ half[adapter], 0.5 * end[key] @ end[adapter])
    task.load_state_dict(interpolated_weights(start, end, 0.0))
    plain = tiny_pair(tmp_path).eval()
    image = pair_batch([1, 2])["image"]
    torch.testing.assert_close(task.encode_image(image), plain.encode_image(image))


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match=r"1 of another shape \(a is "):
        interpolated_weights({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, 0.5)
