"""What an ablation leaves: the table as CSV and Markdown, and a plot of accuracy over cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.efficiency import cells, columns, ratios_to
from evaluation.figures import plain
from evaluation.summary import markdown_rows, with_interval
from evaluation.summary_wide import task_heading
from vitrail.files import write_csv
from vitrail.runs import write_text_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from experiments.ablation_results import Results


def write_reports(folder: Path, title: str, results: Sequence[Results]) -> str:
    """Write ``ablation.csv``, ``ablation.md`` and ``ablation.png``, each whole.

    Returns:
        A line that says where they lie; one before it where ratios are not to the first variant.
    """
    import pandas as pd

    from evaluation.figures import save_figure

    write_csv(folder / "ablation.csv", pd.DataFrame([_values(result) for result in results]))
    note = ratios_to({result.variant.name: (result.counts, result.costs) for result in results})
    told = "\n".join([f"# {title}", "", markdown_table(results), *(["", note] if note else [])])
    write_text_whole(folder / "ablation.md", f"{told}\n")
    figure = _figure(results, title)
    if figure is not None:
        save_figure(figure, folder / "ablation.png")
    written = f"{folder} has ablation.csv, ablation.md{' and ablation.png' if figure else ''}"
    return f"{note}\n{written}" if note else written


def markdown_table(results: Sequence[Results]) -> str:
    """One row a variant."""
    return markdown_rows(*_text(results))


def rich_table(results: Sequence[Results], title: str) -> Table:
    """One column a variant: there are more numbers than variants."""
    from rich.markup import escape
    from rich.table import Table

    names, rows = _text(results)
    table = Table(*(escape(one) for one in ["", *(row[0] for row in rows)]), title=escape(title))
    for place, name in enumerate(names[1:], 1):
        table.add_row(escape(name), *(escape(row[place]) for row in rows))
    return table


def _text(results: Sequence[Results]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; one row a variant. What nobody has is no column."""
    sizes = _batch_sizes(results)
    accuracies = {id(result): {one.task: one for one in result.accuracies()} for result in results}
    tasks = list(dict.fromkeys(task for known in accuracies.values() for task in known))
    headings = [task_heading([known[task] for known in accuracies.values() if task in known]) for task in tasks]
    names = ["variant", "px", *columns(sizes), *(f"{heading} [95 %]" for heading in headings), "note"]
    rows = []
    for result in results:
        known = accuracies[id(result)]
        rows.append(
            [
                result.variant.name,
                str(result.counts.image_size) if result.counts else "–",
                *cells(result.counts, result.costs, sizes),
                *(
                    with_interval(known[task].accuracy, known[task].accuracy_interval) if task in known else "–"
                    for task in tasks
                ),
                result.note,
            ]
        )
    # What no variant has takes no room.
    kept = [place for place in range(len(names)) if not rows or any(row[place] not in ("", "–") for row in rows)]
    return [names[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _values(result: Results) -> dict[str, Any]:
    """The numbers themselves, for the CSV; empty where there are none."""
    row: dict[str, Any] = {"variant": result.variant.name}
    if result.counts is not None:
        row |= vars(result.counts)
    if (costs := result.costs) is not None and not costs.error:
        row |= {"device": costs.device, "threads": costs.threads, "ratio_to": costs.first}
        for size, one in costs.batches.items():
            row |= {
                f"p50_seconds_{size}": one.p50,
                f"p95_seconds_{size}": one.p95,
                f"ratio_{size}": one.ratio,
                f"ratio_low_{size}": min(one.ratios),
                f"ratio_high_{size}": max(one.ratios),
                f"peak_bytes_{size}": one.peak_bytes,
            }
    for task in result.accuracies():
        row |= {
            f"{task.task}_n": task.n,
            f"{task.task}_groups": task.groups,
            f"{task.task}_majority": task.majority,
            f"{task.task}_accuracy": task.accuracy,
            f"{task.task}_accuracy_low": task.accuracy_interval.low,
            f"{task.task}_accuracy_high": task.accuracy_interval.high,
            f"{task.task}_f1_macro": task.f1_macro,
        }
    return {**row, "run": result.run, "note": result.note}


def _batch_sizes(results: Sequence[Results]) -> list[int]:
    return sorted({size for result in results if (costs := result.costs) is not None for size in costs.batches})


def _figure(results: Sequence[Results], title: str) -> Figure | None:
    """Accuracy of the main task over operations; without accuracies, the time's ratio; without either, nothing."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(7.5, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    drawn = [(result, point) for result in results if result.counts and (point := _accuracy_of(result))]
    label = f"accuracy, {drawn[0][1][3]}, test; 95 % by object" if drawn else ""
    if not drawn:
        sizes = _batch_sizes(results)
        drawn = [
            (result, point) for result in results if result.counts and sizes and (point := _time_of(result, sizes))
        ]
        if not drawn:
            return None
        first = next(costs.first for result in results if (costs := result.costs) and costs.first)
        label = f"time, ratio to {first}, batch of {sizes[0]}; lowest and highest round"
        axes.set_yscale("log")
    seen: set[float] = set()
    for result, (value, low, high, _) in drawn:
        assert result.counts is not None
        flops = result.counts.picture_flops / 1e9
        errors = [[value - low], [high - value]]
        axes.errorbar([flops], [value], yerr=errors, fmt="o", color="#2b6cb0", ecolor="#9db8d6", capsize=3)
        # Variants of one architecture lie at one place; so that their names do not, the later one's hangs below.
        below = any(0.75 < flops / other < 1.33 for other in seen)
        seen.add(flops)
        offset = (6, -11 if below else 5)
        axes.annotate(plain(result.variant.name), (flops, value), xytext=offset, textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        # Plain numbers, not powers of ten; on a linear axis nothing changes.
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter() if len(drawn) > 4 else FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("GFLOP of a picture")
    axes.set_ylabel(plain(label))
    axes.set_title(plain(title))
    axes.margins(x=0.25, y=0.12)
    axes.grid(alpha=0.3)
    return figure


def _accuracy_of(result: Results) -> tuple[float, float, float, str] | None:
    main = next(iter(result.accuracies()), None)
    if main is None or not main.n:
        return None
    return main.accuracy, main.accuracy_interval.low, main.accuracy_interval.high, main.task


def _time_of(result: Results, sizes: Sequence[int]) -> tuple[float, float, float, str] | None:
    one = costs.batches.get(sizes[0]) if (costs := result.costs) else None
    return (one.ratio, min(one.ratios), max(one.ratios), "") if one else None
