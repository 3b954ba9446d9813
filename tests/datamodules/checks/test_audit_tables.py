from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from datamodules.checks.audit import (
    TITLES,
    AuditReport,
    DuplicatePair,
    Leaks,
    Sample,
    SkippedImage,
    print_report,
)
from datamodules.image_folder import UnlabeledFolder
from datamodules.wares import Wares
from tests.support.data import Noise


@pytest.fixture
def report() -> AuditReport:
    return Noise(n=30).audit()


def printed(report: AuditReport) -> str:
    console = Console(file=StringIO(), width=100)
    print_report(report, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def pair(number: int) -> DuplicatePair:
    return DuplicatePair(
        Sample(f"a{number}", f"images/a[{number}].jpg", "train", number), Sample("b", "images/b.jpg", "test", 99)
    )


def test_none_is_only_said_of_what_was_looked_for(tmp_path: Path) -> None:
    assert "files left out: not looked for (images are no files of their own)" in printed(Noise(n=30).audit())
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    alone = printed(UnlabeledFolder(root=str(tmp_path)).audit())
    assert "files left out: none" in alone
    assert "identical images within a split: not compared" in alone


def test_a_table_for_each_task(report: AuditReport) -> None:
    lines = printed(report).splitlines()
    assert lines[0].startswith("Noise")
    assert any("samples" in line and "30" in line and "9" in line and "8" in line for line in lines)
    assert "class: 3 classes" in "\n".join(lines)
    assert any("unknown" in line and "5" in line for line in lines)
    assert "groups in several splits: none" in lines


def test_twenty_pairs_and_the_number_of_the_others(report: AuditReport) -> None:
    leaks = Leaks([], [pair(number) for number in range(30)], [pair(1)], near_radius=8)
    text = printed(replace(report, leaks=leaks, allowed=["near"]))
    assert "identical images across splits: 30 (not allowed)" in text
    assert "images/a[19].jpg (train, row 19) = images/b.jpg (test, row 99)" in text, "brackets are no markup"
    assert "a[20]" not in text
    assert "and 10 more" in text
    assert "nearly identical images across splits: 1 (allowed)" in text
    assert "bits were compared" not in text


def test_a_smaller_radius_is_told(report: AuditReport) -> None:
    assert "within 2 bits" in printed(replace(report, leaks=Leaks([], [], [], near_radius=2)))


def test_unseen_values_and_unreadable_images(report: AuditReport) -> None:
    bad = SkippedImage(Sample("a", "a.jpg", "val", 17), "a.jpg: no such file")
    text = printed(replace(report, unseen={"class": {}, "colour": {"gold": 5}}, skipped=[bad]))
    assert "colour, values that are not in the vocabulary: gold (5)" in text
    assert "unreadable images: 1 (not allowed)" in text
    assert "row 17 (val): a.jpg: no such file" in text
    assert "(skipped)" in printed(replace(report, skipped=[bad], skips_bad_images=True))


def test_what_was_not_compared_is_not_called_none(report: AuditReport) -> None:
    """Generated images are not read; one split has nothing to be compared with."""
    text = printed(Wares(n_samples=30, val_fraction=0.2, test_fraction=0.2).audit())
    assert "groups in several splits: none" in text
    assert "identical images across splits: not checked (images are generated)" in text
    assert "nearly identical images across splits: not checked (images are generated)" in text
    assert "unreadable images: not checked (images are generated)" in text
    leaks = Leaks([], [], [], None, {"near": "allowed, so not looked for"})
    assert "nearly identical images across splits: not checked (allowed" in printed(replace(report, leaks=leaks))
    assert "each image is one of its own" in printed(report)


def test_a_single_split_has_nothing_to_be_compared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    text = printed(Wares(n_samples=30, val_fraction=0.0, test_fraction=0.0).audit())
    for title in TITLES.values():
        assert f"{title}: not checked (fewer than two splits have images" in text
