"""Products: photos of everyday things with a class, attributes, a caption and the object that they show, in one table.

The format is that of two student data sets, ``labels.csv`` with the columns ``image_path, class_label, attributes,
caption, split, instance_id``, where ``attributes`` is a text such as ``color:red;material:metal;size:small``:
github.com/Eswar797/Local-DS (600 photos, 123 objects) and github.com/devamshah25/DL_project (1,000 rows, no photos).
Their quirks are taken as they are: back-slashes and blanks in paths, ``color`` for ``colour``, ``unknown`` and ``nan``
for values that are not known (``checks.missing``), blanks around captions. Tables with semicolons or tabs, as
spreadsheets write them, are read as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.base import ImageDataModule
from datamodules.captions import NOUN, composed_captions
from datamodules.files.label_csv import (
    LabelFile,
    Problems,
    Vocabulary,
    VocabularyOptions,
    as_on_disk,
    canonical_attribute,
    locate,
    parse_attributes,
    plain_text,
    read_label_file,
    relative_path,
)
from datamodules.splits import SplitOptions, resolve_splits, split_of_name
from datamodules.table import SPLITS, Missing, SampleTable, table_error, target_column
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SOURCE = "github.com/Eswar797/Local-DS"
_LAYOUT = "labels.csv next to the folder images/ that its image_path column names"


class Products(ImageDataModule):
    """Photos of products with a class, attributes, captions and objects that are seen in several photos.

    Tasks are ``class`` and one per attribute. All problems of the table are reported in one error, before any image is
    read.

    Args:
        root: folder of the data set; by default ``$VITRAIL_DATA/products`` or ``data/products``.
        labels: file name of the table in that folder.
        attributes: attributes to use as tasks, in this order; all that the table has by default.
        vocabulary: where class names come from, and aliases such as ``{colour: {grey: gray}}``.
        split: how samples are divided; the table's own split by default. Groups are the ``instance_id`` values; a row
            without one is a group of its own.
        caption_templates: captions made of these fields: ``{class}``, ``{noun}`` (its last word), the attributes, and
            ``{caption}``, the table's own, which is the only caption by default; an attribute that is called like one
            of the others is ``{attribute noun}``.
        shared: options of every data set, see ``ImageDataModule``.
    """

    missing_texts = ("unknown", "nan")

    def __init__(
        self,
        root: str = "",
        labels: str = "labels.csv",
        attributes: list[str] | None = None,
        vocabulary: VocabularyOptions = VocabularyOptions(),
        split: SplitOptions = SplitOptions(),
        caption_templates: list[str] | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.root, self.labels = root, labels
        self.attributes = attributes
        self.caption_templates = caption_templates
        self.split_options = SplitOptions.of(split)
        self._vocabulary = VocabularyOptions.of(vocabulary)

    def load_table(self) -> SampleTable:
        """Read ``labels.csv``."""
        import pandas as pd

        root = locate(self.root, "products", _SOURCE, _LAYOUT)
        path = root / self.labels
        file = read_label_file(path, self._required_columns())
        problems = list(file.problems)
        missing = Missing(self.check_options.missing or ())
        vocabulary = Vocabulary(self._vocabulary, missing)
        paths = _image_paths(file, problems)
        texts = {LABEL_TASK: file.columns["class_label"], **self._attribute_values(file, missing, problems)}
        own = _own_splits(file, problems) if "split" in file.columns else None
        if problems:
            raise table_error(str(path), problems, "correct or remove these rows")
        tasks = [LABEL_TASK, *self._wanted_attributes(list(texts)[1:], str(path))]
        notes = [*file.notes, *vocabulary.check_aliases(texts, str(path))]
        values = {task: vocabulary.values(task, texts[task]) for task in tasks}
        frame = pd.DataFrame({"name": paths, "source": as_on_disk(root, paths), "row": file.rows}, dtype=object)
        for task in tasks:
            frame[target_column(task)] = values[task]
        captions = [plain_text(text) for text in file.columns.get("caption", [""] * len(frame))]
        frame["caption"] = self._captions(missing.known("caption", captions), values, str(path))
        objects = missing.known("group", file.columns.get("instance_id", [""] * len(frame)))
        frame["group"] = [name or path for name, path in zip(objects, paths, strict=True)]
        if not len(frame):
            raise UserError(f"{path}: has no rows below its header; give a table with at least one sample")
        frame["split"] = resolve_splits(
            self.split_options, labels=values[LABEL_TASK], groups=frame["group"], seed=self.seed, own=own
        )
        vocabularies = {task: names for task, names in vocabulary.from_files(root).items() if task in tasks}
        columns = {task: target_column(task) for task in tasks}
        return SampleTable.from_frame(
            frame, columns, vocabularies, str(path), str(root), missing=missing.counts, notes=notes
        )

    def _captions(self, own: list[str], values: dict[str, list[str]], origin: str) -> list[str] | list[list[str]]:
        """The table's own captions, or those that the templates make of them and the values."""
        if not self.caption_templates:
            return own
        taken = (LABEL_TASK, NOUN, "caption")
        fields = {f"attribute {task}" if task in taken[1:] else task: texts for task, texts in values.items()}
        return composed_captions(
            self.caption_templates, {**fields, "caption": own}, f"data caption_templates: {origin}"
        )

    def _required_columns(self) -> list[str]:
        by = self.split_options.by or "table"
        columns = ["image_path", "class_label"]
        columns += ["attributes"] if self.attributes != [] else []
        columns += ["split"] if by == "table" else []
        columns += ["instance_id"] if by in ("group", "group_kfold") else []
        return columns

    def _attribute_values(self, file: LabelFile, missing: Missing, problems: Problems) -> dict[str, list[str]]:
        """For each attribute of the table a text a row, empty where the row does not mention it."""
        if self.attributes == []:
            return {}
        column = missing.known("attributes", file.columns["attributes"])
        parsed = {text: parse_attributes(text) for text in dict.fromkeys(column)}
        for row, text in zip(file.rows, column, strict=True):
            problems += [(row, wrong) for wrong in parsed[text][1]]
        tasks = dict.fromkeys(task for values, _ in parsed.values() for task in values)
        return {task: [parsed[text][0].get(task, "") for text in column] for task in tasks}

    def _wanted_attributes(self, values: list[str], origin: str) -> list[str]:
        if self.attributes is None:
            return values
        wanted = list(dict.fromkeys(canonical_attribute(name) for name in self.attributes))
        if missing := [name for name in wanted if name not in values]:
            has = ", ".join(values) or "none"
            raise UserError(f"data attributes: {origin} has no attribute {missing[0]!r}; it has {has}")
        return wanted


def _image_paths(file: LabelFile, problems: Problems) -> list[str]:
    """Paths of the images below the root; for a bad one its text and a problem."""
    paths: list[str] = []
    first: dict[str, int] = {}
    for row, text in zip(file.rows, file.columns["image_path"], strict=True):
        try:
            path = relative_path(text)
        except ValueError as error:
            problems.append((row, str(error)))
            path = text
        else:
            if path in first:
                problems.append((row, f"image {path!r} again, first in row {first[path]}"))
            first.setdefault(path, row)
        paths.append(path)
    return paths


def _own_splits(file: LabelFile, problems: Problems) -> NDArray[np.str_]:
    splits = [split_of_name(text) or text.strip().lower() for text in file.columns["split"]]
    for row, split in zip(file.rows, splits, strict=True):
        if split not in SPLITS:
            problems.append((row, f"split {split!r} is not one of {', '.join(SPLITS)}"))
    return np.array(splits)
