from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from datamodules.checks.findings import COLUMNS
from datamodules.image_folder import ImageFolder
from datamodules.options import CheckOptions
from datamodules.wares.render import WareSpec, draw_ware
from vitrail.programs import main


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve different images, and one of each fault."""
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    specs = [WareSpec(kind, "red", "plastic", "used", seed) for kind in ("mug", "vase") for seed in range(6)]
    for number, spec in enumerate(specs):
        folder = tmp_path / "data" / ("train", "val", "test")[number % 3] / spec.kind
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_ware(spec, number, 96)).save(folder / f"{number:02}.png")
    train = tmp_path / "data" / "train"
    first = train / "mug" / "00.png"
    Image.open(first).filter(ImageFilter.GaussianBlur(8)).save(train / "mug" / "blur.png")
    shutil.copy(train / "mug" / "03.png", train / "vase" / "copy.png")
    Image.open(train / "vase" / "06.png").resize((80, 80)).save(tmp_path / "data" / "val" / "vase" / "near.jpg")
    return tmp_path / "data"


def audit(root: Path, *arguments: str) -> int:
    return main("datamodules", ["audit", "--data", "ImageFolder", "--data.init_args.root", str(root), *arguments])


def test_findings_are_a_table_a_summary_and_a_page(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"findings.{suffix}" for suffix in ("parquet", "json", "csv")]
    for file in files:
        # The near duplicate across splits is a leak, which is refused in the end.
        assert audit(root, "--findings", str(file), "--html", str(tmp_path / "page" / "audit.html")) == 2
    frame = pd.DataFrame(pq.read_table(files[0]).to_pydict())
    assert tuple(frame.columns) == COLUMNS
    pd.testing.assert_frame_equal(frame, pd.DataFrame(json.loads(files[1].read_text())))
    assert len(pd.read_csv(files[2])) == len(frame)
    found = {(row.finding, row.image, row.other) for row in frame.itertuples()}
    assert ("duplicate", "train/vase/copy.png", "train/mug/03.png") in found
    assert ("conflicting-labels", "train/vase/copy.png", "train/mug/03.png") in found
    assert ("near-duplicate-across-splits", "val/vase/near.jpg", "train/vase/06.png") in found
    assert ("blurry", "train/mug/blur.png", "") in found
    assert frame["severity"].tolist() == sorted(frame["severity"], key=["high", "medium", "low"].index)
    (conflict,) = frame[frame["finding"] == "conflicting-labels"].itertuples()
    assert conflict.suggestion == "class: 'vase', but 'mug' for the same image"
    out = capsys.readouterr().out
    assert "conflicting-labels" in out
    assert "train/vase/copy.png" in out.replace("\n", "")
    page = (tmp_path / "page" / "audit.html").read_text()
    assert "<h2>near-duplicate-across-splits</h2>" in page
    assert "http" not in page.replace("http-equiv", ""), "nothing is loaded from elsewhere"
    assert page.count('src="data:image/jpeg') == sum(2 if other else 1 for _, _, other in found)


def test_near_duplicates_of_one_group_weigh_less(root: Path) -> None:
    data = ImageFolder(str(root), checks=CheckOptions(allow_leaks=["near"]))
    shutil.copy(root / "val" / "vase" / "near.jpg", root / "train" / "vase" / "same.jpg")
    (near,) = (one for one in data.audit().findings if one.finding == "near-duplicate")
    assert (near.image, near.severity, near.value <= near.threshold) == ("train/vase/same.jpg", "medium", True)
    again = ImageFolder(str(root), checks=CheckOptions(allow_leaks=["near"]))
    again.table.group_ids[:] = 0
    assert [one.severity for one in again.audit().findings if one.finding == "near-duplicate"] == ["low"]


def test_a_file_that_cannot_be_written_or_has_another_ending_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(root, "--findings", "findings.xlsx") == 2
    assert "--findings findings.xlsx: must end in .parquet, .json, .csv" in capsys.readouterr().err
    (root / "file").write_text("")
    assert audit(root, "--findings", str(root / "file" / "f.json")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_one_set_of_decoded_images_is_enough(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datamodules.loading import decode

    read: list[str] = []
    decoded = decode.decoded

    def watched(source: object, *options: object) -> object:
        read.append(str(source))
        return decoded(source, *options)  # type: ignore[arg-type]

    monkeypatch.setattr(decode, "decoded", watched)
    monkeypatch.setattr("datamodules.checks.audit.near_pairs", lambda *options: (np.zeros((0, 2), np.int64), 8))
    ImageFolder(str(root)).audit()
    assert sorted(read) == sorted(str(path) for path in root.rglob("*.*g"))
