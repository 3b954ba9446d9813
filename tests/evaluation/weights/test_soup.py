"""Averages of weights, by hand; and the command on real runs, judged by the runs' own metrics."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from evaluation.__main__ import main
from evaluation.commands.soup import best_of_sweep, place_beside, place_of_sweep
from evaluation.weights.soup import (
    State,
    averaged,
    greedy_soup,
    moving_statistics,
    refresh_batchnorm,
    refuse_strangers,
    uniform_soup,
)
from experiments.train.cli import main as experiments
from lightning_modules.checkpoint import load_task, read_checkpoint
from tests.experiments.conftest import TINY
from tests.experiments.plain_figures import plain_figures
from vitrail.errors import UserError

RUNS = [Path("a"), Path("b"), Path("c")]


def state(*values: float) -> State:
    return {"w": torch.tensor(values), "count": torch.tensor(len(values))}


def near(target: float) -> Any:
    """A metric that is the distance of the first weight from a number; lower is better."""

    def score(weights: State, members: Sequence[int]) -> tuple[float, State]:
        return abs(float(weights["w"][0]) - target), weights

    return score


def test_the_mean_is_computed_weight_by_weight() -> None:
    mean = averaged([state(1.0, 2.0), state(3.0, 6.0), state(5.0, 1.0)])
    assert torch.equal(mean["w"], torch.tensor([3.0, 3.0]))
    assert mean["count"] == 2
    half = averaged([{"w": torch.tensor([1.0]).half()}, {"w": torch.tensor([2.0]).half()}])
    assert half["w"].dtype == torch.float16
    # In float32 the sum of these would lose the small one.
    large = averaged([{"w": torch.tensor([2.0**25])}, {"w": torch.tensor([1.0])}, {"w": torch.tensor([-(2.0**25)])}])
    assert large["w"].item() == pytest.approx(1 / 3)


def test_greedy_takes_only_what_does_no_harm() -> None:
    states = [state(9.0), state(1.0), state(-1.2)]
    # Alone: 9, 1, 1.2 from 0. The mean of the last two is -0.1; with the first one it would be 2.9.
    soup = greedy_soup(states, RUNS, near(0.0), maximize=False)
    assert soup.members == [Path("b"), Path("c"), Path("a")]
    assert soup.scores == pytest.approx([1.0, 1.2, 9.0])
    assert soup.kept == [0, 1]
    assert soup.state["w"].item() == pytest.approx(-0.1)
    assert soup.score == pytest.approx(0.1)
    uniform = uniform_soup(states, RUNS, near(0.0), maximize=False)
    assert uniform.state["w"].item() == pytest.approx(8.8 / 3)
    assert list(uniform.kept) == [0, 1, 2]


def test_higher_is_better_where_that_is_so() -> None:
    soup = greedy_soup([state(1.0), state(3.0), state(2.0)], RUNS, near(0.0), maximize=True)
    assert soup.members[0] == Path("b")
    assert soup.kept == [0]
    # What is equally good is taken: the mean of 3 and 3.
    assert greedy_soup([state(3.0), state(3.0)], RUNS[:2], near(0.0), maximize=True).kept == [0, 1]


def test_a_member_whose_metric_is_not_a_number_is_never_the_best() -> None:
    states = [state(float("nan")), state(1.0), state(-1.2)]
    for maximize in (False, True):
        soup = greedy_soup(states, RUNS, near(0.0), maximize=maximize)
        assert soup.members[-1] == Path("a")
        assert 2 not in soup.kept
        assert not math.isnan(soup.score)
    with pytest.raises(UserError, match="of no member is a number"):
        greedy_soup([state(float("nan"))] * 2, RUNS[:2], near(0.0), maximize=False)


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


def test_batchnorm_is_counted_anew_where_members_differ() -> None:
    torch.manual_seed(0)
    network = Network()
    states = [{name: value.clone() for name, value in network.state_dict().items()} for _ in range(2)]
    assert moving_statistics(network, states) == []
    states[1]["moving.running_mean"] += 1
    layers = moving_statistics(network, states)
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
    with pytest.raises(UserError, match="cannot be counted anew"):
        refresh_batchnorm(network, layers, lambda images: network.conv(images.float()), batches)


def checkpoint(weights: State, **hyper_parameters: Any) -> dict[str, Any]:
    return {"state_dict": weights, "hyper_parameters": {"class_names": ["x", "y"], **hyper_parameters}}


def test_members_that_do_not_belong_together_are_refused() -> None:
    good = checkpoint(state(1.0))
    refuse_strangers(RUNS[:2], [good, checkpoint(state(2.0), lr=0.5)], ["d", "d"])
    for other, data, said in (
        (checkpoint(state(1.0, 2.0)), "d", r"b: is another network \(w is \(2,\) there, \(1,\) in a\)"),
        (checkpoint({"v": torch.zeros(1)}), "d", r"b: is another network \(count is absent there"),
        (checkpoint(state(1.0), class_names=["y", "x"]), "d", "b: class_names differs"),
        (good, "e", "b: has other data or another division"),
    ):
        with pytest.raises(UserError, match=said):
            refuse_strangers(RUNS[:2], [good, other], ["d", data])
    with pytest.raises(UserError, match="at least two runs, got 1"):
        refuse_strangers(RUNS[:1], [good], ["d"])
    with pytest.raises(UserError, match="a: is named twice"):
        refuse_strangers([RUNS[0], Path("b/../a")], [good, good], ["d", "d"])
    adapters = checkpoint({"q.lora_A.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="adapters cannot be averaged"):
        refuse_strangers(RUNS[:2], [adapters, adapters], ["d", "d"])


def test_the_soup_lies_beside_its_members() -> None:
    assert place_beside(Path("runs/tiny/20260101")) == Path("runs/tiny_soup")
    assert place_beside(Path("runs/sweeps/lr/trials/trial-0001/20260101")) == Path("runs/lr_soup")
    assert place_of_sweep(Path("runs/sweeps/lr")) == Path("runs/lr_soup")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's directory with three trained members, of which one is poor."""
    root = tmp_path_factory.mktemp("soup")
    config = root / "tiny.yaml"
    config.write_text(TINY)
    folder = root / "runs" / "sweeps" / "lr"
    rows = []
    for number, lr in enumerate((0.001, 0.002, 0.3)):
        trial = f"trial-000{number}"
        flags = ["--name", trial, "--runs", str(folder / "trials"), f"--model.lr={lr}", "--trainer.max_epochs=1"]
        with plain_figures():
            assert experiments(["fit", "--config", str(config), *flags]) == 0
        [run] = (folder / "trials" / trial).glob("*")
        value = pd.read_csv(run / "metrics.csv")["val/loss"].min()
        rows.append({"trial": trial, "state": "complete", "val/loss": value, "run": str(run)})
    rows.append({"trial": "trial-0003", "state": "failed", "val/loss": None, "run": None})
    pd.DataFrame(rows).sort_values("val/loss").to_csv(folder / "sweep.csv", index=False)
    return folder


