"""Tiny data sets in their real directory formats, a data set of noise, and a model that records what it is given.

Images can be learned by a small network: the class decides the shape, the colour attribute its colour; the background
is different for each object, so that images of different objects are not near-duplicates. All is a function of the
arguments.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image, ImageDraw
from scipy.io import savemat

from datamodules.base import ImageDataModule
from datamodules.options import AugmentOptions, ImageOptions, LoaderOptions
from datamodules.table import SampleTable
from vitrail.types import Batch

COLOURS = {
    "red": (215, 30, 30),
    "blue": (30, 60, 215),
    "green": (25, 155, 55),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
    "yellow": (240, 215, 40),
    "gray": (128, 128, 128),
    "grey": (128, 128, 128),
    "orange": (245, 140, 20),
}


def draw_image(
    shape: int, colour: str, *, look: int, view: int = 0, size: tuple[int, int] = (32, 32), frame: str = ""
) -> Image.Image:
    """One of ten shapes in a colour; ``look`` (the object) decides the background, ``view`` moves the shape."""
    width, height = size
    background = np.random.default_rng([look, 1]).integers(150, 221, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(background).resize(size, Image.Resampling.BICUBIC)
    pen, fill = ImageDraw.Draw(image), COLOURS[colour]
    rng = np.random.default_rng([look, view, 2])
    x, y = (int(side * rng.uniform(0.42, 0.58)) for side in (width, height))
    r = int(min(size) * rng.uniform(0.33, 0.4))
    if frame:
        pen.rectangle((0, 0, width - 1, height - 1), outline=COLOURS[frame], width=2)
    box = (x - r, y - r, x + r, y + r)
    thick, third = max(2, r // 2), r // 3
    draw = [
        lambda: pen.ellipse(box, fill),
        lambda: pen.rectangle((x - third, y - r, x + third, y + r), fill),
        lambda: pen.line((x - r, y - r, x + r, y + r), fill, thick),
        lambda: pen.rectangle((x - r, y - third, x + r, y + third), fill),
        lambda: pen.ellipse(box, outline=fill, width=max(2, third)),
        lambda: pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill),
        lambda: pen.rectangle(box, outline=fill, width=max(2, third)),
        lambda: pen.line((x - r, y + r, x + r, y - r), fill, thick),
        lambda: pen.rectangle(box, fill),
        lambda: pen.polygon([(x - r, y - r), (x + r, y - r), (x, y + r)], fill),
    ]
    draw[shape % 10]()
    return image


FASHION_HEADER = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName"
FASHION_KINDS = (
    ("Men", "Apparel", "Topwear", "Tshirts", "Casual"),
    ("Women", "Accessories", "Watches", "Watches", "Casual"),
    ("Men", "Footwear", "Shoes", "Casual Shoes", "Sports"),
    ("Women", "Personal Care", "Fragrance", "Perfume and Body Mist", "Casual"),
)


def write_fashion(root: Path, *, products: int = 10, size: tuple[int, int] = (60, 80), quirks: bool = True) -> Path:
    """Write ``styles.csv`` and ``images/`` with products of four categories, each under two ids with two images.

    The quirks at the end are, in this order: two rows with commas in the name, a quoted name with an inch sign, a row
    with ``NA`` and no name, a row without an image, two ids with one image, a greyscale image of another size, and one
    product of the class Home.
    """
    (root / "images").mkdir(parents=True, exist_ok=True)
    lines = [FASHION_HEADER]
    for code in range(len(FASHION_KINDS)):
        for product in range(products):
            for view in range(2):
                number = 10000 + code * 1000 + product * 2 + view
                colour = ("Red", "Blue", "Green")[product % 3]
                lines.append(_fashion_line(number, code, colour, f"Brand {product} {FASHION_KINDS[code][3]} {colour}"))
                image = draw_image(code, colour.lower(), look=code * 1000 + product, view=view, size=size)
                image.save(root / "images" / f"{number}.jpg", quality=95)
    if quirks:
        lines += _fashion_quirks(root, size)
    (root / "styles.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def _fashion_line(number: int, code: int, colour: str, name: str, category: str = "") -> str:
    gender, master, sub, article, usage = FASHION_KINDS[code]
    return f"{number},{gender},{category or master},{sub},{article},{colour},Summer,2012,{usage},{name}"


def _fashion_quirks(root: Path, size: tuple[int, int]) -> list[str]:
    def save(number: int, look: int, code: int = 0, colour: str = "red") -> None:
        draw_image(code, colour, look=look, size=size).save(root / "images" / f"{number}.jpg", quality=95)

    for number, look in ((90001, 9001), (90002, 9002), (90003, 9003), (90004, 9004), (90006, 9006), (90007, 9006)):
        save(number, look)
    draw_image(1, "black", look=9008, size=(53, 80)).convert("L").save(root / "images" / "90008.jpg", quality=95)
    save(90009, 9009, code=9)
    return [
        _fashion_line(90001, 0, "Blue", "Take my advice, I don't use it"),
        _fashion_line(90002, 0, "Blue", "Live, Life, Laugh"),
        _fashion_line(90003, 0, "Pink", '"Brand 3.5"" Shorts"'),
        _fashion_line(90004, 0, "NA", ""),
        _fashion_line(90005, 0, "Red", "Brand without an image"),
        _fashion_line(90006, 0, "Red", "Brand Twin Shirt"),
        _fashion_line(90007, 0, "Red", "Brand TWIN Shirt"),
        _fashion_line(90008, 1, "Black", "Brand grey watch"),
        _fashion_line(90009, 0, "Red", "Brand pot", "Home"),
    ]


def write_hub_dataset(
    root: Path,
    *,
    rows: int = 12,
    splits: Sequence[str] = ("train", "validation", "test"),
    kind: Literal["disk", "parquet"] = "disk",
    labels: Literal["classes", "texts", "numbers"] = "classes",
    size: int = 32,
) -> Path:
    """Write a data set of the ``datasets`` library: three classes in turn, two rows an object.

    With the one split "" and ``disk`` it has no splits. The order of ``ClassLabel`` names is not alphabetical.
    """
    import datasets

    names = ["watch", "cap", "bag"]
    label: Any = datasets.Value("string" if labels == "texts" else "int64")
    if labels == "classes":
        label = datasets.ClassLabel(names=names)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": label,
            "caption": datasets.Value("string"),
            "object": datasets.Value("string"),
            "colour": datasets.Value("string"),
        }
    )
    parts = {}
    for place, split in enumerate(splits):
        table: dict[str, list[Any]] = {key: [] for key in features}
        for row in range(rows):
            code, thing = row // 2 % 3, place * 1000 + row // 2
            colour = ("red", "blue")[row // 2 % 2]
            table["image"].append(draw_image(code, colour, look=thing, view=row % 2, size=(size, size)))
            table["label"].append(names[code] if labels == "texts" else code)
            table["caption"].append(f"a {colour} {names[code]}")
            table["object"].append(f"object {thing}")
            table["colour"].append(colour)
        parts[split] = datasets.Dataset.from_dict(table, features=features)
    _write_parts(root, parts, kind)
    return root


def write_fashion_hub(root: Path, *, products: int = 10, size: tuple[int, int] = (60, 80)) -> Path:
    """Write what ``write_fashion`` writes (without quirks) with the columns and the one split of the hub's copy."""
    import datasets

    rows: list[dict[str, Any]] = []
    for code, (gender, master, sub, article, usage) in enumerate(FASHION_KINDS):
        for product in range(products):
            colour = ("Red", "Blue", "Green")[product % 3]
            texts = [gender, master, sub, article, colour, "Summer", 2012.0, usage, f"Brand {product} {article}"]
            for view in range(2):
                image = draw_image(code, colour.lower(), look=code * 1000 + product, view=view, size=size)
                row = dict(
                    zip(FASHION_HEADER.split(","), [10000 + code * 1000 + product * 2 + view, *texts], strict=True)
                )
                rows.append({**row, "image": image})
    _write_parts(root, {"train": datasets.Dataset.from_list(rows)}, "parquet")
    return root


