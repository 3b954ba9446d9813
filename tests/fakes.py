"""Tiny data sets in the real directory formats, with images that a small network can learn.

Everything is a function of the arguments.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from tests.fake_images import COLOURS, draw_image
from tests.fakes_hub import write_fashion, write_fashion_hub, write_hub_dataset

__all__ = [
    "COLOURS",
    "PRODUCT_CLASSES",
    "TEAM14_ATTRIBUTES",
    "TEAM14_CLASSES",
    "draw_image",
    "write_csv",
    "write_fashion",
    "write_fashion_hub",
    "write_hub_dataset",
    "write_image_folder",
    "write_products",
    "write_team14",
]

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
    """Writes ``labels.csv`` and ``images/`` as the 600 product photos have them.

    Args:
        root: folder of the data set, made where missing.
        classes: number of classes, up to 10.
        instances: objects of each class, at least 3: the last is test, the one before val, the others train.
        views: photos of each object.
        size: side of the photos in pixels.
        grey: whether the val objects of the first class are ``grey`` where others are ``gray``.

    Returns:
        The folder.
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
    """Writes ``labels_fixed.csv``, ``classes.txt``, ``attributes.yaml`` and ``images/`` as the 1,000 rows have them.

    Every fifth row of a class is val, none is test; each row is its own object. Values that mean unknown (``unknown``,
    the text ``nan``), the colour ``orange`` that the vocabulary lacks, blanks and no-break spaces in captions occur.

    Args:
        root: folder of the data set, made where missing.
        per_class: rows of each class, at least 5.
        classes: number of classes, up to 10.
        images: whether to write the images, which upstream do not exist.
        size: side of the photos in pixels.

    Returns:
        The folder.
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
    """Writes ``root/<split>/<class>/shelf/<object>_<view>.png`` and files that are to be left alone.

    Args:
        root: folder of the data set, made where missing.
        classes: names of the class folders.
        objects: objects of each class, called ``o0``, ``o1`` and so on, dealt out to the splits in turn.
        views: images of each object.
        splits: names of the split folders; none for classes at the top.
        size: side of the images in pixels.

    Returns:
        The folder.
    """
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


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Writes rows, the header first, as UTF-8 with line feeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
