from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.data import growth
from experiments.train.cli import main


def test_all_images_of_a_class_are_one_file(tmp_path: Path) -> None:
    growth.write_images(tmp_path / "images", 25, 16)
    files = sorted((tmp_path / "images").glob("*/*.jpg"))
    assert len(files) == 25
    assert len({path.stat().st_ino for path in files}) == growth.CLASSES
    assert len({path.read_bytes() for path in files}) == growth.CLASSES


def test_a_run_tells_its_first_step_its_peak_and_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growth.write_images(tmp_path / "images", 100)
    monkeypatch.setattr(growth, "BATCH", 40)
    experiment = growth._experiment(tmp_path, tmp_path / "found.json", True)
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    assert main(["fit", "--config", str(tmp_path / "experiment.yaml")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    (record,) = (tmp_path / "runs").glob("*/*/run.json")
    assert abs(found["first_step"] - record.stat().st_mtime) < 60
    # Python with torch alone holds more than 100 MB; a worker has less for itself than everything together.
    assert found["peak"] > 100
    assert 0 < found["worker"] < found["peak"]


def test_sizes_stand_beside_the_smallest() -> None:
    def numbers(seconds: float, worker: float) -> growth.Numbers:
        return {"seconds": seconds, "peak": 10 * worker, "worker": worker}

    first = {10: numbers(2.0, 1.0), 100: numbers(8.0, 1.0)}
    later = {10: [numbers(1.0, 2.0), numbers(2.0, 2.0)], 100: [numbers(1.5, 2.0), numbers(3.0, 3.0)]}
    rows = growth.rows_of(first, later)
    assert [(row.contender, row.peer) for row in rows] == [("100 images", "10 images")] * 4
    expected = [(4.0, 4.0, 4.0), (1.5, 1.5, 1.5), (1.25, 1.0, 1.5), (1.25, 1.0, 1.5)]
    assert [(row.ratio, row.low, row.high) for row in rows] == expected
    assert [row.kept for row in rows] == [None, None, None, False]
