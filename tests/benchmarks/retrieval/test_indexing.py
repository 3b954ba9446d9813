from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.data import write_photos
from benchmarks.retrieval import indexing
from benchmarks.retrieval.indexing import Contest
from retrieval.gallery import Gallery

N, SIZE, BATCH = 10, 32, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return indexing.data_of(write_photos(tmp_path_factory.mktemp("photos"), N, 60), SIZE, BATCH)


def test_both_sides_see_the_same_images(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contest = Contest("test_resnet", data, tmp_path)
    monkeypatch.setattr(shutil, "rmtree", lambda folder: None)  # keep it to look into
    assert contest.fill() > 0
    assert contest.forward() > 0
    assert [tuple(images.shape) for images in contest.images] == [(4, 3, SIZE, SIZE)] * 2 + [(2, 3, SIZE, SIZE)]
    gallery = Gallery.open(str(tmp_path / "gallery"))
    names = data.image_facts(data.rows_of(["train"])).column("id").to_pylist()
    with torch.inference_mode():
        features = torch.cat([contest.task.encoder(images) for images in contest.images])
    stored = torch.from_numpy(gallery.vectors(names))
    torch.testing.assert_close(stored, torch.nn.functional.normalize(features, dim=1), atol=1e-5, rtol=0)


def test_a_row_for_each_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", "unused")  # put back after the test
    (found,) = indexing.run(2, {"tiny": "test_resnet"}, N, SIZE, 60, BATCH)
    assert (found.contender, found.peer, found.promise) == ("filling a gallery", "forward pass", "≥ 0.95")
    assert 0 < found.low <= found.ratio <= found.high