def _write_parts(root: Path, parts: dict[str, Any], kind: str) -> None:
    import datasets

    if kind == "parquet":
        (root / "data").mkdir(parents=True, exist_ok=True)
        for split, part in parts.items():
            part.to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"))
    elif list(parts) == [""]:
        parts[""].save_to_disk(str(root))
    else:
        datasets.DatasetDict(parts).save_to_disk(str(root))


PRODUCT_CLASSES = (
    "clothing_cap",
    "clothing_wrist_watch",
    "food_storage_plastic_container",
    "footwear_sneakers",
    "personal_care_deodorant",
    "personal_care_shampoo_bottle",
    "personal_care_soap_bar",
    "tableware_water_bottle",
    "travel_backpack",
    "travel_handbag",
)
TEAM14_CLASSES = (
    "tableware_water_bottle",
    "stationary_pen",
    "stationary_notebook",
    "electronic_accessories_phone_charger",
    "electronic_accessories_earphones",
    "personal_care_toothbrush",
    "personal_care_soap_bar",
    "personal_care_shampoo_bottle",
    "clothing_wrist_watch",
    "footware_slippers",
)
MATERIALS = ("plastic", "metal", "fabric")
FRAMES = {"plastic": "", "metal": "white", "fabric": "black"}
"""How a material is seen in an image."""

