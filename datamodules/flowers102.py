"""Flowers102: Oxford Flowers, 8,189 photos of 102 flowers that are common in the United Kingdom.

M.-E. Nilsback and A. Zisserman, "Automated flower classification over a large number of classes", ICVGIP 2008
(robots.ox.ac.uk/~vgg/data/flowers/102); no explicit licence, generally used for research only.

The layout is torchvision's: ``flowers-102/jpg/image_00001.jpg`` …, ``setid.mat``, ``imagelabels.mat``; next to or in
that folder ``cat_to_name.json``, an object from "1" … "102" to names. Splits differ between papers, and so do metrics
(accuracy, or mean per class): name both wherever a number is given. Upstream has five pairs of identical photos, and a
few nearly identical ones: where a protocol puts them into different splits, allow it with ``checks.allow_leaks``.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.base import ImageDataModule
from datamodules.captions import PromptOptions
from datamodules.files.label_csv import data_home, locate
from datamodules.hub_images import answers_in_time
from datamodules.options import Options
from datamodules.splits import stratified_split
from datamodules.table import SampleTable, table_error
from vitrail.errors import UserError
from vitrail.files import write_text_atomically
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    from numpy.typing import NDArray


NUM_CLASSES = 102
_SOURCE = "robots.ox.ac.uk/~vgg/data/flowers/102"
_LAYOUT = "flowers-102/{jpg/image_00001.jpg …, setid.mat, imagelabels.mat} and cat_to_name.json"
_ZHOU_FILE = "split_zhou_OxfordFlowers.json"
_SERVER = "https://www.robots.ox.ac.uk"
_PARTS = ("jpg", "setid.mat", "imagelabels.mat")
_NAMES = "cat_to_name.json"


@dataclass(frozen=True)
class FlowersSplit(Options):
    """How photos are divided.

    Attributes:
        protocol: ``official`` (train trnid, val valid, test tstid), ``swapped`` (train valid and tstid, test trnid),
            ``zhou`` (the file of CoOp, Zhou et al., IJCV 2022) or ``few_shot`` (k photos a class of the official
            train).
        shots: photos a class of ``few_shot``, at least 1, of which the official train list has ten each upstream; all
            of a class that has fewer, which a warning reports.
        val_fraction: share of train that is cut out as val, stratified, where the protocol has none; above 0, below 1.
        seed: of the sampling; null for the seed of the DataModule.
    """

    argument: ClassVar[str] = "split"

    protocol: Literal["official", "swapped", "zhou", "few_shot"] = "official"
    shots: PositiveInt = 16
    val_fraction: OpenUnitInterval = 0.1
    seed: int | None = None


class Flowers102(ImageDataModule):
    """Flowers-102, whose captions are the prompts of its classes.

    Args:
        root: folder that holds ``flowers-102``, or that folder itself; by default ``$VITRAIL_DATA/flowers102`` or
            ``data/flowers102``.
        split: how photos are divided.
        classes: ``all``, or ``base``: train and val have the first half of the classes only, test has all, so that it
            shows accuracy on the trained classes (base) and on the others (novel).
        download: fetch what is missing, where there is a network; where ``cat_to_name.json`` is missing, it is written
            with the names that torchvision knows.
        prompts: texts that stand for the classes, or the name of templates; by default ``openai_flowers``,
            "a photo of a {}, a type of flower.".
        shared: options of every data set, see ``ImageDataModule``.
    """

    def __init__(
        self,
        root: str = "",
        split: FlowersSplit = FlowersSplit(),
        classes: Literal["all", "base"] = "all",
        download: bool = False,
        prompts: PromptOptions | str | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(prompts=prompts or PromptOptions("openai_flowers"), **shared)
        self.root = root
        self.classes = classes
        self.download = download
        self.split_options = FlowersSplit.of(split)
        if classes not in {"all", "base"}:
            raise UserError(f"data classes: must be one of all, base; got {classes!r}")

    @property
    def base_classes(self) -> int:
        """Number of classes in train, the first in label order; 0 for all."""
        return NUM_CLASSES // 2 if self.classes == "base" else 0

    def load_table(self) -> SampleTable:
        """Read labels, class names and split lists."""
        import pandas as pd

        if self.download:
            fetch(self.root)
        folder = _folder(locate(self.root, "flowers102", _SOURCE, _LAYOUT))
        labels = _read_mat(folder / "imagelabels.mat", "labels")
        names = _class_names(folder)
        numbers, splits = self._divide(folder, labels)
        own = labels[numbers - 1] - 1
        strange = numbers[(own < 0) | (own >= NUM_CLASSES)].tolist()
        if wrong := [
            (number, f"photo {number} has the label {labels[number - 1]}, not 1 to 102") for number in strange
        ]:
            raise table_error(str(folder / "imagelabels.mat"), wrong, "get the file again")
        if self.base_classes:
            kept = (splits == "test") | (own < self.base_classes)
            numbers, splits, own = numbers[kept], splits[kept], own[kept]
        files = [f"image_{number:05d}.jpg" for number in numbers]
        frame = pd.DataFrame(
            {
                "name": files,
                "source": [f"jpg/{file}" for file in files],
                "split": splits,
                "row": numbers,
                LABEL_TASK: [names[label] for label in own],
            }
        )
        return SampleTable.from_frame(frame, [LABEL_TASK], {LABEL_TASK: names}, str(folder), str(folder))

    def _divide(self, folder: Path, labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.str_]]:
        """Numbers of the photos, from 1, in ascending order, and their splits."""
        protocol = self.split_options.protocol
        seed = self.seed if self.split_options.seed is None else self.split_options.seed
        path = _in_or_next_to(folder, _ZHOU_FILE) if protocol == "zhou" else folder / "setid.mat"
        if path is None:
            raise UserError(
                f"data split.protocol: zhou needs {_ZHOU_FILE} in {folder} or {folder.parent}; DATASETS.md of "
                "github.com/KaiyangZhou/CoOp describes where to get it"
            )
        if protocol == "zhou":
            lists = _zhou_lists(path)
        else:
            keys = {"train": "trnid", "val": "valid", "test": "tstid"}
            lists = {split: _read_mat(path, key) for split, key in keys.items()}
        _refuse_repetitions(path, lists, len(labels))
        if protocol == "swapped":
            lists = {"train": np.concatenate([lists["val"], lists["test"]]), "test": lists["train"]}
        if protocol == "few_shot":
            lists["train"] = _few(lists["train"], labels, self.split_options.shots, seed)
        numbers = np.concatenate(list(lists.values()))
        splits = np.repeat(np.array(list(lists)), [len(part) for part in lists.values()]).astype("U5")
        order = np.argsort(numbers, kind="stable")
        numbers, splits = numbers[order], splits[order]
        if "val" not in lists:
            train = np.flatnonzero(splits == "train")
            share = self.split_options.val_fraction
            splits[train] = stratified_split(labels[numbers[train] - 1], (1 - share, share, 0.0), seed)
        return numbers, splits


def _folder(root: Path) -> Path:
    folder = root / "flowers-102" if (root / "flowers-102").is_dir() else root
    if missing := [name for name in _PARTS if not (folder / name).exists()]:
        raise UserError(
            f"data root: {folder} has no {', '.join(missing)}; get the data from {_SOURCE} or with data download: "
            f"true, and lay them out as {_LAYOUT}"
        )
    return folder


def _read_mat(path: Path, key: str) -> NDArray[np.int64]:
    """One list of a MATLAB file, int64 ``(n,)``."""
    from scipy.io import loadmat

    try:
        values = loadmat(path)[key]
        numbers: NDArray[np.int64] = np.asarray(values).astype(np.int64).reshape(-1)
    except KeyError:
        raise UserError(f"{path}: has no list {key!r}; get the file again from {_SOURCE}") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as a MATLAB file ({reason}); get it again from {_SOURCE}") from error
    return numbers


def _class_names(folder: Path) -> list[str]:
    """Names of the classes in the order of the labels 1 to 102."""
    path = _in_or_next_to(folder, _NAMES)
    if path is None:
        raise UserError(
            f'data root: neither {folder.parent} nor {folder} has cat_to_name.json, an object from "1" to "102" to the '
            "names of the flowers; it is in github.com/udacity/aipnd-project, and data download: true writes one"
        )
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        names = [str(found[str(number)]) for number in range(1, NUM_CLASSES + 1)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path}: must be an object from "1" to "102" to names ({error} is wrong); correct it'
        ) from error
    if len(set(names)) < NUM_CLASSES:
        raise UserError(f"{path}: has a name twice; correct it")
    return names


def _in_or_next_to(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder.parent / name, folder / name) if path.is_file()), None)


def _zhou_lists(path: Path) -> dict[str, NDArray[np.int64]]:
    """CoOp's own division: JSON with rows of file name, label and class name for train, val and test."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {
            split: np.array([int(Path(row[0]).stem.rpartition("_")[2]) for row in rows[split]], dtype=np.int64)
            for split in ("train", "val", "test")
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: is not CoOp's split file ({error} is wrong); get it again") from error


