"""``vitrail evaluate RUN --class-map MAP``: folders or values of a data set that are called otherwise than the classes.

ImageNet-V2 numbers its folders, ImageNet-R, -A and -Sketch name them by WordNet, and ObjectNet has names of its own,
some of which stand for several classes. Such classes are one class in the results, whose logit is the largest of
theirs, so that a prediction counts as right if it is any of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.types import LABEL_TASK, UNKNOWN

ClassMap = Mapping[str, Sequence[str]]
"""The model's classes that each name of the data set stands for; one or more."""

_SEPARATOR = ";"


def read_class_map(given: str, names: Sequence[str], classes: Sequence[str]) -> ClassMap:
    """Return which of the model's classes the names of a data set stand for.

    Args:
        given: ``index`` for numbers of the model's classes from 0, ``imagenet`` for WordNet's names (``n01440764``) as
            timm has them, or a file: CSV with a name and a class a row, after a header, or JSON of names and classes.
            Several classes of a name are rows of their own, a list, or have ``;`` between them.
        names: of the data set.
        classes: of the model.

    Raises:
        UserError: the map cannot be read, has no class of the model's, or gives one class to two names.
    """
    if given == "index":
        found = {name: [classes[int(name)]] for name in names if name.isdecimal() and int(name) < len(classes)}
    elif given == "imagenet":
        found = _imagenet(names, classes)
    else:
        found = {name: own for name, own in _file(given).items() if name in names}
    known = set(classes)
    found = {name: kept for name, own in found.items() if (kept := [one for one in own if one in known])}
    if not found:
        raise UserError(
            f"--class-map {given}: maps none of the names ({', '.join(names[:3])} …) to a class of the model's "
            f"({', '.join(classes[:3])} …); give a CSV file with a name and a class a row"
        )
    if twice := [one for one, count in Counter(one for own in found.values() for one in own).items() if count > 1]:
        both = [name for name, own in found.items() if twice[0] in own]
        raise UserError(f"--class-map {given}: class {twice[0]!r} is given to {' and '.join(both[:2])}; keep one")
    return found


def _imagenet(names: Sequence[str], classes: Sequence[str]) -> dict[str, list[str]]:
    """Match by WordNet's name, its description, or one of the words in it that no other class of ImageNet has."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    descriptions = {name: info.label_name_to_description(name) for name in info.label_names()}
    words = {name: [part.strip() for part in text.split(",")] for name, text in descriptions.items()}
    count = Counter(one for name, own in words.items() for one in {*map(_plain, own), _plain(descriptions[name])})
    place = {_plain(name): name for name in classes}
    found = {}
    for name in names:
        if name in words:
            # "crane" is a bird and a machine: what two classes are called means neither.
            own = [one for one in (descriptions[name], *words[name]) if count[_plain(one)] == 1]
            called = [name, *own]
            if matches := [place[_plain(one)] for one in called if _plain(one) in place]:
                found[name] = matches[:1]
    return found


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _file(path: str) -> dict[str, list[str]]:
    import pandas as pd

    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--class-map {path}: must be index, imagenet, or a CSV or JSON file; there is no such file")
    try:
        if file.suffix.lower() == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            pairs = [(str(name), own) for name, own in content.items()]
        else:
            frame = pd.read_csv(file, dtype=str, keep_default_na=False)
            pairs = list(zip(frame.iloc[:, 0], frame.iloc[:, 1], strict=True))
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"--class-map {path}: must have names and classes ({error})") from error
    found: dict[str, list[str]] = {}
    for name, own in pairs:
        several = own if isinstance(own, list) else str(own).split(_SEPARATOR)
        found.setdefault(name.strip(), []).extend(one for part in several if (one := str(part).strip()))
    return found


def merged_classes(predictions: Predictions, mapped: ClassMap) -> Predictions:
    """Return predictions in which classes that one name stands for are one class, called like the first of them."""
    if LABEL_TASK not in predictions.tasks:
        return predictions
    old = list(predictions.tasks[LABEL_TASK])
    first = {one: own[0] for own in mapped.values() for one in own}
    names = list(dict.fromkeys(first.get(name, name) for name in old))
    members = [[place for place, name in enumerate(old) if first.get(name, name) == kept] for kept in names]
    own = predictions.logits[LABEL_TASK]
    logits: Any = np.stack([own[:, places].max(axis=1) for places in members], axis=1)
    targets = predictions.targets[LABEL_TASK]
    place = np.array([*(names.index(first.get(name, name)) for name in old), UNKNOWN], dtype=np.int64)
    return replace(
        predictions,
        tasks={**predictions.tasks, LABEL_TASK: names},
        logits={**predictions.logits, LABEL_TASK: logits},
        targets={**predictions.targets, LABEL_TASK: place[targets]},
    )
