"""What several tests of reports read."""

from __future__ import annotations

import pytest

from retrieval.gallery import Gallery
from tests.support.runs import write_run


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """That of a small run; only read."""
    return Gallery.open(str(write_run(tmp_path_factory.mktemp("images")) / "gallery"))
