"""What a run costs, as ``python -m evaluation efficiency`` measured it, as a section of a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evaluation.html_page import Section
from vitrail.runs import RunFiles

if TYPE_CHECKING:
    from evaluation.efficiency import Costs

EFFICIENCY = "efficiency.json"


@dataclass(frozen=True)
class Measured:
    """One model's part of the file.

    Attributes:
        counts: numbers by name that follow from the architecture.
        costs: None where only counts were wanted.
    """

    counts: Mapping[str, Any]
    costs: Costs | None


def efficiency_section(files: RunFiles) -> Section:
    """Counts and, for each batch size, latency, throughput and memory."""
    import pandas as pd

    section = Section("Efficiency")
    found = read_efficiency(files)
    if isinstance(found, str):
        section.missing.append(found)
        return section
    counts = {name: value for name, value in found.counts.items() if value is not None}
    told = [f"{value:,}" if isinstance(value, int) else str(value) for value in counts.values()]
    section.tables["efficiency_counts"] = pd.DataFrame(
        {"what": [name.replace("_", " ") for name in counts], "value": told}
    )
    section.says.append("A multiplication and an addition count as two floating-point operations (flops).")
    if found.costs is None or found.costs.error or not found.costs.batches:
        why = found.costs.error if found.costs is not None else ""
        section.missing.append(f"Time and memory were not measured. {why}".strip())
        return section
    section.says.append(f"Measured on {found.costs.device}, {found.costs.threads} threads.")
    section.tables["efficiency_time"] = pd.DataFrame(_time_rows(found.costs))
    return section


def read_efficiency(files: RunFiles) -> Measured | str:
    """What was measured, or a sentence that says why there is nothing."""
    command = f"`python -m evaluation efficiency {files.path}`"
    try:
        content = json.loads((files.path / EFFICIENCY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"Nothing is measured yet: {command} does."
    except (OSError, ValueError) as error:
        return f"{EFFICIENCY}: cannot be read ({type(error).__name__}); measure again with {command}."
    from evaluation.efficiency import costs_from_values

    try:
        (own,) = content.values()
        return Measured(dict(own["counts"]), own["costs"] and costs_from_values(own["costs"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{EFFICIENCY}: holds no measurement of one model; measure again with {command}."


def cpu_latency(measured: Measured) -> float:
    """Median milliseconds of one picture alone on the CPU; NaN where that was not measured."""
    costs = measured.costs
    if costs is None or costs.device != "cpu" or 1 not in costs.batches:
        return math.nan
    return 1e3 * costs.batches[1].p50


def _time_rows(costs: Costs) -> list[dict[str, Any]]:
    from evaluation.efficiency import ratio_told

    return [
        {
            "batch size": size,
            "rounds": len(one.seconds),
            "p50 [ms]": 1e3 * one.p50,
            "p95 [ms]": 1e3 * one.p95 if len(one.seconds) > 1 else math.nan,
            "pictures/s": size / one.p50,
            f"time, ratio to {costs.first}": ratio_told(one),
            "peak memory [MB]": math.nan if one.peak_bytes is None else one.peak_bytes / 1e6,
        }
        for size, one in sorted(costs.batches.items())
    ]
