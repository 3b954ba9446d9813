from __future__ import annotations

import copy
import itertools
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from evaluation.commands.efficiency import build_experiment, builder_of
from evaluation.efficiency import (
    BatchCost,
    Costs,
    by_model,
    costs_from_values,
    count,
    groups,
    measure,
    parameter_count,
    ratios_to,
)
from lightning_modules import MultiTaskClassifier
from lightning_modules.encoders.dual import build_towers
from lightning_modules.options import TowerOptions
from tests.support.models import write_bert, write_clip
from vitrail.errors import UserError


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
    table = by_model({"a": (None, Costs("cpu", 1, "a", costs))}, [1]).markdown()
    assert "| 10.0 | – | 100.0 | 1.00 | – |" in table


def test_what_ratios_are_to_is_reported_where_it_is_not_the_first() -> None:
    batches = {1: BatchCost([0.01], [1.0], None)}
    failed, measured = Costs(error="no memory"), Costs("cpu", 1, "b", batches)
    assert ratios_to({"b": (None, measured), "c": (None, measured)}) == ""
    message = ratios_to({"a": (None, failed), "b": (None, measured), "c": (None, measured)})
    assert message == ("a could not be measured with all the others, so ratios are not to it: of b to b; of c to b.")


class Embeds(nn.Module):
    """As a task has its towers."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.towers = build_towers(TowerOptions(model=str(folder), pretrained=False), 32)

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
    head, _, known, unknown = (
        by_model({"a|b": (counts, costs), "c": (None, Costs(error="no"))}, [4]).markdown().splitlines()
    )
    assert head.count("|") == unknown.count("|")
    assert "200.0 | 3.00 [2.00, 4.00] | – |" in known  # four images in 20 ms; peak memory is not known
    assert known.startswith(r"| a\|b |")
    assert set(unknown.removeprefix("| c |").split()) == {"|", "–"}


def test_costs_survive_json() -> None:
    costs = Costs("cpu", 1, "first", {4: BatchCost([0.01], [2.0], 7)})
    assert costs_from_values(json.loads(json.dumps(asdict(costs)))) == costs


EXPERIMENT: dict[str, Any] = {
    "data": {
        "class_path": "datamodules.Wares",
        "init_args": {"n_samples": 60, "resolution": 32, "image": {"size": 32}},
    },
    "model": {
        "class_path": "lightning_modules.MultiTaskClassifier",
        "init_args": {"backbone": "test_resnet", "pretrained": True, "lr": 0.001},
    },
}


def test_an_experiment_is_built_without_weights_and_with_the_datas_tasks() -> None:
    task, size = build_experiment(EXPERIMENT, "meta")
    assert size == 32
    assert all(parameter.is_meta for parameter in task.parameters())
    assert not task.training
    assert isinstance(task, MultiTaskClassifier)
    assert set(task.tasks) == {"class", "colour", "material", "condition"}
    real, _ = build_experiment(EXPERIMENT, "cpu")
    assert real(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))["class"].shape[0] == 2


def test_overlays_are_laid_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    (tmp_path / "b.yaml").write_text("data: {init_args: {image: {size: 64}}}")
    assert builder_of(tmp_path / "a.yaml", [tmp_path / "b.yaml"])("meta")[1] == 64


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"model": {}}, "class_path"),
        ({"data": None}, "needs data"),
        ({"model": {"class_path": "lightning_modules.Nothing"}}, "no task"),
        ({"model": {"class_path": "os.system"}}, "no task"),
        ({"model": {**EXPERIMENT["model"], "init_args": {"backbone": "test_resnet", "lr": "x"}}}, "lr"),
        ({"model": {**EXPERIMENT["model"], "init_args": {"backbone": "resnet_nobody"}}}, "timm does not know"),
    ],
)
def test_what_cannot_be_built_is_reported(part: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_experiment({**EXPERIMENT, **part}, "meta")


def test_a_run_without_a_best_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"best\.ckpt"):
        builder_of(tmp_path, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run directory"):
        builder_of(tmp_path / "empty", [])


def test_a_run_that_was_evaluated_as_it_came_is_built_from_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    (tmp_path / "run.json").write_text(json.dumps({"stages": [{"stage": "test", "exit": "finished"}]}))
    task, size = builder_of(tmp_path, [])("meta")
    assert (type(task).__name__, size) == ("MultiTaskClassifier", 32)
    # A training that left no best checkpoint is another matter.
    (tmp_path / "run.json").write_text(json.dumps({"stages": [{"stage": "fit", "exit": "unfinished"}]}))
    with pytest.raises(UserError, match=r"best\.ckpt"):
        builder_of(tmp_path, [])


def test_each_parameter_counts_once_and_frozen_ones_can_be_left_out() -> None:
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    both = nn.Sequential(first, second)
    assert parameter_count(both) == 12 + 4 + 4
    assert parameter_count(both, trainable_only=True) == 12 + 4


def test_packed_weights_count_as_what_they_stand_for() -> None:
    layer = nn.Linear(8, 4, bias=False)
    layer.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = SimpleNamespace(shape=torch.Size((4, 8)))  # type: ignore[attr-defined]  # as bitsandbytes
    assert parameter_count(layer) == 32


def test_the_first_model_is_in_every_group_and_any_other_in_one() -> None:
    names = list("abcde")
    sizes = dict.fromkeys(names, 100_000_000)
    room = 300_000_000
    made = groups(names, sizes, room)
    assert all(group[0] == "a" for group in made)
    others = list(itertools.chain.from_iterable(group[1:] for group in made))
    assert others == names[1:]
    assert all(len(group) * 100_000_000 <= room for group in made)
    # What is too large for any group is tried all the same, with nothing but the first next to it.
    assert groups(names[:3], {**sizes, "b": 10**12}, room) == [["a", "b"], ["a", "c"]]
    assert groups(["a"], sizes, 1) == [["a"]]


@pytest.fixture(scope="module")
def costs() -> dict[str, Costs]:
    wrong = copy.deepcopy(EXPERIMENT)
    wrong["model"]["class_path"] = "lightning_modules.Nothing"
    builders = {"small": partial(build_experiment, EXPERIMENT), "wrong": partial(build_experiment, wrong)}
    return measure(builders, dict.fromkeys(builders, 0), [4, 1], 3, threads=1)


def test_rounds_are_measured_next_to_each_other(costs: dict[str, Costs]) -> None:
    small = costs["small"]
    assert (small.device, small.threads, small.first, small.error) == ("cpu", 1, "small", "")
    assert list(small.batches) == [1, 4]
    for one in small.batches.values():
        assert len(one.seconds) == 3
        assert min(one.seconds) > 0
        assert one.ratios == [1.0, 1.0, 1.0]


def test_memory_is_at_least_that_of_the_weights(costs: dict[str, Costs]) -> None:
    peak = costs["small"].batches[4].peak_bytes
    weights = count(*build_experiment(EXPERIMENT, "meta")).weight_bytes
    if peak is None:
        pytest.skip("this system does not report a process's peak memory")
    # Beyond weights and a batch of a small network there are buffers of kernels; the libraries are not counted.
    assert weights <= peak < weights + 200_000_000


def test_a_model_that_fails_says_why_and_leaves_the_others_alone(costs: dict[str, Costs]) -> None:
    assert "no task of lightning_modules" in costs["wrong"].error
    assert not costs["wrong"].batches
