"""What a task's head outputs for each kind of target, and how it is trained and scored: one file a kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_modules.heads.base import TaskOutput
from lightning_modules.heads.multi_label import MultiLabelOutput
from lightning_modules.heads.ordinal import OrdinalOutput
from lightning_modules.heads.regression import RegressionOutput
from lightning_modules.heads.single_label import SingleLabelOutput, class_weights_from_counts
from lightning_modules.options import LossOptions
from vitrail.errors import UserError
from vitrail.types import TaskFacts, kind_of

__all__ = [
    "MultiLabelOutput",
    "OrdinalOutput",
    "RegressionOutput",
    "SingleLabelOutput",
    "TaskOutput",
    "task_outputs",
]


def task_outputs(
    tasks: Mapping[str, Sequence[str]],
    facts: TaskFacts,
    options: LossOptions,
) -> list[TaskOutput]:
    """Build the output of each task.

    Args:
        tasks: class names of each task.
        facts: kinds of the tasks, and statistics of their targets.
        options: losses by kind or task, label smoothing and class weights.

    Raises:
        UserError: an option does not belong to a task, or the data lack what it needs.
    """
    if unknown := sorted(set(options.by_task) - set(tasks)):
        raise UserError(f"loss_options.by_task: no task {unknown[0]!r}; tasks are {', '.join(tasks)}")
    outputs: list[TaskOutput] = []
    for task, names in tasks.items():
        kind, n = kind_of(facts.task_kinds, task), len(names or ())
        loss = options.loss_of(task, kind)
        if kind == "multi_label":
            outputs.append(MultiLabelOutput(n, loss, options))
        elif kind == "regression":
            outputs.append(RegressionOutput(task, facts.target_stats.get(task), loss, options.delta))
        else:
            weights = class_weights_from_counts(task, n, facts.class_counts, options.class_weighting)
            if kind == "ordinal":
                outputs.append(OrdinalOutput(n, loss, weights))
            else:
                prior = facts.class_counts.get(task)
                outputs.append(SingleLabelOutput(task, n, loss, options, prior, weights))
    return outputs
