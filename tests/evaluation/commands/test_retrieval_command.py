from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from evaluation.__main__ import main
from evaluation.retrieval import METRICS, AttributeRow
from retrieval.gallery import Gallery
from tests.support.galleries import small_gallery
from tests.support.models import PerfectEncoder


@pytest.fixture(scope="module")
def galleries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A dual encoder's that predicts nothing, and a multi-task model's."""
    folder = tmp_path_factory.mktemp("galleries")
    small_gallery(folder / "pairs" / "gallery", predicts={})
    small_gallery(folder / "tasks" / "gallery", encodes_text=False)
    return {name: str(folder / name / "gallery") for name in ("pairs", "tasks")}


@pytest.fixture(autouse=True)
def perfect_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(gallery: Gallery, **_: Any) -> PerfectEncoder:
        return PerfectEncoder()

    monkeypatch.setattr("retrieval.search.searcher.load_encoder", load)


def test_table_of_rankers_and_galleries(
    galleries: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [galleries["tasks"], galleries["pairs"]]
    files = ["--csv", str(tmp_path / "rows.csv"), "--json", str(tmp_path / "rows.json")]
    assert main(["retrieval", "--gallery", *both, "--words-gallery", both[0], *files]) == 0
    rows = pd.read_csv(tmp_path / "rows.csv", keep_default_na=False)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows.to_dict("records")
    systems = rows[["gallery", "ranker", "words"]].drop_duplicates().values.tolist()
    # True labels and random orders do not depend on the model: they are there once.
    assert systems == [
        ["tasks/gallery", "text", "predicted"],
        ["", "text", "label"],
        ["", "random", ""],
        ["pairs/gallery", "vector", ""],
        ["pairs/gallery", "hybrid", "predicted"],
    ]
    assert list(rows.columns) == list(AttributeRow._fields)
    of = rows[rows.metric == "mAP"].set_index(["ranker", "words"]).value
    assert of["random", ""] < of["text", "predicted"] < of["vector", ""]
    shown = capsys.readouterr().out
    assert "34 queries in 7 groups, 12 images" in shown
    assert "hybrid, predicted labels" in shown


def test_markdown_of_unseen_images(galleries: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--splits", "val", "test", "--rankers", "vector", "random", "--tasks", "class", "colour", "--markdown"]
    assert main(["retrieval", "--gallery", galleries["pairs"], *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "11 queries in 5 groups, 9 images; mean [95 %]"
    assert lines[2].split(" | ")[1:] == ["ranker", *list(METRICS)[:-1], "nDCG@10 |"]
    assert [line.split(" | ")[1] for line in lines[4:]] == ["vector", "random"]


def test_mistakes_are_reported(galleries: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*arguments: str) -> str:
        assert main(["retrieval", "--gallery", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "there is no gallery here" in message(str(tmp_path / "none"))
    assert "not possible in these galleries" in message(galleries["tasks"], "--rankers", "vector", "hybrid")
    assert "'prize'" in message(galleries["tasks"], "--where", "prize = 'first'")
