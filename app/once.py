"""Results that take long: computed once, kept, and never computed by two requests at the same time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Once(Generic[Result]):
    """Keeps results by key; of more than ``most`` the one that was not asked for longest goes.

    Requests for a key that is being computed wait for it; those for other keys do not. An error is not kept: the next
    request tries again.

    Args:
        most: number of results.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._results: OrderedDict[Hashable, Result] = OrderedDict()
        self._working: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._results

    def get(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """The result of a key.

        Args:
            key: says all that the result depends on.
            compute: is called where there is none.
        """
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                return self._results[key]
            working = self._working.setdefault(key, threading.Lock())
        with working:
            with self._lock:
                if key in self._results:
                    return self._results[key]
            result = compute()
            with self._lock:
                self._results[key] = result
                self._working.pop(key, None)
                while len(self._results) > self._most:
                    self._results.popitem(last=False)
            return result