CONDITIONS = ("new", "used")
TEAM14_ATTRIBUTES = """---

colour:
- red
- blue
- green
- black
- white
- yellow
- unknown

material:
- metal
- plastic
- fabric
- unknown

size:
- large
- small
- unknown

condition:
- new
- used
- unknown
"""


def write_products(
    root: Path, *, classes: int = 3, instances: int = 4, views: int = 3, size: int = 32, grey: bool = True
) -> Path:
    """Write ``labels.csv`` and ``images/`` as the 600 product photos have them.

    Of the objects of a class the last is test, the one before val, the others train. With ``grey`` the val objects of
    the first class are ``grey`` where others are ``gray``.
    """
    colours = ("red", "blue", "green", "gray")
    rows: list[list[str]] = []
    (root / "images").mkdir(parents=True, exist_ok=True)
    for code, name in enumerate(PRODUCT_CLASSES[:classes]):
        for instance in range(instances):
            split = {instances - 1: "test", instances - 2: "val"}.get(instance, "train")
            # val and test objects look like train objects, so every value of theirs is known from train.
            kind = instance % max(1, instances - 2)
            colour = colours[(code + kind) % len(colours)]
            if grey and split == "val" and code == 0:
                colour = "grey"
            attributes = {
                "color": colour,
                "material": MATERIALS[(code + kind) % len(MATERIALS)],
                "condition": CONDITIONS[(code + kind) % 2],
                "size": ("small", "large")[code % 2],
                "style": ("modern", "casual")[kind % 2],
            }
            for view in range(views):
                path = f"images/team13_{name}_{instance * views + view + 1:03}.jpg"
                frame = FRAMES[attributes["material"]]
                image = draw_image(code, colour, look=code * 1000 + instance, view=view, size=(size, size), frame=frame)
                image.save(root / path, quality=95)
                caption = f"{' ' if view == 1 else ''}{name.replace('_', ' ')} in {colour} in view {view + 1}"
                text = ";".join(f"{key}:{value}" for key, value in attributes.items())
                rows.append([path, name, text, caption, split, f"TEAM13_{name.upper()}_{chr(65 + instance)}"])
    header = ["image_path", "class_label", "attributes", "caption", "split", "instance_id"]
    write_csv(root / "labels.csv", [header, *rows])
    return root


def write_team14(root: Path, *, per_class: int = 5, classes: int = 10, images: bool = True, size: int = 32) -> Path:
    """Write ``labels_fixed.csv``, ``classes.txt``, ``attributes.yaml`` and ``images/`` as the 1,000 rows have them.

    Every fifth row of a class is val, none is test; each row is its own object. Values that mean unknown (``unknown``,
    the text ``nan``), the colour ``orange`` that the vocabulary lacks, blanks and no-break spaces in captions occur.
    """
    colours = ("red", "blue", "green", "orange", "yellow")
    rows: list[list[str]] = []
    (root / "images").mkdir(parents=True, exist_ok=True)
    for code, name in enumerate(TEAM14_CLASSES[:classes]):
        for row in range(per_class):
            colour = colours[row % len(colours)]
            file = f"team14_{name.split('_', 1)[1]} ({row + 1}).jpg"
            if images:
                draw_image(code, colour, look=code * 1000 + row, size=(size, size)).save(
                    root / "images" / file, quality=95
                )
            material = ("metal", "plastic", "unknown", "nan", "fabric")[row % 5]
            attributes = (
                f"color:{colour};material:{material};condition:{CONDITIONS[row % 2]};size:{('small', 'nan')[row % 2]}"
            )
            caption = f"{colour} {material}\u00a0thing \u00a0" if row == 1 else f"{colour} {material} thing "
            split = "val" if row % 5 == 4 else "train"
            fixed = f"/content/drive/MyDrive/project/data/images/{file}"
            rows.append([f"images\\{file}", name, attributes, caption, split, f"Team14_{code}_{row}", fixed])
    header = ["image_path", "class_label", "attributes", "caption", "split", "instance_id", "image_path_fixed"]
    write_csv(root / "labels_fixed.csv", [header, *rows])
    (root / "classes.txt").write_text("\n".join(TEAM14_CLASSES[:classes]), encoding="utf-8")
    (root / "attributes.yaml").write_text(TEAM14_ATTRIBUTES, encoding="utf-8")
    return root


