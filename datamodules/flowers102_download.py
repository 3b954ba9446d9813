"""Fetches Flowers-102 by torchvision, where there is a network; only what is missing, and whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from datamodules.hub_access import answers_in_time
from datamodules.location import VARIABLE
from vitrail.errors import UserError
from vitrail.files import written_whole

_SERVER = "https://www.robots.ox.ac.uk"
_PARTS = ("jpg", "setid.mat", "imagelabels.mat")
_NAMES = "cat_to_name.json"


def fetch(root: str) -> None:
    """Downloads pictures, lists and labels (about 345 MB) unless they are there, and writes the names of the classes.

    The names are torchvision's, which differ from the usual file in two of 102.

    Args:
        root: as ``Flowers102`` takes it.

    Raises:
        UserError: where there is no network, the server does not give the files, or they cannot be written.
    """
    home = os.environ.get(VARIABLE, "") or "data"
    given = Path(root).expanduser() if root else Path(home).expanduser() / "flowers102"
    is_inner = given.name == "flowers-102" or (given / "jpg").is_dir()
    folder = given if is_inner else given / "flowers-102"
    try:
        if not all((folder / part).exists() for part in _PARTS):
            _fetch_parts(folder)
        if not any((place / _NAMES).is_file() for place in (folder.parent, folder)):
            _write_names(folder / _NAMES)
    except OSError as error:
        raise UserError(f"data download: {folder} cannot be written ({error}); give another data root") from error


def _fetch_parts(folder: Path) -> None:
    if not answers_in_time(_SERVER):
        raise UserError(
            f"data download: no answer from {_SERVER}; connect to the network, or get the data elsewhere and give "
            "their folder as data root"
        )
    from torchvision.datasets import Flowers102

    rank_zero_info(f"Fetching Flowers-102 to {folder} …")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as temporary:
        try:
            Flowers102(temporary, split="train", download=True)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"data download: Flowers-102 could not be fetched ({reason}); try again") from error
        for part in _PARTS:
            if not (folder / part).exists():
                (Path(temporary) / "flowers-102" / part).replace(folder / part)


def _write_names(path: Path) -> None:
    from torchvision.datasets import Flowers102

    names = {str(label): name for label, name in enumerate(Flowers102.classes, start=1)}
    with written_whole(path) as partial:
        partial.write_text(json.dumps(names, indent=1), encoding="utf-8")
