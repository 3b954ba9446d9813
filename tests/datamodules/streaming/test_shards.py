from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.streaming.index import read_streams
from datamodules.streaming.shards import Shards, find_shards, format_of, open_shard, short_names
from tests.datamodules.streaming.shard_sets import encoded, write_tar
from vitrail.errors import UserError

CONTENTS = [encoded(look) for look in range(10)]


def parquet(root: Path, kind: str = "struct") -> Shards:
    """Two files of six and four rows, in row groups of two."""
    urls = []
    for number, part in enumerate((CONTENTS[:6], CONTENTS[6:])):
        cells = [{"bytes": content, "path": None} for content in part] if kind == "struct" else part
        path = root / f"{number}.parquet"
        pq.write_table(pa.table({"image": cells}), path, row_group_size=2)
        urls.append(str(path))
    images = pa.table({"key": [f"k{row}" for row in range(10)]})
    return Shards(urls, np.array([6, 10]), images, "image")


def tars(root: Path, *, zipped: bool = False) -> Shards:
    urls = []
    for number, rows in enumerate((range(6), range(6, 10))):
        samples = [(f"k{row}", {"cls": str(row), "png": CONTENTS[row]}) for row in rows]
        name = f"{number}.tar.gz" if zipped else f"{number}.tar"
        urls.append(str(write_tar(root / name, samples, "w:gz" if zipped else "w")))
    return read_streams({"train": urls}, "webdataset", {}, {}, "set")[1]


