from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.cost.efficiency import BatchCost, Costs, costs_from_values, count, markdown, ratios_to
from lightning_modules.encoders.dual import build_towers
from tests.fakes_models import write_bert, write_clip


class Small(nn.Module):
    """A network whose numbers can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.conv(image.float()))
        scores: torch.Tensor = self.head(features.mean((2, 3)))
        return scores


def test_counts_are_those_worked_out_by_hand() -> None:
    with torch.device("meta"):
        model = Small()
    model.conv.requires_grad_(False)
    counts = count(model, 10)
    assert counts.parameters == 3 * 4 * 9 + 2 * 4 + (4 * 5 + 5)
    assert counts.trainable == counts.parameters - 3 * 4 * 9
    # A multiplication and an addition for each weight and each place; norms and means are left out.
    assert counts.image_flops == 2 * (3 * 4 * 9 * 10 * 10) + 2 * 4 * 5
    # Mean, variance (float32) and the number of batches (int64) of the norm are saved too.
    assert counts.weight_bytes == 4 * counts.parameters + 4 * 2 * 4 + 8
    assert counts.text_flops is None


def test_one_round_has_no_percentile_and_no_spread() -> None:
    costs = {1: BatchCost([0.01], [1.0], None)}
    table = markdown({"a": (None, Costs("cpu", 1, "a", costs))}, [1])
    assert "| 10.0 | – | 100.0 | 1.00 | – |" in table


def test_what_ratios_are_to_is_told_where_it_is_not_the_first() -> None:
    batches = {1: BatchCost([0.01], [1.0], None)}
    failed, measured = Costs(error="no memory"), Costs("cpu", 1, "b", batches)
    assert ratios_to({"b": (None, measured), "c": (None, measured)}) == ""
    told = ratios_to({"a": (None, failed), "b": (None, measured), "c": (None, measured)})
    assert told == ("a could not be measured beside all the others, so ratios are not to it: of b to b; of c to b.")


class Embeds(nn.Module):
    """As a task has its towers."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.towers = build_towers({"model": str(folder), "pretrained": False}, 32)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.towers.encode_image(image)


def test_attention_of_both_towers_is_counted(tmp_path: Path) -> None:
    folder = write_clip(tmp_path)
    with torch.device("meta"):
        counts = count(Embeds(folder), 32)

    def layers(places: int) -> int:
        # Two layers of width 32: four maps, two of the feed-forward part, and twice every place with every place.
        return 2 * 2 * (places * (4 * 32 * 32 + 2 * 32 * 64) + 2 * places * places * 32)

    patches = 2 * (3 * 8 * 8 * 32) * 16
    assert counts.image_flops == layers(17) + patches + 2 * 32 * 16
    assert counts.text_flops == layers(20) + 2 * 32 * 16


def test_two_towers_have_a_text_side_too(tmp_path: Path) -> None:
    folder = str(write_bert(tmp_path))

    class Pair(Embeds):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            options = {"image": "test_resnet", "image_pretrained": False, "text": folder, "text_pretrained": False}
            self.towers = build_towers(options, 32)  # type: ignore[arg-type]  # a plain dictionary

    with torch.device("meta"):
        counts = count(Pair(), 32)
    assert counts.text_flops is not None
    assert counts.text_flops > 0


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_percentiles_are_numpys(n: int) -> None:
    seconds = np.random.default_rng(n).random(n).tolist()
    cost = BatchCost(seconds, [1.0] * n, None)
    assert cost.p95 == pytest.approx(np.percentile(seconds, 95))
    assert cost.p50 == pytest.approx(np.percentile(seconds, 50))


def test_the_table_shows_a_dash_where_nothing_is_known() -> None:
    cost = BatchCost([0.01, 0.02, 0.03], [2.0, 4.0, 3.0], None)
    costs = Costs("cpu", 1, "first", {4: cost})
    with torch.device("meta"):
        counts = count(Small(), 10)
    head, _, known, unknown = markdown({"a|b": (counts, costs), "c": (None, Costs(error="no"))}, [4]).splitlines()
    assert head.count("|") == unknown.count("|")
    assert "200.0 | 3.00 [2.00, 4.00] | – |" in known  # four images in 20 ms; peak memory is not known
    assert known.startswith(r"| a\|b |")
    assert set(unknown.removeprefix("| c |").split()) == {"|", "–"}


def test_costs_survive_json() -> None:
    costs = Costs("cpu", 1, "first", {4: BatchCost([0.01], [2.0], 7)})
    assert costs_from_values(json.loads(json.dumps(asdict(costs)))) == costs
