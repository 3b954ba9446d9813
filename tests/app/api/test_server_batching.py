from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.api.server import Batcher
from vitrail.errors import UserError


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def test_what_waits_is_one_batch_and_everybody_gets_their_own(executor: ThreadPoolExecutor) -> None:
    batches: list[list[int]] = []
    begun, free = threading.Event(), threading.Event()

    def infer(items: list[int]) -> list[int]:
        batches.append(items)
        begun.set()
        assert free.wait(10)
        return [10 * item for item in items]

    async def ask() -> list[list[int]]:
        batcher = Batcher(infer, 4, executor)
        first = asyncio.create_task(batcher.submit([1]))
        await asyncio.to_thread(begun.wait, 10)
        others = [asyncio.create_task(batcher.submit(items)) for items in ([2, 3], [4], [5, 6])]
        await asyncio.sleep(0.01)
        assert len(batcher) == 5
        free.set()
        return await asyncio.gather(first, *others)

    assert asyncio.run(ask()) == [[10], [20, 30], [40], [50, 60]]
    assert batches == [[1], [2, 3, 4, 5], [6]]


def test_an_error_is_for_its_batch_and_an_ended_request_harms_no_other(executor: ThreadPoolExecutor) -> None:
    def infer(items: list[int]) -> list[int]:
        if 0 in items:
            raise UserError("zero")
        return items

    async def ask() -> None:
        batcher = Batcher(infer, 2, executor)
        with pytest.raises(UserError, match="zero"):
            await batcher.submit([0, 1, 2])
        ended = asyncio.create_task(batcher.submit([3]))
        other = asyncio.create_task(batcher.submit([4]))
        await asyncio.sleep(0)
        ended.cancel()
        assert await other == [4]
        assert len(batcher) == 0

    asyncio.run(ask())