def soup_of(folder: Path) -> Path:
    return sorted((folder.parents[1] / "lr_soup").glob("*"))[-1]


def members(folder: Path) -> list[Path]:
    return sorted((folder / "trials").glob("*/*"))


def test_the_best_of_a_sweep_become_a_run_that_can_be_tested(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["soup", "--sweep", str(finished), "--top", "3", "--test"]) == 0
    said = capsys.readouterr().out
    assert "test/loss" in said
    made = soup_of(finished)
    assert str(made / "checkpoints" / "best.ckpt") in said
    record = json.loads((made / "soup.json").read_text())
    table = pd.read_csv(finished / "sweep.csv").head(3)
    # Measured again, each member is worth what its own training said.
    assert [member["run"] for member in record["members"]] == table["run"].tolist()
    assert [member["val/loss"] for member in record["members"]] == pytest.approx(table["val/loss"].tolist(), rel=1e-4)
    assert record["val/loss"] <= table["val/loss"].min() + 1e-6
    assert record["members"][0]["kept"] is True
    assert load_task(made / "checkpoints" / "best.ckpt").tasks

    with plain_figures():
        assert experiments(["test", "--ckpt_path", str(made / "checkpoints" / "best.ckpt")]) == 0
    assert (made / "predictions" / "test.parquet").is_file()
    stages = json.loads((made / "run.json").read_text())["stages"]
    tested = stages[-1]["metrics"]["test/loss"]
    assert f"{tested:.4f}" in said
    config = yaml.safe_load((made / "config.yaml").read_text())
    assert config["name"] == "lr_soup"


