"""Fashion: "Fashion Product Images (Small)", studio photos of 60 × 80 pixels with one row of metadata each.

Param Aggarwal, kaggle.com/datasets/paramaggarwal/fashion-product-images-small (44,446 rows, MIT licence according to
its page); a copy with the images inside and only a train split is ashraq/fashion-product-images-small on the hub.

``styles.csv`` is read as it is: in 22 rows the product's name, the last column, has commas without quotes; ``NA`` and
nothing mean unknown; five rows have no image (``checks.on_bad_image: skip`` leaves them out and counts them).

One product is all rows with the same name, upper and lower case alike: the twelve groups of identical images under
different ids known upstream agree in their names, so splits by product keep them together. Different things of the same
name ("Lucera Women Silver Earrings") stay together too, which costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities import rank_zero_info

from datamodules.base import ImageDataModule
from datamodules.files.columns import plain_texts
from datamodules.files.label_csv import Problems, as_on_disk, locate, plain_text, read_text
from datamodules.hub_images import ImageColumn, open_splits, read_columns
from datamodules.loading.transforms import targets_colour
from datamodules.options import AugmentOptions, Options
from datamodules.splits import SplitOptions, resolve_splits
from datamodules.table import Missing, SampleTable, attribute_column, table_error, target_column
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import pandas as pd

HUB_COPY = "ashraq/fashion-product-images-small"
_NAME = "productDisplayName"
_LABELS = ("gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "year", "usage")
_CLASS = target_column(LABEL_TASK)
_HEADER = ("id", *_LABELS, _NAME)

FashionLabel = Literal[
    "gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "year", "usage"
]


@dataclass(frozen=True)
class RareOptions(Options):
    """What happens to classes of the target that hardly occur.

    Attributes:
        handling: ``keep`` leaves them in; ``drop`` leaves out their rows, counted in the run record.
        min_count: fewest different products of a class that is not rare, at least 1; 3 is one for each split.
    """

    argument: ClassVar[str] = "rare"

    handling: Literal["keep", "drop"] = "keep"
    min_count: PositiveInt = 3


class Fashion(ImageDataModule):
    """Fashion products, to be classified by one column of their metadata and, where wanted, by further ones.

    Args:
        root: folder with ``styles.csv`` and ``images/``; by default ``$VITRAIL_DATA/fashion`` or ``data/fashion``. With
            ``source: hub`` a local copy of the hub's data set (``save_to_disk`` folder, Parquet); by default the hub.
        target: column that is the main task ``class``.
        attributes: further columns, each a task of its own.
        source: ``csv`` or ``hub``.
        rare: what happens to classes of the target that hardly occur.
        split: how samples are divided; by default ``group``: stratified by the target, products kept together.
        augment: augmentation of the training images; a preset's hue jitter is off where the target is a color.
        shared: options of every data set, see ``ImageDataModule``.
    """

    missing_texts = ("NA",)

    def __init__(
        self,
        root: str = "",
        target: FashionLabel = "masterCategory",
        attributes: list[FashionLabel] | None = None,
        source: Literal["csv", "hub"] = "csv",
        rare: RareOptions = RareOptions(),
        split: SplitOptions = SplitOptions(),
        augment: AugmentOptions = AugmentOptions(),
        **shared: Any,
    ) -> None:
        augment = AugmentOptions.of(augment)
        if targets_colour([target]) and augment.hue is None:
            # The task is called class, which does not show that it is a color: no hue jitter of a preset.
            augment = replace(augment, hue=0.0)
        super().__init__(augment=augment, **shared)
        for key, names in (("target", [target]), ("attributes", attributes or [])):
            if unknown := [name for name in names if name not in _LABELS]:
                raise UserError(f"data {key}: must be one of {', '.join(_LABELS)}; got {unknown[0]!r}")
        if source not in ("csv", "hub"):
            raise UserError(f"data source: must be one of csv, hub; got {source!r}")
        self.root, self.target, self.source = root, target, source
        self.attributes = list(dict.fromkeys(attributes or []))
        self.rare = RareOptions.of(rare)
        self.split_options = SplitOptions.of(split)
        self.repaired_rows = 0
        self.dropped: dict[str, int] = {}
        self._images: ImageColumn | None = None

    def load_table(self) -> SampleTable:
        """Read ``styles.csv``, or the hub's copy."""
        missing = Missing(self.check_options.missing or ())
        origin, root, frame = self._open_hub(missing) if self.source == "hub" else self._open_csv(missing)
        if self.rare.handling == "drop":
            frame = self._without_rare(frame)
        if not len(frame):
            raise UserError(f"{origin}: no rows are left; give a table with rows or lower data rare.min_count")
        frame["split"] = resolve_splits(
            self.split_options, labels=frame[_CLASS], groups=frame["group"], seed=self.seed, default="group"
        )
        columns = {task: target_column(task) for task in (LABEL_TASK, *self.attributes)}
        return SampleTable.from_frame(frame, columns, None, origin, root, missing=missing.counts)

    def read_image(self, index: int) -> torch.Tensor:
        """See ``ImageDataModule``; from its file or out of the hub's data set."""
        if self.source == "csv":
            return super().read_image(index)
        place, name = int(self.table.source(index)), self.table.name(index)
        assert self._images is not None, "the table opens the images"
        return self._images.read(place, f"{self.table.origin}: {name}", self.value_range, self.max_pixels)

    @property
    def image_files(self) -> bool:
        """Whether each image is a file of its own."""
        return self.source == "csv"

    def data_record(self) -> dict[str, Any]:
        """Return the record, with the number of repaired rows and the rows of each class that was dropped."""
        return {**super().data_record(), "repaired_rows": self.repaired_rows, "dropped": self.dropped}

    def _open_csv(self, missing: Missing) -> tuple[str, str, pd.DataFrame]:
        source = f"kaggle.com/datasets/paramaggarwal/fashion-product-images-small (or set source: hub for {HUB_COPY})"
        root = locate(self.root, "fashion", source, "styles.csv next to images/<id>.jpg")
        path = root / "styles.csv"
        columns, rows, self.repaired_rows = read_styles(path)
        if self.repaired_rows:
            rank_zero_info(f"{path}: {self.repaired_rows} rows with commas in the product's name were repaired")
        sources = as_on_disk(root, [f"images/{name}.jpg" for name in columns["id"]])
        return str(path), str(root), self._frame(columns, sources, rows, missing)

    def _open_hub(self, missing: Missing) -> tuple[str, str, pd.DataFrame]:
        path = self.root or HUB_COPY
        parts = open_splits(path)
        part = parts.get("train", next(iter(parts.values())))
        if lacking := [name for name in (*_HEADER, "image") if name not in part.features]:
            raise UserError(f"{path}: missing column {', '.join(lacking)}; it has {', '.join(part.features)}")
        self._images = ImageColumn([part], "image")
        table = read_columns(part, _HEADER)
        columns = {name: plain_texts(table[name]) for name in _HEADER}
        return path, "", self._frame(columns, [str(row) for row in range(len(part))], range(len(part)), missing)

    def _frame(
        self, columns: dict[str, list[str]], sources: list[str], rows: Sequence[int], missing: Missing
    ) -> pd.DataFrame:
        import pandas as pd

        frame = pd.DataFrame({"name": columns["id"], "source": sources, "row": rows}, dtype=object)
        for task, column in [(LABEL_TASK, self.target), *((name, name) for name in self.attributes)]:
            frame[target_column(task)] = missing.known(attribute_column(task), columns[column])
        frame["caption"] = missing.known("caption", [plain_text(text) for text in columns[_NAME]])
        frame["group"] = frame["caption"].str.casefold().where(frame["caption"] != "", frame["name"])
        return frame

    def _without_rare(self, frame: pd.DataFrame) -> pd.DataFrame:
        products = frame.loc[frame[_CLASS] != ""].groupby(_CLASS)["group"].nunique()
        is_rare = frame[_CLASS].isin(products.index[products < self.rare.min_count])
        self.dropped = {str(name): int(n) for name, n in frame.loc[is_rare, _CLASS].value_counts().items()}
        return frame.loc[~is_rare].reset_index(drop=True)


