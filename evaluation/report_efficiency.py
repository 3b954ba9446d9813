"""What a run costs, as ``python -m evaluation efficiency`` measured it, as a section of a report."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from evaluation.html_page import Section
from evaluation.report_run import flattened
from evaluation.run_files import RunFiles

if TYPE_CHECKING:
    import pandas as pd

EFFICIENCY = "efficiency.json"


def efficiency_section(files: RunFiles) -> Section:
    """Everything that the measurement says: single numbers as one table, lists of rows as a table each."""
    import pandas as pd

    title = "Efficiency"
    content = read_efficiency(files)
    if isinstance(content, str):
        return Section(title, missing=[content])
    tables: dict[str, pd.DataFrame] = {}
    single: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            tables[f"efficiency_{key}"] = pd.DataFrame([flattened(row) for row in value])
        else:
            single |= flattened({key: value})
    if single:
        told = [f"{value:,}" if isinstance(value, (int, float)) else str(value) for value in single.values()]
        tables = {"efficiency": pd.DataFrame({"what": list(single), "value": told}), **tables}
    return Section(title, tables=tables, missing=[] if tables else [f"{EFFICIENCY} holds nothing."])


def read_efficiency(files: RunFiles) -> dict[str, Any] | str:
    """What was measured, or a sentence that says why there is nothing."""
    path = files.path / EFFICIENCY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"Nothing is measured yet: `python -m evaluation efficiency {files.path}` does."
    except (OSError, ValueError) as error:
        return f"{EFFICIENCY}: cannot be read ({type(error).__name__}); measure again."
    return content if isinstance(content, dict) else f"{EFFICIENCY}: holds no measurement; measure again."


def latency_of(content: dict[str, Any]) -> float:
    """Median milliseconds a picture on the CPU, one by one; NaN where that was not measured."""
    rows = content.get("latency")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and str(row.get("device", "")).startswith("cpu") and row.get("batch_size") == 1:
            value = row.get("p50_ms")
            return float(value) if isinstance(value, (int, float)) else math.nan
    return math.nan
