"""Shards that several files of tests stream."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.streaming.pack import pack
from tests.datamodules.streaming.shard_sets import source


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``parquet`` and ``webdataset``: train in six shards, val and test in two each."""
    root = tmp_path_factory.mktemp("packed")
    data = source(root / "products")
    pack(data, root / "parquet", "parquet", shard_size=6)
    pack(data, root / "webdataset", "webdataset", shard_size=6)
    return root


@pytest.fixture(params=["parquet", "webdataset"])
def shards(packed: Path, request: pytest.FixtureRequest) -> str:
    """``packed`` in either format."""
    return str(packed / request.param)
