from __future__ import annotations

import numpy as np
import pytest

from evaluation.cost.efficiency import BatchCost
from experiments.export.graphs import Runner
from experiments.export.parity import Form, Parity, interleaved, markdown, rich_table


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

    lines = markdown([form("PyTorch", 4_000_000, 1.0, 1.0), form("int8", 1_000_000, 0.943, 0.5)]).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        *("form", "size", "class: agrees, accuracy", "largest difference", "time, batch 8 [low, high]")
    ]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == [
        *("int8", "1.00 MB, 0.25", "0.943 of 53, 0.480", "0.2", "0.75 [0.50, 1.00]")
    ]
    assert rich_table([form("PyTorch", 1, 1.0, 1.0)]).row_count == 1