def test_a_uniform_soup_is_the_mean_with_its_own_statistics(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("lightning.pytorch.utilities.rank_zero").level
    runs = members(finished)[:2]
    assert main(["soup", *map(str, runs), "--method", "uniform"]) == 0
    assert "test/loss" not in capsys.readouterr().out
    made = soup_of(finished)
    soup = read_checkpoint(made / "checkpoints" / "best.ckpt")["state_dict"]
    states = [read_checkpoint(run / "checkpoints" / "best.ckpt")["state_dict"] for run in runs]
    moved = 0
    for name, value in soup.items():
        mean = ((states[0][name].double() + states[1][name].double()) / 2).to(value.dtype)
        if "running_" in name:
            moved += not torch.allclose(value, mean)
        elif "num_batches" not in name:
            assert torch.equal(value, mean), name
    assert moved > 0
    # As counted by a network that has seen nothing but these weights and the training images.
    from datamodules.cli import load_datamodule

    datamodule = load_datamodule(runs[0] / "config.yaml")
    task = load_task(made / "checkpoints" / "best.ckpt")
    name, first = next((n, m) for n, m in task.named_modules() if isinstance(m, nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].mean((0, 2, 3))))
    with torch.no_grad():
        for batch in datamodule.eval_dataloader("train"):
            task.image_features(batch["image"])
    torch.testing.assert_close(soup[f"{name}.running_mean"], torch.stack(seen).mean(0), rtol=1e-4, atol=1e-5)
    assert logging.getLogger("lightning.pytorch.utilities.rank_zero").level == level  # later runs are not muted


def test_members_are_found_beside_the_table_of_a_moved_sweep(tmp_path: Path) -> None:
    # The second trial went on with an interrupted one, in the directory of that.
    runs = [f"old/trials/{name}/now" for name in ("trial-0000", "trial-0001")]
    rows = {"trial": ["trial-0000", "trial-0002"], "state": ["complete", "complete"], "run": runs}
    pd.DataFrame(rows).to_csv(tmp_path / "sweep.csv", index=False)
    assert best_of_sweep(tmp_path, 5) == [Path(run) for run in runs]
    moved = [tmp_path / "trials" / name / "now" for name in ("trial-0000", "trial-0001")]
    for run in moved:
        run.mkdir(parents=True)
    assert best_of_sweep(tmp_path, 5) == moved


def test_mistakes_are_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(run) for run in members(finished)]
    for arguments, said in (
        ([], "either run directories, or one sweep"),
        ([runs[0], "--sweep", str(finished)], "either run directories, or one sweep"),
        ([runs[0]], "at least two runs, got 1"),
        ([runs[0], str(tmp_path)], "at least two runs, got 1"),  # what is no run is left out
        ([*runs[:2], "--metric", "test/loss"], "chosen on the validation split"),
        ([*runs[:2], "--metric", "val/nothing"], "the task does not measure it; it has"),
        (["--sweep", str(tmp_path)], "has no sweep.csv"),
        (["--sweep", str(finished), "--top", "1"], "1 complete trials, and a soup needs at least two"),
    ):
        assert main(["soup", *arguments]) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert said in line
