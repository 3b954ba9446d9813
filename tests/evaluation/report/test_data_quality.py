from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from evaluation.report.data_quality import data_quality_section
from evaluation.report.summary import run_summary
from tests.support.runs import image, write_run
from vitrail.programs import main
from vitrail.runs import Run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path, gallery=False)


def write_audit(run: Path, findings: list[dict[str, Any]], **changes: Any) -> None:
    content: dict[str, Any] = {
        "measured": "2026-11-30 14:05",
        "fingerprint": "other",
        "samples": {"train": 1200, "test": 300},
    }
    content |= {"unreadable": 2, "generated": False, "findings": findings, **changes}
    (run / "reports").mkdir(exist_ok=True)
    (run / Run.AUDIT).write_text(json.dumps(content))


def finding(image: str, kind: str, severity: str, other: str = "") -> dict[str, Any]:
    return {
        **{"image": image, "split": "train", "row": 3, "source": image, "finding": kind, "value": 2.0},
        **{"threshold": 1.0, "severity": severity, "suggestion": f"mend {kind}", "other": other},
    }


def test_commands_that_were_not_run_are_named_in_a_line_each(run: Path) -> None:
    section = data_quality_section(Run(run), None, 8)
    assert section.missing == [
        f"The data have not been audited: run `vitrail audit --run {run}`.",
        f"The labels have not been checked: run `vitrail label-issues {run}`.",
    ]
    assert not any((section.paragraphs, section.tables, section.grids))


def test_findings_are_counted_and_shown_with_their_time(run: Path) -> None:
    found = [
        finding("a", "conflicting-labels", "high", "b"),
        *(finding(name, "blurry", "low") for name in ("c", "d", "missing")),
    ]
    write_audit(run, found)
    section = data_quality_section(Run(run), lambda name: None if name == "missing" else image(0), 8)
    assert section.paragraphs[0].startswith(
        "Audited on 2026-11-30 14:05: 1,200 train, 300 test images; 2 cannot be read, 4 findings;"
    )
    assert "not those of the training any more" in section.paragraphs[1]
    counts = section.tables["findings"]
    assert counts[["finding", "images"]].to_numpy().tolist() == [["conflicting-labels", 1], ["blurry", 3]]
    assert counts["suggestion"].tolist() == ["correct one of the two values", "mend blurry"]
    (grid,) = section.grids
    assert set(grid.images) == {"a", "c", "d"}
    assert "other: b" in grid.lines(grid.rows.iloc[0].to_dict())
    assert not any("other" in line for line in grid.lines(grid.rows.iloc[1].to_dict()))
    caveats = run_summary(Run(run), "test", [], [], [section]).caveats
    assert "The audit found what makes results wrong: 1 conflicting-labels." in caveats
    without = data_quality_section(Run(run), None, 8)
    assert without.tables["found_images"]["name"].tolist() == ["a", "c", "d", "missing"]


def test_nothing_found_and_damaged_files_are_reported(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    write_audit(run, [], fingerprint=record["data"]["fingerprint"])
    section = data_quality_section(Run(run), None, 8)
    assert len(section.paragraphs) == 1
    assert "0 findings" in section.paragraphs[0]
    write_audit(run, [], generated=True)
    assert "they are generated, so there is nothing to find." in data_quality_section(Run(run), None, 8).paragraphs[0]
    (run / Run.AUDIT).write_text("[1")
    (run / Run.LABEL_ISSUES).write_text("{}")
    damaged = data_quality_section(Run(run), None, 8)
    assert [
        str(path) in text for path, text in zip((run / Run.AUDIT, run / Run.LABEL_ISSUES), damaged.missing, strict=True)
    ]
    assert all("cannot be read" in text for text in damaged.missing)


def test_the_audit_of_a_run_and_label_issues_leave_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    run = write_run(tmp_path, wrong=0.05, gallery=False)
    for number in range(6):
        folder = tmp_path / "data" / ("train", "val", "test")[number % 3] / "mug"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number % 5).integers(0, 255, (40, 40, 3), np.uint8)).save(
            folder / f"{number}.png"
        )
    data = {"class_path": "datamodules.ImageFolder", "init_args": {"root": str(tmp_path / "data")}}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    main("vitrail", ["audit", "--run", str(run)])  # refuses the copy across splits in the end
    assert main("vitrail", ["label-issues", str(run)]) == 0
    section = data_quality_section(Run(run), None, 8)
    assert section.missing == []
    assert "duplicate-across-splits" in section.tables["findings"]["finding"].tolist()
    issues = json.loads((run / Run.LABEL_ISSUES).read_text())
    assert f": {len(issues['rows']):,} are suspected." in section.paragraphs[-1]
    assert section.paragraphs[-1].startswith("Labels in test were compared with the predictions on 2")
    if issues["rows"]:
        assert section.tables["suspected_labels"]["target"].tolist() == [row["old"] for row in issues["rows"]]


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("vitrail", ["audit", "--run", str(tmp_path)]) == 2
    assert f"--run {tmp_path}: has no config.yaml" in capsys.readouterr().err
