from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from datamodules import Wares
from datamodules.files.image_sources import ImageSource, find_images
from datamodules.loading.decode import read_image
from datamodules.streaming.pack import PackFormat, pack
from tests.support.data import draw_image, write_csv
from vitrail.errors import UserError


def read_all(source: ImageSource) -> list[tuple[int, ...]]:
    found = []
    for image in source.read(np.arange(len(source))):
        assert not isinstance(image, UserError)
        found.append(tuple(read_image(image, "image").shape))
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    for name in ("photos/a.png", "photos/deep/b.png", "photos/.hidden.png", "c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(0, "red", look=1).save(tmp_path / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    write_csv(tmp_path / "list.csv", [["file", "other"], ["photos/a.png", "x"], ["c.jpg", "y"]])
    return tmp_path


def test_files_folders_patterns_and_tables_keep_the_order_in_which_they_are_given(folder: Path) -> None:
    found = find_images(["c.jpg", "photos", "list.csv", "photos/**/*.png"])

    assert [list(source.names) for source in found] == [
        ["c.jpg", "photos/a.png", "photos/deep/b.png"],
        ["photos/a.png", "c.jpg"],
        ["photos/a.png", "photos/deep/b.png"],
    ]
    assert read_all(found[1]) == [(3, 32, 32)] * 2


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_shards_are_read_with_the_names_of_their_samples(folder: Path, kind: PackFormat) -> None:
    pack(Wares(n_samples=60, views=3, resolution=32), folder / "shards", shard_size=4, pack_format=kind)

    [source] = find_images(["shards"])

    assert len(source) == 60
    assert len(set(source.names)) == 60
    assert read_all(source) == [(3, 32, 32)] * 60
    some = [io.BytesIO(content).read(4) for content in source.read(np.array([1, 5, 11])) if isinstance(content, bytes)]
    assert len(some) == 3


def test_a_parquet_file_of_another_library_is_read_whatever_its_column_is_called(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = (folder / "c.jpg").read_bytes()
    pq.write_table(
        pa.table({"text": ["x", "y"], "photo": [{"bytes": content, "path": None}] * 2}), folder / "other.parquet"
    )

    [source] = find_images(["other.parquet"])

    assert read_all(source) == [(3, 32, 32)] * 2


def test_links_that_are_dead_are_errors_in_the_place_of_images(folder: Path) -> None:
    write_csv(folder / "web.csv", [["url"], ["http://127.0.0.1:9/a.png"], ["photos/a.png"]])

    [source] = find_images(["web.csv"])
    first, second = source.read(np.arange(2))

    assert isinstance(first, UserError)
    assert str(first).startswith("http://127.0.0.1:9/a.png cannot be fetched")
    assert second == folder / "photos/a.png"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.jpg", "absent.jpg: no such file or folder, and no pattern that matches one"),
        ("photos/*.tiff", "no pattern that matches"),
        ("empty", "empty: has neither images"),
    ],
)
def test_nothing_found_is_an_error(folder: Path, source: str, message: str) -> None:
    (folder / "empty").mkdir()

    with pytest.raises(UserError) as error:
        find_images([source])

    assert message in str(error.value)
