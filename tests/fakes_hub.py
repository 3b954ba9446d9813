"""Tiny data sets in the formats of the ``datasets`` library and of "Fashion Product Images (Small)"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tests.fake_images import draw_image

FASHION_HEADER = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName"
FASHION_KINDS = (
    ("Men", "Apparel", "Topwear", "Tshirts", "Casual"),
    ("Women", "Accessories", "Watches", "Watches", "Casual"),
    ("Men", "Footwear", "Shoes", "Casual Shoes", "Sports"),
    ("Women", "Personal Care", "Fragrance", "Perfume and Body Mist", "Casual"),
)


def write_fashion(root: Path, *, products: int = 10, size: tuple[int, int] = (60, 80), quirks: bool = True) -> Path:
    """Writes ``styles.csv`` and ``images/`` as "Fashion Product Images (Small)" has them.

    Each product of a category comes under two ids with two images.

    Args:
        root: folder of the data set, made where missing.
        products: products of each of four categories.
        size: width and height of the images in pixels.
        quirks: whether to add, at the end and in this order: two rows with commas in the name, a quoted name with an
            inch sign, a row with ``NA`` and no name, a row without an image, two ids with one image, a greyscale
            image of another size, and one product of the class Home.

    Returns:
        The folder.
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
    """Writes a data set of the ``datasets`` library with columns image, label, caption, object and colour.

    Args:
        root: folder of the data set; ``disk`` writes it with ``save_to_disk``, ``parquet`` a file for each split.
        rows: rows of each split; three classes in turn, two rows an object.
        splits: names of the splits; with the one split "" and ``disk`` a data set without splits.
        kind: format.
        labels: whether labels are the library's ``ClassLabel`` (its order is not alphabetical), texts or numbers.
        size: side of the images in pixels.

    Returns:
        The folder.
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
    """Writes what ``write_fashion`` writes (without quirks) with the columns and the one split of the hub's copy."""
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
