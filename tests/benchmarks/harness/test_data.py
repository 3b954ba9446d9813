from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.harness.data import CLASSES, linked_products, write_photos


def test_photos_have_their_size_and_lie_in_classes(tmp_path: Path) -> None:
    files = sorted(write_photos(tmp_path, CLASSES + 1, 64).rglob("*.jpg"))
    assert len(files) == CLASSES + 1
    assert len({path.parent for path in files}) == CLASSES
    assert len({path.read_bytes() for path in files}) == len(files)
    assert {Image.open(path).size for path in files} == {(64, 48)}


def test_products_are_linked_where_they_are_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path / "data"))
    assert linked_products(tmp_path / "links") is None
    images = tmp_path / "data" / "products" / "images"
    images.mkdir(parents=True)
    (images / "1.jpg").write_bytes(b"image")
    assert linked_products(tmp_path / "links") == tmp_path / "links"
    (link,) = (tmp_path / "links").rglob("*.jpg")
    assert link.read_bytes() == b"image"
