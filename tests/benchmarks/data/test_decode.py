from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data import decode


def test_every_decoder_has_a_row_and_the_reference_preset_a_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path))
    rows = decode.run(1, number=2)
    assert {decode.OURS, decode.SIMPLEJPEG, decode.TORCHVISION, decode.HALF, "reference"} <= {
        one.contender for one in rows
    }
    assert rows[-1].promise == "≥ 0.25"
    assert all(one.ratio > 0 for one in rows)
