"""What the application serves.

Runs and galleries have names here, and requests can only contain names: no path ever comes from outside.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from app.state.limits import Limits, shortened
from vitrail.errors import UserError

if TYPE_CHECKING:
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedRun

T = TypeVar("T")

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
