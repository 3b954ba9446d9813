"""Flickr8k: 8,091 photos of people and animals doing things, each with five captions written by people.

M. Hodosh, P. Young and J. Hockenmaier, "Framing Image Description as a Ranking Task", JAIR 47, 2013; for
non-commercial research. It is given out by form (and as kaggle.com/datasets/adityajn105/flickr8k). The same loader
reads Flickr30k and COCO with A. Karpathy's split files (cs.stanford.edu/people/karpathy/deepimagesent).

The original token file has five captions of ``2258277193_586949ec62.jpg.1``, a photo that does not exist and is in no
list: captions like these are left out and counted in the run record, as are photos that no list has.

Files of captions are ``name.jpg#0<TAB>caption`` lines (token file; Flickr30k's ``results_20130124.token`` is alike),
Kaggle's CSV with the columns ``image`` and ``caption``, or A. Karpathy's JSON, which also has the split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.base import ImageDataModule
from datamodules.files.label_csv import Problems, as_on_disk, locate, read_label_file, read_text
from datamodules.splits import SplitOptions, resolve_splits
from datamodules.table import Missing, SampleTable, composed, table_error
from vitrail.errors import UserError

_SOURCE = "kaggle.com/datasets/adityajn105/flickr8k or the form of the University of Illinois"
_LAYOUT = (
    "Flicker8k_Dataset/*.jpg next to Flickr8k_text/Flickr8k.token.txt and its split lists, or captions.txt, or a JSON"
)
_CAPTION_FILES = {
    "token": ("Flickr8k_text/Flickr8k.token.txt", "Flickr8k.token.txt", "*.token"),
    "kaggle": ("captions.txt",),
    "karpathy": ("dataset*.json",),
}
_IMAGE_FOLDERS = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images", ".")
_LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
_KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}  # restval is COCO's


class Flickr8k(ImageDataModule):
    """Photos with several captions each, and no classes; one row a photo, so no split divides a photo's captions.

    Args:
        root: folder of the data; by default ``$VITRAIL_DATA/flickr8k`` or ``data/flickr8k``.
        captions: ``token``, ``kaggle`` (``captions.txt``) or ``karpathy`` (``dataset*.json``) for a file of that kind,
            ``auto`` (or empty) for the first of these that is there, or a file's path, below ``root`` or absolute.
        images: folder of the photos, below ``root`` or absolute; by default looked for.

        split: how photos are divided; by default by the JSON or the split lists, where there are none at random.
        shared: options of every data set, see ``ImageDataModule``.
    """

    def __init__(
        self,
        root: str = "",
        captions: str = "auto",
        images: str = "",
        split: SplitOptions = SplitOptions(),
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.root = root
        self.caption_file = captions
        self.unlabeled_folder = images
        self.split_options = SplitOptions.of(split)
        self.left_out = {"photos in no list": 0, "captions of photos that do not exist": 0}

    def load_table(self) -> SampleTable:
        """Read captions and split lists."""
        import pandas as pd

        root = locate(self.root, "flickr8k", _SOURCE, _LAYOUT)
        path = _caption_file(root, self.caption_file)
        images = _unlabeled_folder(root, self.unlabeled_folder)
        file = read_captions(path)
        problems = {path: file.problems}
        listed = file.splits or _read_lists([path.parent, root, root / "Flickr8k_text"], file.captions, problems)
        _refuse(problems)
        on_disk = dict(zip(file.captions, as_on_disk(images, file.captions), strict=True))
        names = self._kept(file, listed, {name for name, path in on_disk.items() if (images / path).exists()})
        if not any((images / on_disk[name]).exists() for name in names):
            raise UserError(f"{path}: none of its photos is in {images}; give the folder as data images")
        if any(self.left_out.values()):
            rank_zero_warn(f"Flickr8k: left out {', '.join(f'{n} {what}' for what, n in self.left_out.items() if n)}")
        rows = [file.rows[name] for name in names]
        frame = pd.DataFrame({"name": names, "source": [on_disk[name] for name in names], "row": rows})
        missing = Missing(self.check_options.missing or ())
        known = [missing.known("caption", file.captions[name]) for name in names]
        frame["caption"] = [[text for text in texts if text] or [""] for texts in known]
        frame["split"] = resolve_splits(
            self.split_options,
            labels=np.zeros(len(names)),
            groups=range(len(names)),
            seed=self.seed,
            default="table" if listed else "random",
            own=np.array([listed[name] for name in names], dtype="U5") if listed else None,
        )
        return SampleTable.from_frame(frame, [], None, str(path), str(images), missing=missing.counts)

    def data_record(self) -> dict[str, Any]:
        """Return the record, with what was left out."""
        return {**super().data_record(), "left_out": self.left_out}

    def _kept(self, file: CaptionFile, listed: dict[str, str], there: Container[str]) -> list[str]:
        """Names of the photos in the order of the file, without those that no list has."""
        self.left_out = dict.fromkeys(self.left_out, 0)
        kept = []
        for name, captions in file.captions.items():
            # A listed photo that is absent is reported by the check of all images.
            if name in listed:
                kept.append(name)
            elif name not in there:
                self.left_out["captions of photos that do not exist"] += len(captions)
            elif listed:
                self.left_out["photos in no list"] += 1
            else:
                kept.append(name)
        return kept


def _caption_file(root: Path, given: str) -> Path:
    kind = given or "auto"
    if kind not in ("auto", *_CAPTION_FILES):
        path = root / Path(given).expanduser()
        if not path.is_file():
            known = ", ".join(("auto", *_CAPTION_FILES))
            raise UserError(f"data captions: there is no file {path}; give the path of one, or one of {known}")
        return path
    patterns = [name for key, names in _CAPTION_FILES.items() if kind in ("auto", key) for name in names]
    found = [file for pattern in patterns for file in sorted(root.glob(pattern)) if file.is_file()]
    if not found:
        what = "captions" if kind == "auto" else f"captions of kind {kind} ({', '.join(patterns)})"
        raise UserError(f"data captions: {root} has no {what}; lay it out as {_LAYOUT}, or give a file's path")
    return found[0]


def _unlabeled_folder(root: Path, given: str) -> Path:
    if given:
        folder = root / Path(given).expanduser()
        if not folder.is_dir():
            raise UserError(f"data images: there is no folder {folder}")
        return folder
    return next(root / name for name in _IMAGE_FOLDERS if (root / name).is_dir())


def _refuse(problems: dict[Path, Problems]) -> None:
    """Report the problems of all files together, each with its own lines."""
    hint = "correct or remove these lines"
    if errors := [str(table_error(str(path), found, hint)) for path, found in problems.items() if found]:
        raise UserError("\n".join(errors))


def _read_lists(folders: list[Path], captioned: Container[str], problems: dict[Path, Problems]) -> dict[str, str]:
    """Split of each photo that a list names; nothing where no folder has lists."""
    folder = next((f for f in folders if any((f / name).is_file() for name in _LISTS.values())), None)
    if folder is None:
        return {}
    paths = {split: folder / name for split, name in _LISTS.items()}
    there = [path.name for path in paths.values() if path.is_file()]
    if len(there) < len(paths):
        missing = next(path for path in paths.values() if not path.is_file())
        raise UserError(f"{missing}: is missing next to {', '.join(there)}; add it, or remove those for a random split")
    listed: dict[str, str] = {}
    for split, path in paths.items():
        found = problems.setdefault(path, [])
        for row, line in enumerate(read_text(path, found).split("\n"), start=1):
            name = line.strip()
            if name in listed:
                found.append((row, f"{name} again, it is in the list for {listed[name]}"))
            elif name:
                listed[name] = split
                if name not in captioned:
                    found.append((row, f"{name} has no captions"))
    return listed


@dataclass
class CaptionFile:
    """Captions by image, in the order of the file.

    Attributes:
        captions: by the image's name its captions, stripped, one or more.
        rows: by name the line of its first caption, or its number in a JSON, from 1.
        splits: by name its split, where the file has it.
        problems: what was wrong in the file, by line.
    """

    captions: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    problems: Problems = field(default_factory=list)

    def add(self, name: str, caption: str, row: int) -> None:
        """Add a caption, or a problem where it is empty."""
        name, caption = composed(name), composed(caption)  # a JSON's escapes hide what its text does not
        if not name.strip():
            self.problems.append((row, "no name of an image"))
        elif not caption.strip():
            self.problems.append((row, f"empty caption of {name}"))
        else:
            self.rows.setdefault(name, row)
            self.captions.setdefault(name, []).append(caption.strip())


def read_captions(path: Path) -> CaptionFile:
    """Read a file of captions, whose kind its ending and its first line show.

    Raises:
        UserError: for a file that cannot be read or has another format.
    """
    if path.suffix == ".json":
        return _read_karpathy(path)
    first = read_text(path, []).partition("\n")[0]
    header = {name.strip(" \"'") for name in re.split(r"[,;\t|]", first)}
    is_table = first.startswith("sep=") or {"image", "caption"} <= header
    return _read_token_file(path) if not is_table and ("\t" in first or "#" in first) else _read_kaggle(path)


def _read_token_file(path: Path) -> CaptionFile:
    file = CaptionFile()
    # Not splitlines, which would also cut a caption at a Unicode line separator.
    for row, line in enumerate(read_text(path, file.problems).split("\n"), start=1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        name, mark, number = key.rpartition("#")
        if not tab or not mark or not number.strip().isdigit():
            file.problems.append((row, f"{line[:40]!r} is not name.jpg#number, a tab and a caption"))
        else:
            file.add(name.strip(), caption, row)
    return file


def _read_kaggle(path: Path) -> CaptionFile:
    table = read_label_file(path, ["image", "caption"])
    file = CaptionFile(problems=list(table.problems))
    for name, caption, row in zip(table.columns["image"], table.columns["caption"], table.rows, strict=True):
        file.add(name.strip(), caption, row)
    return file


def _read_karpathy(path: Path) -> CaptionFile:
    file = CaptionFile()
    try:
        entries = json.loads(read_text(path, file.problems))["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: is not JSON with a list "images" ({str(error)[:100]}); get the file again') from error
    if not isinstance(entries, list):
        raise UserError(f'{path}: "images" is not a list; get the file again')
    for row, entry in enumerate(entries, start=1):
        name, split = _name_and_split(entry)
        if split is None:
            file.problems.append((row, "has no filename, or its split is not train, restval, val or test"))
            continue
        if name in file.splits:
            file.problems.append((row, f"{name} again, first in entry {file.rows.get(name, '?')}"))
            continue
        file.splits[name] = split
        sentences = entry.get("sentences")
        for sentence in sentences if isinstance(sentences, list) else []:
            raw = sentence.get("raw", "") if isinstance(sentence, dict) else ""
            file.add(name, str(raw), row)
        if name not in file.captions:
            file.problems.append((row, f"{name} has no captions"))
    return file


def _name_and_split(entry: Any) -> tuple[str, str | None]:
    if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str) or not entry["filename"]:
        return "", None
    folder = entry.get("filepath") or ""
    name = f"{folder}/{entry['filename']}" if folder else entry["filename"]
    return composed(name), _KARPATHY_SPLITS.get(str(entry.get("split")))
