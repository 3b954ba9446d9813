from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation.__main__ import main
from evaluation.retrieval import Row, report_rows, write_report
from tests.evaluation.test_retrieval import answers


@pytest.fixture
def rows() -> list[Row]:
    return report_rows(answers(), n_resamples=200)


@pytest.fixture
def runs(tmp_path: Path, rows: list[Row]) -> list[str]:
    """One that was tested in both directions, and one that only texts asked."""
    both, texts = tmp_path / "flickr" / "both", tmp_path / "flickr" / "texts"
    write_report(both / "reports" / "test_retrieval.csv", rows)
    write_report(texts / "reports" / "test_retrieval.csv", [row for row in rows if row.direction == "text_to_image"])
    return [str(both), str(texts)]


def test_a_row_a_run_and_direction(runs: list[str], rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", *runs, "--retrieval", "--markdown"]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    names = ["R@1", "R@5", "R@10", "median rank", "mAP"]
    assert lines[0] == ["run", "split", "direction", "n", *(f"{name} [95 %]" for name in names)]
    texts = next(str(row.n) for row in rows if row.direction == "text_to_image")
    assert [line[:4] for line in lines[2:]] == [
        ["flickr/both", "test", "image → text", "60"],
        ["flickr/both", "test", "text → image", texts],
        ["flickr/texts", "test", "text → image", texts],
    ]
    first = rows[0]
    assert lines[2][4] == f"{first.value:.3f} [{first.low:.3f}, {first.high:.3f}]"
    assert lines[3][4:] == lines[4][4:]
    assert main(["summary", *runs, "--retrieval"]) == 0
    assert "median rank" in " ".join(capsys.readouterr().out.split())


def test_json_has_every_number(runs: list[str], rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", runs[0], "--retrieval", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(one["run"], one["split"]) for one in found} == {("flickr/both", "test")}
    assert [Row(*(one[name] for name in Row._fields)) for one in found] == rows


HEADER = "direction,metric,value,low,high,n\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--ckpt_path"),
        ("", "not readable as CSV"),
        (HEADER, "needs rows with the columns"),
        ("direction,value\nboth,1\n", "needs rows with the columns"),
        (f"{HEADER}both,mAP,high,0,1,3\n", "finite numbers"),
        (f"{HEADER}both,mAP,,0,1,3\n", "finite numbers"),
        (f"{HEADER}both,mAP,inf,0,1,3\n", "finite numbers"),
    ],
)
def test_a_report_that_cannot_be_read_is_refused(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "reports").mkdir()
        (tmp_path / "reports" / "val_retrieval.csv").write_text(content)
    assert main(["summary", str(tmp_path), "--retrieval", "--split", "val"]) == 2
    told = capsys.readouterr().err
    assert "val_retrieval.csv" in told
    assert message in told
    assert len(told.splitlines()) == 1


def test_what_does_not_go_together_is_refused(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--wide", "--join"):
        assert main(["summary", *runs, "--retrieval", flag]) == 2
        assert "--retrieval: is a table of its own" in capsys.readouterr().err
    assert main(["summary", "nowhere", "--retrieval"]) == 2
    assert "no such run directory" in capsys.readouterr().err
