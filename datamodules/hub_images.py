"""HubImages: any data set of the ``datasets`` library that has a column of pictures and one of labels.

Data sets come from huggingface.co/datasets, or from a local folder or file in one of the library's formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from datamodules.base import ImageDataModule
from datamodules.columns import Missing, attribute_column, composed
from datamodules.hub_access import PictureColumn, local_files, open_splits, read_columns
from datamodules.label_columns import class_names_of, label_texts, numbers_in_order, plain_texts
from datamodules.location import count_files_left_out
from datamodules.options import AugmentOptions, CheckOptions, ImageOptions, LoaderOptions
from datamodules.prompts import PromptOptions
from datamodules.splits import SplitOptions, resolve_splits, split_of_name
from datamodules.table import SPLITS, SampleTable, target_column
from vitrail.errors import UserError
from vitrail.types import DEFAULT_SEED, LABEL_TASK

if TYPE_CHECKING:
    import pandas as pd


class ColumnOptions(TypedDict, total=False):
    """Which columns of the data set are what.

    Attributes:
        image: pictures; default image.
        label: class, as the library's ClassLabel, text or whole number; default label.
        caption: text, or several texts of which the first is taken; default none.
        group: the object or product that a picture shows; default none.
        attributes: further columns to learn, each a task of its own; default none.
    """

    image: str
    label: str
    caption: str
    group: str
    attributes: list[str]


class HubImages(ImageDataModule):
    """Pictures and labels of any data set of the ``datasets`` library.

    Args:
        path: name on the hub (``owner/name``), or a local folder (``save_to_disk``, Parquet, or folders of pictures) or
            file (Parquet, Arrow).
        columns: which columns are what.
        config_name: which of several configurations, where the data set has them.
        revision: branch, tag or commit on the hub.
        splits: for train, val and test the data set's own names; the usual ones are found without. Others are left out.
        split: how samples are divided; by default the data set's own splits. Where it has no val or test, that is cut
            out of train by its fraction (0 leaves it empty), groups kept together.
        image: size, crop and interpolation of the pictures.
        augment: augmentation of the training pictures; none by default.
        loader: batch size, workers and sampling.
        checks: what to do about unreadable pictures and leaks between the splits.
        seed: of order, sampling, augmentation and, where ``split`` names no other, of the division.
        prompts: texts that stand for the classes; given, they are the captions too.
    """

    def __init__(
        self,
        path: str,
        columns: ColumnOptions | None = None,
        config_name: str = "",
        revision: str = "",
        splits: dict[str, str] | None = None,
        split: SplitOptions | None = None,
        image: ImageOptions | None = None,
        augment: AugmentOptions | None = None,
        loader: LoaderOptions | None = None,
        checks: CheckOptions | None = None,
        seed: int = DEFAULT_SEED,
        prompts: PromptOptions | None = None,
    ) -> None:
        super().__init__(image, augment, loader, checks, seed, prompts)
        if strange := sorted(set(columns or {}) - set(ColumnOptions.__annotations__)):
            known = ", ".join(ColumnOptions.__annotations__)
            raise UserError(f"data columns: unknown key {strange[0]!r}; known keys are {known}")
        self.path = path
        self.columns: ColumnOptions = {"image": "image", "label": "label", **(columns or {})}
        self._tasks()  # a mistake is told now, not when the table is read
        self.config_name = config_name
        self.revision = revision
        self.split_names = splits or {}
        self.split_options = split or {}
        self._pictures: PictureColumn | None = None
        self._local_files: list[str] = []

    def load_table(self) -> SampleTable:
        """Opens the data set and reads all columns but the pictures.

        Raises:
            UserError: where the data set cannot be opened, or lacks splits or columns.
        """
        import pandas as pd

        opened = open_splits(self.path, self.config_name, self.revision)
        chosen = self._choose_splits(opened)
        parts = {split: opened[theirs] for split, theirs in chosen.items()}
        for split, part in parts.items():
            self._check_columns(part, f"{self.path} ({chosen[split]})")
        self._pictures = PictureColumn(list(parts.values()), self.columns["image"])
        folder = Path(self.path).expanduser()
        if folder.is_dir():
            named = {chosen[split]: part for split, part in parts.items()}
            self._local_files = local_files(str(folder), self.config_name, named, self.columns["image"])
        missing = Missing(self.check_options["missing"])
        frames = [self._frame(part, chosen[split], split, missing) for split, part in parts.items()]
        frame = pd.concat(frames, ignore_index=True)
        tasks = self._tasks()
        features = parts["train"].features
        self._divide(frame)
        in_train = frame["split"] == "train"
        vocabularies = {}
        for task, column in tasks.items():
            names = [name for name in class_names_of(features[column]) if not missing.means_unknown(name)]
            vocabularies[task] = names or _in_order(frame.loc[in_train, target_column(task)], features[column])
        known = {task: values for task, values in vocabularies.items() if values}
        columns = {task: target_column(task) for task in tasks}
        return SampleTable.from_frame(frame, columns, known, self.path, missing=missing.counts)

    def _tasks(self) -> dict[str, str]:
        """The column of each task, the main one first.

        Raises:
            UserError: for an attribute that is called like the main task.
        """
        attributes = self.columns.get("attributes", [])
        if LABEL_TASK in attributes:
            raise UserError(
                f"data columns.attributes: the name {LABEL_TASK!r} is taken by the main task; rename the column"
            )
        return {LABEL_TASK: self.columns["label"], **{composed(name): name for name in attributes}}

    def count_left_out(self) -> dict[str, int]:
        """Count the files of a local folder that none of the splits were read from."""
        _ = self.table
        folder = str(Path(self.path).expanduser())
        return count_files_left_out(self._local_files, "", folder) if self._local_files else {}

    def read_image(self, index: int) -> torch.Tensor:
        """Reads one picture out of the data set's files.

        Args:
            index: row of the table.

        Returns:
            uint8 ``(3, H, W)``, RGB, in the picture's own size.

        Raises:
            ImageError: where the picture cannot be read.
        """
        name = self.table.name(index)
        assert self._pictures is not None, "the table opens the pictures"
        return self._pictures.read(index, f"{self.path}: {name}", self.value_range)

    def encoded_picture(self, index: int) -> bytes:
        """The picture's file as it is stored.

        Raises:
            ImageError: where there is none.
        """
        assert self._pictures is not None, "the table opens the pictures"
        found = self._pictures.encoded(index, f"{self.path}: {self.table.name(index)}")
        return found if isinstance(found, bytes) else Path(found).read_bytes()

    def _choose_splits(self, opened: Mapping[str, Any]) -> dict[str, str]:
        """For each of our splits that the data set has, its name there, train first."""
        has = ", ".join(opened)
        if strange := sorted(set(self.split_names) - set(SPLITS)):
            raise UserError(f"data splits: {strange[0]!r} is none of {', '.join(SPLITS)}")
        chosen: dict[str, str] = {}
        for split in SPLITS:
            given = self.split_names.get(split)
            if given is not None and given not in opened:
                raise UserError(f"data splits.{split}: {self.path} has no split {given!r}; it has {has}")
            usual = sorted((name for name in opened if split_of_name(name) == split), key=lambda name: name != split)
            if given or usual:
                chosen[split] = given or usual[0]
        if not chosen and len(opened) == 1:
            chosen["train"] = next(iter(opened))
        if "train" not in chosen:
            raise UserError(f"data splits: {self.path} has no split train; it has {has}: name one as splits.train")
        if len(set(chosen.values())) < len(chosen):
            raise UserError(f"data splits: {chosen} uses one split twice; name each once")
        return chosen

    def _check_columns(self, part: Any, where: str) -> None:
        wanted = [("image", self.columns["image"]), ("label", self.columns["label"])]
        wanted += [(key, self.columns[key]) for key in ("caption", "group") if self.columns.get(key)]
        wanted += [("attributes", name) for name in self.columns.get("attributes", [])]
        for key, name in wanted:
            if name not in part.features:
                raise UserError(
                    f"data columns.{key}: {where} has no column {name!r}; it has {', '.join(part.features)}"
                )

    def _frame(self, part: Any, theirs: str, split: str, missing: Missing) -> pd.DataFrame:
        import pandas as pd

        caption, group, tasks = self.columns.get("caption", ""), self.columns.get("group", ""), self._tasks()
        table = read_columns(part, sorted({*tasks.values(), caption, group} - {""}))
        names = [f"{theirs}/{row}" for row in range(len(part))]
        frame = pd.DataFrame({"name": names, "source": names, "split": split, "row": range(len(part))}, dtype=object)
        for task, column in tasks.items():
            where = f"data columns.{'label' if task == LABEL_TASK else 'attributes'}"
            texts = label_texts(table[column], class_names_of(part.features[column]), where)
            frame[target_column(task)] = missing.known(attribute_column(task), texts)
        if caption:
            frame["caption"] = missing.known("caption", plain_texts(table[caption]))
        if group:
            frame["group"] = missing.known("group", plain_texts(table[group]))
        return frame

    def _divide(self, frame: pd.DataFrame) -> None:
        """Settles the column ``split``."""
        import pandas as pd

        groups = frame["name"]
        if "group" in frame:
            groups = frame["group"].where(frame["group"] != "", frame["name"])
        frame["split"] = resolve_splits(
            self.split_options,
            labels=pd.factorize(frame[target_column(LABEL_TASK)], sort=True)[0],
            groups=pd.factorize(groups, sort=True)[0],
            seed=self.seed,
            own=frame["split"].to_numpy(dtype=str),
            carve=True,
        )


def _in_order(values: pd.Series[Any], feature: Any) -> list[str]:
    """Whole numbers by size; nothing for other values, whose order is alphabetical."""
    return numbers_in_order(values) if str(getattr(feature, "dtype", "")).startswith(("int", "uint")) else []
