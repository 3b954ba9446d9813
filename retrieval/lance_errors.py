"""What LanceDB raises, as one line for people: which table, what is wrong, the way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vitrail.errors import DISK_FULL, UserError


def second_writer(origin: str) -> str:
    """What to tell who writes at the same time as somebody else."""
    return (
        f"{origin} was written by somebody else meanwhile; wait until the other one is done, then run the same command "
        "again: what is there is whole, and only what is missing is done"
    )


@contextmanager
def reading(origin: str) -> Iterator[None]:
    """Turns what LanceDB raises when it reads into one line."""
    with _told(lambda reason: f"{origin} cannot be read ({reason}); restore it from a copy, or index into a new one"):
        yield


@contextmanager
def writing(origin: str) -> Iterator[None]:
    """Turns what LanceDB raises when it writes into one line."""

    def line(reason: str) -> str:
        number = re.search(r"os error (\d+)", reason)
        if number and int(number[1]) in DISK_FULL:
            return f"{origin} cannot be written ({reason}); free some space; what was there is untouched"
        if "conflict" in reason.lower() or "concurrent" in reason.lower():
            return second_writer(origin)
        if "already exists" in reason:
            return f"{origin} is there already; name a new gallery"
        return f"{origin} cannot be written ({reason}); what was there is untouched"

    with _told(line):
        yield


@contextmanager
def _told(line: Callable[[str], str]) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(line(_reason(error))) from error
    except BaseException as error:
        # A cut file can make the library panic; that class is of its own module and no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(line(_reason(error))) from error


def _reason(error: BaseException) -> str:
    """First line of an error, without the place in the library's source."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("lance error: ")
    return re.sub(r", /\S*\.rs:\d+:\d+.*$", "", first)
