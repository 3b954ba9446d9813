from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation.__main__ import main
from evaluation.statistics import intervals as statistics
from evaluation.statistics.base_to_novel import Cost, base_to_novel, compare, restricted_accuracy
from vitrail.errors import UserError
from vitrail.predictions import Predictions, write_predictions

CLASSES = ["bag", "cap", "mug", "pen", "shoe"]
BASE = 3


def make(skill: tuple[float, float], n: int = 120, seed: int = 0) -> Predictions:
    """Two images an object, both of one class; ``skill`` is how far the right logit of each half stands out.

    The first three targets are unknown.
    """
    rng = np.random.default_rng(seed)
    targets = np.repeat(np.arange(n // 2) % len(CLASSES), 2).astype(np.int64)
    noise = rng.normal(size=(n, len(CLASSES)))
    stands_out = np.where(targets < BASE, skill[0], skill[1])
    logits = noise + np.eye(len(CLASSES))[targets] * stands_out[:, None]
    targets[:3] = -1
    return Predictions(
        sample_id=np.arange(n, dtype=np.int64),
        names=np.array([f"photo {row}" for row in range(n)], dtype=object),
        groups=np.array([f"object {row // 2}" for row in range(n)], dtype=object),
        tasks={"class": CLASSES},
        targets={"class": targets},
        logits={"class": logits.astype(np.float32)},
    )


def brute_force(predictions: Predictions, base: int) -> tuple[list[bool], list[bool]]:
    """Right or wrong, sample by sample, of both halves."""
    halves: tuple[list[bool], list[bool]] = ([], [])
    for target, logits in zip(predictions.targets["class"], predictions.logits["class"], strict=True):
        if target == -1:
            continue
        own = range(base) if target < base else range(base, len(CLASSES))
        halves[int(target >= base)].append(max(own, key=lambda index: logits[index]) == target)
    return halves


@pytest.mark.parametrize("base", [1, 2, 3, 4])
def test_equals_brute_force(base: int) -> None:
    predictions = make((1.5, 0.5))
    right = brute_force(predictions, base)
    result = base_to_novel(predictions, base, n_resamples=500)
    accuracies = [float(np.mean(half)) for half in right]
    assert (result.base_classes, result.novel_classes) == (base, len(CLASSES) - base)
    assert (result.n_base, result.n_novel) == (len(right[0]), len(right[1]))
    assert [result.base.value, result.novel.value] == pytest.approx(accuracies)
    assert result.harmonic_mean.value == pytest.approx(2 / sum(1 / accuracy for accuracy in accuracies))
    targets, logits = predictions.targets["class"][3:], predictions.logits["class"][3:]
    assert restricted_accuracy(targets, logits, base) == pytest.approx(accuracies[0])
    assert restricted_accuracy(targets, logits, base, novel=True) == pytest.approx(accuracies[1])


def test_a_class_of_the_other_half_is_not_a_lucky_one_of_the_own() -> None:
    """A generative model that names one class leaves the others equally likely."""
    predictions = make((0.0, 0.0))
    named = np.where(predictions.targets["class"] < BASE, BASE, 0)
    logits = np.eye(len(CLASSES), dtype=np.float32)[named]
    result = base_to_novel(dataclasses.replace(predictions, logits={"class": logits}), BASE, n_resamples=100)
    assert (result.base.value, result.novel.value) == (0, 0)


def test_restriction_helps() -> None:
    """Wherever the prediction over all classes is right, it is right among fewer classes too."""
    predictions = make((1, 1))
    rows = predictions.targets["class"] >= BASE
    among_all = np.mean(predictions.predicted("class")[rows] == predictions.targets["class"][rows])
    result = base_to_novel(predictions, n_resamples=100)
    assert result.novel.value > among_all
    assert result.base_classes == BASE  # half, rounded up


def test_intervals_are_those_of_the_groups() -> None:
    predictions = make((1.5, 0.5))
    result = base_to_novel(predictions, n_resamples=500)
    for half, estimate in zip(halves(predictions), (result.base, result.novel), strict=True):
        right, groups = half
        ones = np.ones(len(right), dtype=np.int64)
        statistic = statistics.accuracy_statistic(ones, right.astype(np.int64))
        assert estimate.interval == statistics.group_interval(statistic, groups, 500)
    low, high = result.harmonic_mean.interval
    assert low < result.harmonic_mean.value < high


def halves(predictions: Predictions) -> list[tuple[NDArray[np.bool_], NDArray[np.object_]]]:
    targets = predictions.targets["class"]
    right = brute_force(predictions, BASE)
    rows = [(targets >= 0) & (targets < BASE), targets >= BASE]
    return [(np.array(right[side]), predictions.groups[rows[side]]) for side in (0, 1)]


def test_interval_of_the_harmonic_mean_equals_brute_force() -> None:
    """About the percentiles that resampling objects one by one gives."""
    predictions = make((1.5, 0.5))
    parts = [dict.fromkeys(groups, (0, 0)) for _, groups in halves(predictions)]
    for part, (right, groups) in zip(parts, halves(predictions), strict=True):
        for group, is_right in zip(groups, right, strict=True):
            part[group] = (part[group][0] + int(is_right), part[group][1] + 1)
    objects = sorted(parts[0].keys() | parts[1].keys())
    rng = np.random.default_rng(1)
    means = []
    for _ in range(4000):
        drawn = [objects[index] for index in rng.integers(len(objects), size=len(objects))]
        base, novel = (np.sum([part.get(name, (0, 0)) for name in drawn], axis=0) for part in parts)
        means.append(2 / (base[1] / base[0] + novel[1] / novel[0]))
    low, high = base_to_novel(predictions).harmonic_mean.interval
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.015)


def test_all_right_and_all_wrong() -> None:
    perfect = base_to_novel(make((100, 100)))
    assert perfect.harmonic_mean.value == 1
    # As many trials as known objects: the first is unknown, of the second one image is left.
    assert perfect.harmonic_mean.interval == pytest.approx(statistics.wilson(1.0, 59), abs=0.001)
    lost = base_to_novel(make((100, -100)))
    assert (lost.base.value, lost.novel.value, lost.harmonic_mean.value) == (1, 0, 0)


def test_one_object_of_a_half_is_no_error() -> None:
    """Resamples without it count as 0, which only widens the interval."""
    predictions = make((100, 100))
    kept = np.flatnonzero((predictions.targets["class"] < BASE) | (predictions.groups == "object 4"))
    result = base_to_novel(predictions.take(kept), BASE)
    assert result.n_novel == 2
    assert result.harmonic_mean.interval.low < 0.02
    assert result.harmonic_mean.interval.high == 1


def test_cost_is_paired() -> None:
    before, after = make((1.0, 1.5)), make((3.0, 0.7))
    shuffled = before.take(np.random.default_rng(0).permutation(len(before)))
    cost = compare(after, shuffled)
    assert cost.after == base_to_novel(after)
    assert cost.before == base_to_novel(before)
    names = ("base", "novel", "harmonic_mean")
    for name in names:
        difference, new, old = (getattr(part, name) for part in (cost, cost.after, cost.before))
        assert difference.value == pytest.approx(new.value - old.value)
        assert difference.interval.low <= difference.value <= difference.interval.high
        # The noise is the same, so pairs differ less than two models apart would.
        apart = (new.interval.high - new.interval.low) ** 2 + (old.interval.high - old.interval.low) ** 2
        assert difference.interval.high - difference.interval.low < apart**0.5
    assert cost.base.interval.low > 0
    assert cost.novel.interval.high < 0


def test_interval_of_the_difference_equals_brute_force() -> None:
    before, after = make((1.0, 1.5)), make((3.0, 0.7))
    (old, groups), (new, _) = halves(before)[1], halves(after)[1]
    gains = {name: (new[groups == name].astype(float) - old[groups == name]) for name in np.unique(groups)}
    objects, rng = sorted(gains), np.random.default_rng(1)
    means = []
    for _ in range(4000):
        drawn = rng.integers(len(objects), size=len(objects))
        means.append(np.concatenate([gains[objects[index]] for index in drawn]).mean())
    low, high = compare(after, before).novel.interval
    # Ours is wider: there are only 24 objects.
    brute = np.quantile(means, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(brute), abs=0.06)
    assert high - low > np.ptp(brute)


def test_no_difference_has_an_interval_around_zero() -> None:
    predictions = make((1, 1))
    cost = compare(predictions, predictions)
    for estimate in (cost.base, cost.novel, cost.harmonic_mean):
        assert estimate.value == 0
        assert estimate.interval.low == -estimate.interval.high
        assert 0 < estimate.interval.high < 0.2
    everything = compare(make((100, 100)), make((-100, 100)), n_resamples=100)
    assert everything.base == statistics.Estimate(1.0, everything.base.interval)
    assert everything.base.interval.high == 1


def test_both_halves_must_exist() -> None:
    predictions = make((1, 1))
    for base in (0, 5, -1):
        with pytest.raises(UserError, match=f"--base: must be from 1 to 4, as there are 5 classes; got {base}"):
            base_to_novel(predictions, base)
    targets = predictions.targets["class"]
    with pytest.raises(UserError, match=r"no sample is of the novel classes \(3 of 5 are base\)"):
        base_to_novel(predictions.take(np.flatnonzero(targets < BASE)))
    with pytest.raises(UserError, match="no sample is of the base classes"):
        base_to_novel(predictions.take(np.flatnonzero((targets >= BASE) | (targets < 0))))
    parts = ("tasks", "targets", "logits")
    other: dict[str, Any] = {name: {"colour": getattr(predictions, name)["class"]} for name in parts}
    with pytest.raises(UserError, match="no task 'class'"):
        base_to_novel(dataclasses.replace(predictions, **other))


def write_run(folder: Path, predictions: Predictions) -> Path:
    write_predictions(folder / "predictions" / "test.parquet", predictions)
    return folder


def test_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "after", make((3, 0.7)))
    assert main(["base-to-novel", str(run), "--base", "2"]) == 0
    printed = capsys.readouterr().out
    estimate = base_to_novel(make((3, 0.7)), 2).novel
    assert "base, among 2 classes" in printed
    assert "novel, among 3 classes" in printed
    assert "harmonic mean" in printed
    assert f"{estimate.value:.3f} [{estimate.interval.low:.3f}, {estimate.interval.high:.3f}]" in printed
    assert "before" not in printed


