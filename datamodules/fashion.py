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

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from lightning.pytorch.utilities import rank_zero_info

from datamodules.base import ImageDataModule
from datamodules.captions import PromptOptions
from datamodules.files.label_csv import Problems, as_on_disk, count_files_left_out, locate, plain_text, read_text
from datamodules.hub_images import ImageColumn, open_splits, read_columns
from datamodules.loading.transforms import learns_colour
from datamodules.options import AugmentOptions, CheckOptions, ImageOptions, LoaderOptions
from datamodules.splits import SplitOptions, resolve_splits
from datamodules.table import Missing, SampleTable, attribute_column, composed, table_error, target_column
from vitrail.errors import UserError
from vitrail.types import DEFAULT_SEED, LABEL_TASK

if TYPE_CHECKING:
    import pandas as pd

HUB_COPY = "ashraq/fashion-product-images-small"
_NAME = "productDisplayName"
_LABELS = ("gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "year", "usage")
_CLASS = target_column(LABEL_TASK)
_HEADER = ("id", *_LABELS, _NAME)
_LAYOUT = "styles.csv beside images/<id>.jpg"

FashionLabel = Literal[
    "gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "year", "usage"
]


class RareOptions(TypedDict, total=False):
    """What happens to classes of the target that hardly occur.

    Attributes:
        handling: ``keep`` leaves them in; ``drop`` leaves out their rows, counted in the run record; default keep.
        min_count: fewest different products of a class that is not rare; default 3, one for each split.
    """

    handling: Literal["keep", "drop"]
    min_count: int


class Fashion(ImageDataModule):
    """Fashion products, to be classified by one column of their metadata and, where wanted, by further ones.

    Args:
        root: folder with ``styles.csv`` and ``images/``; by default ``$VITRAIL_DATA/fashion`` or ``data/fashion``. With
            ``source: hub`` a local copy of the hub's data set (``save_to_disk`` folder, Parquet); by default the hub.
        target: column that the main task ``class`` learns.
        attributes: further columns to learn, each a task of its own.
        source: ``csv`` or ``hub``.
        rare: what happens to classes of the target that hardly occur.
        split: how samples are divided; by default ``group``: stratified by the target, products kept together.
        image: size, crop and interpolation of the images.
        augment: augmentation of the training images; none by default.
        loader: batch size, workers and sampling.
        checks: what to do about unreadable and missing images and leaks between the splits.
        seed: of order, sampling, augmentation and, where ``split`` names no other, of the division.
        prompts: texts that stand for the classes; given, they are the captions too.
    """

    missing_texts = ("NA",)

    def __init__(
        self,
        root: str = "",
        target: FashionLabel = "masterCategory",
        attributes: list[FashionLabel] | None = None,
        source: Literal["csv", "hub"] = "csv",
        rare: RareOptions | None = None,
        split: SplitOptions | None = None,
        image: ImageOptions | None = None,
        augment: AugmentOptions | None = None,
        loader: LoaderOptions | None = None,
        checks: CheckOptions | None = None,
        seed: int = DEFAULT_SEED,
        prompts: PromptOptions | None = None,
    ) -> None:
        super().__init__(image, _hue_safe(augment, target), loader, checks, seed, prompts)
        self.root = root
        self.target = target
        self.attributes = list(dict.fromkeys(attributes or []))
        self.source = source
        self.rare: RareOptions = {"handling": "keep", "min_count": 3, **(rare or {})}
        self.split_options = split or {}
        self.repaired_rows = 0
        self.dropped: dict[str, int] = {}
        self._missing = Missing()
        self._images: ImageColumn | None = None
        self._check_choices()

    def load_table(self) -> SampleTable:
        """Reads the table.

        Raises:
            UserError: for missing files or columns, or with all problems of the rows.
        """
        origin, root, frame = self._open_hub() if self.source == "hub" else self._open_csv()
        frame = self._without_rare(frame)
        if not len(frame):
            raise UserError(f"{origin}: no rows are left; give a table with rows or lower data rare.min_count")
        self._divide(frame)
        columns = {task: target_column(task) for task in (LABEL_TASK, *self.attributes)}
        return SampleTable.from_frame(frame, columns, None, origin, root, missing=self._missing.counts)

    def read_image(self, index: int) -> torch.Tensor:
        """Reads one image, from its file or out of the hub's data set.

        Args:
            index: row of the table.

        Returns:
            uint8 ``(3, H, W)``, RGB, in the image's own size.

        Raises:
            ImageError: where the image cannot be read.
        """
        if self.source == "csv":
            return super().read_image(index)
        place, name = int(self.table.source(index)), self.table.name(index)
        assert self._images is not None, "the table opens the images"
        return self._images.read(place, f"{self.table.origin}: {name}", self.value_range)

    def count_left_out(self) -> dict[str, int]:
        """See ``ImageDataModule``; the hub's images are no files."""
        return count_files_left_out(self.table.sources.to_pylist(), self.table.origin) if self.source == "csv" else {}

    def data_record(self) -> dict[str, Any]:
        """As of every data set, with the number of repaired rows, and the rows of each class that was dropped."""
        return {**super().data_record(), "repaired_rows": self.repaired_rows, "dropped": self.dropped}

    def _check_choices(self) -> None:
        known = ", ".join(_LABELS)
        if self.target not in _LABELS:
            raise UserError(f"data target: there is no column {self.target!r}; use one of {known}")
        if strange := [name for name in self.attributes if name not in _LABELS]:
            raise UserError(f"data attributes: there is no column {strange[0]!r}; use some of {known}")
        if self.source not in ("csv", "hub"):
            raise UserError(f"data source: is {self.source!r}, must be csv or hub")
        if wrong := sorted(set(self.rare) - set(RareOptions.__annotations__)):
            raise UserError(f"data rare: unknown key {wrong[0]!r}; known keys are handling, min_count")
        if self.rare["handling"] not in ("keep", "drop"):
            raise UserError(f"data rare.handling: is {self.rare['handling']!r}, must be keep or drop")

    def _open_csv(self) -> tuple[str, str, pd.DataFrame]:
        source = f"kaggle.com/datasets/paramaggarwal/fashion-product-images-small (or set source: hub for {HUB_COPY})"
        root = locate(self.root, "fashion", source, _LAYOUT)
        path = root / "styles.csv"
        columns, rows, self.repaired_rows = read_styles(path)
        if self.repaired_rows:
            rank_zero_info(f"{path}: {self.repaired_rows} rows with commas in the product's name were repaired")
        sources = as_on_disk(root, [f"images/{name}.jpg" for name in columns["id"]])
        return str(path), str(root), self._frame(columns, sources, rows)

    def _open_hub(self) -> tuple[str, str, pd.DataFrame]:
        path = self.root or HUB_COPY
        parts = open_splits(path)
        part = parts.get("train", next(iter(parts.values())))
        if missing := [name for name in (*_HEADER, "image") if name not in part.features]:
            raise UserError(f"{path}: missing column {', '.join(missing)}; it has {', '.join(part.features)}")
        self._images = ImageColumn([part], "image")
        table = read_columns(part, _HEADER)
        columns = {name: _hub_texts(table[name].to_pylist()) for name in _HEADER}
        return path, "", self._frame(columns, [str(row) for row in range(len(part))], list(range(len(part))))

    def _frame(self, columns: dict[str, list[str]], sources: list[str], rows: list[int]) -> pd.DataFrame:
        import pandas as pd

        missing = self._missing = Missing(self.check_options["missing"])
        frame = pd.DataFrame({"name": columns["id"], "source": sources, "row": rows}, dtype=object)
        for task, column in [(LABEL_TASK, self.target), *((name, name) for name in self.attributes)]:
            frame[target_column(task)] = missing.known(attribute_column(task), columns[column])
        frame["caption"] = missing.known("caption", [plain_text(text) for text in columns[_NAME]])
        frame["group"] = frame["caption"].str.casefold().where(frame["caption"] != "", frame["name"])
        return frame

    def _without_rare(self, frame: pd.DataFrame) -> pd.DataFrame:
        if self.rare["handling"] == "keep":
            return frame
        products = frame.loc[frame[_CLASS] != ""].groupby(_CLASS)["group"].nunique()
        is_rare = frame[_CLASS].isin(products.index[products < self.rare["min_count"]])
        self.dropped = {str(name): int(n) for name, n in frame.loc[is_rare, _CLASS].value_counts().items()}
        return frame.loc[~is_rare].reset_index(drop=True)

    def _divide(self, frame: pd.DataFrame) -> None:
        """Adds the column ``split``."""
        import pandas as pd

        frame["split"] = resolve_splits(
            self.split_options,
            labels=pd.factorize(frame[_CLASS], sort=True)[0],
            groups=pd.factorize(frame["group"], sort=True)[0],
            seed=self.seed,
            default="group",
        )


def read_styles(path: Path) -> tuple[dict[str, list[str]], list[int], int]:
    """Reads ``styles.csv``; a name with commas is taken whole, since it is the last column.

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
            problems.append((row, f"id {fields[0]!r} is no name of an image"))
        elif fields[0] in first:
            problems.append((row, f"id {fields[0]} again, first in row {first[fields[0]]}"))
        first.setdefault(fields[0], row)
        rows.append(row)
        for column, field in zip(values, fields, strict=True):
            column.append(field)
    if problems:
        raise table_error(str(path), problems, "correct or remove these rows")
    return dict(zip(_HEADER, values, strict=True)), rows, repaired


def _hue_safe(augment: AugmentOptions | None, target: str) -> AugmentOptions | None:
    """No hue jitter of a preset where a colour is the target: the task is called class, which does not tell so."""
    return {"hue": 0.0, **(augment or {})} if learns_colour([target]) else augment


def _hub_texts(values: list[Any]) -> list[str]:
    """Texts of a hub column; years are floating point there."""
    known = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
    return [
        "" if value is None else composed(str(int(value) if isinstance(value, float) else value)) for value in known
    ]
