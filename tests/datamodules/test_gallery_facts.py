from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import Products, StreamedImages, Wares
from datamodules.checks.verify import content_of
from datamodules.options import ImageOptions, LoaderOptions
from datamodules.streaming.pack import PackFormat, pack
from tests.support.data import write_products
from vitrail.errors import UserError
from vitrail.types import DescribesImages

IDS = np.array([5, 2, 30])


def products(root: Path, **options: object) -> Products:
    attributes = ["colour", "material"]
    data = Products(str(root), attributes=attributes, image={"size": 16}, **options)  # type: ignore[arg-type]
    data.setup("predict")
    return data


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_products(tmp_path_factory.mktemp("products"), grey=False)


def test_facts_are_the_tables(root: Path) -> None:
    data = products(root)
    assert isinstance(data, DescribesImages)
    facts = data.image_facts(IDS).to_pylist()
    table = data.table
    for row, fact in zip(IDS.tolist(), facts, strict=True):
        assert fact["id"] == table.name(row)
        assert fact["path"] == str(root / table.name(row))
        assert fact["content"] == content_of(data.read_image(row).permute(1, 2, 0).contiguous().numpy()).hex()
        assert (fact["caption"], fact["captions"]) == (table.caption(row), [table.caption(row)])
        assert (fact["group"], fact["split"]) == (table.group(row), table.split(row))
        for task, names in table.tasks.items():
            assert fact[f"label_{task}"] == names[table.targets[task][row]]


def test_unknown_labels_are_null(root: Path) -> None:
    data = products(root, vocabulary=None)
    data.table.targets["colour"][IDS[1]] = -1
    assert data.image_facts(IDS).column("label_colour").is_null().to_pylist() == [False, True, False]


def test_generated_images_are_no_files(tmp_path: Path) -> None:
    data = Wares(n_samples=40, resolution=16)
    data.setup("predict")
    facts = data.image_facts(IDS).to_pylist()
    assert not data.image_files
    assert [fact["path"] for fact in facts] == [""] * 3
    assert facts[0]["content"] == content_of(data.read_image(5).permute(1, 2, 0).contiguous().numpy()).hex()
    assert len({fact["content"] for fact in facts}) == 3


@pytest.mark.parametrize("pack_format", ["parquet", "webdataset"])
def test_streamed_images_change_with_their_shard(root: Path, tmp_path: Path, pack_format: PackFormat) -> None:
    pack(products(root), tmp_path / "shards", pack_format, 10)

    def streamed() -> StreamedImages:
        data = StreamedImages(
            str(tmp_path / "shards"), image=ImageOptions(size=16), loader=LoaderOptions(batch_size=4), streams=2
        )
        data.setup("predict")
        return data

    data = streamed()
    everything = data.rows_of(["train", "val", "test"])
    before = data.image_facts(everything)
    assert before.column("id").to_pylist() == data.sample_names()
    assert len(set(before.column("content").to_pylist())) == len(everything)
    assert before.equals(streamed().image_facts(everything))
    first = sorted((tmp_path / "shards").glob("test-*"))[0]
    first.touch()
    other = np.array(before.column("content")) != np.array(streamed().image_facts(everything).column("content"))
    assert set(before.column("split").filter(other).to_pylist()) == {"test"}
    assert other.sum() == len(data.split_indices("test")[:10])


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_rows_come_in_their_order(root: Path, tmp_path: Path, workers: int) -> None:
    pack(products(root), tmp_path / "shards", "parquet", 10)
    loader = {"batch_size": 4, "num_workers": workers, "predict": ["train", "test"]}
    data = StreamedImages(str(tmp_path / "shards"), image={"size": 16}, loader=loader, streams=2)
    data.setup("predict")
    rows = np.array([1, 2, 5, 11, 12, 13, 22, 30, 35])
    batches = list(data.rows_dataloader(rows))
    assert torch.cat([batch["sample_id"] for batch in batches]).tolist() == rows.tolist()
    by_split = {
        int(row): image
        for split in ("train", "val", "test")
        for batch in data.eval_dataloader(split)
        for row, image in zip(batch["sample_id"], batch["image"], strict=True)
    }
    for batch in batches:
        assert all(
            torch.equal(by_split[int(row)], image)
            for row, image in zip(batch["sample_id"], batch["image"], strict=True)
        )
    seen = torch.cat([batch["sample_id"] for batch in data.predict_dataloader()])
    assert seen.tolist() == data.rows_of(["train", "test"]).tolist()


@pytest.mark.parametrize("splits", [["test"], ["train", "val", "test"], ["test", "val"]])
def test_predict_sees_the_splits_that_are_asked_for(root: Path, splits: list[str]) -> None:
    data = products(root, loader={"batch_size": 8, "predict": splits})
    batches = list(data.predict_dataloader())
    seen = torch.cat([batch["sample_id"] for batch in batches])
    expected = np.sort(np.concatenate([data.split_indices(split) for split in splits]))
    assert seen.tolist() == expected.tolist()
    by_split = {
        int(row): image
        for split in splits
        for batch in data.eval_dataloader(split)
        for row, image in zip(batch["sample_id"], batch["image"], strict=True)
    }
    for batch in batches:
        for row, image in zip(batch["sample_id"], batch["image"], strict=True):
            assert torch.equal(image, by_split[int(row)])


@pytest.mark.parametrize(("predict", "message"), [([], "at least one of"), (["exam"], "one of train, val, test")])
def test_unknown_splits_to_predict_are_refused(predict: list[str], message: str) -> None:
    with pytest.raises(UserError, match=rf"loader\.predict.*{message}"):
        Wares(loader={"predict": predict})
