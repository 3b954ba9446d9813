from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from datamodules.schema import UserError
from lightning_modules.temperature import Temperature


def test_it_begins_where_clip_begins() -> None:
    scale, bias = Temperature(None, with_bias=False)()
    assert float(scale) == pytest.approx(1 / 0.07)
    assert float(bias) == 0.0


def test_with_a_bias_it_begins_where_siglip_begins() -> None:
    scale, bias = Temperature(None, with_bias=True)()
    assert float(scale) == pytest.approx(10.0)
    assert float(bias) == -10.0


def test_a_learned_one_is_clamped_at_a_hundred_and_can_come_back() -> None:
    temperature = Temperature({"scale": 99.0}, with_bias=False)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=1.0)
    for direction in (-1.0, 1.0):
        optimizer.zero_grad()
        (direction * temperature()[0]).backward()
        assert float(temperature.log_scale.grad) != 0  # type: ignore[arg-type]  # it has one
        optimizer.step()
        temperature.clamp()
        if direction < 0:
            assert float(temperature.log_scale) == pytest.approx(math.log(100))
    assert float(temperature()[0]) < 100


def test_a_fixed_one_is_no_parameter_but_is_saved() -> None:
    temperature = Temperature({"scale": math.e, "learned": False}, with_bias=True)
    assert not list(temperature.parameters())
    assert set(temperature.state_dict()) == {"log_scale", "bias"}
    assert float(temperature()[0]) == pytest.approx(math.e)


def test_what_came_with_the_weights_is_taken_unless_the_options_say_otherwise() -> None:
    given = nn.Parameter(torch.tensor([math.log(50.0)])), nn.Parameter(torch.tensor([-3.0]))
    ours, theirs = Temperature({"scale": 7.0}, with_bias=True), Temperature(None, with_bias=True)
    for temperature in (ours, theirs):
        temperature.take_pretrained(*given)
    assert float(ours()[0]) == pytest.approx(7.0)
    assert float(theirs()[0]) == pytest.approx(50.0)
    assert float(theirs()[1]) == -3.0


@pytest.mark.parametrize("options", [{"tau": 1.0}, {"scale": 0.0}, {"scale": 200.0}, {"lr": -1.0}, {"bias": 1.0}])
def test_wrong_settings_are_refused(options: Any) -> None:
    with pytest.raises(UserError, match="temperature"):
        Temperature(options, with_bias=False)
