"""Where a data set lies: the folder that the user names, else ``$VITRINE_DATA/<name>``, else ``data/<name>``.

And which files are in it, those that are no images included.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from datamodules.columns import composed
from datamodules.images import HEIF_SUFFIXES, heif_formats
from vitrail.errors import UserError

VARIABLE = "VITRINE_DATA"


def locate(root: str, name: str, source: str, layout: str) -> Path:
    """Finds the folder of a data set.

    Args:
        root: what the user gave; empty for the usual place.
        name: the data set's folder in the usual place.
        source: where the data set is to be had, for the error.
        layout: how its folder is laid out, for the error.

    Returns:
        An existing folder.

    Raises:
        UserError: where there is no such folder; it says how to come by one.
    """
    home = os.environ.get(VARIABLE, "")
    folder = Path(root).expanduser() if root else Path(home or "data").expanduser() / name
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"data root: {folder} is a file; give the folder that holds {layout}")
    asked = "data root" if root else f"${VARIABLE}" if home else "data"
    raise UserError(
        f"{asked}: there is no folder {folder}; get the data from {source}, lay them out as {layout}, "
        f"and point data root (or ${VARIABLE}, which holds {name}/) at them"
    )


def files_below(top: Path) -> Iterator[str]:
    """Paths of all files below a folder, relative to it; hidden ones are left alone, linked folders come once."""
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not is_left_alone(name))
        below = Path(folder).relative_to(top)
        yield from ((below / name).as_posix() for name in files if not is_left_alone(name))


def is_left_alone(name: str) -> bool:
    """Whether a file or folder is hidden, or one that macOS puts into archives."""
    return name.startswith(".") or name == "__MACOSX"


def count_files_left_out(sources: Sequence[str], origin: str, below: str = "") -> dict[str, int]:
    """Count the files that lie among a data set's images and are none of them.

    Args:
        sources: the images' paths.
        origin: where the table comes from, which is not left out.
        below: folder of which all images below it belong to the data set.

    Returns:
        Number of files by the ending of their names in lower case (empty for none), most frequent first; those below
        ``below``, or without it those in the same folders as the images that a table names.
    """
    # Paths as texts: a million Path objects would take their time.
    used = {os.path.abspath(source) for source in (*sources, origin)}  # noqa: PTH100
    if below:
        there = [(path, os.path.abspath(os.path.join(below, path))) for path in files_below(Path(below))]  # noqa: PTH100, PTH118
    else:
        folders = {os.path.dirname(source) for source in sources}  # noqa: PTH120
        there = [(entry.name, os.path.abspath(entry)) for entry in _files_in(folders)]  # noqa: PTH100
    left = Counter(Path(name).suffix.lower() for name, path in there if path not in used)
    return dict(sorted(left.items(), key=lambda one: (-one[1], one[0])))


def _files_in(folders: Iterable[str]) -> Iterator[os.DirEntry[str]]:
    for folder in folders:
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            yield from (entry for entry in entries if entry.is_file() and not is_left_alone(entry.name))


def left_out_text(left_out: Mapping[str, int]) -> str:
    """Such as: by ending: .txt 3, .heic 2 (the extra heic reads them)."""
    shown = []
    for suffix, count in left_out.items():
        hint = " (install the extra heic to read them)" if suffix in HEIF_SUFFIXES and not heif_formats() else ""
        shown.append(f"{suffix or 'no ending'} {count}{hint}")
    return "by ending: " + ", ".join(shown)


def as_on_disk(root: Path, paths: Iterable[str]) -> list[str]:
    """Paths as the file system spells them: macOS and archives made there hold names in another Unicode normal form.

    Args:
        root: folder of the data set.
        paths: below it, with ``/`` between their parts.

    Returns:
        For each the path of the file that has the same name in NFC; the path itself where there is none.
    """
    listings: dict[str, dict[str, str]] = {}

    def spelled(path: str) -> str:
        if path.isascii() or os.path.lexists(f"{root}/{path}"):
            return path
        found = ""
        for part in path.split("/"):
            if found not in listings:
                folder = f"{root}/{found}"
                names = os.listdir(folder) if os.path.isdir(folder) else []  # noqa: PTH112, PTH208 -- millions of them
                listings[found] = {composed(name): name for name in sorted(names)}
            name = listings[found].get(composed(part), part)
            found = f"{found}/{name}" if found else name
        return found

    return [spelled(path) for path in paths]