def _refuse_repetitions(path: Path, lists: dict[str, NDArray[np.int64]], count: int) -> None:
    """Refuse numbers that do not exist, and photos that are in two lists or twice in one."""
    problems: list[tuple[int, str]] = []
    seen: dict[int, str] = {}
    for split, numbers in lists.items():
        for position, number in enumerate(numbers.tolist(), start=1):
            where = f"place {position} of the list for {split}"
            if not 1 <= number <= count:
                problems.append((position, f"{where}: there is no photo {number}, labels end at {count}"))
            elif number in seen:
                problems.append((position, f"{where}: photo {number} again, first at {seen[number]}"))
            else:
                seen[number] = where
    if problems:
        raise table_error(str(path), problems, "get the lists again")


def _few(numbers: NDArray[np.int64], labels: NDArray[np.int64], shots: int, seed: int) -> NDArray[np.int64]:
    """``shots`` randomly sampled photos of each class; all where a class has fewer."""
    import pandas as pd

    order = np.random.default_rng(seed).permutation(numbers)
    own = labels[order - 1]
    if few := int((np.unique(own, return_counts=True)[1] < shots).sum()):
        rank_zero_warn(f"Flowers102: {few} classes have fewer than {shots} photos in the train list; all are taken")
    return order[pd.Series(own).groupby(own).cumcount() < shots]


