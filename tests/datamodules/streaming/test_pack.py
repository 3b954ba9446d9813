"""Packing data sets into shards, and reading them back."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.__main__ import main
from datamodules.hub_images import HubImages
from datamodules.image_folder import ImageFolder
from datamodules.loading.decode import heif_formats
from datamodules.options import ImageOptions
from datamodules.products import Products
from datamodules.splits import SplitOptions
from datamodules.streaming.pack import PackFormat, pack
from datamodules.table_file import Table, TableColumns
from datamodules.wares import Wares
from tests.datamodules.streaming.shard_sets import SIZES, encoded, source, streamed, write_tar
from tests.support.data import write_deep_folder, write_labelled
from vitrail.errors import UserError
from vitrail.types import UNKNOWN


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Products:
    return source(tmp_path_factory.mktemp("products"))


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_shards_hold_what_the_data_set_holds(products: Products, kind: str, tmp_path: Path) -> None:
    assert pack(products, tmp_path, kind, shard_size=10) == {"train": 4, "val": 1, "test": 1}  # type: ignore[arg-type]
    data = streamed(str(tmp_path))
    assert data.tasks == products.tasks
    assert data.class_counts == products.class_counts
    place = {name: row for row, name in enumerate(products.sample_names())}
    assert sorted(data.sample_names()) == sorted(place)
    for row in range(len(data.table)):
        theirs = place[data.table.name(row)]
        for ours, other in ((data.table, products.table),):
            assert ours.split(row) == other.split(theirs)
            assert ours.group(row) == other.group(theirs)
            assert ours.caption(row) == " ".join(other.caption(theirs).split())
            assert all(ours.targets[task][row] == other.targets[task][theirs] for task in ours.tasks)
        # Not only the same pixels: the file itself.
        assert data.encoded_image(row) == Path(products.table.source(theirs)).read_bytes()
        assert data.read_image(row).equal(products.read_image(theirs))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_labels_of_every_kind_survive_with_what_is_unknown(kind: str, tmp_path: Path) -> None:
    columns = TableColumns(
        label="tags",
        kinds={"tags": "multi_label", "price": "regression", "grade": "ordinal"},
        classes={"grade": ["poor", "fair", "good"], "tags": ["red", "none of them", "green", "blue"]},
    )
    data = Table(str(write_labelled(tmp_path, 20)), columns=columns, image=ImageOptions(size=16))
    data.table.targets["class"][4, 1] = UNKNOWN
    data.table.targets["class"][5] = UNKNOWN
    pack(data, tmp_path / "shards", kind, shard_size=7)  # type: ignore[arg-type]
    found = streamed(str(tmp_path / "shards"), augment={"preset": "light"})
    assert found.tasks == data.tasks
    assert found.task_kinds == data.task_kinds
    place = {name: row for row, name in enumerate(data.sample_names())}
    order = [place[name] for name in found.sample_names()]
    for task, targets in data.table.targets.items():
        np.testing.assert_array_equal(found.table.targets[task], targets[order])
    few = streamed(str(tmp_path / "shards"), columns={"attributes": ["price"]})
    assert few.task_kinds == {"class": "multi_label", "price": "regression"}
    if kind == "webdataset":
        with tarfile.open(next((tmp_path / "shards").glob("train-*.tar"))) as tar:
            described = [json.load(tar.extractfile(one)) for one in tar if one.name.endswith(".json")]  # type: ignore[arg-type]
        assert all(isinstance(one["label"], list | None) for one in described)


def test_train_is_mixed_and_the_others_keep_their_order(products: Products, tmp_path: Path) -> None:
    pack(products, tmp_path, shard_size=100)
    data = streamed(str(tmp_path))
    labels = data.table.targets["class"][data.split_indices("train")]
    assert (np.diff(labels) != 0).sum() > 10, "sorted by class there would be two changes"
    names = [data.table.name(row) for row in data.split_indices("val").tolist()]
    assert names == [products.table.name(row) for row in products.split_indices("val").tolist()]


def test_generated_images_become_png_and_shards_can_be_packed_again(tmp_path: Path) -> None:
    wares = Wares(n_samples=30, views=3, resolution=32, image=ImageOptions(size=16))
    assert wares.encoded_image(0).startswith(b"\x89PNG")
    pack(wares, tmp_path / "tar", "webdataset", shard_size=7)
    first = streamed(str(tmp_path / "tar"))
    pack(first, tmp_path / "parquet", shard_size=11)
    second = streamed(str(tmp_path / "parquet"))
    place = {name: row for row, name in enumerate(second.sample_names())}
    source_place = {name: row for row, name in enumerate(wares.sample_names())}
    for row, name in enumerate(first.sample_names()):
        assert first.encoded_image(row) == second.encoded_image(place[name])
        assert torch.equal(first.read_image(row), wares.read_image(source_place[name]))


def test_images_out_of_the_hubs_files_keep_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = [encoded(look, "jpg") for look in range(6)]
    columns = {"image": [{"bytes": file, "path": None} for file in files], "label": ["cup", "hat"] * 3}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "a.parquet"))
    hub = HubImages(str(tmp_path / "a.parquet"), split=SplitOptions(val_fraction=0, test_fraction=0))
    pack(hub, tmp_path / "shards", "webdataset")
    data = streamed(str(tmp_path / "shards"))
    assert sorted(data.encoded_image(row) for row in range(6)) == sorted(files)


def test_other_libraries_read_the_shards(products: Products, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for kind, files in (("parquet", "train-*.parquet"), ("webdataset", "train-*.tar")):
        pack(products, tmp_path / kind, kind, shard_size=20)  # type: ignore[arg-type]
        data = streamed(str(tmp_path / kind))
        theirs = datasets.load_dataset(kind, data_files=str(tmp_path / kind / files), split="train", streaming=True)
        rows = list(theirs)
        assert len(rows) == SIZES["train"]
        for row, sample in enumerate(rows):
            pixels = sample["image" if kind == "parquet" else "jpg"]
            assert torch.from_numpy(np.array(pixels)).permute(2, 0, 1).equal(data.read_image(row))
            label = sample["label" if kind == "parquet" else "cls"]
            assert label == data.table.targets["class"][row]


def test_the_command_packs_and_refuses_to_pack_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wares = ["--data", "datamodules.Wares", "--data.n_samples=30", "--data.resolution=16"]
    to = tmp_path / "deep" / "shards"
    assert main(["pack", *wares, "--to", str(to), "--format", "webdataset", "--shard-size=9"]) == 0
    assert "train 3" in capsys.readouterr().out
    assert sorted(path.name for path in to.iterdir())[0] == "index.parquet"
    assert main(["pack", *wares, "--to", str(to)]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert main(["pack", *wares, "--to", str(tmp_path / "other"), "--shard-size=0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "pack" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_an_interrupted_pack_goes_on(
    products: Products, kind: PackFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, rows = Products.encoded_image, list[int]()

    def broken(data: Products, row: int) -> bytes:
        if row == products.split_indices("val")[3]:
            raise OSError(28, "No space left on device")
        return encoded(data, row)

    def noted(data: Products, row: int) -> bytes:
        rows.append(row)
        return encoded(data, row)

    counts = pack(products, tmp_path / "whole", kind, shard_size=12)
    to = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr(Products, "encoded_image", broken)
        with pytest.raises(UserError, match="cannot be written"):
            pack(products, to, kind, shard_size=12)
    shards = [f"train-{n:05d}-of-00003.{'tar' if kind == 'webdataset' else 'parquet'}" for n in range(3)]
    assert sorted(path.name for path in to.iterdir()) == ["packing.json", *shards]  # none of them in part
    with pytest.raises(UserError, match=r"interrupted pack of other data left packing\.json"):
        pack(products, to, kind, shard_size=6)
    monkeypatch.setattr(Products, "encoded_image", noted)
    assert pack(products, to, kind, shard_size=12) == counts
    assert not set(rows) & set(products.split_indices("train").tolist())
    assert contents(to) == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_shards_keep_the_value_range(kind: str, tmp_path: Path) -> None:
    deep = ImageFolder(str(write_deep_folder(tmp_path / "deep")))
    pack(deep, tmp_path / kind, kind)  # type: ignore[arg-type]
    data = streamed(str(tmp_path / kind))
    place = {name: row for row, name in enumerate(deep.sample_names())}
    for row, name in enumerate(data.sample_names()):
        assert data.read_image(row).equal(deep.read_image(place[name]))
    assert data.image_options["value_range"] == deep.image_options["value_range"] == [0, 4095]
    assert data.data_record()["value_range"]["range"] == [0, 4095]
    other = streamed(str(tmp_path / kind), image={"size": 16, "value_range": "dtype"})
    assert int(other.read_image(0).max()) <= 15
    batch = next(iter(other.eval_dataloader("val")))
    assert int(batch["image"].max()) <= 24  # bicubic


def test_streams_are_not_guessed_at(tmp_path: Path) -> None:
    """Skipping such images would leave out the dark ones of a set."""
    content = Path(write_deep_folder(tmp_path / "deep") / "bag" / "0.png").read_bytes()
    write_tar(tmp_path / "train-0.tar", [(f"k{number}", {"png": content, "cls": "0"}) for number in range(8)])
    data = streamed(str(tmp_path / "train-0.tar"), checks={"on_bad_image": "skip"})
    with pytest.raises(UserError, match=r"k\d: more than 8 bits .* set data image.value_range") as said:
        list(data.train_dataloader())
    assert "\n" not in str(said.value)


def test_shards_take_every_format(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    heif_formats()
    formats = {"avif": "AVIF", "jfif": "JPEG", "jp2": "JPEG2000", "heic": "HEIF", "pnm": "PPM"}
    rng = np.random.default_rng(0)
    for number, (suffix, kind) in enumerate(formats.items()):
        folder = tmp_path / "photos" / ("train" if number else "val") / "a"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{number}.{suffix}").open("wb") as file:
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, kind)
    photos = ImageFolder(str(tmp_path / "photos"), SplitOptions(test_fraction=0))
    assert len(photos.table) == 5
    pack(photos, tmp_path / "tar", "webdataset")
    (tmp_path / "tar" / "index.parquet").unlink()
    assert streamed(str(tmp_path / "tar")).read_image(0).shape == (3, 64, 64)
    with tarfile.open(next((tmp_path / "tar").glob("train-*"))) as archive:
        endings = {Path(name).suffix for name in archive.getnames()} - {".cls", ".json"}
    assert endings == {".jpg", ".jp2", ".heic", ".ppm"}
