from __future__ import annotations

from pathlib import Path

import pytest

from datamodules import UnlabeledFolder
from datamodules.options import CheckOptions, ImageOptions, LoaderOptions
from tests.support.data import draw_image
from vitrail.errors import UserError


def write(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(0, "red", look=number, size=(40, 30)).save(folder / name)
    return folder


def test_all_images_at_any_depth_are_test_samples(tmp_path: Path) -> None:
    folder = write(tmp_path / "holiday", "z.png", "day1/b.jpg", "day1/noon/a.JPG", ".hidden.png")
    (folder / "notes.txt").write_text("none")
    data = UnlabeledFolder(str(folder), image=ImageOptions(size=16), loader=LoaderOptions(batch_size=2))
    data.prepare_data()
    data.setup("predict")
    assert data.sample_names() == ["holiday/day1/b.jpg", "holiday/day1/noon/a.JPG", "holiday/z.png"]
    assert len(data.split_indices("train")) == len(data.split_indices("val")) == 0
    batches = list(data.predict_dataloader())
    assert [len(batch["sample_id"]) for batch in batches] == [2, 1]
    assert batches[0]["image"].shape == (2, 3, 16, 16)
    assert data.tasks == {}
    assert not data.own_captions
    assert data.image_facts(data.split_indices("test")).column("path").to_pylist() == [
        str(folder / name) for name in ("day1/b.jpg", "day1/noon/a.JPG", "z.png")
    ]


def test_unreadable_images_are_told_or_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "holiday", "a.png", "b.png")
    (folder / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b\.png.*not an image in a known format"):
        UnlabeledFolder(str(folder)).setup("predict")
    data = UnlabeledFolder(str(folder), checks=CheckOptions(on_bad_image="skip"))
    data.setup("predict")
    assert data.split_indices("test").tolist() == [0]


@pytest.mark.parametrize(("name", "message"), [("missing", "there is no folder"), ("empty", "has no images")])
def test_a_folder_without_images_is_told(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        _ = UnlabeledFolder(str(tmp_path / name)).table
