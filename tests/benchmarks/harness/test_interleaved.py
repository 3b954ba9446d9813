from __future__ import annotations

import math

import pytest

from benchmarks.harness.interleaved import Row, interleave, row, table


def test_every_round_has_every_contender_and_another_one_begins() -> None:
    calls: list[str] = []

    def contender(name: str) -> int:
        calls.append(name)
        return len(calls)

    found = interleave({name: lambda name=name: contender(name) for name in "abc"}, 4)  # type: ignore[misc]
    assert calls == [*"abc", *"bca", *"cab", *"abc"]
    assert found == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_ratios_are_taken_within_a_round() -> None:
    # The machine was four times as slow in the second round and ten times in the third: no ratio notices.
    values = {"ours": [2.0, 0.5, 0.22], "theirs": [2.0, 0.5, 0.2]}
    one = row("step", "ours", "theirs", values, "steps/s", "≥ 0.98")
    assert (one.ratio, one.low, one.high) == pytest.approx((1.0, 1.0, 1.1))
    assert one.note == "0.5 : 0.5 steps/s"
    assert one.kept


@pytest.mark.parametrize(
    ("promise", "ratio", "kept"),
    [
        ("≥ 0.98", 0.98, True),
        ("≥ 0.98", 0.979, False),
        ("> 1", 1.0, False),
        ("> 1", 1.001, True),
        ("≤ 1.1", 1.1, True),
        ("≤ 1.1", 1.11, False),
        ("< 1", 0.99, True),
        ("< 1", 1.0, False),
        ("", 3.0, None),
        ("≥ 0.95", math.nan, None),
    ],
)
def test_a_promise_is_kept_or_missed(promise: str, ratio: float, kept: bool | None) -> None:
    one = Row("b", "c", "p", ratio, ratio, ratio, "s", promise)
    assert one.kept is kept
    word = {True: ": kept", False: ": missed", None: ""}[kept]
    assert table([one]).rows[0][4] == promise + word


def test_a_promise_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="promise: 'about 1'"):
        Row("b", "c", "p", 1.0, 1.0, 1.0, "s", "about 1")


def test_the_markdown_table_has_as_many_cells_in_every_line() -> None:
    lines = table([Row("a b", "c", "p", 0.98149, 0.9, 1.2, "s", "≥ 0.98", "1 : 2 s")]).markdown().splitlines()
    assert lines[1] == "| --- | --- | --- | --- | --- | --- |"
    assert lines[2] == "| a b | c | p | 0.981 [0.900, 1.200] | ≥ 0.98: kept | 1 : 2 s |"
    assert {line.count("|") for line in lines} == {7}
