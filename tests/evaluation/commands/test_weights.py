from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from sklearn.metrics import average_precision_score
from torch import nn

from evaluation.__main__ import main
from evaluation.commands.transfer.base_to_novel import finetuning_cost, predict_main_task
from evaluation.commands.weights import (
    best_mixture,
    best_of_sweep,
    evaluate_mixtures,
    make_soup,
    mixtures_table,
    refuse_strangers,
    soup_folder,
)
from experiments.train.cli import main as experiments
from lightning_modules.checkpoint import State, load_task, read_checkpoint
from lightning_modules.heads.multi_label import best_thresholds
from tests.support.data import write_flowers, write_labelled
from tests.support.models import write_clip
from tests.support.runs import TINY
from vitrail.errors import UserError
from vitrail.runs import Run

RUNS = [Path("a"), Path("b"), Path("c")]


def state(*values: float) -> State:
    return {"w": torch.tensor(values), "count": torch.tensor(len(values))}


def near(target: float) -> Any:
    """A metric that is the distance of the first weight from a number; lower is better."""

    def score(weights: State, members: Sequence[int]) -> tuple[float, State]:
        return abs(float(weights["w"][0]) - target), weights

    return score


def test_greedy_takes_only_what_does_no_harm() -> None:
    states = [state(9.0), state(1.0), state(-1.2)]
    # Alone: 9, 1, 1.2 from 0. The mean of the last two is -0.1; with the first one it would be 2.9.
    soup = make_soup("greedy", states, near(0.0), maximize=False)
    assert (soup.members, soup.kept) == ([1, 2, 0], [1, 2])
    assert soup.scores == pytest.approx([1.0, 1.2, 9.0])
    assert soup.state["w"].item() == pytest.approx(-0.1)
    assert soup.score == pytest.approx(0.1)
    uniform = make_soup("uniform", states, near(0.0), maximize=False)
    assert uniform.state["w"].item() == pytest.approx(8.8 / 3)
    assert sorted(uniform.kept) == [0, 1, 2]


def test_higher_is_better_where_that_is_so() -> None:
    soup = make_soup("greedy", [state(1.0), state(3.0), state(2.0)], near(0.0), maximize=True)
    assert (soup.members[0], soup.kept) == (1, [1])
    # What is equally good is taken: the mean of 3 and 3.
    assert make_soup("greedy", [state(3.0), state(3.0)], near(0.0), maximize=True).kept == [0, 1]


@pytest.mark.parametrize("maximize", [False, True])
def test_a_member_whose_metric_is_not_a_number_is_never_the_best(maximize: bool) -> None:
    soup = make_soup("greedy", [state(math.nan), state(1.0), state(-1.2)], near(0.0), maximize=maximize)
    assert soup.members[-1] == 0
    assert 0 not in soup.kept
    assert not math.isnan(soup.score)
    with pytest.raises(UserError, match="metric of 1 of 3 members is not a number"):
        make_soup("uniform", [state(math.nan), state(1.0), state(-1.2)], near(0.0), maximize=maximize)
    with pytest.raises(UserError, match="of no member is a number"):
        make_soup("greedy", [state(math.nan)] * 2, near(0.0), maximize=maximize)


def checkpoint(weights: State, **hyper_parameters: Any) -> dict[str, Any]:
    return {"state_dict": weights, "hyper_parameters": {"class_names": ["x", "y"], **hyper_parameters}}