def read_styles(path: Path) -> tuple[dict[str, list[str]], list[int], int]:
    """Read ``styles.csv``; a name with commas is taken whole, since it is the last column.

    Returns:
        For each column a text a row, the rows' line numbers, and how many rows were repaired.

    Raises:
        UserError: for a missing file or another header, or with all problems of the rows.
    """
    problems: Problems = []
    lines = [line.rstrip("\r") for line in read_text(path, problems).split("\n")]
    header = tuple(lines[0].split(","))
    if header != _HEADER:
        raise UserError(f"{path}:1: the header is {','.join(header)!r}, must be {','.join(_HEADER)!r}")
    values: list[list[str]] = [[] for _ in _HEADER]
    rows: list[int] = []
    first: dict[str, int] = {}
    repaired = 0
    for row, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        fields = line.split(",", maxsplit=len(_HEADER) - 1)
        if len(fields) < len(_HEADER):
            problems.append((row, f"{len(fields)} fields where the header has {len(_HEADER)}"))
            continue
        if re.fullmatch(r'".*"', fields[-1]):
            fields[-1] = fields[-1][1:-1].replace('""', '"')
        elif "," in fields[-1]:
            repaired += 1
        if not re.fullmatch(r"\w[\w-]*", fields[0]):
            problems.append((row, f"id {fields[0]!r} is not a name of an image"))
        elif fields[0] in first:
            problems.append((row, f"id {fields[0]} again, first in row {first[fields[0]]}"))
        first.setdefault(fields[0], row)
        rows.append(row)
        for column, field in zip(values, fields, strict=True):
            column.append(field)
    if problems:
        raise table_error(str(path), problems, "correct or remove these rows")
    return dict(zip(_HEADER, values, strict=True)), rows, repaired
