from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evaluation.__main__ import main
from retrieval.gallery import Gallery
from tests.support.data import PRODUCT_CLASSES, write_flickr, write_image_folder, write_products
from tests.support.galleries import identity, image_rows

SECTIONS = (
    "Splits",
    "Classes",
    "Image sizes",
    "Colours of classes",
    "Map of classes by colour",
    "Caption lengths",
    "Labels that go together",
    "Leaks between splits",
    "Suspected labels",
)
QUICK = ("--side", "16", "--pixels", "50")


def explore(to: Path, *arguments: object) -> int:
    return main(["explore", "--to", str(to), *QUICK, *map(str, arguments)])


def page(to: Path, *arguments: object) -> str:
    assert explore(to, *arguments) == 0
    return (to / "explore.html").read_text(encoding="utf-8")


def data(name: str, root: Path, *arguments: object) -> list[object]:
    return ["--data", f"datamodules.{name}", "--data.init_args.root", root, *arguments]


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_products(tmp_path_factory.mktemp("products"), classes=4, grey=False)


@pytest.fixture(scope="module")
def config(products: Path) -> Path:
    path = products / "experiment.yaml"
    init_args = f"{{root: {products}, attributes: [colour, material]}}"
    path.write_text(f"data:\n  class_path: datamodules.Products\n  init_args: {init_args}\n", encoding="utf-8")
    return path