def write_image_folder(
    root: Path,
    *,
    classes: Sequence[str] = ("bottle", "cap", "bag"),
    objects: int = 6,
    views: int = 2,
    splits: Sequence[str] = ("train", "val", "test"),
    size: int = 32,
) -> Path:
    """Write ``root/<split>/<class>/shelf/<object>_<view>.png``, objects to the splits in turn, and files to ignore."""
    for code, name in enumerate(classes):
        for number in range(objects):
            above = root / splits[number % len(splits)] if splits else root
            folder = above / name / "shelf" if number % 2 else above / name
            folder.mkdir(parents=True, exist_ok=True)
            for view in range(views):
                colour = ("red", "blue", "green")[number % 3]
                image = draw_image(code, colour, look=code * 1000 + number, view=view, size=(size, size))
                image.save(folder / f"{name}_o{number}_{view}.png")
            (folder / ".hidden.png").write_bytes(b"no image")
            (folder / "notes.txt").write_text("no image", encoding="utf-8")
    return root


def write_captions(path: Path, images: Path) -> Path:
    """Writes a Parquet table of two captions for each image below a folder, one a row, with paths relative to it."""
    files = sorted(images.rglob("[!.]*.png"))
    names = [file.relative_to(path.parent).as_posix() for file in files]
    texts = [f"a {file.stem.split('_')[0]}, number {number}" for number, file in enumerate(files)]
    rows = {"image_path": names * 2, "caption": [*texts, *(f"photo of {text}" for text in texts)]}
    pd.DataFrame(rows).to_parquet(path)
    return path


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write rows, the header first, as UTF-8 with line feeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


TAGS, GRADES = ("blue", "green", "red"), ("poor", "fair", "good")


