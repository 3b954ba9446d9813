from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evaluation.weights.wise_ft import interpolated_weights
from tests.lightning_modules.tiny_pairs import pair_batch, tiny_pair
from vitrail.errors import UserError


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