MAKERS: dict[str, Any] = {
    "struct": parquet,
    "binary": lambda root: parquet(root, "binary"),
    "tar": tars,
    "tar.gz": lambda root: tars(root, zipped=True),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_rows_that_are_asked_for_come_in_order(kind: str, tmp_path: Path) -> None:
    shards = MAKERS[kind](tmp_path)
    for rows in ([0, 1, 2, 3, 4, 5], [1, 4], [5], [6, 9], []):
        assert list(shards.read(np.array(rows, dtype=np.int64))) == [CONTENTS[row] for row in rows]
    assert shards.encoded(7) == CONTENTS[7]
    assert shards.image(3).shape == (3, 10, 12)
    assert shards.label(8) == f"{shards.urls[1]}: k8"


def test_row_groups_without_wanted_rows_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = parquet(tmp_path)
    read: list[int] = []
    original = pq.ParquetFile.iter_batches

    def counting(self: Any, **options: Any) -> Any:
        read.extend(options["row_groups"])
        return original(self, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    assert len(list(shards.read(np.array([0, 5])))) == 2
    assert read == [0, 2]


@pytest.mark.parametrize("kind", ["struct", "tar", "tar.gz"])
def test_a_shard_that_was_cut_off_meanwhile_is_refused(kind: str, tmp_path: Path) -> None:
    shards = MAKERS[kind](tmp_path)
    path = Path(shards.urls[0])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(UserError, match=f"{path.name}.*get an intact copy") as caught:
        list(shards.read(np.arange(6)))
    assert "\n" not in str(caught.value)


def test_a_shard_that_was_replaced_meanwhile_is_refused(tmp_path: Path) -> None:
    shards = parquet(tmp_path)
    shutil.copy(shards.urls[1], shards.urls[0])
    with pytest.raises(UserError, match="fewer rows than when it was indexed"):
        list(shards.read(np.arange(6)))


def test_a_row_without_an_image_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [CONTENTS[0], None]}), path)
    shards = Shards([str(path)], np.array([2]), pa.table({"key": ["a", "b"]}), "image")
    assert list(shards.read(np.arange(2))) == [CONTENTS[0], b""]
    with pytest.raises(UserError, match=r"a\.parquet: b: "):
        shards.image(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of three splits in different layouts, an index, a hidden file and a file of another kind."""
    names = ("train-00000.tar", "train-00001.tar", "sub/training_2.tar", "validation/0.tar.gz", "test_a.tgz")
    for name in (*names, "index.parquet", ".train-9.tar", "train.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_a_folder_is_divided_by_names(folder: Path) -> None:
    found = find_shards(str(folder))
    short = {split: [str(Path(url).relative_to(folder)) for url in urls] for split, urls in found.items()}
    assert short == {
        "train": ["sub/training_2.tar", "train-00000.tar", "train-00001.tar"],
        "val": ["validation/0.tar.gz"],
        "test": ["test_a.tgz"],
    }


def test_globs_lists_and_ranges(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = [str(folder / f"train-0000{n}.tar") for n in range(2)]
    for given in (
        {"train": str(folder / "train-*.tar")},
        {"train": train},
        {"train": str(folder / "train-{00000..00001}.tar")},
        str(folder / "train-*.tar"),
        train,
    ):
        assert find_shards(given) == {"train": train}
    monkeypatch.chdir(folder)
    assert find_shards({"train": "train-00000.tar"}) == {"train": ["train-00000.tar"]}


def test_a_relative_path_is_looked_for_among_the_data_sets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_DATA", str(folder.parent))
    assert find_shards(folder.name) == find_shards(str(folder))
    assert len(find_shards(f"{folder.name}/train-*")["train"]) == 2


def test_urls_are_taken_as_they_are() -> None:
    found = find_shards({"train": "https://server/a-{08..11}.tar?key=1", "test": ["s3://bucket/b.parquet"]})
    assert found["train"] == [f"https://server/a-{number}.tar?key=1" for number in ("08", "09", "10", "11")]
    assert found["test"] == ["s3://bucket/b.parquet"]
    assert format_of(found["train"], "auto") == "webdataset"


def test_addresses_with_passwords_are_refused() -> None:
    with pytest.raises(UserError, match=r"data shards\.train: s3://key:\*\*\*@bucket/train\.tar has a password"):
        find_shards({"train": "s3://key:secret@bucket/train.tar"})


def test_any_file_system_of_fsspec(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("train-0.parquet", "train-1.parquet", "val.parquet"):
        memory.pipe(f"/shard_files/{name}", b"content")
    found = find_shards("memory://shard_files")
    assert [url.rsplit("/", 1)[-1] for url in found["train"]] == ["train-0.parquet", "train-1.parquet"]
    with open_shard(found["val"][0]) as file:
        assert file.read() == b"content"
    memory.rm("/shard_files", recursive=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"training": "x"}, "must be among train, val, test; got 'training'"),
        ({"val": "{folder}/test_a.tgz"}, "there are no training shards"),
        ({"train": "{folder}/nothing-*.tar"}, r"data shards\.train: no shard .* is found as .*nothing"),
        ({"train": "{folder}/missing.tar"}, r"data shards\.train: there is no .*missing\.tar"),
        ({"train": []}, "names no shard"),
        ({"train": "{folder}/train-*.tar", "val": "{folder}/train-00000.tar"}, r"train-00000\.tar is named twice"),
        ("{folder}/sub/../odd", "there is no"),
    ],
)
def test_mistakes_are_refused(given: Any, message: str, folder: Path) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        return value.replace("{folder}", str(folder)) if isinstance(value, str) else value

    with pytest.raises(UserError, match=message) as caught:
        find_shards(filled(given))
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_name_its_split(tmp_path: Path) -> None:
    (tmp_path / "part-0.tar").write_bytes(b"")
    with pytest.raises(UserError, match="does not name its split"):
        find_shards(str(tmp_path))
    assert find_shards({"train": str(tmp_path)})["train"] == [str(tmp_path / "part-0.tar")]


def test_hub_names_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match="owner/name is not a local folder and cannot be found on the hub") as caught:
        find_shards("owner/name")
    assert "\n" not in str(caught.value)


def test_hub_data_sets_are_streamed_from_their_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    class Builder:
        def __init__(self, files: dict[str, list[str]]) -> None:
            self.config = type("Config", (), {"data_files": files})

    at = "hf://datasets/owner/name@main/data"
    files = {"train": [f"{at}/train-0.parquet"], "validation": [f"{at}/validation-0.parquet"], "unlabelled": []}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: Builder(files))
    assert find_shards("owner/name") == {"train": files["train"], "val": files["validation"]}
    files["train"] = ["hf://datasets/owner/name@main/train.zip"]
    with pytest.raises(UserError, match=r"read it with datamodules\.HubImages"):
        find_shards("owner/name")


def test_a_folder_that_lacks_one_of_its_numbered_shards_is_refused(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        (tmp_path / f"train-{number:05d}-of-00004.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"lacks train-00002-of-00004\.tar"):
        find_shards(str(tmp_path))
    assert len(find_shards(f"{tmp_path}/train-*.tar")["train"]) == 3, "who names files gets those"
    (tmp_path / "train-00002-of-00004.tar").write_bytes(b"")
    assert len(find_shards(str(tmp_path))["train"]) == 4


def test_formats(tmp_path: Path) -> None:
    assert format_of(["a.parquet", "b.parquet"], "auto") == "parquet"
    assert format_of(["a.bin"], "webdataset") == "webdataset"
    with pytest.raises(UserError, match="both Parquet and tar"):
        format_of(["a.parquet", "b.tar"], "auto")
    with pytest.raises(UserError, match="ends neither with"):
        format_of(["a.bin"], "auto")


def test_short_names_do_not_depend_on_the_place() -> None:
    assert short_names(["/a/b/x.tar", "/a/c/y.tar"]) == ["b/x.tar", "c/y.tar"]
    assert short_names(["s3://z/a/b/x.tar", "s3://z/a/c/y.tar"]) == ["b/x.tar", "c/y.tar"]
    assert short_names(["/a/b/x.tar"]) == ["x.tar"]
    signed = [f"https://z/a/{name}.tar?signature=new/{name}" for name in "xy"]
    assert short_names(signed) == ["x.tar", "y.tar"]
    assert short_names(["https://z/get?file=x.tar", "https://z/get?file=y.tar"]) == ["get?file=x.tar", "get?file=y.tar"]
