"""What may be wrong with a data set, as sections of a page: leaks between splits, and suspected labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.dataset.features import thumbnail
from evaluation.dataset.figures import Tile, contact_sheet
from evaluation.dataset.label_issues import FOLDS, LabelIssues, find_label_issues, out_of_fold
from evaluation.dataset.sections import Collection
from evaluation.report.figures import short
from evaluation.report.page import Section
from vitrail.errors import UserError
from vitrail.trust import file_name
from vitrail.types import UNKNOWN

TOO_WEAK, STRONG = 0.5, 0.8
"""Accuracy below which a probe's doubts are not shown, and from which the share of wrong labels is estimated: a weak
probe's mistakes would be counted as the labels'."""

_TITLE = "Suspected labels"
_SHOWN_PAIRS, _SHOWN_SUSPECTS = 6, 24
_SIDE = 128


def leak_section(collection: Collection, audit: Mapping[str, Any]) -> Section:
    """Groups and images that are in several splits."""
    import pandas as pd

    leaks = audit["leaks"]
    rows: list[dict[str, Any]] = [
        {"kind": "group in several splits", "first": found["group"], "second": "", "splits": _counts(found["counts"])}
        for found in leaks["groups"]
    ]
    kinds = {"exact": "identical images", "near": "nearly identical images"}
    for kind, title in kinds.items():
        rows += [
            {
                "kind": title,
                "first": pair["first"]["name"],
                "second": pair["second"]["name"],
                "splits": f"{pair['first']['split']}, {pair['second']['split']}",
            }
            for pair in leaks[kind]
        ]
    not_checked: Mapping[str, str] = leaks.get("not_checked", {})
    own_groups = bool(leaks.get("own_groups"))
    counted = [] if "groups" in not_checked or own_groups else [f"{len(leaks['groups'])} groups"]
    missing = []
    if own_groups and "groups" not in not_checked:
        missing.append(
            "The data name no objects (groups) with several images: whether one is in several splits is not known."
        )
    if leaks["near_radius"] is None:
        missing.append("Images are generated, so they are not compared with each other: only groups are checked.")
    else:
        counted += [f"{len(leaks[kind])} pairs of {title}" for kind, title in kinds.items() if kind not in not_checked]
        missing += [f"Not checked: {kinds.get(kind, kind)} ({why})." for kind, why in not_checked.items()]
    paragraphs = [
        f"In several splits: {', '.join(counted) or 'nothing was compared'}. A model that has seen an object in "
        "training is good at it again, so a test split with leaks looks better than the model is."
    ]
    section = Section("Leaks between splits", paragraphs, missing=missing)
    if rows:
        section.tables["leaks"] = pd.DataFrame(rows)
    if tiles := _pair_tiles(collection, [*leaks["exact"], *leaks["near"]]):
        section.figures["leaks"] = contact_sheet(tiles, columns=4)
    return section


def label_section(
    collection: Collection,
    task: str | None,
    rows: NDArray[np.int64],
    features: NDArray[Any],
    origin: str,
    *,
    folds: int = FOLDS,
    seed: int = 0,
) -> Section:
    """Labels that a linear probe, trained on other groups, disagrees with."""
    if task is None:
        return Section(_TITLE, missing=["The data have no labels, so none can be suspected."])
    targets = collection.targets[task][rows]
    known = np.flatnonzero(targets != UNKNOWN)
    rows, labels = rows[known], targets[known]
    try:
        probability = out_of_fold(
            features[known], labels, collection.groups[rows], len(collection.tasks[task]), folds=folds, seed=seed
        )  # fmt: skip
    except UserError as error:
        return Section(_TITLE, missing=[f"{error}."])
    issues = find_label_issues(probability, labels)
    missing = []
    if alone := len(labels) - issues.evaluated:
        missing.append(f"Samples that cannot be evaluated, because no other group has a label like theirs: {alone:,}.")
    if issues.evaluated and issues.accuracy < TOO_WEAK:
        missing.append(
            f"A linear probe on {origin} is right, by the labels, for {issues.accuracy:.1%} only: that it doubts a "
            "label means nothing, so none is suspected here."
        )
    if not issues.evaluated or issues.accuracy < TOO_WEAK:
        return Section(_TITLE, missing=missing)
    own_groups = len(set(collection.groups.tolist())) == len(collection.groups)
    section = Section(_TITLE, _paragraphs(task, issues, origin, own_groups), missing=missing)
    if len(issues.rows):
        _add_suspects(section, collection, task, rows, issues)
    return section


def _paragraphs(task: str, issues: LabelIssues, origin: str, own_groups: bool) -> list[str]:
    apart = (
        "no image is evaluated by itself (the data name no objects with several images)"
        if own_groups
        else "no object is evaluated by its own images"
    )
    noise = f"The estimated share of wrong labels is {issues.noise:.1%}. " if issues.accuracy >= STRONG else ""
    return [
        f"{len(issues.rows):,} of {issues.evaluated:,} labels of {task} are suspected by confident learning. {noise}"
        f"They come from a linear probe on {origin}, cross-validated so that {apart}.",
        f"The probe itself is right, by the labels, for {issues.accuracy:.1%}: the less that is, the more of the "
        "suspected labels are right and the probe is wrong. Look before you change a label.",
    ]


def _add_suspects(
    section: Section, collection: Collection, task: str, rows: NDArray[np.int64], issues: LabelIssues
) -> None:
    """Add the table of all suspected labels and a sheet of the first ones; ``rows`` are those of the issues."""
    import pandas as pd

    names, chosen = collection.tasks[task], rows[issues.rows]
    labels = [names[code] for code in collection.targets[task][chosen]]
    suggested = [names[code] for code in issues.suggested]
    section.tables[f"suspects_{file_name(task)}"] = pd.DataFrame(
        {
            "name": collection.names[chosen],
            "split": collection.splits[chosen],
            "label": labels,
            "suggested": suggested,
            "margin": issues.margin.round(4),
        }
    )
    shown = list(zip(chosen.tolist(), labels, suggested, strict=True))[:_SHOWN_SUSPECTS]
    tiles = [
        Tile(thumbnail(collection.read(row), _SIDE), f"{short(label, 22)}\n→ {short(other, 20)}")
        for row, label, other in shown
    ]
    section.figures[f"suspects_{file_name(task)}"] = contact_sheet(tiles)


def _pair_tiles(collection: Collection, pairs: Sequence[Mapping[str, Any]]) -> list[Tile]:
    """Both images of the first pairs, next to each other."""
    row_of = {name: row for row, name in enumerate(collection.names.tolist())}
    return [
        Tile(
            thumbnail(collection.read(row_of[side["name"]]), _SIDE),
            f"{short(side['name'].rsplit('/', 1)[-1], 24)}\n{side['split']}, pair {number}",
        )
        for number, pair in enumerate(pairs[:_SHOWN_PAIRS], start=1)
        for side in (pair["first"], pair["second"])
    ]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{split} {count}" for split, count in counts.items())
