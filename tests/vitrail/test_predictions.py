from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.evaluation.predictions_fixture import TASKS, make_predictions
from vitrail.errors import UserError
from vitrail.predictions import (
    ImagePrediction,
    Predictions,
    TaskPrediction,
    join_predictions,
    read_predictions,
    write_predictions,
)


def assert_same(left: Predictions, right: Predictions) -> None:
    assert {task: list(names) for task, names in left.tasks.items()} == dict(right.tasks)
    for field in ("sample_id", "names", "groups"):
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field))
    for task in left.tasks:
        np.testing.assert_array_equal(left.targets[task], right.targets[task])
        np.testing.assert_array_equal(left.logits[task], right.logits[task])
        assert right.logits[task].dtype == np.float32
        assert right.targets[task].dtype == np.int64


@pytest.mark.parametrize("n", [0, 1, 20])
def test_what_was_written_is_read(tmp_path: Path, n: int) -> None:
    path = tmp_path / "predictions" / "test.parquet"
    predictions = make_predictions(n)
    write_predictions(path, predictions)
    assert_same(predictions, read_predictions(path))
    assert [entry.name for entry in path.parent.iterdir()] == ["test.parquet"]


def test_file_is_plain_parquet_that_names_its_classes(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    write_predictions(path, make_predictions(3))
    schema = pq.read_schema(path)
    types = {name: str(schema.field(name).type) for name in schema.names}
    assert types == {
        "sample_id": "int64",
        "name": "string",
        "group": "string",
        "target_class": "int64",
        "logits_class": "list<element: float>",
        "answered_class": "bool",
        "target_colour": "int64",
        "logits_colour": "list<element: float>",
        "answered_colour": "bool",
    }
    assert json.loads(schema.metadata[b"vitrail.tasks"]) == TASKS


def test_equal_logits_are_no_prediction_and_marked_in_the_file(tmp_path: Path) -> None:
    logits = np.array([[1, 2, 2], [0, 0, 0], [0, 0, 3]], dtype=np.float32)
    tied = dataclasses.replace(make_predictions(3), tasks={"class": TASKS["class"]}, logits={"class": logits})
    tied = dataclasses.replace(tied, targets={"class": tied.targets["class"]})
    assert tied.predicted("class").tolist() == [-1, -1, 2]
    write_predictions(tmp_path / "test.parquet", tied)
    assert pq.read_table(tmp_path / "test.parquet").column("answered_class").to_pylist() == [False, False, True]
    assert read_predictions(tmp_path / "test.parquet").predicted("class").tolist() == [-1, -1, 2]


def test_a_missing_file_names_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no predictions.*experiments test"):
        read_predictions(tmp_path / "test.parquet")


@pytest.mark.parametrize("keep", [0, 3, 400])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "test.parquet"
    write_predictions(path, make_predictions())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a readable Parquet file") as caught:
        read_predictions(path)
    assert "\n" not in str(caught.value)


def test_another_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    write_predictions(path, make_predictions())
    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)
    with pytest.raises(UserError, match="not a predictions file"):
        read_predictions(path)
    write_predictions(path, make_predictions())
    table = pq.read_table(path).replace_schema_metadata({b"vitrail.tasks": json.dumps(TASKS).encode()})
    pq.write_table(table.drop_columns(["logits_colour"]), path)
    with pytest.raises(UserError, match=r"not a predictions file.*logits_colour"):
        read_predictions(path)
    pq.write_table(table.set_column(4, "logits_class", table.column("target_class")), path)
    with pytest.raises(UserError, match="not a predictions file"):
        read_predictions(path)