def fetch(root: str) -> None:
    """Download what is missing (about 345 MB in all) by torchvision, and write its class names.

    Two of the 102 names differ from those of the usual file.

    Raises:
        UserError: where there is no network, the server does not give the files, or they cannot be written.
    """
    given = Path(root).expanduser() if root else data_home() / "flowers102"
    is_inner = given.name == "flowers-102" or (given / "jpg").is_dir()
    folder = given if is_inner else given / "flowers-102"
    try:
        if not all((folder / part).exists() for part in _PARTS):
            _fetch_parts(folder)
        if _in_or_next_to(folder, _NAMES) is None:
            from torchvision.datasets import Flowers102

            names = {str(label): name for label, name in enumerate(Flowers102.classes, start=1)}
            write_text_atomically(folder / _NAMES, json.dumps(names, indent=1))
    except OSError as error:
        raise UserError(f"data download: {folder} cannot be written ({error}); give another data root") from error


def _fetch_parts(folder: Path) -> None:
    if not answers_in_time(_SERVER):
        raise UserError(
            f"data download: no answer from {_SERVER}; connect to the network, or get the data elsewhere and give "
            "their folder as data root"
        )
    from torchvision.datasets import Flowers102

    rank_zero_info(f"Fetching Flowers-102 to {folder} …")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as temporary:
        try:
            Flowers102(temporary, split="train", download=True)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"data download: Flowers-102 could not be fetched ({reason}); try again") from error
        for part in _PARTS:
            if not (folder / part).exists():
                (Path(temporary) / "flowers-102" / part).replace(folder / part)
