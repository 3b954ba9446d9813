"""Where a data set lies: the folder that the user names, else ``$VITRINE_DATA/<name>``, else ``data/<name>``."""

from __future__ import annotations

import os
from pathlib import Path

from datamodules.schema import UserError

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