def test_logits_must_fit_the_class_names_and_targets_the_classes(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    write_predictions(path, make_predictions())
    table = pq.read_table(path)
    more = {b"vitrail.tasks": json.dumps({**TASKS, "colour": ["blue", "red", "green"]}).encode()}
    pq.write_table(table.replace_schema_metadata(more), path)
    with pytest.raises(UserError, match="3 logits"):
        read_predictions(path)
    predictions = make_predictions()
    write_predictions(path, dataclasses.replace(predictions, targets={**predictions.targets, "class": np.full(20, 3)}))
    with pytest.raises(UserError, match=r"target 3 of task 'class' in row 0"):
        read_predictions(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    predictions = make_predictions()
    predictions.logits["colour"][7, 1] = value
    path = tmp_path / "test.parquet"
    with pytest.raises(UserError, match="'colour' are not finite for 1 of 20 samples, first 'photo 7'"):
        write_predictions(path, predictions)
    assert not list(tmp_path.iterdir())


def test_a_changed_logit_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    predictions = make_predictions(12)
    write_predictions(path, predictions)
    table = pq.read_table(path)
    logits = predictions.logits["class"].copy()
    logits[3, 0] += 1e-3
    changed = table.set_column(4, "logits_class", pa.array(logits.tolist(), table.schema.field("logits_class").type))
    pq.write_table(changed, path)
    with pytest.raises(UserError, match=r"test\.parquet: is damaged or was changed, .* write it again"):
        read_predictions(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test.parquet"
    write_predictions(path, make_predictions())
    before = path.read_bytes()

    def full_disk(table: object, where: Path) -> None:
        Path(where).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_predictions(path, make_predictions(5))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["test.parquet"]


def test_joining_counts_each_sample_once_in_order() -> None:
    whole = make_predictions(20)
    even, odd = whole.take(np.arange(0, 20, 2)), whole.take(np.arange(1, 20, 2)[::-1])
    padded = whole.take(np.array([4, 19]))
    joined, dropped = join_predictions([odd, padded, even])
    assert_same(whole, joined)
    assert dropped == 2


def test_rounding_of_a_repeated_sample_is_no_contradiction() -> None:
    whole = make_predictions(5)
    again = dataclasses.replace(whole, logits={task: values + 1e-5 for task, values in whole.logits.items()})
    joined, dropped = join_predictions([whole, again])
    assert (len(joined), dropped) == (5, 5)


def test_contradicting_shards_are_refused() -> None:
    whole = make_predictions(5)
    other = dataclasses.replace(whole, logits={task: values + 1 for task, values in whole.logits.items()})
    with pytest.raises(UserError, match=r"sample 0 \('photo 0'\) was predicted twice"):
        join_predictions([whole, other])
    renamed = dataclasses.replace(whole, tasks={**TASKS, "colour": ["red", "blue"]})
    with pytest.raises(UserError, match="different tasks or classes"):
        join_predictions([whole, renamed])
    with pytest.raises(UserError, match="no shards"):
        join_predictions([])


def every_kind() -> Predictions:
    labels = np.array([[1, 0, -1], [-1, -1, -1], [0, 1, 1]], np.int8)
    return Predictions(
        np.arange(3),
        np.array(["a", "b", "c"], object),
        np.array(["a", "b", "c"], object),
        {"class": ["x", "y"], "tags": ["p", "q", "r"], "price": [], "size": []},
        {
            "class": np.array([0, -1, 1]),
            "tags": labels,
            "price": np.array([1.5, np.nan, 3], np.float32),
            "size": np.array([1, 2, 3], np.float32),
        },
        {
            "class": np.eye(3, 2, dtype=np.float32),
            "tags": np.array([[2, -1, 0.1], [-1, -2, -3], [0.5, 0, 0]], np.float32),
            "price": np.array([[1, -2], [2, 0], [3, 2]], np.float32),
            "size": np.array([[1], [2], [3]], np.float32),
        },
        {"tags": "multi_label", "price": "regression", "size": "regression"},
        {"tags": [0.5, 0.5, 0.6]},
    )


def test_tasks_of_every_kind_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    write_predictions(path, every_kind())
    found = read_predictions(path)
    for task in found.tasks:
        np.testing.assert_array_equal(found.targets[task], every_kind().targets[task])
        np.testing.assert_array_equal(found.logits[task], every_kind().logits[task])
        assert found.targets[task].dtype == every_kind().targets[task].dtype
    assert (found.kinds, found.thresholds) == (every_kind().kinds, every_kind().thresholds)
    schema = pq.read_schema(path)
    assert str(schema.field("target_tags").type) == "list<element: int8>"
    assert pq.read_table(path)["target_price"].null_count == 1
    assert "answered_class" in schema.names
    assert "answered_tags" not in schema.names
    assert found.predicted_labels("tags").tolist() == [[True, False, False], [False] * 3, [True, True, False]]
    assert [found.known(task).tolist() for task in found.tasks] == [[0, 2], [0, 2], [0, 2], [0, 1, 2]]
    assert found.values("price").tolist() == [1, 2, 3]
    assert found.deviations("price") == pytest.approx(np.exp([-1, 0, 1]))
    assert found.deviations("size") is None
    assert list(found.of_kinds("single_label", "ordinal").tasks) == ["class"]
    assert found.of_kinds("multi_label").thresholds == every_kind().thresholds


def test_repeated_samples_of_every_kind_are_joined() -> None:
    whole = every_kind()
    joined, repeated = join_predictions([whole.take(np.array([1, 2])), whole.take(np.array([0, 1]))])
    assert (len(joined), repeated) == (3, 1)
    np.testing.assert_array_equal(joined.targets["price"], whole.targets["price"])
    other = every_kind()
    other.targets["tags"][1] = 0
    with pytest.raises(UserError, match=r"sample 1 .'b'. was predicted twice with different"):
        join_predictions([whole, other])


def test_values_outside_their_kind_are_refused(tmp_path: Path) -> None:
    path, predictions = tmp_path / "test.parquet", every_kind()
    predictions.targets["tags"][0, 1] = 2
    write_predictions(path, predictions)
    with pytest.raises(UserError, match=r"target .* of task 'tags' in row 0 is outside"):
        read_predictions(path)
    for task, call in (("tags", predictions.values), ("price", predictions.label_probabilities)):
        with pytest.raises(UserError, match=f"task '{task}' is .*, must be "):
            call(task)


def test_tasks_that_are_called_like_a_column_have_columns_of_their_own() -> None:
    one = TaskPrediction(["chip", "crack"], np.array([0.25, 0.75]))
    row = ImagePrediction("a.jpg", {"class": one, "error": one, "image": one}).row()

    assert (row["image"], row["error"]) == ("a.jpg", None)
    assert (row["class"], row["attribute error"], row["attribute image"]) == ("crack",) * 3
    assert row["attribute error_confidence"] == 0.75
