"""Tests of names of what is served, and of results that are computed once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.state.context import AppContext, SingleFlightCache
from vitrail.errors import UserError


@pytest.mark.parametrize(
    "name", ["", "other", "../quickstart", None, 3, ["quickstart"], {"name": "quickstart"}, "x" * 999]
)
def test_only_served_names_are_known(context: AppContext, name: object) -> None:
    with pytest.raises(UserError, match="choose one of: quickstart, pairs") as said:
        context.run(name)
    assert len(str(said.value)) < 200
    with pytest.raises(UserError, match=r"gallery .* not served"):
        context.gallery(name)


def test_what_is_served_is_found_by_its_name(context: AppContext) -> None:
    assert context.run("quickstart").kind == "classifier"
    assert context.run("pairs").kind == "dual encoder"
    assert len(context.gallery("quickstart")) == 300


def test_many_threads_that_ask_at_once_compute_once() -> None:
    once: SingleFlightCache[int] = SingleFlightCache(4)
    everyone, made = threading.Barrier(8), []

    def compute() -> int:
        made.append(threading.get_ident())
        return 42

    def ask(_: int) -> int:
        everyone.wait(10)
        return once.get("key", compute)

    with ThreadPoolExecutor(8) as threads:
        assert [*threads.map(ask, range(8))] == [42] * 8
    assert len(made) == 1


def test_another_key_does_not_wait() -> None:
    once: SingleFlightCache[str] = SingleFlightCache(4)
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        assert go_on.wait(10)
        return "slow"

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(once.get, 1, slow)
        assert begun.wait(10)
        assert once.get(2, lambda: "quick") == "quick"
        go_on.set()
        assert waiting.result(10) == "slow"


def test_what_was_not_asked_for_longest_goes() -> None:
    once: SingleFlightCache[int] = SingleFlightCache(2)
    made: list[int] = []

    def get(key: int) -> int:
        def compute() -> int:
            made.append(key)
            return key

        return once.get(key, compute)

    assert [get(key) for key in (1, 2, 1, 3)] == [1, 2, 1, 3]
    assert made == [1, 2, 3]
    assert [get(key) for key in (1, 3, 2)] == [1, 3, 2]
    assert made == [1, 2, 3, 2]


def test_an_error_is_raised_for_all_callers_and_not_kept() -> None:
    once: SingleFlightCache[int] = SingleFlightCache(2)
    with pytest.raises(ZeroDivisionError):
        once.get("key", lambda: 1 // 0)
    assert once.get("key", lambda: 5) == 5
