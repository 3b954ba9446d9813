"""Building a DataModule as the command line does."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from datamodules.base import ImageDataModule


def from_yaml(text: str) -> Any:
    """The DataModule that the ``data:`` part of an experiment describes.

    Args:
        text: YAML with ``class_path`` and ``init_args``.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    indented = "\n".join(f"  {line}" for line in text.strip().splitlines())
    return parser.instantiate(parser.parse_string(f"data:\n{indented}")).data
