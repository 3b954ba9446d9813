from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from evaluation.commands.efficiency import write
from evaluation.cost.efficiency import BatchCost, Costs, Counts
from evaluation.report.sections import cpu_latency, efficiency_section, read_efficiency
from vitrail.runs import RunFiles

COUNTS = Counts(2_000_000, 1_000, 5_000_000, None, 8_000_000, 224)
COSTS = Costs(
    "cpu",
    2,
    "shop/1",
    {1: BatchCost([0.02, 0.01, 0.03], [1.0, 2.0, 3.0], None), 8: BatchCost([0.1] * 3, [1.0] * 3, 5_000_000)},
)


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    return RunFiles(tmp_path)


def test_what_was_measured_is_shown(files: RunFiles) -> None:
    write(files.path / "efficiency.json", {"shop/1": (COUNTS, COSTS)})
    section = efficiency_section(files)
    counts = section.tables["efficiency_counts"]
    assert dict(zip(counts["what"], counts["value"], strict=True))["parameters"] == "2,000,000"
    assert "text flops" not in counts["what"].tolist()
    time = section.tables["efficiency_time"].set_index("batch size")
    assert time["p50 [ms]"].tolist() == pytest.approx([20, 100])
    assert time["images/s"].tolist() == pytest.approx([50, 80])
    assert time["time, ratio to shop/1"][1] == "2.00 [1.00, 3.00]"
    assert math.isnan(time["peak memory [MB]"][1])
    assert time["peak memory [MB]"][8] == 5
    assert section.missing == []


def test_latency_is_that_of_one_image_on_the_cpu(files: RunFiles) -> None:
    for costs, expected in (
        (COSTS, 20),
        (Costs("NVIDIA", 2, "a", COSTS.batches), math.nan),
        (Costs("cpu", 2, "a", {8: COSTS.batches[8]}), math.nan),
        (None, math.nan),
    ):
        write(files.path / "efficiency.json", {"shop/1": (COUNTS, costs)})
        found = read_efficiency(files)
        assert not isinstance(found, str)
        assert cpu_latency(found) == pytest.approx(expected, nan_ok=True)


def test_counts_alone_say_that_time_was_not_measured(files: RunFiles) -> None:
    for costs in (None, Costs(error="no memory")):
        write(files.path / "efficiency.json", {"shop/1": (COUNTS, costs)})
        section = efficiency_section(files)
        assert list(section.tables) == ["efficiency_counts"]
        assert section.missing[0].startswith("Time and memory were not measured.")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "cannot be read"),
        ("[]", "holds no measurement of one model"),
        ("{}", "holds no measurement of one model"),
        (json.dumps({"a": {"counts": {}}}), "holds no measurement of one model"),
        (json.dumps({"a": {"counts": asdict(COUNTS), "costs": {"batches": {}, "odd": 1}}}), "holds no measurement"),
    ],
)
def test_damaged_files_are_told(files: RunFiles, content: str, told: str) -> None:
    (files.path / "efficiency.json").write_text(content, encoding="utf-8")
    section = efficiency_section(files)
    assert told in section.missing[0]
    assert f"`python -m evaluation efficiency {files.path}`" in section.missing[0]
    assert not section.tables


def test_nothing_measured_names_the_command(files: RunFiles) -> None:
    assert efficiency_section(files).missing == [
        f"Nothing is measured yet: `python -m evaluation efficiency {files.path}` does."
    ]
