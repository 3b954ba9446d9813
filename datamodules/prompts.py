"""Class prompts: the texts that stand for a class, in training and in zero-shot evaluation alike.

Several prompts of a class are an ensemble, whose embeddings the model averages (Radford et al., 2021). Descriptions of
each class go back to Menon and Vondrick, "Visual classification via description from large language models", ICLR 2023.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from datamodules.columns import composed
from vitrail.errors import UserError

TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "name": ("{}",),
    # OpenAI's for Flowers-102, and the later code of the reference project.
    "openai_flowers": ("a photo of a {}, a type of flower.",),
    # The reference project's README.
    "reference_flowers": ("an image of the {} flower",),
}
"""Named sets of templates."""

DEFAULT = "photo"
_SHOWN = 5


class PromptOptions(TypedDict, total=False):
    """Which texts stand for a class; by default the set ``photo``. Underscores of class names become spaces.

    Attributes:
        name: a named set of templates: photo, name, openai_flowers or reference_flowers.
        templates: templates of your own, each with ``{}`` where the class name stands.
        descriptions: path of a JSON file with an object from class name to a list of texts, used as they are.
    """

    name: str
    templates: list[str]
    descriptions: str


def class_prompts(options: PromptOptions | None, class_names: Sequence[str]) -> list[list[str]]:
    """The prompts of each class: those of the templates first, then its descriptions.

    Args:
        options: which ones.
        class_names: in the order of the labels.

    Returns:
        For each class one prompt or more.

    Raises:
        UserError: for an unknown key or set, a template without one ``{}``, or classes without a description.
    """
    given = options or {}
    if strange := sorted(set(given) - set(PromptOptions.__annotations__)):
        known = ", ".join(PromptOptions.__annotations__)
        raise UserError(f"data prompts: unknown key {strange[0]!r}; known keys are {known}")
    templates = _templates(given)
    described = _descriptions(given["descriptions"], class_names) if given.get("descriptions") else {}
    prompts = []
    for name in class_names:
        words = " ".join(name.replace("_", " ").split())
        texts = [template.replace("{}", words) for template in templates] + list(described.get(name, []))
        prompts.append(list(dict.fromkeys(texts)))
    return prompts


def _templates(options: PromptOptions) -> list[str]:
    if "name" in options and options["name"] not in TEMPLATES:
        raise UserError(f"data prompts.name: {options['name']!r} is unknown; choose one of {', '.join(TEMPLATES)}")
    chosen = list(TEMPLATES[options["name"]]) if "name" in options else []
    chosen += options.get("templates", [])
    if not chosen and not options.get("descriptions"):
        chosen = list(TEMPLATES[DEFAULT])
    if wrong := [template for template in chosen if template.count("{}") != 1]:
        raise UserError(f"data prompts.templates: {_some(wrong)} must have {{}} once, where the class name stands")
    return chosen


def _descriptions(path: str, class_names: Sequence[str]) -> Mapping[str, list[str]]:
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"data prompts.descriptions: {path} cannot be read as JSON ({reason}); correct it") from error
    if not isinstance(found, dict):
        raise UserError(f"data prompts.descriptions: {path} must be an object from class name to a list of texts")
    found = {composed(name): texts for name, texts in found.items()}
    if wrong := [name for name in class_names if not _is_texts(found.get(name))]:
        raise UserError(
            f"data prompts.descriptions: {path} has no texts for {_some(wrong)}; add a list of texts for each"
        )
    return found


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
