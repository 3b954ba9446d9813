"""Models of tasks of every kind: they are trained, stored, resumed, averaged and predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import average_precision_score, f1_score, root_mean_squared_error
from torch.multiprocessing.spawn import start_processes

from callbacks.confusion import ClassReport
from callbacks.outputs import PredictionWriter
from datamodules.base import ImageDataModule
from datamodules.options import AugmentOptions, ImageOptions, LoaderOptions
from datamodules.table import SampleTable
from lightning_modules.checkpoint import load_task
from lightning_modules.classification import ImageClassifier, MultiTaskClassifier
from lightning_modules.ensemble import Ensemble
from lightning_modules.heads import task_outputs
from lightning_modules.heads.multi_label import MultiLabelScores
from lightning_modules.heads.regression import RegressionScores
from lightning_modules.metrics import SplitMetrics
from lightning_modules.options import LossOptions
from tests.lightning_modules.test_ensemble import write_member
from tests.support.models import same_weights, tiny_trainer
from vitrail.errors import UserError
from vitrail.predictions import image_predictions, read_predictions
from vitrail.types import UNKNOWN, TaskFacts, TaskKind

KINDS: dict[str, TaskKind] = {"tags": "multi_label", "grade": "ordinal", "price": "regression"}
VOCABULARIES = {"class": ["cold", "warm"], "tags": ["green", "red"], "grade": ["low", "middle", "high"]}


class Shades(ImageDataModule):
    """Images of one colour each, which all targets follow from; of each task some targets are unknown."""

    def __init__(self, count: int = 96, main: str = "", **shared: Any) -> None:
        shared = {"image": ImageOptions(size=32), "loader": LoaderOptions(batch_size=16), **shared}
        super().__init__(**shared)
        self.main = main
        self.colours = np.random.default_rng(0).integers(0, 256, (count, 3))

    def load_table(self) -> SampleTable:
        rows = []
        for number, (red, green, blue) in enumerate(self.colours.tolist()):
            targets: dict[str, Any] = {
                "class": "warm" if red > green else "cold",
                "tags": [name for name, value in (("red", red), ("green", green)) if value > 127],
                "grade": VOCABULARIES["grade"][green * 3 // 256],
                "price": 100 + 50 * blue / 255,
            }
            if number % 13 < len(targets):
                targets[list(targets)[number % 13]] = None
            split = ("train", "train", "val", "test")[number % 4]
            rows.append({"name": f"s{number}", "source": str(number), "split": split, **targets})
        frame = pd.DataFrame(rows, dtype=object)
        names: Any = VOCABULARIES
        if self.main:  # that task alone
            kind = KINDS[self.main]
            names = {} if kind == "regression" else {"class": VOCABULARIES[self.main]}
            return SampleTable.from_frame(frame, {"class": self.main}, names, kinds={"class": kind})
        return SampleTable.from_frame(frame, ["class", *KINDS], names, kinds=KINDS)

    def read_image(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.colours[index].astype(np.uint8))[:, None, None].expand(3, 32, 32).clone()


def model_of(data: Shades, **changes: Any) -> MultiTaskClassifier:
    pl.seed_everything(0)
    arguments: dict[str, Any] = {
        "tasks": data.tasks,
        "task_facts": data.task_facts,
        "image_size": 32,
        "pretrained": False,
        "lr": 1e-2,
        "schedule": "onecycle",
    }
    return MultiTaskClassifier("test_resnet", **{**arguments, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shades, dict[str, float], dict[str, float]]:
    """A run of eight epochs: its folder with a checkpoint, its data, its validation's and its test's metrics."""
    folder = tmp_path_factory.mktemp("trained")
    data = Shades()
    model = model_of(data, loss_options=LossOptions(regression="gaussian_nll"))
    trainer = tiny_trainer(folder, max_epochs=8, callbacks=[PredictionWriter(), ClassReport()])
    trainer.fit(model, data)
    validated = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.save_checkpoint(folder / "model.ckpt")
    [tested] = trainer.test(model, data, verbose=False)
    return folder, data, validated, dict(tested)


Trained = tuple[Path, Shades, dict[str, float], dict[str, float]]


def test_every_kind_is_learned(trained: Trained) -> None:
    metrics = trained[3]
    assert metrics["test/tags/mAP"] > 0.8  # about a half of the samples have each tag
    assert metrics["test/grade/quadratic_kappa"] > 0.5
    assert metrics["test/price/r2"] > 0.3
    assert metrics["test/price/loss"] < 0.8  # 1 for predicting the mean
    assert metrics["test/class/accuracy"] > 0.7
    assert not any(name.startswith("train/") and "/mAP" in name for name in metrics)


def test_predictions_hold_every_kind_and_give_the_logged_scores(trained: Trained) -> None:
    folder, data, _, metrics = trained
    found = read_predictions(folder / "predictions" / "test.parquet")
    assert dict(found.kinds) == KINDS
    assert found.logits["price"].shape == (24, 2)
    rows = data.split_indices("test")
    for task in data.tasks:
        np.testing.assert_array_equal(found.targets[task], data.table.targets[task][rows])
        assert 20 < len(found.known(task)) <= 24
    known = found.known("tags")
    truth, marked = found.targets["tags"][known], found.predicted_labels("tags")[known]
    scores = found.label_probabilities("tags")[known]
    assert metrics["test/tags/mAP"] == pytest.approx(average_precision_score(truth, scores), abs=1e-5)
    assert metrics["test/tags/f1_macro"] == pytest.approx(f1_score(truth, marked, average="macro"), abs=1e-5)
    known = found.known("price")
    rmse = root_mean_squared_error(found.targets["price"][known], found.values("price")[known])
    assert metrics["test/price/rmse"] == pytest.approx(rmse, rel=1e-4)
    deviations = found.deviations("price")
    assert deviations is not None
    assert (deviations > 0).all()
    for refused in (found.predicted, found.probabilities):
        with pytest.raises(UserError, match="task 'tags' is multi_label, must be single_label or ordinal"):
            refused("tags")


def test_thresholds_of_the_validation_come_with_the_checkpoint(trained: Trained) -> None:
    folder, data, validated, _ = trained
    task: Any = load_task(folder / "model.ckpt")
    found = read_predictions(folder / "predictions" / "test.parquet")
    assert task.thresholds == {"tags": found.thresholds_of("tags").tolist()}
    assert task.thresholds["tags"] != [0.5, 0.5]
    trainer = tiny_trainer(folder, callbacks=[writer := PredictionWriter(["val"])])
    trainer.validate(task, data, verbose=False)
    of_val = read_predictions(folder / "predictions" / "val.parquet")
    assert writer.splits == ["val"]
    known = of_val.known("tags")
    truth, probabilities = of_val.targets["tags"][known], of_val.label_probabilities("tags")[known]
    for label in range(2):
        best = max(f1_score(truth[:, label], probabilities[:, label] >= cut) for cut in probabilities[:, label])
        marked = of_val.predicted_labels("tags")[known, label]
        assert f1_score(truth[:, label], marked) == pytest.approx(best)
    assert float(trainer.callback_metrics["val/tags/f1_macro"]) == pytest.approx(validated["val/tags/f1_macro"])
    task.thresholds["tags"] = [0.9, 0.1]
    tiny_trainer(folder).validate(task, data, verbose=False)
    assert task.thresholds["tags"] == [0.9, 0.1], "only a training's validation chooses"


def test_the_class_report_has_a_row_for_each_label(trained: Trained) -> None:
    folder, _, _, metrics = trained
    report = pd.read_csv(folder / "reports" / "test_tags.csv", index_col="class")
    assert list(report.index) == ["green", "red", "macro avg"]
    assert report.loc["macro avg", "average_precision"] == pytest.approx(metrics["test/tags/mAP"], abs=1e-5)
    assert (folder / "reports" / "test_grade.csv").exists()
    assert not (folder / "reports" / "test_price.csv").exists()
    assert (folder / "reports" / "val_tags.csv").exists()


def test_new_images_are_predicted_in_every_kind(trained: Trained) -> None:
    task: Any = load_task(trained[0] / "model.ckpt")
    image = torch.tensor([250, 10, 128], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 32, 32)
    with torch.no_grad():
        logits = {name: values.numpy() for name, values in task(image).items()}
    [one] = image_predictions(["red.png"], logits, task.tasks, {}, task.task_kinds, task.thresholds)
    row = one.row()
    assert row["tags"] == one.tasks["tags"].label == ";".join(name for name, _ in one.tasks["tags"].labels)
    assert "red" in row["tags"]
    assert float(row["tags_confidence"].split(";")[0]) == pytest.approx(one.tasks["tags"].labels[0][1], abs=1e-4)
    assert (row["price"], row["price_deviation"]) == (one.tasks["price"].value, one.tasks["price"].deviation)
    assert row["grade"] in VOCABULARIES["grade"]
    assert "±" in repr(one)


def test_a_resumed_run_of_every_kind_is_the_same(tmp_path: Path) -> None:
    options = LossOptions(ordinal="cumulative_link", multi_label="asymmetric", balance="uncertainty")
    data = Shades(32)
    whole = model_of(data, loss_options=options, schedule="cosine")
    tiny_trainer(tmp_path, max_epochs=2).fit(whole, Shades(32))
    first, rest = (model_of(data, loss_options=options, schedule="cosine") for _ in range(2))
    stop = pl.callbacks.LambdaCallback(on_train_epoch_end=lambda trainer, module: setattr(trainer, "should_stop", True))
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[stop])
    trainer.fit(first, Shades(32))
    assert trainer.current_epoch == 1
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    tiny_trainer(tmp_path, max_epochs=2).fit(rest, Shades(32), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert same_weights(whole, rest)
    assert whole.thresholds == rest.thresholds
    assert whole.log_variances is not None
    assert whole.log_variances.detach().abs().min() > 0


@pytest.mark.parametrize("task", list(KINDS))
def test_one_task_of_a_kind_needs_no_several(tmp_path: Path, task: str) -> None:
    data = Shades(32, main=task)
    model = ImageClassifier(
        "test_resnet",
        data.class_names,
        task_facts=data.task_facts,
        image_size=32,
        pretrained=False,
    )
    trainer = tiny_trainer(tmp_path)
    trainer.fit(model, data)
    score = {"tags": "mAP", "grade": "mae", "price": "spearman"}[task]
    assert f"val/class/{score}" in trainer.callback_metrics
    with pytest.raises(UserError, match=r"has no class|has fewer than two classes|mean and standard deviation"):
        ImageClassifier("test_resnet", [], task_facts=TaskFacts(data.task_kinds), image_size=32, pretrained=False)


def test_mixed_images_train_every_kind(tmp_path: Path) -> None:
    data = Shades(32, augment=AugmentOptions(mixup=0.4))
    trainer = tiny_trainer(tmp_path, limit_val_batches=0)
    trainer.fit(model_of(data, loss_options=LossOptions(single_label="bce", bce_threshold=0.2)), data)
    assert np.isfinite(float(trainer.callback_metrics["train/loss"]))


@pytest.mark.parametrize("changes", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_every_kind_trains_with_accumulated_steps_and_in_bfloat16(tmp_path: Path, changes: dict[str, Any]) -> None:
    data = Shades(32)
    plain, model = model_of(data, lr=0.0), model_of(data, lr=0.0)  # the same network throughout: only rounding differs
    found = []
    for one, options in ((plain, {}), (model, changes)):
        trainer = tiny_trainer(tmp_path, **options)
        trainer.fit(one, data)
        found.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    losses = [name for name in found[0] if name.endswith("/loss")]
    assert {f"{split}/{task}/loss" for split in ("train", "val") for task in data.tasks} <= set(losses)
    for name in losses:
        assert found[1][name] == pytest.approx(found[0][name], rel=0.02), name
    trained = model_of(data)
    tiny_trainer(tmp_path, **changes).fit(trained, data)
    for before, after in zip(model.heads, trained.heads, strict=True):
        assert not same_weights(before, after)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    data = Shades(32)
    tasks = {**data.tasks, "price": ["cheap", "dear"]}
    with pytest.raises(UserError, match="'tags': MultiTaskClassifier takes it as single_label, the data have it as"):
        tiny_trainer(tmp_path).fit(model_of(data, task_facts=None, tasks=tasks), data)


def test_a_precision_that_would_round_targets_is_refused(tmp_path: Path) -> None:
    data = Shades(32)
    with pytest.raises(UserError, match="bf16-true would round the targets of regression tasks; use bf16-mixed"):
        tiny_trainer(tmp_path, precision="bf16-true").fit(model_of(data), data)


def test_an_ensemble_averages_every_kind(tmp_path: Path) -> None:
    data = Shades(32)
    members, runs = [], []
    for number in range(2):
        member = model_of(data, loss_options=LossOptions(regression="gaussian_nll")).eval()
        with torch.no_grad():
            for parameter in member.heads.parameters():
                parameter.add_(0.3 * number)
        member.thresholds["tags"] = [0.2 + number / 2, 0.4]
        runs.append(write_member(tmp_path / f"run{number}", member, options={"size": 32}))
        members.append(member)
    ensemble = Ensemble(runs)
    image = torch.from_numpy(data.colours[:4].astype(np.uint8))[:, :, None, None].expand(4, 3, 32, 32)
    with torch.no_grad():
        found = ensemble(image)
        first, second = (member(image) for member in members)
    assert ensemble.thresholds == {"tags": pytest.approx([0.45, 0.4])}
    mean = (first["tags"].sigmoid() + second["tags"].sigmoid()) / 2
    torch.testing.assert_close(found["tags"].sigmoid(), mean)
    torch.testing.assert_close(found["grade"].exp(), (first["grade"].exp() + second["grade"].exp()) / 2)
    values = torch.stack([first["price"][:, 0], second["price"][:, 0]])
    variances = torch.stack([first["price"][:, 1], second["price"][:, 1]]).exp()
    torch.testing.assert_close(found["price"][:, 0], values.mean(0))
    mixture = (variances + values**2).mean(0) - values.mean(0) ** 2
    torch.testing.assert_close(found["price"][:, 1].exp(), mixture, rtol=1e-3, atol=1e-2)
    assert ensemble.task_kinds == KINDS


def samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 2, (11, 3), generator=generator).to(torch.int8)
    labels[10] = UNKNOWN  # as padding is
    numbers = torch.randn(11, generator=generator)
    numbers[10] = torch.nan
    return torch.randn(11, 3, generator=generator), labels, numbers


def scores_of(rows: slice) -> dict[str, float]:
    logits, labels, numbers = samples()
    of_labels, of_numbers = MultiLabelScores(3), RegressionScores()
    of_labels.chooses = True
    of_labels.update(logits[rows], labels[rows])
    of_numbers.update(logits[rows, :1], numbers[rows])
    return {name: float(value) for name, value in {**of_labels.compute(), **of_numbers.compute()}.items()}


def losses_of(rows: slice) -> dict[str, float]:
    """Losses of every kind over batches of three; of the first four samples no class and no grade is known."""
    logits, labels, numbers = samples()
    classes, grades = labels[:, 0].long(), labels[:, 1].long()
    classes[:4] = grades[:4] = UNKNOWN
    targets = {"class": classes, "tags": labels, "grade": grades, "price": numbers}
    tasks: dict[str, list[str]] = {task: [] if task == "price" else ["a", "b", "c"] for task in targets}
    outputs = task_outputs(tasks, TaskFacts(KINDS, target_stats={"price": [0.0, 1.0]}), LossOptions())
    metrics = SplitMetrics(tasks, dict.fromkeys(tasks, 1.0), losses_only=True)
    for batch in torch.split(torch.arange(11)[rows], 3):
        metrics.update_losses(
            {
                task: output.loss(output(logits[batch, : output.width]), targets[task][batch])
                for task, output in zip(tasks, outputs, strict=True)
            }
        )
    return {name: float(value) for name, value in metrics.compute().items()}


def _half(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = slice(0, 4) if rank else slice(4, 11)
    torch.save(scores_of(rows) | losses_of(rows), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_scores_and_losses_are_over_all_processes(tmp_path: Path) -> None:
    method = "spawn" if torch.accelerator.is_available() else "fork"
    start_processes(_half, args=(str(tmp_path),), nprocs=2, start_method=method)  # type: ignore[no-untyped-call]
    expected = scores_of(slice(0, 11)) | losses_of(slice(0, 11))
    assert {"loss", "class/loss", "tags/loss", "grade/loss", "price/loss"} <= set(expected)
    for rank in range(2):
        assert cast("dict[str, float]", torch.load(tmp_path / f"{rank}.pt")) == pytest.approx(expected, rel=1e-5)
