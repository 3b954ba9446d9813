"""Data sets of labelled images, each in one file, and what all of them share.

Names are looked up when they are first used, so that ``import datamodules`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule as ImageDataModule
    from datamodules.fashion import Fashion as Fashion
    from datamodules.flickr8k import Flickr8k as Flickr8k
    from datamodules.flowers102 import Flowers102 as Flowers102
    from datamodules.hub_images import HubImages as HubImages
    from datamodules.image_folder import ImageFolder as ImageFolder
    from datamodules.image_folder import UnlabeledFolder as UnlabeledFolder
    from datamodules.products import Products as Products
    from datamodules.streaming import StreamedImages as StreamedImages
    from datamodules.table import SampleTable as SampleTable
    from datamodules.table_file import Table as Table
    from datamodules.wares import Wares as Wares
    from vitrail.errors import UserError as UserError

_MODULES = {
    "Fashion": "datamodules.fashion",
    "Flickr8k": "datamodules.flickr8k",
    "Flowers102": "datamodules.flowers102",
    "HubImages": "datamodules.hub_images",
    "ImageDataModule": "datamodules.base",
    "ImageFolder": "datamodules.image_folder",
    "UnlabeledFolder": "datamodules.image_folder",
    "Products": "datamodules.products",
    "SampleTable": "datamodules.table",
    "StreamedImages": "datamodules.streaming",
    "Table": "datamodules.table_file",
    "UserError": "vitrail.errors",
    "Wares": "datamodules.wares",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
