"""What the application serves.

Runs and galleries have names here, and requests can only contain names: no path ever comes from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from app.state.limits import Limits, shortened
from vitrail.errors import UserError

if TYPE_CHECKING:
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedRun

T = TypeVar("T")


@dataclass(frozen=True)
class AppContext:
    """The runs and galleries that are served, by the names that users see, and the limits of requests."""

    runs: Mapping[str, ServedRun]
    galleries: Mapping[str, ServedGallery]
    limits: Limits = field(default_factory=Limits)

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