def labelled_rows(count: int = 48, *, size: int = 32) -> list[dict[str, Any]]:
    """Return rows with labels of every kind: ``tags`` are the colours of up to three corners, ``price`` their number.

    ``grade`` is how bright the rest is. Every eighth row has no tag, every ninth no price and every tenth no grade;
    three in five rows are train, the others val and test in turn.
    """
    rows = []
    for number in range(count):
        draw = np.random.default_rng(number)
        grade, tags = number % 3, [tag for place, tag in enumerate(TAGS) if number % 8 and number % 8 >> place & 1]
        pixels = draw.integers(0, 40, (size, size, 3)).astype(np.uint8) + np.uint8(60 * grade)
        for place, tag in enumerate(TAGS):
            if tag in tags:
                top, left = place // 2 * size // 2, place % 2 * size // 2
                pixels[top : top + size // 3, left : left + size // 3] = COLOURS[tag]
        rows.append(
            {
                "image": Image.fromarray(pixels),
                "tags": tags,
                "price": None if number % 9 == 8 else len(tags) + 0.25 + number / 1000,
                "grade": None if number % 10 == 9 else GRADES[grade],
                "split": ("train", "train", "train", "val", "test")[number % 5],
            }
        )
    return rows


def write_labelled(root: Path, count: int = 48) -> Path:
    """Write ``labelled_rows`` as a CSV table, tags separated by semicolons."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    lines = [["image", "tags", "price", "grade", "split"]]
    for number, row in enumerate(labelled_rows(count)):
        row["image"].save(root / "images" / f"{number:03}.png")
        texts = ["" if row[key] is None else str(row[key]) for key in ("price", "grade", "split")]
        lines.append([f"images/{number:03}.png", ";".join(row["tags"]) or ";", *texts])
    write_csv(root / "labels.csv", lines)
    return root / "labels.csv"


SHAPES = ("disc", "square", "triangle", "ring", "cross")
LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
GHOST = "2258277193_586949ec62.jpg.1"
"""A photo that does not exist, but has captions in the original token file."""


def photo_name(number: int) -> str:
    return f"{1000 + number}_ab.jpg"


def captions_of(number: int) -> list[str]:
    """Five captions of a photo, one of them with a comma."""
    colour, shape = list(COLOURS)[number % 6], SHAPES[number % 5]
    return [
        f"A {colour} {shape} .",
        f"The {shape} is {colour} , on a wall .",
        f"Children painted a {shape} in {colour} .",
        f"{colour} {shape} number {number}",
        f"a {shape}",
    ]


def split_of(number: int) -> str:
    """Every sixth photo is val, every sixth test."""
    return {4: "val", 5: "test"}.get(number % 6, "train")


def write_flickr(
    root: Path, *, photos: int = 24, size: int = 32, layout: Literal["original", "kaggle", "karpathy"] = "original"
) -> Path:
    """Write photos and captions; the last photo is in no list, ``original`` has captions of one that does not exist."""
    folder = root / {"original": "Flicker8k_Dataset", "kaggle": "Images", "karpathy": "images"}[layout]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(photos):
        image = draw_image(number % 5, list(COLOURS)[number % 6], look=number, size=(size, size))
        image.save(folder / photo_name(number), quality=95)
    if layout == "original":
        text = root / "Flickr8k_text"
        text.mkdir(exist_ok=True)
        named = [(photo_name(n), captions_of(n)) for n in range(photos)] + [(GHOST, captions_of(0))]
        lines = [f"{name}#{k}\t{caption}\n" for name, captions in named for k, caption in enumerate(captions)]
        (text / "Flickr8k.token.txt").write_text("".join(lines), encoding="utf-8")
        for split, file in LISTS.items():
            names = [photo_name(n) for n in range(photos - 1) if split_of(n) == split]
            (text / file).write_text("\n".join(names) + "\n", encoding="utf-8")
    elif layout == "kaggle":
        rows = [[photo_name(n), caption] for n in range(photos) for caption in captions_of(n)]
        write_csv(root / "captions.txt", [["image", "caption"], *rows])
    else:
        images = [
            {
                "filename": photo_name(n),
                "split": "restval" if n == 0 else split_of(n),
                "sentences": [{"raw": caption} for caption in captions_of(n)],
            }
            for n in range(photos)
        ]
        (root / "dataset_tiny.json").write_text(json.dumps({"images": images}), encoding="utf-8")
    return root


NAMES = [f"flower {number}" for number in range(1, 103)]


def write_flowers(
    root: Path,
    *,
    classes: int = 8,
    per_class: int = 6,
    size: int = 32,
    lists: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """Write ``flowers-102`` with images of some classes, half of them from 1 on, half from 52 on.

    Of each class's photos the first third is trnid, the second valid, the rest tstid, unless ``lists`` differ.
    """
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True, exist_ok=True)
    half = classes // 2
    own = [*range(1, half + 1), *range(52, 52 + classes - half)]
    labels = [label for label in own for _ in range(per_class)]
    colours = list(COLOURS)
    for number, label in enumerate(labels, start=1):
        kind = own.index(label)
        image = draw_image(kind % 5, colours[kind % len(colours)], look=number, size=(size, size))
        image.save(folder / "jpg" / f"image_{number:05d}.jpg", quality=95)
    place = [number % per_class for number in range(len(labels))]
    third = per_class // 3
    parts = {
        "trnid": [n + 1 for n, p in enumerate(place) if p < third],
        "valid": [n + 1 for n, p in enumerate(place) if third <= p < 2 * third],
        "tstid": [n + 1 for n, p in enumerate(place) if p >= 2 * third],
    }
    parts |= {key: list(numbers) for key, numbers in (lists or {}).items()}
    savemat(folder / "setid.mat", {key: np.array([numbers], dtype=np.uint16) for key, numbers in parts.items()})
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    named = {str(number): name for number, name in enumerate(NAMES, start=1)}
    (root / "cat_to_name.json").write_text(json.dumps(named), encoding="utf-8")
    return root


CLASSES = ["ball", "cup", "hat"]

Seen = list[tuple[int, int, list[int], int]]
"""Epoch, number of the batch, ids of its samples and a sum over its content, for each training batch."""


def frame(n: int = 30, n_val: int = 9, n_test: int = 8) -> pd.DataFrame:
    """n training samples, then validation and test; classes are skewed."""
    total = n + n_val + n_test
    return pd.DataFrame(
        {
            "name": [f"n{i}" for i in range(total)],
            "source": [f"{i}.png" for i in range(total)],
            "split": ["train"] * n + ["val"] * n_val + ["test"] * n_test,
            "group": [f"g{i}" for i in range(total)],
            "class": [CLASSES[min(i % 5, 2)] for i in range(total)],
            "colour": [None if i % 7 == 0 else ("red", "blue")[i % 2] for i in range(total)],
        }
    )


def noise(index: int, height: int = 20, width: int = 24) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Noise(ImageDataModule):
    """Generated images of noise."""

    generated: ClassVar[bool] = True

    def __init__(self, n: int = 30, tags: list[str] | None = None, **shared: Any) -> None:
        super().__init__(**{"seed": 0, **shared})
        self.n = n
        self.tags = tags

    def load_table(self) -> SampleTable:
        return SampleTable.from_frame(frame(self.n), ["class", "colour"])

    def read_image(self, index: int) -> torch.Tensor:
        return torch.from_numpy(noise(index)).permute(2, 0, 1)


def small(**options: Any) -> Noise:
    loader: LoaderOptions = LoaderOptions(**{"batch_size": 4, **options})
    augment: AugmentOptions = AugmentOptions(preset="reference", mixup=0.4, cutmix=1.0)
    return Noise(image=ImageOptions(size=16), augment=augment, loader=loader, seed=3)


class Recorder(LightningModule):
    """Trains nothing and records what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: Seen = []
        self.evaluated: dict[str, list[int]] = {"val": [], "test": [], "predict": []}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        content = int(batch["image"].long().sum()) + int(batch["mix"]["partner"][0] if "mix" in batch else 0)
        self.seen.append((self.current_epoch, batch_idx, batch["sample_id"].tolist(), content))
        return self.weight * 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluated["val"] += batch["sample_id"].tolist()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluated["test"] += batch["sample_id"].tolist()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[int]:
        return batch["sample_id"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Reporting(Recorder):
    """Writes what each process was given to a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def setup(self, stage: str) -> None:
        torch.set_num_threads(1)  # a forked process must not use its parent's thread pool

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluated["val"] += batch["sample_id"][~batch["is_padding"]].tolist()

    def on_fit_end(self) -> None:
        report = {"seen": self.seen, "val": self.evaluated["val"]}
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(report))


def trainer(folder: Path, epochs: int, *callbacks: ModelCheckpoint, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"devices": 1, "use_distributed_sampler": False}
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks) or None,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **{**defaults, **options},
    )


def run(folder: Path, epochs: int, workers: int = 0) -> Seen:
    model = Recorder()
    trainer(folder, epochs).fit(model, datamodule=small(num_workers=workers))
    return model.seen


def write_deep_folder(root: Path, highest: int = 4095, *, count: int = 6, suffix: str = "png") -> Path:
    """Write ``root/{bag,cup}/N.suffix`` of 16 bits a pixel, of which the largest value is used once."""
    for place, name in enumerate(("bag", "cup")):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = np.random.default_rng(100 * place + number)
            values = rng.integers(0, highest // 2, (24, 24), dtype=np.uint16)
            values[number, place] = highest if (place, number) == (0, 0) else highest // 2
            Image.fromarray(values).save(root / name / f"{number}.{suffix}")
    return root


Ints = npt.NDArray[np.int64]


def random_groups(seed: int, *, mixed: bool) -> tuple[Ints, Ints]:
    """Groups of 1 to 12 samples in skewed classes; mixed groups hold several classes."""
    rng = np.random.default_rng(seed)
    n_groups, n_classes = int(rng.integers(60, 200)), int(rng.integers(3, 9))
    groups = np.repeat(np.arange(n_groups), rng.integers(1, 13, n_groups))
    weights = 1 / np.arange(1, n_classes + 1)
    labels = rng.choice(n_classes, n_groups, p=weights / weights.sum())[groups]
    if mixed:
        labels = np.where(rng.random(len(groups)) < 0.3, rng.integers(0, n_classes, len(groups)), labels)
    order = rng.permutation(len(groups))
    return groups[order], labels[order]


def from_yaml(text: str) -> Any:
    """The DataModule that the ``data:`` part of an experiment (``class_path`` and ``init_args``) describes."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    indented = "\n".join(f"  {line}" for line in text.strip().splitlines())
    return parser.instantiate(parser.parse_string(f"data:\n{indented}")).data


PRODUCTS_YAML = """
name: tiny
data:
  class_path: datamodules.Products
  init_args:
    root: {root}
    attributes: [colour, material]
    image: {{size: 16, crop_fraction: 0.9, interpolation: bilinear}}
    loader: {{batch_size: 8}}
    checks: {{allow_leaks: [exact, near]}}
model:
  class_path: lightning_modules.MultiTaskClassifier
  init_args: {{backbone: test_vit, pretrained: false}}
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
wandb: {{mode: disabled}}
"""
"""An experiment of one epoch on what ``write_products`` writes to ``root``."""
