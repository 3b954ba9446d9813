"""What a tested training prints last: what was trained, its scores next to a baseline, and what to do with it."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from evaluation.commands import report
from evaluation.statistics.scores import heading
from evaluation.tables.summary import number_text, score_text, summarise_run
from vitrail.errors import UserError
from vitrail.programs import program_name
from vitrail.runs import Run
from vitrail.types import CLASS_KINDS

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule


def closing_summary(run: Run) -> str:
    """Return a dozen lines for a user who has just trained a first model.

    Args:
        run: that was tested.
    """
    data, model = run.record.get("data") or {}, run.record.get("model") or {}
    samples = data.get("samples") or {}
    size, trained, tested = int(model.get("parameters", 0)), samples.get("train", 0), samples.get("test", 0)
    lines = [
        f"{model.get('class', 'The model')} ({size:,} parameters) was trained on {trained:,} images of "
        f"{data.get('data', 'the data')} and tested on {tested:,} others."
    ]
    if parent := run.record.get("parent"):
        lines.append(f"  It went on from {parent}.")
    try:
        summaries = summarise_run(run.path, "test")
    except UserError:
        summaries = []  # captions alone: their scores are in the table above
    for one in summaries:
        constant = "the most frequent class" if one.kind in CLASS_KINDS else one.majority_label or "the same"
        lines.append(
            f"  {one.task}: {heading(one.main)} {score_text(one.main, one.main_score)}; always predicting {constant} "
            f"gives {number_text(one.main, one.majority)}"
        )
    return "\n".join([*lines, "Next:", *(f"  {line}" for line in _next(run, has_labels=bool(summaries))), ""])


def _next(run: Run, *, has_labels: bool) -> list[str]:
    path = shlex.quote(str(run.path))
    evaluation, experiments, retrieval = (program_name(name) for name in ("evaluation", "experiments", "retrieval"))
    page = run.path / "report.html"
    app = "vitrail app" if program_name("app") == "vitrail" else "python -m app"
    commands = [
        (f"{evaluation} report {path}", "everything about the run on one page"),
        (f"{experiments} predict {path} YOUR_IMAGES/", "what the model predicts for new images"),
        (f"{retrieval} index --run {path}", "a gallery of its images, to search in"),
        (f"{app} --run {path}", "try it in a browser"),
    ]
    left_out = 0 if page.exists() else 2 if has_labels else 1
    del commands[left_out]
    width = max(len(command) for command, _ in commands)
    lines = [f"{command:{width}}  # {what}" for command, what in commands]
    return [*lines, f"Report: {page}"] if page.exists() else lines


def write_report(run: Run, datamodule: ImageDataModule) -> None:
    """Write ``report.html``, as ``report RUN`` does, with the data of the training, which are read already."""
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    options: Any = parser.parse_args([str(run.path)])
    report.run(options, datamodule=datamodule)
