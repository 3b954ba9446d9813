"""Images of several requests pass through the network together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Collects items while the model works on others.

    A batch begins as soon as the model is free, with all that waits by then: so a single client never waits for
    others, and the busier the server is, the larger its batches.

    Args:
        infer: gets some items and returns as many results.
        size: items of a batch at most.
        executor: of the model; one thread, since a second batch would only slow the first one down.
    """

    def __init__(self, infer: Callable[[list[Item]], Sequence[Result]], size: int, executor: Executor) -> None:
        self._infer, self._size, self._executor = infer, size, executor
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._running: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Return the results of items, which may be of several batches; raise what the model raised for one."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Result]] = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._running is None or self._running.done():
            self._running = loop.create_task(self._run())
        found = await asyncio.gather(*futures, return_exceptions=True)
        results: list[Result] = []
        for one in found:
            if isinstance(one, BaseException):
                raise one
            results.append(one)
        return results

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            try:
                results = await loop.run_in_executor(self._executor, self._infer, [item for item, _ in batch])
            except Exception as error:  # whatever it is, it belongs to those who wait
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():  # its request may have ended
                    future.set_result(result)
