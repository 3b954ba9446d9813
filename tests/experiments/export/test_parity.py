"""Parity, speed and size of exports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from evaluation.efficiency import BatchCost
from experiments.export.graphs import Arrays, Runner, module_runner, towers_of
from experiments.export.parity import Form, Parity, interleaved, measure, parity_table, refuse_disagreement
from tests.experiments.export.test_graphs import ready_pair
from tests.support.models import TinyData, TinyPairs, tiny_multitask
from tests.support.runs import data_of, kinds_run
from vitrail.errors import UserError
from vitrail.ood import Detector, unit
from vitrail.runs import Run


class Data:
    """What ``measure`` asks of a DataModule."""

    def __init__(self, data: TinyData) -> None:
        self._data = data

    def eval_dataloader(self, split: str) -> Any:
        assert split == "test"
        return self._data.test_dataloader()


def changed(runner: Runner, output: str, rows: list[int], by: float) -> Runner:
    """Adds something to the first class of some rows of the first batch."""
    calls: list[int] = []

    def run(inputs: Any) -> Arrays:
        found = runner(inputs)
        calls.append(1)
        if len(calls) == 1:
            found[output] = found[output].copy()
            found[output][rows, 0] += by
        return found

    return run


def test_agreement_difference_and_accuracy_are_those_of_the_images() -> None:
    task = tiny_multitask().eval()
    [tower] = towers_of(task)
    own = module_runner(tower)
    forms = {"same": {"model": own}, "other": {"model": changed(own, "logits_class", [0, 2], 100.0)}}
    found = measure(task, cast("Any", Data(TinyData())), "test", forms)
    for row in found["same"]:
        assert row.n == 7  # the eighth row is padding
        assert row.difference < 1e-6
    rows = {row.what: row for row in found["other"]}
    with torch.no_grad():
        batches = [task.predict_step(batch, 0) for batch in TinyData().test_dataloader()]
    logits = torch.cat([batch["logits"]["class"] for batch in batches])
    targets = torch.cat([batch["targets"]["class"] for batch in batches])
    answers = logits.argmax(dim=1)
    others = answers.clone()
    others[[0, 2]] = 0
    assert rows["class"].agreement == pytest.approx(float((answers == others).float().mean()))
    assert rows["class"].accuracy == pytest.approx(
        [float((answers == targets).float().mean()), float((others == targets).float().mean())]
    )
    assert rows["class"].difference == pytest.approx(100.0, rel=1e-5)
    # Every third image's second target is unknown.
    known = torch.cat([batch["targets"]["type"] for batch in batches]) >= 0
    assert rows["type"].known == int(known.sum()) < 7
    assert rows["type"].agreement == 1.0


def test_texts_are_compared_by_what_is_nearest(tmp_path: Path) -> None:
    task = ready_pair(tmp_path, class_names=None)
    image, text = towers_of(task)
    exact = {"image": module_runner(image), "text": module_runner(text)}

    def turned(inputs: Any) -> Arrays:
        return {"text_embedding": -exact["text"](inputs)["text_embedding"]}

    forms = {"exact": exact, "turned": {**exact, "text": turned}}
    found = measure(task, cast("Any", Data(TinyPairs(captions=True))), "test", forms)
    exact_rows = {row.what: row for row in found["exact"]}
    # Seven images with two captions each; none twice.
    assert exact_rows["nearest text of 14"].n == 7
    assert exact_rows["nearest text of 14"].agreement == 1.0
    assert exact_rows["text_embedding"].n == 14
    turned_rows = {row.what: row for row in found["turned"]}
    assert turned_rows["nearest text of 14"].agreement < 1.0
    assert turned_rows["text_embedding"].difference == pytest.approx(2 * exact_rows["text_embedding"].largest)


def test_of_one_text_nothing_is_chosen_and_without_texts_the_tower_is_compared(tmp_path: Path) -> None:
    task = ready_pair(tmp_path, class_names=None)
    forms = {"exact": {tower.name: module_runner(tower) for tower in towers_of(task)}}
    without = measure(task, cast("Any", Data(TinyPairs(captions=False))), "test", forms)["exact"]
    assert {row.what: row.n for row in without}["text_embedding"] == 2
    single = ready_pair(tmp_path, class_names=["cat"], class_prompts=[["a cat"]])
    forms = {"exact": {tower.name: module_runner(tower) for tower in towers_of(single)}}
    found = measure(single, cast("Any", Data(TinyPairs(captions=False))), "test", forms)["exact"]
    assert all(math.isnan(row.agreement) for row in found)


def test_what_is_refused() -> None:
    good = Parity("class", 50, 1.0, 0.004, 20.0)
    refuse_disagreement("x", [good], tolerance=1e-3, min_agreement=1.0)
    cases = [
        (Parity("class", 50, 0.98, 1e-6, 20.0), 1e-3, 1.0, "98.0% of 50"),
        (Parity("class", 50, 1.0, 0.03, 20.0), 1e-3, 1.0, "0.03"),
        (Parity("class", 50, 1.0, 0.004, 0.5), 1e-3, 1.0, "0.004"),
        (Parity("class", 50, 1.0, math.nan, 20.0), None, 0.9, "nan"),
        (Parity("image_embedding", 50, math.nan, 0.1, 1.0), 1e-3, 1.0, "image_embedding: largest"),
        (Parity("class", 50, 0.88, 3.0, 20.0), None, 0.9, "88.0%"),
    ]
    for row, tolerance, share, said in cases:
        with pytest.raises(UserError, match="nothing was written") as error:
            refuse_disagreement("onnx", [good, row], tolerance=tolerance, min_agreement=share)
        assert said in str(error.value)
    refuse_disagreement("x", [Parity("class", 50, 0.92, 3.0, 20.0)], tolerance=None, min_agreement=0.9)


def test_values_that_are_none_are_a_difference() -> None:
    task = tiny_multitask().eval()
    [tower] = towers_of(task)
    own = module_runner(tower)
    broken = changed(own, "logits_class", [0], math.nan)
    rows = measure(task, cast("Any", Data(TinyData())), "test", {"x": {"model": broken}})["x"]
    assert np.isnan(next(row for row in rows if row.what == "class").difference)


def test_forms_take_turns_and_ratios_are_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("experiments.export.parity.time.perf_counter", lambda: clock[0])
    order: list[tuple[str, int]] = []

    def runner(name: str, seconds: float) -> Runner:
        def run(inputs: object) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]]:
            assert isinstance(inputs, dict)
            order.append((name, len(inputs["image"])))
            # The machine slows down from round to round, for all alike.
            clock[0] += seconds * (1 + len(order) // 2)
            return {}

        return run

    images = np.zeros((3, 3, 4, 4), np.uint8)
    found = interleaved({"a": runner("a", 1.0), "b": runner("b", 0.5)}, images, [2, 5], repeats=2)
    assert [name for name, size in order if size == 2] == ["a", "b", "b", "a", "a", "b"]
    assert [size for _, size in order].count(5) == 6
    assert found["a"][2].ratios == [1.0, 1.0]
    assert len(found["b"][5].seconds) == 2
    assert all(0.3 < ratio < 0.7 for ratio in found["b"][2].ratios)


def test_the_table_has_ratios_to_the_first() -> None:
    def form(name: str, size: int, agreement: float, ratio: float) -> Form:
        rows = [
            Parity("class", 53, agreement, 0.01, 9.0, 50, (0.5, 0.48)),
            Parity("image_embedding", 53, float("nan"), 0.2, 1.0),
        ]
        return Form(name, size, rows, {8: BatchCost([ratio, ratio], [ratio, 2 * ratio], None)})

    lines = (
        parity_table([form("PyTorch", 4_000_000, 1.0, 1.0), form("int8", 1_000_000, 0.943, 0.5)])
        .markdown()
        .splitlines()
    )
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        *("form", "size", "class: agrees, accuracy", "largest difference", "time, batch 8 [low, high]")
    ]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == [
        *("int8", "1.00 MB, 0.25", "0.943 [0.846, 0.980] of 53, 0.480", "0.2", "0.75 [0.50, 1.00]")
    ]


@pytest.mark.parametrize(("task", "change"), [("tags", -3.0), ("price", 50.0), ("condition", None)])
def test_another_decision_of_any_kind_is_found(task: str, change: float | None) -> None:
    own, data = Run(kinds_run()).load_model(), data_of(kinds_run())
    [tower] = towers_of(own)
    right = module_runner(tower)

    def wrong(inputs: Any) -> Arrays:
        outputs = right(inputs)
        values = outputs[f"logits_{task}"]
        return {**outputs, f"logits_{task}": values[:, ::-1] if change is None else values + np.float32(change)}

    found = measure(own, data, "test", {"right": {"model": right}, "wrong": {"model": wrong}})
    assert {row.what: row.agreement for row in found["right"] if row.what != "image_embedding"} == dict.fromkeys(
        own.tasks, 1.0
    )
    agreement = {row.what: row.agreement for row in found["wrong"]}
    assert agreement.pop(task) < 0.9
    assert {value for name, value in agreement.items() if name != "image_embedding"} == {1.0}
    [tags] = [row for row in found["right"] if row.what == "tags"]
    predictions = Run(kinds_run()).predictions("test")
    assert predictions is not None
    expected = (predictions.predicted_labels("tags") == (predictions.targets["tags"] == 1)).mean()
    assert tags.accuracy == pytest.approx((expected, expected))


@pytest.mark.parametrize("task", ["classifier", "pair"])
def test_scores_of_unknown_images_are_compared(task: str, tmp_path: Path) -> None:
    own: Any = tiny_multitask().eval() if task == "classifier" else ready_pair(tmp_path)
    data: Any = Data(TinyData() if task == "classifier" else TinyPairs(captions=False))
    towers = towers_of(own, features=True)
    size = int(own.input_options["size"])
    right = {tower.name: module_runner(tower) for tower in towers}
    name = towers[0].name
    wrong = {**right, name: changed(right[name], "image_features", [0, 2], 100.0)}
    width = right[name]({"image": np.zeros((1, 3, size, size), np.uint8)})["image_features"].shape[1]
    bank = unit(np.random.default_rng(0).normal(size=(5, width))).astype(np.float32)
    detector = Detector(
        "knn", next(iter(own.tasks)), "single_label", 0.0, 0.9, {"bank": bank, "neighbours": np.array(2, np.float32)}
    )

    found = measure(own, data, "test", {"right": right, "wrong": wrong}, detector)

    rows = {form: {row.what: row for row in values} for form, values in found.items()}
    assert rows["right"]["unknown (knn)"].agreement == 1.0
    assert rows["right"]["unknown (knn)"].difference < 1e-5
    refuse_disagreement("onnx", found["right"], tolerance=1e-3, min_agreement=1.0)
    assert rows["wrong"]["unknown (knn)"].difference > 1e-3
    with pytest.raises(UserError, match="unknown"):
        refuse_disagreement("onnx", [rows["wrong"]["unknown (knn)"]], tolerance=1e-3, min_agreement=1.0)
