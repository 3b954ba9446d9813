from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.data import growth
from experiments.train.cli import main


def test_all_images_of_a_class_are_one_file(tmp_path: Path) -> None:
    growth.write_images(tmp_path / "images", 25, 16)
    files = sorted((tmp_path / "images").glob("*/*.jpg"))
    assert len(files) == 25
    assert len({path.stat().st_ino for path in files}) == growth.CLASSES
    assert len({path.read_bytes() for path in files}) == growth.CLASSES


def test_a_run_reports_its_first_step_its_peak_and_its_workers(tmp_path: Path) -> None:
    growth.write_images(tmp_path / "images", 100)
    experiment = growth.experiment(tmp_path, tmp_path / "found.json", epoch=True, batch_size=40)
    assert main(["fit", "--config", str(experiment)]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    (record,) = (tmp_path / "runs").glob("*/*/run.json")
    assert abs(found["first_step"] - record.stat().st_mtime) < 60
    # Python with torch alone holds more than 100 MB; a worker has less for itself than everything together.
    assert found["peak"] > 100
    assert 0 < found["worker"] < found["peak"]


def test_sizes_are_compared_with_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {False: iter([2.0, 8.0]), True: iter([1.0, 1.5, 3.0, 2.0])}
    workers = iter([1.0, 1.0, 2.0, 2.0, 3.0, 2.0])

    def start(folder: Path, *, epoch: bool) -> dict[str, float]:
        worker = next(workers)
        return {"seconds": next(seconds[epoch]), "peak": 10 * worker, "worker": worker}

    monkeypatch.setattr(growth, "start", start)
    rows = growth.run(2, (10, 100))
    assert [(row.contender, row.peer) for row in rows] == [("100 images", "10 images")] * 4
    expected = [(4.0, 4.0, 4.0), (1.5, 1.5, 1.5), (1.25, 1.0, 1.5), (1.25, 1.0, 1.5)]
    assert [(row.ratio, row.low, row.high) for row in rows] == expected
    assert [row.kept for row in rows] == [None, None, None, False]
