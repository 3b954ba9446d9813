"""ImageFolder: a user's own pictures, one folder a class, with or without folders for the splits above them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.base import ImageDataModule
from datamodules.options import AugmentOptions, CheckOptions, ImageOptions, LoaderOptions
from datamodules.prompts import PromptOptions
from datamodules.schema import LABEL_TASK, UserError
from datamodules.splits import SplitOptions, resolve_splits
from datamodules.table import SampleTable

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Endings of file names that are pictures, in upper or lower case; other files are left alone."""

_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SHOWN = 5


class ImageFolder(ImageDataModule):
    """Pictures in folders: ``root/<class>/…`` or ``root/{train,val,test}/<class>/…``, at any depth below the class.

    Folders are splits where one is called train and all others val (or valid, validation) or test; else they are
    classes. Hidden files and folders are left alone, as are files that are no pictures.

    Args:
        root: the folder.
        split: how samples are divided. By default by the folders, where they are splits; a val or test that is missing
            is cut out of train by its fraction (0 leaves it empty). Where they are classes, ``group`` with a
            ``group_pattern``, else ``stratified``.
        group_pattern: regular expression that is searched for in a picture's path from the class folder on
            (``bottle/b07_front.jpg``); what its one group matches names the object that the picture shows. Pictures of
            one object stay together.
        image: size, crop and interpolation of the pictures.
        augment: augmentation of the training pictures; none by default.
        loader: batch size, workers and sampling.
        checks: what to do about unreadable pictures and leaks between the splits.
        seed: of order, sampling, augmentation and, where ``split`` names no other, of the division.
        prompts: texts that stand for the classes; given, they are the captions too.
    """

    def __init__(
        self,
        root: str,
        split: SplitOptions | None = None,
        group_pattern: str = "",
        image: ImageOptions | None = None,
        augment: AugmentOptions | None = None,
        loader: LoaderOptions | None = None,
        checks: CheckOptions | None = None,
        seed: int = 0,
        prompts: PromptOptions | None = None,
    ) -> None:
        super().__init__(image, augment, loader, checks, seed, prompts)
        self.root = root
        self.split_options = split or {}
        self._group_of = _compiled(group_pattern)

    def load_table(self) -> SampleTable:
        """Lists the pictures.

        Raises:
            UserError: where there is no such folder, folders cannot be told to be splits or classes, a class folder is
                empty, or pictures lie outside the class folders.
        """
        import pandas as pd

        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise UserError(f"data root: there is no folder {root}; give one with a folder of pictures for each class")
        split_folders = _split_folders(root)
        tops = {folder: root / folder for folder in split_folders} or {"": root}
        records: list[tuple[str, str, str]] = []
        for folder, top in tops.items():
            below = pictures_below(top)
            _refuse_strays(top, below)
            own = _SPLIT_FOLDERS[folder] if folder else ""
            records += [(f"{folder}/{path}" if folder else path, path.split("/", 1)[0], own) for path in below]
        frame = pd.DataFrame(records, columns=["name", LABEL_TASK, "split"], dtype=object)
        frame["source"] = frame["name"]
        frame["row"] = range(1, len(frame) + 1)
        frame["group"] = self._groups(frame, str(root))
        self._divide(frame, bool(split_folders))
        return SampleTable.from_frame(frame, [LABEL_TASK], None, str(root), str(root))

    def _groups(self, frame: pd.DataFrame, origin: str) -> list[str]:
        names = [str(name) for name in frame["name"]]
        if self._group_of is None:
            return names
        below = [name.split("/", 1)[1] if own else name for name, own in zip(names, frame["split"], strict=True)]
        matches = [self._group_of.search(path) for path in below]
        if unmatched := [path for path, match in zip(below, matches, strict=True) if not match or not match[1]]:
            raise UserError(f"data group_pattern: finds nothing in {_some(unmatched)} of {origin}; correct the pattern")
        return [match[1] for match in matches if match]

    def _divide(self, frame: pd.DataFrame, has_splits: bool) -> None:
        """Settles the column ``split``."""
        import pandas as pd

        by_class = "group" if self._group_of else "stratified"
        frame["split"] = resolve_splits(
            self.split_options,
            labels=pd.factorize(frame[LABEL_TASK], sort=True)[0],
            groups=pd.factorize(frame["group"], sort=True)[0],
            seed=self.seed,
            default="table" if has_splits else by_class,
            own=np.array(frame["split"], dtype=str) if has_splits else None,
            carve=True,
        )


def _compiled(pattern: str) -> re.Pattern[str] | None:
    if not pattern:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"data group_pattern: {pattern!r} is no regular expression ({error}); correct it") from error
    if compiled.groups != 1:
        raise UserError(f"data group_pattern: {pattern!r} must have one group in parentheses, it has {compiled.groups}")
    return compiled


def _split_folders(root: Path) -> list[str]:
    """Names of the folders that are splits, train first; none where the folders are classes."""
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not _left_alone(entry.name))
    splits = [name for name in folders if name in _SPLIT_FOLDERS]
    others = [name for name in folders if name not in _SPLIT_FOLDERS]
    if not folders:
        raise UserError(f"data root: {root} has no folders; give one with a folder of pictures for each class")
    if not others and "train" not in splits:
        raise UserError(f"data root: {root} has {_some(splits)} but no train; add it")
    if "train" not in splits or (others and len(splits) == 1):
        return []  # a class may well be called train or test
    if others:
        raise UserError(
            f"data root: {root} has {_some(others)} beside {', '.join(splits)}; move classes into the splits"
        )
    kinds = [_SPLIT_FOLDERS[name] for name in splits]
    if len(set(kinds)) < len(kinds):
        raise UserError(f"data root: {root} has several folders for val ({', '.join(splits)}); keep one")
    return sorted(splits, key=lambda name: ("train", "val", "test").index(_SPLIT_FOLDERS[name]))


def pictures_below(top: Path) -> list[str]:
    """Paths of all pictures below a folder, relative to it, sorted; links to folders are followed, each once."""
    found: list[str] = []
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not _left_alone(name))
        below = Path(folder).relative_to(top)
        found += [
            (below / name).as_posix() for name in files if name.lower().endswith(SUFFIXES) and not _left_alone(name)
        ]
    return sorted(found)


def _refuse_strays(top: Path, below: list[str]) -> None:
    """Refuses pictures outside the class folders, and class folders without pictures."""
    if strays := [path for path in below if "/" not in path]:
        raise UserError(f"{top}: {_some(strays)} in no class folder; move or remove them")
    classes = {path.split("/", 1)[0] for path in below}
    folders = sorted(entry.name for entry in top.iterdir() if entry.is_dir() and not _left_alone(entry.name))
    if empty := [name for name in folders if name not in classes]:
        raise UserError(
            f"{top}: no pictures ({', '.join(SUFFIXES)}) in class folder {_some(empty)}; add some or remove the folder"
        )
    if not folders:
        raise UserError(f"{top}: has no class folders; give it a folder of pictures for each class")


def _left_alone(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
