"""ImageFolder: a user's own images, one folder a class, with or without folders for the splits above them.

UnlabeledFolder: images in a folder and nothing else known of them, to be put into a gallery or predicted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.base import ImageDataModule
from datamodules.files.label_csv import count_files_left_out, files_below, is_left_alone
from datamodules.loading.decode import image_suffixes
from datamodules.splits import SplitOptions, resolve_splits, split_of_name
from datamodules.table import SPLITS, Missing, SampleTable, composed
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import pandas as pd


_STATE = "say which with data split_folders: {train: A, val: B, test: C}, or {} where all folders are classes"
_SHOWN = 5


class ImageFolder(ImageDataModule):
    """Images in folders: ``root/<class>/…`` or ``root/{train,val,test}/<class>/…``, at any depth below the class.

    Folders are splits where one is called train and all others val or test, in any case and usual spelling (``VAL``,
    ``Training``, ``validation``, ``dev``, ``eval``, ``testing``, ``val2017``); otherwise they are classes. Where that
    is unclear, because all folders have the same subfolders, ``split_folders`` is needed. Hidden files and folders are
    ignored; other files that are no images are counted in the audit and the run record.

    Args:
        root: the folder.
        split: how samples are divided. By default by the folders, where they are splits; a val or test that is missing
            is cut out of train by its fraction (0 leaves it empty). Where they are classes, ``group`` with a
            ``group_pattern``, else ``stratified``.
        group_pattern: regular expression that is searched for in an image's path from the class folder on
            (``bottle/b07_front.jpg``); what its one group matches names the object that the image shows. Images of
            one object stay together.
        split_folders: which folders are which split where their names do not show it, such as ``{train: [2018, 2019],
            test: 2020}``; ``{}`` where all folders are classes, whatever they are called. By default the names decide.
        shared: options of every data set, see ``ImageDataModule``.
    """

    def __init__(
        self,
        root: str,
        split: SplitOptions = SplitOptions(),
        group_pattern: str = "",
        split_folders: dict[str, str | list[str]] | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.root = root
        self.split_folders = split_folders
        self.split_options = SplitOptions.of(split)
        self._group_of = _compiled(group_pattern)

    def load_table(self) -> SampleTable:
        """List the images."""
        import pandas as pd

        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise UserError(f"data root: there is no folder {root}; give one with a folder of images for each class")
        given = self.split_folders
        split_folders = _split_folders(root) if given is None else _chosen_folders(root, given)
        tops = {folder: root / folder for folder in split_folders} or {"": root}
        records: list[tuple[str, str, str]] = []
        for folder, top in tops.items():
            below = images_below(top)
            _refuse_strays(top, below)
            own = split_folders.get(folder, "")
            records += [(f"{folder}/{path}" if folder else path, path.split("/", 1)[0], own) for path in below]
        frame = pd.DataFrame(records, columns=["name", LABEL_TASK, "split"], dtype=object)
        missing = Missing(self.check_options.missing or ())
        frame["source"] = frame["name"]
        # Copies of a folder may spell the same name in different Unicode normal forms.
        frame["name"] = [composed(name) for name in frame["name"]]
        frame[LABEL_TASK] = missing.known(LABEL_TASK, frame[LABEL_TASK])
        frame["row"] = range(1, len(frame) + 1)
        groups = missing.known("group", self._groups(frame, str(root)))
        frame["group"] = [group or name for group, name in zip(groups, frame["name"], strict=True)]
        frame["split"] = resolve_splits(
            self.split_options,
            labels=frame[LABEL_TASK],
            groups=frame["group"],
            seed=self.seed,
            default="table" if split_folders else "group" if self._group_of else "stratified",
            own=np.array(frame["split"], dtype=str) if split_folders else None,
            carve=True,
        )
        return SampleTable.from_frame(frame, [LABEL_TASK], None, str(root), str(root), missing=missing.counts)

    def count_left_out(self) -> dict[str, int]:
        """See ``ImageDataModule``; all images below the root belong to the data set."""
        return count_files_left_out(self.table.sources.to_pylist(), self.table.origin, self.table.origin)

    def _groups(self, frame: pd.DataFrame, origin: str) -> list[str]:
        names = [str(name) for name in frame["name"]]
        if self._group_of is None:
            return names
        below = [name.split("/", 1)[1] if own else name for name, own in zip(names, frame["split"], strict=True)]
        matches = [self._group_of.search(path) for path in below]
        if unmatched := [path for path, match in zip(below, matches, strict=True) if not match or not match[1]]:
            raise UserError(f"data group_pattern: finds nothing in {_some(unmatched)} of {origin}; correct the pattern")
        return [match[1] for match in matches if match]


def _compiled(pattern: str) -> re.Pattern[str] | None:
    if not pattern:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"data group_pattern: {pattern!r} is not a regular expression ({error}); correct it") from error
    if compiled.groups != 1:
        raise UserError(f"data group_pattern: {pattern!r} must have one group in parentheses, it has {compiled.groups}")
    return compiled


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_left_alone(entry.name))


def _chosen_folders(root: Path, chosen: Mapping[str, str | list[str]]) -> dict[str, str]:
    """By folder the split that the user gave it; empty where folders are classes."""
    if strange := sorted(set(chosen) - set(SPLITS)):
        raise UserError(f"data split_folders: key must be one of {', '.join(SPLITS)}; got {strange[0]!r}")
    given = {split: [names] if isinstance(names, str) else list(names) for split, names in chosen.items()}
    named = [(name, split) for split in SPLITS for name in given.get(split, [])]
    folders = _subfolders(root)
    if missing := [name for name, _ in named if name not in folders]:
        raise UserError(f"data split_folders: {root} has no folder {missing[0]!r}; it has {_some(folders)}")
    if len(dict(named)) < len(named):
        raise UserError("data split_folders: names a folder twice; name each once")
    if named and (others := [name for name in folders if name not in dict(named)]):
        raise UserError(f"data split_folders: does not name {_some(others)} in {root}; name all folders")
    if named and not given.get("train"):
        raise UserError("data split_folders: names no folder for train; add it")
    return dict(named)


def _split_folders(root: Path) -> dict[str, str]:
    """By folder the split that its name means, train first; empty where the folders are classes."""
    folders = _subfolders(root)
    meant = {name: split for name in folders if (split := split_of_name(name)) is not None}
    others = [name for name in folders if name not in meant]
    kinds = set(meant.values())
    if not folders:
        raise UserError(f"data root: {root} has no folders; give one with a folder of images for each class")
    if not others and "train" not in kinds:
        raise UserError(f"data root: {root} has {_some(folders)} but no train; add it, or {_STATE}")
    if "train" not in kinds or (others and len(meant) == 1):
        # A class may well be called train or test.
        _refuse_alike(root, folders)
        return {}
    if others:
        raise UserError(
            f"data root: {root} has {_some(others)} next to {', '.join(meant)}; move classes into the splits, or "
            f"{_STATE}"
        )
    if len(kinds) < len(meant):
        twice = next(split for split in SPLITS if list(meant.values()).count(split) > 1)
        several = ", ".join(name for name, split in meant.items() if split == twice)
        raise UserError(f"data root: {root} has several folders for {twice} ({several}); keep one, or {_STATE}")
    return dict(sorted(meant.items(), key=lambda one: SPLITS.index(one[1])))


def _refuse_alike(root: Path, folders: list[str]) -> None:
    """Refuse folders that all have the same subfolders: they look like splits with unusual names."""
    below = [_subfolders(root / name) for name in folders]
    if len(folders) > 1 and len(below[0]) > 1 and all(names == below[0] for names in below):
        raise UserError(
            f"data root: {root} has {_some(folders)}, and each of them has {_some(below[0])}: these may be classes or "
            f"splits; {_STATE}"
        )


def images_below(top: Path) -> list[str]:
    """Paths of all images below a folder, relative to it, sorted; links to folders are followed, each once."""
    suffixes = image_suffixes()
    return sorted(path for path in files_below(top) if path.lower().endswith(suffixes))


def _refuse_strays(top: Path, below: list[str]) -> None:
    """Refuse images outside the class folders, and class folders without images."""
    if strays := [path for path in below if "/" not in path]:
        raise UserError(f"{top}: {_some(strays)} in no class folder; move or remove them")
    classes = {path.split("/", 1)[0] for path in below}
    folders = _subfolders(top)
    if empty := [name for name in folders if name not in classes]:
        raise UserError(
            f"{top}: no images ({', '.join(image_suffixes())}) in class folder {_some(empty)}; add some or remove "
            "the folder"
        )
    if not folders:
        raise UserError(f"{top}: has no class folders; give it a folder of images for each class")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


class UnlabeledFolder(ImageDataModule):
    """All images below a folder, at any depth, without labels and captions; all of them are in the split test.

    An image's name is its path from the folder on, with the folder's own name in front (``holiday/day1/beach.jpg``),
    so that folders of different names can go into one gallery. Hidden files and folders are ignored, as are files
    that are no images.

    Args:
        root: the folder.
        shared: options of every data set, see ``ImageDataModule``.
    """

    def __init__(self, root: str, **shared: Any) -> None:
        super().__init__(**shared)
        self.root = root

    def load_table(self) -> SampleTable:
        """List the images."""
        import pandas as pd

        root = Path(self.root).expanduser().absolute()
        if not root.is_dir():
            raise UserError(f"data root: there is no folder {self.root}; give one with images")
        paths = images_below(root)
        if not paths:
            raise UserError(
                f"data root: {self.root} has no images ({', '.join(image_suffixes())}); give another folder"
            )
        names = [composed(f"{root.name}/{path}") for path in paths]
        frame = pd.DataFrame({"name": names, "source": paths, "split": "test"})
        return SampleTable.from_frame(frame, [], None, str(root), str(root))

    def count_left_out(self) -> dict[str, int]:
        """See ``ImageDataModule``; all images below the root belong to the data set."""
        return count_files_left_out(self.table.sources.to_pylist(), self.table.origin, self.table.origin)