def recorded(run: Path, counts: list[int], stage: str = "fit") -> Path:
    record = {"data": {"class_counts": {"class": counts}}, "stages": [{"stage": stage}]}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return run


@pytest.mark.parametrize(
    ("counts", "arguments", "message"),
    [
        ([4, 4, 4, 4, 4], [], f"trained on 2 of the 2 classes that would be called novel, first '{CLASSES[3]}'"),
        ([4, 4, 4, 0, 1], [], f"trained on 1 of the 2 classes that would be called novel, first '{CLASSES[4]}'"),
        ([4, 4, 0, 0, 0], [], f"none of the images of 1 of the 3 base classes, first '{CLASSES[2]}'"),
        ([4, 4, 0, 0, 0], ["--base", "2"], ""),
        ([4, 4, 4, 0, 0], [], ""),
    ],
)
def test_classes_that_were_trained_are_not_called_novel(
    counts: list[int], arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorded(write_run(tmp_path / "run", make((3, 0.7))), counts)
    assert main(["base-to-novel", str(run), *arguments]) == (2 if message else 0)
    printed = capsys.readouterr()
    assert message in printed.err
    assert "not checked" not in printed.out


def test_what_cannot_be_checked_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, target = write_run(tmp_path / "run", make((3, 0.7))), tmp_path / "a.json"
    for path in (run, run / "predictions" / "test.parquet"):
        assert main(["base-to-novel", str(path), "--json", str(target)]) == 0
        assert "was not checked" in " ".join(capsys.readouterr().out.split())
        assert "not checked" in json.loads(target.read_text(encoding="utf-8"))["note"]
    assert main(["base-to-novel", str(recorded(run, [4, 4, 4, 4, 4], stage="test"))]) == 0
    assert "the run was not trained" in " ".join(capsys.readouterr().out.split())


def test_command_compares_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after, before = write_run(tmp_path / "after", make((3, 0.7))), write_run(tmp_path / "before", make((1, 1.5)))
    file = before / "predictions" / "test.parquet"
    target = tmp_path / "numbers" / "cost.json"
    assert main(["base-to-novel", str(after), "--before", str(file), "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    cost: Cost = compare(make((3, 0.7)), make((1, 1.5)))
    assert "difference [95 %]" in printed
    assert f"{cost.novel.value:+.3f} [{cost.novel.interval.low:+.3f}, {cost.novel.interval.high:+.3f}]" in printed
    written = json.loads(target.read_text(encoding="utf-8"))
    assert written["after"]["n_base"] == cost.after.n_base
    assert written["novel"] == {
        "value": cost.novel.value,
        "low": cost.novel.interval.low,
        "high": cost.novel.interval.high,
    }
    assert written["before"]["harmonic_mean"]["value"] == cost.before.harmonic_mean.value


def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITRAIL_DEBUG", raising=False)
    run, other = write_run(tmp_path / "run", make((1, 1))), write_run(tmp_path / "other", make((1, 1), n=100))
    assert main(["base-to-novel", str(run), "--split", "val"]) == 2
    assert main(["base-to-novel", str(run), "--base", "9"]) == 2
    assert main(["base-to-novel", str(run), "--before", str(other)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "val.parquet: there are no predictions" in errors[0]
    assert "--base: must be from 1 to 4" in errors[1]
    assert "the samples differ: 20 only after (first 'photo 100')" in errors[2]
