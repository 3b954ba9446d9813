"""Which files a gallery may show: its rows name images by path, and another person may have made the gallery.

A gallery could name any file of the machine that opens it, and a page or the application would show it to others. So a
file is shown only where it is, links followed, below the gallery's own folder, a folder that this user has indexed into
this gallery on this machine (recorded under ``$VITRAIL_CACHE``), the data folder of the gallery's run,
``$VITRAIL_DATA`` or ``data``, or a folder that the user names.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from retrieval.search.vectors import cache_of
from vitrail.errors import UserError
from vitrail.files import local_folder, write_text_atomically
from vitrail.runs import Run

_NOTE = "folders.json"

_MOST = 10_000
"""Folders of images that are recorded at most; of more only their common parent."""


class ImageFiles:
    """The files of a gallery's images.

    Args:
        uri: of the gallery.
        run: directory of the run that made it, as far as it is known.
        given: folders that the user names.

    Attributes:
        roots: folders below which files are shown, links followed.
    """

    def __init__(self, uri: str, run: str | Path = "", given: Sequence[Path] = ()) -> None:
        self._folder = local_folder(uri)
        found = [self._folder, *_noted(uri), Path(os.environ.get("VITRAIL_DATA") or "data").expanduser()]
        runs = [Path(run)] if str(run) else []
        runs += [self._folder.resolve().parent] if self._folder is not None else []
        found += [root for one in runs if (root := _data_root(one)) is not None]
        self.roots = list(dict.fromkeys(root.resolve() for root in (*found, *given) if root is not None))

    def file(self, path: str) -> Path:
        """The file that a row names.

        Raises:
            UserError: where there is none, or it may not be shown.
        """
        if not path:
            raise UserError("the image has no file of its own")
        found = self._resolved(path)
        if found is None or not any(found.is_relative_to(root) for root in self.roots):
            raise OutsideError(
                f"{_plain(path)}: is outside of the folders of the gallery and its data, so it is not shown; if it "
                "is one of yours, name its folder with --data-root"
            )
        if not os.path.isfile(found):  # noqa: PTH113 -- a name too long for the system is no error to it
            raise UserError(f"{_plain(path)}: the file is gone")
        return found

    def outside(self, paths: Iterable[str]) -> list[str]:
        """Return the paths that may not be shown, by their folders alone, which is quick for a million of them."""
        allowed: dict[str, bool] = {}
        refused = []
        for path in paths:
            folder = os.path.dirname(path)  # noqa: PTH120 -- a million Path objects would take their time
            if folder not in allowed:
                found = self._resolved(folder or ".") if path else None
                allowed[folder] = found is not None and any(found.is_relative_to(root) for root in self.roots)
            if path and not allowed[folder]:
                refused.append(path)
        return refused

    def _resolved(self, path: str) -> Path | None:
        """A path with its links followed; None for addresses and what is no path."""
        if "://" in path or path.startswith("file:"):
            return None
        try:
            # What is not absolute is meant from the gallery, wherever the program runs.
            return ((self._folder or Path("/nowhere")) / path).resolve()
        except (OSError, ValueError, RuntimeError):
            return None


class OutsideError(UserError):
    """A file that a gallery names may not be shown."""


def note_folders(uri: str, paths: Iterable[str]) -> None:
    """Record the folders of images that this user has indexed, so that the gallery may show them on this machine."""
    folders = {os.path.dirname(path) for path in paths if path} | {str(folder) for folder in _noted(uri)}  # noqa: PTH120
    if not folders:
        return
    if len(folders) > _MOST:
        folders = {os.path.commonpath(folders)}
    try:
        write_text_atomically(cache_of(uri) / _NOTE, json.dumps(sorted(folders)))
    except OSError as error:
        sys.stderr.write(
            f"warning: {error}: the folders of the images cannot be recorded; to see images, name their folder with "
            "--data-root\n"
        )


def _noted(uri: str) -> list[Path]:
    try:
        found: Any = json.loads((cache_of(uri) / _NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [Path(one) for one in found if isinstance(one, str)] if isinstance(found, list) else []


def _data_root(run: Path) -> Path | None:
    """The data folder of a run's configuration; none as wide as the machine or a home."""
    import yaml

    try:
        config: Any = yaml.safe_load((run / Run.CONFIG).read_text(encoding="utf-8"))
        root = Path(str(config["data"]["init_args"]["root"])).expanduser()
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
    wide = [Path.home().resolve(), Path("/home")]
    if root == Path() or any(one.is_relative_to(root.resolve()) for one in wide):
        return None
    return root


def _plain(path: str) -> str:
    """A path in one line, whatever is in it."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in path)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"
