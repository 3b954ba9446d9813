"""Captions made of what is known of a picture: templates such as ``a photo of a {colour} {material} {noun}``.

A table's own captions often leave out what people ask for. A template names columns of the table in braces; what is not
known of a picture is left out of its text. Beside the columns there are ``{class}``, the class name with blanks for
underscores, and ``{noun}``, its last word, as people say "bottle" for ``tableware_water_bottle``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

NOUN = "noun"
"""Field of a template: the last word of the class name."""

_FIELD = re.compile(r"\{([^{}]*)\}")


def composed_captions(templates: Sequence[str], columns: Mapping[str, Sequence[str]], where: str) -> list[list[str]]:
    """The captions of each sample: every template filled in, each text once.

    Args:
        templates: texts with fields.
        columns: texts of all samples by field, empty where unknown; the class among them under its task's name.
        where: YAML key and file, for the error.

    Returns:
        For each sample one caption or more; a single empty one where nothing of any template is known.

    Raises:
        UserError: for an empty template, a brace that is no field's, or a field that is not there.
    """
    fields = dict(columns)
    if LABEL_TASK in columns:
        names = [_words(name) for name in columns[LABEL_TASK]]
        fields |= {LABEL_TASK: names, NOUN: [name.rpartition(" ")[2] for name in names]}
    for template in templates:
        _check(template, fields, where)
    rows = len(next(iter(fields.values()), ()))
    return [_filled(templates, {name: texts[row] for name, texts in fields.items()}) for row in range(rows)]


def _filled(templates: Sequence[str], values: Mapping[str, str]) -> list[str]:
    texts = []
    for template in templates:
        names = _FIELD.findall(template)
        # Where nothing of a template is known, what remains of it ("a photo of a") says nothing of the picture.
        if not names or any(values[name] for name in names):
            texts.append(_words(_FIELD.sub(lambda field: values[field.group(1)], template)))
    return list(dict.fromkeys(texts)) or [""]


def _words(text: str) -> str:
    return " ".join(text.replace("_", " ").split())


def _check(template: str, fields: Mapping[str, Sequence[str]], where: str) -> None:
    if not template.strip():
        raise UserError(f"{where}: a template is empty; write a text with fields such as {{class}}")
    if {"{", "}"} & set(_FIELD.sub("", template)):
        raise UserError(f"{where}: {template!r} has a brace that belongs to no field; write fields such as {{class}}")
    if strange := [name for name in _FIELD.findall(template) if name not in fields]:
        raise UserError(f"{where}: {template!r} has no such field as {strange[0]!r}; there are {', '.join(fields)}")
