"""Opening files of other authors safely.

Classes that a run or a checkpoint names are imported only from this project and from the packages in
``$VITRAIL_PLUGINS``, and names become files only if they are plain.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from vitrail.errors import UserError

OWN = ("callbacks", "datamodules", "lightning_modules")
"""Packages whose classes take only plain values, so that no argument can name code."""

PLUGINS = "VITRAIL_PLUGINS"
"""Environment variable: comma-separated modules whose classes a run may name, too."""

FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""Beginning of a cell that a spreadsheet may compute, or that is escaped by an apostrophe."""

_LONGEST = 150  # with a time, a number or a suffix appended still a file name on every system
_CONTROL = ("Cc", "Cs", "Zl", "Zp")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def plugins() -> tuple[str, ...]:
    """Modules that ``$VITRAIL_PLUGINS`` allows."""
    return tuple(name for name in (part.strip() for part in os.environ.get(PLUGINS, "").split(",")) if name)


def is_trusted(class_path: str, also: Iterable[str] = ()) -> bool:
    """Whether a run may name this class path, or bare class name; ``also`` are further trusted class paths."""
    module = class_path.rpartition(".")[0]
    if not all(part.isidentifier() for part in class_path.split(".")):
        return False
    if any(_is_below(module, package) for package in plugins()):
        return True
    # It must be a module, not something that one of our modules imports.
    if any(_is_below(module, package) for package in OWN) and _is_module(module):
        return True
    return any(class_path in (path, path.rpartition(".")[2]) or _same_library(class_path, path) for path in also)


def _is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _same_library(class_path: str, allowed: str) -> bool:
    """Whether both name one class of a library, which may be re-exported within it."""
    module, _, name = class_path.rpartition(".")
    library, _, known = allowed.rpartition(".")
    return name == known and module.startswith(f"{library}.")


def refuse_foreign_code(content: object, origin: Path | str, also: Iterable[str] = (), otherwise: str = "") -> None:
    """Refuse settings of a run that name a class of neither this project nor an allowed plugin.

    Args:
        content: a configuration, or a part of it.
        origin: the file, for the message.
        also: further trusted class paths.
        otherwise: another hint for users who trust the author.

    Raises:
        UserError: names the first such class.
    """
    for key, named in _named_classes(content, ""):
        if not isinstance(named, str) or not is_trusted(named, also):
            module = str(named).rpartition(".")[0] or str(named)
            raise UserError(
                f"{origin}: {key} names {str(named)[:200]!r}, no class of this project, and opening a run does not run "
                f"its author's code; if you trust it, set {PLUGINS}={module.split('.')[0][:100]}{otherwise}"
            )


def _named_classes(content: object, key: str) -> Iterator[tuple[str, object]]:
    if isinstance(content, dict):
        for name, value in content.items():
            inner = f"{key}.{name}".lstrip(".")
            # Data and model may be bare class paths.
            if name == "class_path" or (inner in ("data", "model") and isinstance(value, str)):
                yield inner, value
            else:
                yield from _named_classes(value, inner)
    elif isinstance(content, list | tuple):
        for place, value in enumerate(content):
            yield from _named_classes(value, f"{key}[{place}]")
    elif isinstance(content, str) and "class_path" in content:
        # The parser would parse a mapping in a string.
        yield key, content


def plain_name(name: object, key: str) -> str:
    """Return a name that becomes a folder or a file, refused (UserError with ``key``) if it could lead elsewhere."""
    if reason := _not_plain(name):
        shown = repr(name) if len(repr(name)) <= 80 else f"{repr(name)[:79]}…"
        raise UserError(f"{key}: {shown} {reason}; give a plain name such as 'baseline_2', it becomes a folder")
    return str(name)


def _not_plain(name: object) -> str:
    if not isinstance(name, str):
        return "is no text"
    faults = {
        "is empty": not name.strip(),
        "holds a path separator": "/" in name or "\\" in name,
        "holds a control character": any(unicodedata.category(letter) in _CONTROL for letter in name),
        "begins with a dot": name.startswith("."),
        "begins or ends with a space": name != name.strip(),
        "is the name of a device on some systems": _DEVICES.fullmatch(name) is not None,
        f"is longer than {_LONGEST} bytes": len(name.encode(errors="replace")) > _LONGEST,
    }
    return next((fault for fault, found in faults.items() if found), "")


_OF_OTHER_FILES = re.compile(r"retrieval|.*_normalised", re.IGNORECASE)
"""``test_retrieval.csv`` among the reports, ``confusion_test_class_normalised.png`` of the task ``class``."""


def file_name(text: str) -> str:
    """Return a text, such as the name of a task, as part of a file name: special characters become ``_``.

    A digest is appended if anything changed, so that different texts get different names, and to names of other files.
    """
    plain = re.sub(r"[^\w.-]+", "_", text)
    if plain == text and len(plain.encode()) <= _LONGEST and not _OF_OTHER_FILES.fullmatch(text):
        return plain
    return plain.encode()[: _LONGEST - 9].decode(errors="ignore") + "_" + hashlib.sha256(text.encode()).hexdigest()[:8]


def unguarded(cell: str) -> str:
    """Return a cell without the apostrophe that escapes a formula."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
