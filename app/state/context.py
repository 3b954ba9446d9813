"""What the application serves and how much of it one request may ask for; every tab gets it.

Runs and galleries have names here, and names are all that a request can say: no path ever comes from outside.

Results that take long: computed once, kept, and never computed by two requests at the same time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from vitrail.errors import UserError

if TYPE_CHECKING:
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedRun


Served = TypeVar("Served")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for at most; more is refused in one line.

    Attributes:
        upload_bytes: size of an uploaded file.
        upload_pixels: pixels of an image, checked before it is decoded: a file of a few kilobytes can hold one that
            fills the memory. A phone's largest photo has 50 million.
        images: images that are classified at once.
        text: characters of a query or of a list of labels.
        labels: labels of a zero-shot question.
        label_text: characters of one label or of a prompt template.
        results: results on a page of the search.
        page: images on a page of the dataset browser.
        offset: results that paging may skip: each page ranks all that comes before it, too.
        side: longest side in pixels of an image that is sent to the browser.
        queue: requests that may wait; the next one is told to come back later.
        at_once: requests that are computed at the same time; more would only make each of them slower.
        request_bytes: size of a request that is no upload.
        uploads_kept: size of all uploads that are kept, for a day at most.
    """

    upload_bytes: int = 20 * 2**20
    upload_pixels: int = 50_000_000
    images: int = 16
    text: int = 2_000
    labels: int = 200
    label_text: int = 300
    results: int = 20
    page: int = 20
    offset: int = 10_000
    side: int = 1_600
    queue: int = 64
    at_once: int = 2
    request_bytes: int = 2 * 2**20
    uploads_kept: int = 2 * 2**30


@dataclass(frozen=True)
class AppContext:
    """What the application serves.

    Attributes:
        runs: trained models by the name that users see, in the order in which they were given.
        galleries: galleries by the name that users see.
        limits: what one request may ask for.
    """

    runs: Mapping[str, ServedRun]
    galleries: Mapping[str, ServedGallery]
    limits: Limits = field(default_factory=Limits)

    def run(self, name: object) -> ServedRun:
        """The run of this name.

        Raises:
            UserError: for a name that is not served.
        """
        return _named(self.runs, name, "run")

    def gallery(self, name: object) -> ServedGallery:
        """The gallery of this name.

        Raises:
            UserError: for a name that is not served.
        """
        return _named(self.galleries, name, "gallery")


def _named(served: Mapping[str, Served], name: object, what: str) -> Served:
    # What comes from a browser may be of any type, a list or a dictionary too.
    if isinstance(name, str) and name in served:
        return served[name]
    given = repr(name)
    shown = given if len(given) <= 80 else f"{given[:80]}…"
    raise UserError(f"{what} {shown}: not served here; choose one of: {', '.join(served) or 'none is served'}")


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
