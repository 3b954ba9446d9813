from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules.losses import Temperature
from vitrail.errors import UserError


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


@pytest.mark.parametrize("learned", [True, False])
def test_a_pretrained_scale_beyond_a_hundred_is_not_cut(learned: bool) -> None:
    """SigLIP's: a pair of cosine .13 is one of p = .91, not of .52."""
    temperature = Temperature({"learned": learned}, with_bias=True)
    temperature.take_pretrained(torch.tensor(4.765), torch.tensor([-12.93]))
    temperature.clamp()
    scale, bias = (float(value) for value in temperature())
    assert torch.equal(temperature.log_scale, torch.tensor(4.765))
    assert bias == pytest.approx(-12.93)
    assert 1 / (1 + math.exp(-(0.13 * scale + bias))) == pytest.approx(0.9108, abs=1e-3)
    with torch.no_grad():
        temperature.log_scale.add_(1.0)
    temperature.clamp()
    assert float(temperature()[0]) == pytest.approx(math.exp(4.765))


def test_a_maximum_below_the_pretrained_scale_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_scale: 100 is below .* 117\.331"):
        Temperature({"max_scale": 100.0}, with_bias=True).take_pretrained(torch.tensor(4.765), None)


@pytest.mark.parametrize("options", [{"tau": 1.0}, {"scale": 0.0}, {"scale": 200.0}, {"lr": -1.0}, {"bias": 1.0}])
def test_wrong_settings_are_refused(options: Any) -> None:
    with pytest.raises(UserError, match="temperature"):
        Temperature(options, with_bias=False)
