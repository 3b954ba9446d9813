"""Tests of reading uploads."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.logic.uploads import read_upload
from app.state.context import Limits
from datamodules.loading.decode import read_image
from tests.app.hostile_files import encoded, harmless_files, hostile_files, png_bomb, text_bomb
from vitrail.errors import UserError

HOSTILE = list(hostile_files())
HARMLESS = list(harmless_files())


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what is wrong with a TIFF
@pytest.mark.parametrize(("name", "content"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_files_are_refused_in_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^image 'a\.\w+': ") as said:
        read_upload(written(tmp_path, name, content))
    line = str(said.value)
    assert "\n" not in line
    assert len(line) < 250
    assert str(tmp_path) not in line


@pytest.mark.parametrize(("name", "content"), [case[1:] for case in HARMLESS], ids=[case[0] for case in HARMLESS])
def test_odd_images_are_read_as_data_sets_read_them(name: str, content: bytes, tmp_path: Path) -> None:
    found = read_upload(written(tmp_path, name, content))
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), read_image(content).permute(1, 2, 0).numpy())


def test_phones_hold_their_images_sideways(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    content = io.BytesIO()
    Image.new("RGB", (40, 30), (0, 0, 200)).save(content, "JPEG", exif=tags)
    assert read_upload(written(tmp_path, "a.jpg", content.getvalue())).size == (30, 40)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    bomb = written(tmp_path, "a.png", png_bomb(20_000, 20_000))
    tracemalloc.start()
    with pytest.raises(
        UserError, match="pixels, at most 50 million are decoded; scale it down, or start the server with --max-pixels"
    ):
        read_upload(bomb)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**20  # the pixels would be 400 MB


def test_a_comment_that_unpacks_to_much_is_not_unpacked(tmp_path: Path) -> None:
    path = written(tmp_path, "a.png", text_bomb())
    tracemalloc.start()
    with pytest.raises(UserError, match="damaged"):
        read_upload(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 * 2**20


def test_limits_of_size(tmp_path: Path) -> None:
    path = written(tmp_path, "a.png", encoded(size=(50, 40)))
    assert read_upload(path, Limits(upload_pixels=2_000)).size == (50, 40)
    with pytest.raises(UserError, match="50 × 40 pixels, at most"):
        read_upload(path, Limits(upload_pixels=1_999))
    length = path.stat().st_size
    assert read_upload(path, Limits(upload_bytes=length)).size == (50, 40)
    with pytest.raises(UserError, match="scale it down"):
        read_upload(path, Limits(upload_bytes=length - 1))


def test_what_is_gone_or_no_file_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.png", tmp_path, Path("/dev/zero"), Path("a\0b.png")):
        with pytest.raises(UserError, match="no longer there"):
            read_upload(path)


def test_a_long_name_is_shortened(tmp_path: Path) -> None:
    with pytest.raises(UserError) as said:
        read_upload(written(tmp_path, "x" * 250, b"no image"))
    assert len(str(said.value)) < 200
