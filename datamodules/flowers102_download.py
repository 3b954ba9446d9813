"""Fetches Flowers-102 by torchvision, where there is a network; only what is missing."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from datamodules.hub_access import answers_in_time
from datamodules.location import VARIABLE
from datamodules.schema import UserError

_SERVER = "https://www.robots.ox.ac.uk"


def fetch(root: str) -> None:
    """Downloads pictures, lists and labels (about 345 MB) unless they are there.

    Args:
        root: as ``Flowers102`` takes it.

    Raises:
        UserError: where there is no network, or the server does not give the files.
    """
    home = os.environ.get(VARIABLE, "") or "data"
    folder = Path(root).expanduser() if root else Path(home).expanduser() / "flowers102"
    own = folder / "flowers-102"
    if all((own / name).exists() for name in ("jpg", "setid.mat", "imagelabels.mat")):
        return
    if not answers_in_time(_SERVER):
        raise UserError(
            f"data download: no answer from {_SERVER}; connect to the network, or get the data elsewhere and give "
            "their folder as data root"
        )
    from torchvision.datasets import Flowers102

    rank_zero_info(f"Fetching Flowers-102 to {own} …")
    try:
        Flowers102(str(folder), split="train", download=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data download: Flowers-102 could not be fetched ({reason}); try again") from error
