from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from vitrail.errors import UserError
from vitrail.runs import CALIBRATION_FILE, read_temperatures, write_temperatures


def test_written_and_read_with_the_digest_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"weights")
    path = write_temperatures(tmp_path, {"class": 1.5, "colour": 0.5}, {"fitted_on": "val"})
    assert path == tmp_path / CALIBRATION_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["checkpoint_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert content["fitted_on"] == "val"
    assert read_temperatures(tmp_path) == {"class": 1.5, "colour": 0.5}
    assert sorted(file.name for file in path.parent.iterdir()) == ["best.ckpt", "calibration.json"]


def test_a_run_without_a_checkpoint_has_temperatures_until_it_has_one(tmp_path: Path) -> None:
    assert read_temperatures(tmp_path) == {}
    write_temperatures(tmp_path, {"class": 1.5}, {})
    assert read_temperatures(tmp_path) == {"class": 1.5}
    (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"belongs to another checkpoint.*calibrate .* again$"):
        read_temperatures(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"temperatures": [1], "checkpoint_sha256": null}',
        '{"temperatures": {"class": "hot"}, "checkpoint_sha256": null}',
    ],
)
def test_unreadable_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / CALIBRATION_FILE
    path.parent.mkdir()
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="not a readable calibration") as caught:
        read_temperatures(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["0", "-1", "NaN", "Infinity"])
def test_a_temperature_is_a_number_above_0(tmp_path: Path, value: str) -> None:
    path = tmp_path / CALIBRATION_FILE
    path.parent.mkdir()
    path.write_text(f'{{"temperatures": {{"class": {value}}}, "checkpoint_sha256": null}}', encoding="utf-8")
    with pytest.raises(UserError, match="finite numbers above 0"):
        read_temperatures(tmp_path)
