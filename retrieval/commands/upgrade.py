"""``python -m retrieval upgrade``: bring a gallery of version 0.1 to the names that tables and columns have now."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``upgrade``."""
    command.description = (
        "Renames the tables and columns of a gallery that version 0.1 made, in place and without reading the images. "
        "A gallery that is up to date is left as it is."
    )
    command.add_argument("--gallery", required=True, metavar="G", help="folder of the gallery")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Upgrade the gallery, and report how many images it has."""
    from retrieval.gallery import Gallery, upgrade_gallery

    upgraded = upgrade_gallery(options.gallery)
    count = len(Gallery.open(options.gallery))
    sys.stdout.write(f"{options.gallery}: {'upgraded' if upgraded else 'is up to date'}, {count:,} images\n")
