"""What trackers get that is no number; fits with each of them are in `tests/experiments/train/test_trackers.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import trackers
from tests.support.models import tiny_trainer


@pytest.mark.parametrize(
    ("texts", "lines"),
    [
        ({"id": ["a\tb", "c\nd", "e"]}, ["a b", "c d"]),
        ({"id": ["a\tb", "c\nd", "e"], "label": ["x", "", "y"]}, ["id\tlabel", "a b\tx", "c d\t"]),
    ],
    ids=["a column alone has no heading", "several have one"],
)
def test_each_vector_in_the_projector_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: dict[str, list[str]], lines: list[str]
) -> None:
    monkeypatch.setattr(trackers, "MOST_ROWS", 2)
    trainer = tiny_trainer(tmp_path, logger=TensorBoardLogger(tmp_path, name="", version="tensorboard"))

    trackers.log_embeddings(trainer, "embeddings/test", texts, np.eye(3, dtype=np.float32))

    [metadata] = tmp_path.glob("tensorboard/**/metadata.tsv")
    assert metadata.read_text().split("\n")[:-1] == lines
    assert np.loadtxt(metadata.with_name("tensors.tsv")).tolist() == [[1, 0, 0], [0, 1, 0]]
