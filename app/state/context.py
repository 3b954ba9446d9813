"""What the application serves, and how much one request may ask for.

Runs and galleries have names here, and requests can only contain names: no path ever comes from outside.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from vitrail.errors import UserError

if TYPE_CHECKING:
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedRun


T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for at most; more is refused in one line.

    Attributes:
        upload_bytes: size of an uploaded file.
        upload_pixels: pixels of an image, checked before it is decoded: a file of a few kilobytes can decode to one
            that fills the memory. A phone's largest photo has 50 million.
        images: images that are classified at once.
        text: characters of a query or of a list of labels.
        labels: labels of a zero-shot question.
        label_text: characters of one label or of a prompt template.
        results: results on a page of the search.
        page: images on a page of the dataset browser.
        offset: results that paging may skip: each page ranks all that come before it, too.
        side: longest side in pixels of an image that is sent to the browser.
        queue: requests that may wait; the next one is asked to come back later.
        at_once: requests that are computed at the same time; more would only make each of them slower.
        request_bytes: size of a request that is not an upload.
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


def shortened(text: str, length: int = 80) -> str:
    """Return a text for a message, cut where it is longer."""
    return text if len(text) <= length else f"{text[:length]}…"


class SingleFlightCache(Generic[T]):
    """The latest ``size`` results by key; several requests for one key compute it once, those for others do not wait.

    An error is raised for all who wait and is not kept: the next request tries again.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._results: dict[Hashable, Future[T]] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return the result of a key; ``compute`` is called where there is none."""
        with self._lock:
            known = self._results.pop(key, None)
            result: Future[T] = known or Future()
            self._results[key] = result  # the latest is the last
            while len(self._results) > self._size:
                del self._results[next(iter(self._results))]
        if known is None:
            try:
                result.set_result(compute())
            except BaseException as error:
                with self._lock:
                    if self._results.get(key) is result:
                        del self._results[key]
                result.set_exception(error)
        return result.result()


_STAMP = re.compile(r"\d{8}-\d{6}(-\d+)?")
"""Name of a run directory that the command line made."""


def display_name(parts: Sequence[str], taken: Iterable[str]) -> str:
    """Return what users call a run or a gallery: the experiment; the time of the run only where two are of one.

    Args:
        parts: of its path.
        taken: names of others.

    Example:
        >>> display_name(("runs", "quickstart", "20261130-033827"), [])
        'quickstart'
        >>> display_name(("runs", "quickstart", "20261130-033827"), ["quickstart"])
        'quickstart (30 Nov 03:38)'
        >>> display_name(("shop", "a"), ["a"])
        'shop/a'
    """
    *_, parent, last = ("", *parts)
    if stamp := parent and _STAMP.fullmatch(last):
        moment = time.strptime(stamp[0][:15], "%Y%m%d-%H%M%S")
        names = [parent, f"{parent} ({time.strftime('%d %b %H:%M', moment)})"]
    else:
        names = [last, f"{parent}/{last}"]
    others = set(taken)
    names += [f"{names[0]} ({number})" for number in range(2, len(others) + 3)]
    return next(name for name in names if name not in others)


@dataclass
class Pending:
    """What is not served yet because it is still trained.

    Attributes:
        complete: trains it, given what receives a line on how far it is, and returns all that is served then.
        line: how far it is; empty once it is served.
    """

    complete: Callable[[Callable[[str], None]], AppContext]
    line: str = "starting"


@dataclass(frozen=True)
class AppContext:
    """The runs and galleries that are served, by the names that users see, the limits, and what is still to come."""

    runs: Mapping[str, ServedRun]
    galleries: Mapping[str, ServedGallery]
    limits: Limits = field(default_factory=Limits)
    pending: Pending | None = None

    def run(self, name: object) -> ServedRun:
        """Return the run of this name; raise ``UserError`` where it is not served."""
        return _named(self.runs, name, "run")

    def gallery(self, name: object) -> ServedGallery:
        """Return the gallery of this name; raise ``UserError`` where it is not served."""
        return _named(self.galleries, name, "gallery")


def _named(served: Mapping[str, T], name: object, what: str) -> T:
    # What comes from a browser may be of any type, a list or a dictionary too.
    if isinstance(name, str) and name in served:
        return served[name]
    raise UserError(
        f"{what} {shortened(repr(name))}: not served here; choose one of: {', '.join(served) or 'none is served'}"
    )
