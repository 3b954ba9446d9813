"""An ablation as one YAML file: an experiment, and variants that each change a little of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitrail.config import load_yaml, merged, read_experiment, read_experiments
from vitrail.errors import UserError

_KEYS = {"experiment", "variants"}
_VARIANT_KEYS = {"name", "changes"}
_PLACE = "{file}: variants[{number}]"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: as the file has it.
        experiment: the whole experiment file, the variant's changes and everything asked for merged in.
    """

    name: str
    experiment: Mapping[str, Any]

    @property
    def slug(self) -> str:
        """Its name as a folder's."""
        return re.sub(r"[^\w.@-]+", "_", self.name).strip("_.")

    @property
    def fingerprint(self) -> str:
        """Changes with anything that its numbers depend on."""
        return hashlib.sha256(json.dumps(self.experiment, sort_keys=True).encode()).hexdigest()[:16]


def read_ablation(file: Path, overlays: Sequence[Path] = (), settings: Sequence[str] = ()) -> list[Variant]:
    """The variants of a file.

    Args:
        file: of the ablation; ``experiment:`` in it is relative to it.
        overlays: experiment files that are laid over every variant.
        settings: ``KEY=VALUE`` for all variants or ``NAME:KEY=VALUE`` for one, the last word on both.

    Raises:
        UserError: for a file or a setting that is not as it should be.
    """
    content = read_experiment(file)
    if strange := sorted(set(content) - _KEYS):
        raise UserError(f"{file}: unknown key {strange[0]!r}; an ablation has experiment: and variants:")
    if not isinstance(content.get("experiment"), str) or not isinstance(content.get("variants"), list):
        raise UserError(f"{file}: needs experiment: with the path of an experiment, and a list variants:")
    base = read_experiment(file.parent / content["experiment"])
    variants = []
    for number, one in enumerate(content["variants"]):
        place = _PLACE.format(file=file, number=number)
        if not isinstance(one, dict) or set(one) != _VARIANT_KEYS or not isinstance(one["changes"], dict):
            raise UserError(f"{place}: needs name: and changes:, which holds keys as an experiment file has them")
        experiment = merged(merged(base, one["changes"]), read_experiments(overlays))
        variants.append(Variant(str(one["name"]), experiment))
    _check_names(file, variants)
    return _with_settings(variants, settings)


def _check_names(file: Path, variants: Sequence[Variant]) -> None:
    if not variants:
        raise UserError(f"{file}: variants: is empty; name at least one")
    seen: set[str] = set()
    for variant in variants:
        if not variant.slug or variant.slug in seen:
            raise UserError(f"{file}: variants: {variant.name!r} is not a name of its own as a folder; rename it")
        seen.add(variant.slug)


def _with_settings(variants: Sequence[Variant], settings: Sequence[str]) -> list[Variant]:
    names = [variant.name for variant in variants]
    changes: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in settings:
        left, equals, text = setting.partition("=")
        # A name may hold a colon of its own, a key never does.
        name, colon, key = left.rpartition(":")
        if not equals or not key or (colon and name not in changes):
            raise UserError(
                f"--set {setting}: is neither KEY=VALUE nor NAME:KEY=VALUE with NAME one of {', '.join(names)}"
            )
        for one in [name] if colon else names:
            changes[one] = merged(changes[one], _nested(key, text, setting))
    return [Variant(variant.name, merged(dict(variant.experiment), changes[variant.name])) for variant in variants]


def _nested(key: str, text: str, setting: str) -> dict[str, Any]:
    try:
        nested: dict[str, Any] = load_yaml(text or '""', below=key.split("."))
    except yaml.YAMLError as error:
        raise UserError(f"--set {setting}: the value is no YAML") from error
    return nested