@pytest.mark.usefixtures("drawn")
def test_page_figures_and_tables_of_an_experiment(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page(tmp_path / "out", "--config", config)
    assert f"{tmp_path / 'out' / 'explore.html'} has the page" in capsys.readouterr().out
    for title in SECTIONS:
        assert f"<h2>{title}</h2>" in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    tasks = ("class", "colour", "material")
    assert names >= {f"classes_{task}.{kind}" for task in tasks for kind in ("png", "csv")}
    assert names >= {"sizes.png", "captions.png", "association.png", "hsv_class.png", "isomap_class.png", "splits.csv"}
    counts = pd.read_csv(tmp_path / "out" / "classes_class.csv")
    assert sorted(counts["class"]) == sorted(PRODUCT_CLASSES[:4])
    assert counts[["train", "val", "test"]].sum().tolist() == [24, 12, 12]


@pytest.mark.slow  # makes the page twice
@pytest.mark.usefixtures("drawn")
def test_the_same_command_gives_the_same_page(tmp_path: Path) -> None:
    photos = data("ImageFolder", write_image_folder(tmp_path / "photos", views=1))
    pages = [page(tmp_path / name, *photos, "--images", "10", "--seed", "4") for name in ("a", "b")]
    assert pages[0] == pages[1]
    assert "10 of 18 images, sampled with seed 4" in pages[0]


def test_vectors_of_a_gallery_check_the_labels(config: Path, products: Path, tmp_path: Path) -> None:
    table = pd.read_csv(products / "labels.csv").iloc[:36]
    codes = pd.factorize(table["class_label"])[0]
    matrix = (np.eye(8)[codes] + np.random.default_rng(0).normal(size=(36, 8)) * 0.05).astype(np.float32)
    # To the model one image of the first class looks like the second.
    matrix[5] = np.eye(8)[codes.max()]
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    made_by = identity()
    gallery = Gallery.create(str(tmp_path / "g"), made_by)
    with gallery.writing() as writer:
        writer.add(image_rows(made_by, table["image_path"].tolist(), matrix))
    options = ["--config", config, "--gallery", tmp_path / "g", "--folds", "3", "--data.init_args.attributes", "[]"]
    text = page(tmp_path / "out", *options)
    suspects = pd.read_csv(tmp_path / "out" / "suspects_class.csv")
    assert suspects["name"].tolist()[0] == table["image_path"].tolist()[5]
    assert suspects["suggested"].tolist()[0] == table["class_label"].tolist()[-1]
    assert "of 36 labels of class" in text
    assert "vectors of DualEncoder" in text


@pytest.mark.usefixtures("drawn")
def test_generated_images_with_labels_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wares = ["--data", "datamodules.Wares", "--data.init_args.n_samples", "60", "--data.init_args.resolution", "32"]
    wares += ["--data.init_args.every_kind", "true"]
    text = page(tmp_path, *wares, "--task", "colour")
    assert "Images are generated" in text
    assert "tags (multi_label), price (regression) are left out there" in text
    for name in ("hsv_colour.png", "labels_tags.png", "together_tags.png", "together_tags.csv", "numbers_price.png"):
        assert (tmp_path / name).is_file()
    assert main(["explore", *wares, "--to", str(tmp_path), "--task", "tags"]) == 2
    assert "--task tags: has no single class for each image; name one of class, colour" in capsys.readouterr().err


def test_captions_and_no_labels(tmp_path: Path) -> None:
    write_flickr(tmp_path / "flickr")
    text = page(tmp_path / "out", *data("Flickr8k", tmp_path / "flickr"))
    assert "The data have no labels, so none can be suspected." in text
    assert (tmp_path / "out" / "captions.png").exists()
    assert not (tmp_path / "out" / "isomap_class.png").exists()


def test_images_of_which_nothing_is_known(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "photos", classes=["only"])
    text = page(tmp_path / "out", *data("UnlabeledFolder", tmp_path / "photos"))
    for message in ("The train split is empty.", "The val split is empty.", "no classes to count", "no captions of"):
        assert message in text


def test_unreadable_images_and_one_class_are_reported(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "photos", classes=["only"], splits=["train"])
    (tmp_path / "photos" / "train" / "only" / "bad.png").write_bytes(b"no image")
    text = page(tmp_path / "out", *data("ImageFolder", tmp_path / "photos"))
    for message in (
        "cannot be read, left out where images are needed (1): ",
        "bad.png: ",
        "class has one class only",
        "a map needs three at least",
        "fewer than two classes",
        "no captions of their own",
        "no attributes next to the class",
    ):
        assert message in text


@pytest.mark.parametrize(("count", "message"), [(8, ""), (4, "no class has two labelled samples")])
def test_a_few_images_have_a_page_that_names_what_it_lacks(count: int, message: str, tmp_path: Path) -> None:
    root = write_products(tmp_path / "products", classes=4, grey=False)
    table = pd.read_csv(root / "labels.csv").groupby("class_label").head(count // 4)
    table["split"] = ["train"] * (count - 2) + ["val", "test"]
    table["instance_id"] = range(count)
    table.to_csv(root / "labels.csv", index=False)
    checks = ["--data.init_args.checks", "{allow_leaks: [groups, exact, near]}"]
    text = page(tmp_path / "out", *data("Products", root, *checks))
    assert all(f">{section}<" in text for section in SECTIONS)
    assert message in text


def test_leaks_are_on_the_page(tmp_path: Path) -> None:
    root = write_products(tmp_path / "products", grey=False)
    table = pd.read_csv(root / "labels.csv")
    first = table[table["split"] == "train"].to_dict("records")[0]
    other = table[table["split"] == "test"].to_dict("records")[0]
    (root / other["image_path"]).write_bytes((root / first["image_path"]).read_bytes())
    table.loc[table["image_path"] == other["image_path"], "instance_id"] = first["instance_id"]
    table.to_csv(root / "labels.csv", index=False)
    assert explore(tmp_path / "out", *data("Products", root, "--data.init_args.attributes", "[]")) == 0
    leaks = pd.read_csv(tmp_path / "out" / "leaks.csv")
    assert {"group in several splits", "identical images"} <= set(leaks["kind"])
    pair = leaks[leaks["kind"] == "identical images"].iloc[0]
    assert {pair["first"], pair["second"]} == {first["image_path"], other["image_path"]}
    assert (tmp_path / "out" / "leaks.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the data with --config EXPERIMENT.yaml or --data CLASS"),
        (["--config", "none.yaml"], "--config none.yaml: No such file"),
        (["--config", "CONFIG", "--task", "size"], "--task size: the data have class, colour, material"),
        (["--config", "CONFIG", "--classes", "pink"], "--classes: class has no class 'pink'"),
        (["--config", "CONFIG", "--images", "0"], "--images: is 0, must be at least 1"),
        (["--config", "CONFIG", "--folds", "1"], "--folds: is 1, must be at least 2"),
        (["--config", "CONFIG", "--gallery", "nowhere"], "nowhere: there is no gallery here"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("VITRAIL_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    assert explore(tmp_path / "out", *[str(config) if word == "CONFIG" else word for word in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