def test_members_that_do_not_belong_together_are_refused() -> None:
    good = checkpoint(state(1.0))
    refuse_strangers(RUNS[:2], [good, checkpoint(state(2.0), lr=0.5)], ["d", "d"])
    for other, data, message in (
        (checkpoint(state(1.0, 2.0)), "d", r"b: is another network \(w is \(2,\) there, \(1,\) in a\)"),
        (checkpoint({"v": torch.zeros(1)}), "d", r"b: is another network \(count is absent there"),
        (checkpoint(state(1.0), class_names=["y", "x"]), "d", "b: class_names differs"),
        (checkpoint(state(1.0), task_facts={"task_kinds": {"class": "multi_label"}}), "d", "b: task_kinds differs"),
        ({**good, "input_options": {"resize": "squash"}}, "d", r"b: image\.resize differs"),
        ({**good, "tokenizer": {"pipeline": "{}"}}, "d", "b: the tokenizer differs"),
        (checkpoint(state(1.0), architectures={"pooling": {"rule": "cls"}}), "d", r"b: towers\.pooling differs"),
        (good, "e", "b: has other data or another division"),
    ):
        with pytest.raises(UserError, match=message):
            refuse_strangers(RUNS[:2], [good, other], ["d", data])
    with pytest.raises(UserError, match="at least two runs, got 1"):
        refuse_strangers(RUNS[:1], [good], ["d"])
    with pytest.raises(UserError, match="a: is named twice"):
        refuse_strangers([RUNS[0], Path("b/../a")], [good, good], ["d", "d"])
    adapters = checkpoint({"q.lora_A.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="adapters cannot be averaged"):
        refuse_strangers(RUNS[:2], [adapters, adapters], ["d", "d"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--top", "2"], "--top 2: goes with --sweep DIR"),
        (["--sweep", "s", "--top", "-1"], "must be at least 2"),
    ],
)
def test_how_many_trials_is_a_number_of_a_sweep(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["soup", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_soup_is_next_to_its_members() -> None:
    assert soup_folder(Path("runs/tiny/20260101")) == Path("runs/tiny_soup")
    assert soup_folder(Path("runs/sweeps/lr/trials/trial-0001/20260101")) == Path("runs/lr_soup")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's directory with three trained members, of which one is poor."""
    root = tmp_path_factory.mktemp("soup")
    config = root / "tiny.yaml"
    config.write_text(TINY)
    folder = root / "runs" / "sweeps" / "lr"
    rows = []
    for number, lr in enumerate((0.001, 0.002, 0.3)):
        trial = f"trial-000{number}"
        flags = ["--name", trial, "--runs", str(folder / "trials"), f"--model.lr={lr}", "--trainer.max_epochs=1"]
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


@pytest.mark.slow
def test_the_best_of_a_sweep_become_a_run_that_can_be_tested(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soup", "--sweep", str(sweep), "--top", "3", "--test"]) == 0
    printed = capsys.readouterr().out
    assert "test/loss" in printed
    made = soup_of(sweep)
    assert str(made / "checkpoints" / "best.ckpt") in printed
    record = json.loads((made / "soup.json").read_text())
    table = pd.read_csv(sweep / "sweep.csv").head(3)
    # Measured again, each member is worth what its own training said.
    assert [member["run"] for member in record["members"]] == table["run"].tolist()
    assert [member["val/loss"] for member in record["members"]] == pytest.approx(table["val/loss"].tolist(), rel=1e-4)
    assert record["val/loss"] <= table["val/loss"].min() + 1e-6
    assert record["members"][0]["kept"] is True
    assert load_task(made / "checkpoints" / "best.ckpt").tasks

    assert experiments(["test", "--ckpt_path", str(made / "checkpoints" / "best.ckpt")]) == 0
    assert (made / "predictions" / "test.parquet").is_file()
    stages = json.loads((made / "run.json").read_text())["stages"]
    tested = stages[-1]["metrics"]["test/loss"]
    assert f"{tested:.4f}" in printed
    config = yaml.safe_load((made / "config.yaml").read_text())
    assert config["name"] == "lr_soup"


def test_a_uniform_soup_is_the_mean_with_its_own_statistics(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("lightning.pytorch.utilities.rank_zero").level
    runs = members(sweep)[:2]
    assert main(["soup", *map(str, runs), "--method", "uniform"]) == 0
    assert "test/loss" not in capsys.readouterr().out
    made = soup_of(sweep)
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


def test_members_are_found_next_to_the_table_of_a_moved_sweep(tmp_path: Path) -> None:
    # The second trial went on with an interrupted one, in the directory of that.
    runs = [f"old/trials/{name}/now" for name in ("trial-0000", "trial-0001")]
    rows = {"trial": ["trial-0000", "trial-0002"], "state": ["complete", "complete"], "run": runs}
    pd.DataFrame(rows).to_csv(tmp_path / "sweep.csv", index=False)
    assert best_of_sweep(tmp_path, 5) == [Path(run) for run in runs]
    (tmp_path / "one").mkdir()
    pd.DataFrame(rows).assign(state=["complete", "failed"]).to_csv(tmp_path / "one" / "sweep.csv", index=False)
    with pytest.raises(UserError, match="1 complete trials, and a soup needs at least two"):
        best_of_sweep(tmp_path / "one", 5)
    moved = [tmp_path / "trials" / name / "now" for name in ("trial-0000", "trial-0001")]
    for run in moved:
        run.mkdir(parents=True)
    assert best_of_sweep(tmp_path, 5) == moved


def test_mistakes_are_one_line(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(run) for run in members(sweep)]
    for arguments, message in (
        ([], "either run directories, or one sweep"),
        ([runs[0], "--sweep", str(sweep)], "either run directories, or one sweep"),
        ([runs[0]], "at least two runs, got 1"),
        ([runs[0], str(tmp_path)], "at least two runs, got 1"),  # what is no run is left out
        ([*runs[:2], "--metric", "test/loss"], "chosen on the validation split"),
        ([*runs[:2], "--metric", "val/nothing"], "the task does not measure it; it has"),
        (["--sweep", str(tmp_path)], "has no sweep.csv"),
        (["--sweep", str(sweep), "--top", "1"], "--top 1: must be at least 2"),
    ):
        assert main(["soup", *arguments]) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert message in line


BASE_CLASSES = """
data:
  class_path: datamodules.Flowers102
  init_args:
    root: {root}
    classes: base
    image: {{size: 32}}
    loader: {{batch_size: 8}}
    checks: {{allow_leaks: [exact, near]}}
model:
  class_path: lightning_modules.DualEncoder
  init_args:
    towers: {{model: {root}/clip}}
    lr: 0.003
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  callbacks:
    - class_path: callbacks.StartWeights
checkpoint: {{monitor: val/class/accuracy, mode: max}}
wandb: {{mode: disabled}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning on half of the classes."""
    root = tmp_path_factory.mktemp("wise")
    write_flowers(root)
    write_clip(root / "clip")
    config = root / "base.yaml"
    config.write_text(BASE_CLASSES.format(root=root))
    assert experiments(["fit", "--config", str(config), "--runs", str(root / "runs"), "--test_best=true"]) == 0
    [run] = (root / "runs").glob("*/*")
    return run


def test_start_weights_are_those_of_the_pretrained_model(finished: Path) -> None:
    start = read_checkpoint(finished / "checkpoints" / "start.ckpt")["state_dict"]
    best = read_checkpoint(finished / "checkpoints" / "best.ckpt")["state_dict"]
    assert start.keys() == best.keys()
    assert any(not torch.equal(start[name], best[name]) for name in start)
    from transformers import CLIPModel

    pretrained = CLIPModel.from_pretrained(finished.parents[2] / "clip").state_dict()
    for name, value in pretrained.items():
        if "logit_scale" not in name:
            assert torch.equal(start[f"towers.model.{name}"], value), name


def test_the_run_keeps_what_the_model_predicted_before(finished: Path) -> None:
    after, before = (pd.read_parquet(finished / "predictions" / f"{name}.parquet") for name in ("test", "test_start"))
    assert after["name"].tolist() == before["name"].tolist()
    assert set(before["target_class"]) == {0, 1, 2, 3, 51, 52, 53, 54}


def test_mixtures_are_evaluated_and_the_best_on_validation_is_kept(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["wise-ft", str(finished), "--alphas", "0", "0.5", "1"]) == 0
    printed = capsys.readouterr().out
    frame = pd.read_csv(finished / "reports" / "wise_ft.csv")
    assert frame["alpha"].tolist() == [0.0, 0.5, 1.0]
    assert set(frame.columns) == {"alpha", "val", "test", "base", "novel"}
    assert (finished / "figures" / "wise_ft.png").stat().st_size > 1000
    chosen = frame["alpha"].tolist()[int(frame["val"].to_numpy().argmax())]
    assert f"α = {chosen:g}" in printed
    start, best, kept = (
        read_checkpoint(finished / "checkpoints" / f"{name}.ckpt")["state_dict"]
        for name in ("start", "best", "wise_ft")
    )
    for name, value in kept.items():
        torch.testing.assert_close(value, torch.lerp(start[name].double(), best[name].double(), chosen).to(value.dtype))
    assert load_task(finished / "checkpoints" / "wise_ft.ckpt").tasks


def test_the_ends_agree_with_the_predictions_of_the_run(finished: Path) -> None:
    from datamodules.cli import load_datamodule

    datamodule = load_datamodule(finished / "config.yaml")
    datamodule.prepare_data()
    datamodule.setup("test")
    cost = finetuning_cost(finished, datamodule, 51)
    start, best = (
        read_checkpoint(finished / "checkpoints" / f"{name}.ckpt")["state_dict"] for name in ("start", "best")
    )
    task = load_task(finished / "checkpoints" / "best.ckpt")
    ends = evaluate_mixtures(task, start, best, datamodule, [0.0, 1.0], base_classes=51)
    assert ends["novel"][0] == pytest.approx(cost.before.novel.value)
    assert ends["base"][1] == pytest.approx(cost.after.base.value)


def test_of_equal_mixtures_the_one_nearest_to_the_start_is_taken() -> None:
    mixtures = pd.DataFrame({"alpha": [0.0, 0.4, 0.9], "val": [0.5, 0.8, 0.8], "test": 0.5})
    assert best_mixture(mixtures) == 0.4
    parts = mixtures.assign(base=[0.6, 0.0, 0.5], novel=[0.3, 0.0, float("nan")])
    table = mixtures_table(parts, 0.4)
    assert [row[-1] for row in table.rows] == ["0.400", "0.000", "–"]
    assert table.styles == {1: "bold"}
    with pytest.raises(UserError, match="no sample of the validation split has a known target"):
        best_mixture(mixtures.assign(val=float("nan")))


def test_shares_out_of_range_and_missing_files_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["wise-ft", str(finished), "--alphas", "2"]) == 2
    assert main(["wise-ft", str(tmp_path)]) == 2
    shutil.copy(finished / "config.yaml", tmp_path)
    capsys.readouterr()
    assert main(["wise-ft", str(tmp_path)]) == 2
    assert "train it with callbacks.StartWeights" in capsys.readouterr().err


MULTI_LABEL = """
data:
  class_path: datamodules.Table
  init_args:
    path: {table}
    columns: {{label: tags, labels: [price], kinds: {{tags: multi_label, price: regression}}}}
    image: {{size: 32}}
    loader: {{batch_size: 8}}
    checks: {{allow_leaks: [near]}}
model:
  class_path: lightning_modules.MultiTaskClassifier
  init_args: {{backbone: test_resnet, pretrained: false, lr: 0.01}}
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  callbacks:
    - class_path: callbacks.StartWeights
checkpoint: {{monitor: val/class/mAP, mode: max}}
wandb: {{mode: disabled}}
"""


@pytest.fixture(scope="module")
def of_labels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two trainings of a multi-label main task and a number."""
    root = tmp_path_factory.mktemp("labels")
    (root / "tags.yaml").write_text(MULTI_LABEL.format(table=write_labelled(root)))
    for lr in ("0.01", "0.02"):
        arguments = ["--config", str(root / "tags.yaml"), "--runs", str(root / "runs"), f"--model.lr={lr}"]
        assert experiments(["fit", *arguments]) == 0
    return sorted((root / "runs").glob("*/*"))


def thresholds_on_validation(path: Path, run: Path) -> dict[str, list[float]]:
    """The thresholds of the highest F1 of a checkpoint on the validation split of a run."""
    datamodule = Run(run).datamodule
    datamodule.setup("fit")
    predictions = predict_main_task(load_task(path), datamodule, "val")
    probabilities = torch.from_numpy(predictions.label_probabilities("class"))
    targets = torch.from_numpy(predictions.targets["class"]).long()
    return {"class": best_thresholds(probabilities, targets).tolist()}


@pytest.mark.slow  # trains two more runs
def test_a_soup_of_multi_label_runs_has_thresholds_of_its_own(of_labels: list[Path]) -> None:
    assert main(["soup", *map(str, of_labels), "--method", "uniform", "--metric", "val/price/mae"]) == 0
    made = sorted(of_labels[0].parent.with_name(f"{of_labels[0].parent.name}_soup").glob("*"))[-1]
    members = json.loads((made / "soup.json").read_text())["members"]
    # Of errors less is better: the first member is the best.
    assert members[0]["val/price/mae"] < members[1]["val/price/mae"]
    kept = read_checkpoint(made / "checkpoints" / "best.ckpt")["thresholds"]
    assert kept["class"] == pytest.approx(
        thresholds_on_validation(made / "checkpoints" / "best.ckpt", of_labels[0])["class"], abs=1e-5
    )
    for run in of_labels:
        assert kept != read_checkpoint(run / "checkpoints" / "best.ckpt")["thresholds"]


def test_mixtures_of_a_multi_label_task_are_chosen_by_map(
    of_labels: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = of_labels[0]
    assert main(["wise-ft", str(run), "--alphas", "0", "0.5", "1"]) == 0
    assert "WiSE-FT: mAP; α chosen on val" in " ".join(capsys.readouterr().out.split())
    frame = pd.read_csv(run / "reports" / "wise_ft.csv").set_index("alpha")
    datamodule = Run(run).datamodule
    datamodule.setup("test")
    for alpha, name in ((0.0, "start"), (1.0, "best")):
        for split in ("val", "test"):
            found = predict_main_task(load_task(run / "checkpoints" / f"{name}.ckpt"), datamodule, split)
            expected = average_precision_score(found.targets["class"], found.label_probabilities("class"))
            assert frame[split][alpha] == pytest.approx(expected)
    mixed = run / "checkpoints" / "wise_ft.ckpt"
    kept = read_checkpoint(mixed)["thresholds"]
    assert kept["class"] == pytest.approx(thresholds_on_validation(mixed, run)["class"], abs=1e-5)


def test_of_errors_the_lowest_is_the_best_mixture() -> None:
    mixtures = pd.DataFrame({"alpha": [0.0, 0.4, 0.9], "val": [3.5, 1.25, 1.25], "test": 10.0})
    assert best_mixture(mixtures, "mae") == 0.4
    assert mixtures_table(mixtures, 0.4, "mae").rows[1] == ["0.4", "1.25", "10"]
