"""Files of captions, several for an image, read with all problems gathered.

- Flickr8k's token file: ``name.jpg#0<TAB>caption`` a line (Flickr30k's ``results_20130124.token`` is alike).
- Kaggle's ``captions.txt``: CSV with the columns ``image`` and ``caption``.
- A. Karpathy's JSON (``dataset_flickr8k.json``, ``dataset_flickr30k.json``, ``dataset_coco.json``), which also has the
  split; COCO's ``restval`` belongs to train.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.files.label_csv import Problems, read_label_file, read_text
from datamodules.table import composed
from vitrail.errors import UserError

_KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


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
        return read_karpathy(path)
    first = read_text(path, []).partition("\n")[0]
    header = {name.strip(" \"'") for name in re.split(r"[,;\t|]", first)}
    is_table = first.startswith("sep=") or {"image", "caption"} <= header
    return read_token_file(path) if not is_table and ("\t" in first or "#" in first) else read_kaggle(path)


def read_token_file(path: Path) -> CaptionFile:
    """Read ``name.jpg#0<TAB>caption`` lines."""
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


def read_kaggle(path: Path) -> CaptionFile:
    """Read a CSV file with the columns ``image`` and ``caption``."""
    table = read_label_file(path, ["image", "caption"])
    file = CaptionFile(problems=list(table.problems))
    for name, caption, row in zip(table.columns["image"], table.columns["caption"], table.rows, strict=True):
        file.add(name.strip(), caption, row)
    return file


def read_karpathy(path: Path) -> CaptionFile:
    """Read A. Karpathy's JSON."""
    file = CaptionFile()
    try:
        entries = json.loads(read_text(path, file.problems))["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: is no JSON with a list "images" ({str(error)[:100]}); get the file again') from error
    if not isinstance(entries, list):
        raise UserError(f'{path}: "images" is no list; get the file again')
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
