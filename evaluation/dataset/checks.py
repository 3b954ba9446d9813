"""What may be wrong with a data set: leaks between splits, and labels that a classifier disagrees with.

Labels are suspected by confident learning, Northcutt, Jiang & Chuang, JAIR 70 (2021), from predictions of images that
the classifier was not trained on. A class's threshold is the mean probability that images labelled with it get for it.
An image that reaches the threshold of another class, and of no class more clearly, is counted in the confident joint at
(its label, that class); all off its diagonal are suspected. Classes that the classifier finds hard have low thresholds
and others high ones, so a timid or a bold classifier does no harm. Where features are poor, most suspected labels are
right.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.dataset.features import Reduction, fitted, probabilities, thumbnail
from evaluation.dataset.figures import Tile, contact_sheet
from evaluation.dataset.sections import Collection
from evaluation.report.figures import short
from evaluation.report.page import Section
from vitrail.errors import UserError
from vitrail.predictions import predicted_classes
from vitrail.trust import file_name
from vitrail.types import UNKNOWN

FOLDS = 5

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
    counted = [] if "groups" in not_checked or own_groups else [f"groups {len(leaks['groups'])}"]
    missing = []
    if own_groups and "groups" not in not_checked:
        missing.append(
            "The data name no objects (groups) with several images: whether one is in several splits is not known."
        )
    if leaks["near_radius"] is None:
        missing.append("Images are generated, so they are not compared with each other: only groups are checked.")
    else:
        counted += [f"pairs of {title} {len(leaks[kind])}" for kind, title in kinds.items() if kind not in not_checked]
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


@dataclass(frozen=True)
class LabelIssues:
    """What is suspected of N labelled samples and C classes.

    Attributes:
        rows: int64 ``(S,)``, the suspected ones, the most suspicious first.
        suggested: int64 ``(S,)``, the class that the classifier is confident of.
        margin: float64 ``(S,)``, probability of the label less that of the best other class, -1 to 1; lower is more
            suspicious.
        joint: int64 ``(C, C)``, the confident joint: row the label, column the confident class.
        noise: estimated share of wrong labels, 0 to 1; the joint's off-diagonal after each class is scaled to its size.
        evaluated: samples that could be evaluated.
        accuracy: share of these that the classifier gives their label.
    """

    rows: NDArray[np.int64]
    suggested: NDArray[np.int64]
    margin: NDArray[np.float64]
    joint: NDArray[np.int64]
    noise: float
    evaluated: int
    accuracy: float


def out_of_fold(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    groups: NDArray[Any],
    num_classes: int,
    *,
    folds: int = FOLDS,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Return probabilities from a linear probe that saw neither the sample nor any other sample of its group.

    Args:
        features: ``(N, D)``.
        labels: int64 ``(N,)``, all known.
        groups: ``(N,)``, the physical object of each.
        num_classes: C.
        folds: at most; fewer where there are fewer groups, or fewer samples of every class.
        seed: of the division.

    Returns:
        float64 ``(N, C)``; NaN in the rows whose label the other folds do not have, which cannot be evaluated.

    Raises:
        UserError: for fewer than two classes or groups, classes of one sample only, or features that are not finite.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    _check(features, labels, groups)
    folds = min(folds, len(np.unique(groups)), int(np.bincount(labels).max()))
    result = np.full((len(labels), num_classes), np.nan)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, held_out in _divisions(splitter, labels, groups):
        present = np.unique(labels[train])
        if len(present) < 2:
            continue
        reduction = Reduction(features[train])
        classifier = fitted(reduction(features[train]), labels[train])
        rows = held_out[np.isin(labels[held_out], present)]
        if len(rows):
            result[rows] = probabilities(classifier, reduction(features[rows]), num_classes)
    return result


def find_label_issues(probability: NDArray[np.float64], labels: NDArray[np.int64]) -> LabelIssues:
    """Apply confident learning to out-of-fold probabilities ``(N, C)``, with NaN rows for samples to leave out."""
    num_classes = probability.shape[1]
    evaluated = np.flatnonzero(np.isfinite(probability).all(axis=1))
    probability, given = probability[evaluated], labels[evaluated]
    counts = np.bincount(given, minlength=num_classes)
    own = np.take_along_axis(probability, given[:, None], axis=1)[:, 0] if len(evaluated) else np.zeros(0)
    sums = np.bincount(given, weights=own, minlength=num_classes)
    # A class without samples has no threshold that could be reached.
    threshold = np.divide(sums, counts, out=np.full(num_classes, np.inf), where=counts > 0)
    reached = np.where(probability >= threshold, probability, -np.inf)
    is_confident = np.isfinite(reached).any(axis=1)
    confident = reached.argmax(axis=1) if len(evaluated) else np.zeros(0, np.int64)
    joint = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(joint, (given[is_confident], confident[is_confident]), 1)
    others = probability.copy()
    np.put_along_axis(others, given[:, None], -np.inf, axis=1)
    margin = own - (others.max(axis=1) if len(evaluated) else own)
    places = np.flatnonzero(is_confident & (confident != given))
    places = places[np.argsort(margin[places], kind="stable")]
    right = float((predicted_classes(probability) == given).mean()) if len(evaluated) else float("nan")
    return LabelIssues(
        evaluated[places], confident[places], margin[places], joint, _noise(joint, counts), len(evaluated), right
    )


def _noise(joint: NDArray[np.int64], counts: NDArray[np.int64]) -> float:
    """Share off the diagonal, once each label's row is scaled to as many samples as have the label."""
    totals = joint.sum(axis=1)
    rows = totals > 0
    if not rows.any():
        return float("nan")
    right = np.diag(joint)[rows] / totals[rows] * counts[rows]
    return float(1 - right.sum() / counts[rows].sum())


def _check(features: NDArray[Any], labels: NDArray[np.int64], groups: NDArray[Any]) -> None:
    if len(np.unique(labels)) < 2:
        raise UserError("label issues: there are fewer than two classes with a labelled sample, so nothing to compare")
    if np.bincount(labels).max() < 2:
        raise UserError("label issues: no class has two labelled samples, so none can be evaluated by others")
    if len(np.unique(groups)) < 2:
        raise UserError("label issues: all samples are of one group, so none can be evaluated by others")
    if not np.isfinite(features).all():
        raise UserError("label issues: features are not finite; has the model diverged?")


def _divisions(splitter: Any, labels: NDArray[np.int64], groups: NDArray[Any]) -> list[tuple[Any, Any]]:
    with warnings.catch_warnings():
        # Classes with fewer samples than folds are in some folds only, and are reported as not evaluated.
        warnings.filterwarnings("ignore", message="The least populated class")
        return list(splitter.split(np.zeros(len(labels)), labels, groups))
