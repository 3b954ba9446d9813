"""Data sets of labelled images, each in one file, and what all of them share.

Names are looked up when they are first used, so that ``import datamodules`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrail import lazy_names

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

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "datamodules.fashion": "Fashion",
        "datamodules.flickr8k": "Flickr8k",
        "datamodules.flowers102": "Flowers102",
        "datamodules.hub_images": "HubImages",
        "datamodules.base": "ImageDataModule",
        "datamodules.image_folder": "ImageFolder UnlabeledFolder",
        "datamodules.products": "Products",
        "datamodules.table": "SampleTable",
        "datamodules.streaming": "StreamedImages",
        "datamodules.table_file": "Table",
        "vitrail.errors": "UserError",
        "datamodules.wares": "Wares",
    },
)
