"""Tests of pages, drawn orders and steps."""

from __future__ import annotations

import numpy as np
import pytest

from app.logic.explore import page_of, shuffled, step


@pytest.mark.parametrize("count", [0, 1, 19, 20, 21, 40, 101])
def test_the_pages_together_have_every_row_once(count: int) -> None:
    rows = np.arange(count, dtype=np.int64) * 3
    pages = [page_of(rows, number, 20) for number in range(1, page_of(rows, 1, 20).pages + 1)]
    assert np.concatenate([page.rows for page in pages]).tolist() == rows.tolist()
    assert [page.number for page in pages] == [*range(1, len(pages) + 1)]
    assert all(len(page.rows) == 20 for page in pages[:-1])
    assert [page.first for page in pages] == ([1 + 20 * place for place in range(len(pages))] if count else [0])


@pytest.mark.parametrize(("asked", "given"), [(-5, 1), (0, 1), (3, 3), (4, 3), (10**30, 3)])
def test_a_page_outside_is_the_nearest_one(asked: int, given: int) -> None:
    assert page_of(np.arange(50, dtype=np.int64), asked, 20).number == given


def test_a_drawn_order_has_every_row_once_and_is_its_seeds_alone() -> None:
    rows = np.arange(5, 300, dtype=np.int64)
    one = shuffled(rows, 3)
    assert sorted(one.tolist()) == rows.tolist()
    assert one.tolist() != rows.tolist()
    assert shuffled(rows, 3).tolist() == one.tolist()
    assert shuffled(rows, 4).tolist() != one.tolist()
    assert shuffled(rows, None).tolist() == rows.tolist()


def test_steps_go_through_the_order_and_end_at_its_ends() -> None:
    rows = np.array([8, 2, 9, 4], np.int64)
    places, current = [], None
    for _ in range(6):
        places.append(step(rows, current, 1) if current is not None else step(rows, None, 0))
        current = int(rows[places[-1]])
    assert places == [0, 1, 2, 3, 3, 3]
    assert step(rows, 9, -1) == 1
    assert step(rows, 8, -1) == 0
    assert step(rows, 77, 1) == 0  # filtered away since: from the first again
