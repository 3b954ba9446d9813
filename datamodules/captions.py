"""The texts that go with images: their own captions, captions made from templates, or the prompts of their class.

Several prompts of a class are an ensemble, whose embeddings the model averages (Radford et al., 2021). Descriptions of
each class go back to Menon and Vondrick, "Visual classification via description from large language models", ICLR 2023.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import numpy as np
import yaml

from datamodules.options import Options
from datamodules.table import composed
from vitrail.errors import UserError
from vitrail.predictions import refuse_kinds
from vitrail.seeding import derive_seed
from vitrail.types import CLASS_KINDS, LABEL_TASK, UNKNOWN, kind_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.table import SampleTable


@cache
def templates() -> dict[str, list[str]]:
    """Return the named templates of ``templates.yaml``, the data of CLIP's authors among them."""
    text = (files(__package__ or "datamodules") / "templates.yaml").read_text(encoding="utf-8")
    found: dict[str, list[str]] = yaml.safe_load(text)
    return found


_SHOWN = 5


@dataclass(frozen=True)
class PromptOptions(Options):
    """Which texts stand for a class. Underscores of class names become spaces.

    Attributes:
        name: named templates, such as ``photo``, ``imagenet_80`` (OpenAI's for ImageNet; Radford et al., 2021) or those
            of a kind of data, such as ``flowers``, ``food``, ``pets``, ``textures``, ``satellite``, ``actions``,
            ``cars`` and ``aircraft`` (``datamodules/templates.yaml``); null for none, or for ``photo`` where there are
            no other texts. ``prompts: NAME`` is short for ``prompts: {name: NAME}``.
        templates: templates of your own, each with ``{}`` where the class name goes.
        descriptions: path of a JSON file with an object from class name to a list of texts, used as they are.
    """

    argument: ClassVar[str] = "prompts"

    name: str | None = None
    templates: list[str] = field(default_factory=list)
    descriptions: str = ""

    @classmethod
    def of(cls, given: Self | Mapping[str, Any] | str | None) -> Self:
        """As ``Options.of``; a text is the name of templates."""
        return super().of({"name": given} if isinstance(given, str) else given)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None and self.name not in templates():
            raise UserError(f"data prompts.name: must be one of {', '.join(templates())}; got {self.name!r}")
        if wrong := [template for template in self.templates if template.count("{}") != 1]:
            raise UserError(f"data prompts.templates: {_some(wrong)} must have {{}} once, where the class name goes")


def class_prompts(options: PromptOptions | None, class_names: Sequence[str]) -> list[list[str]]:
    """Return one prompt or more for each class: those of the templates first, then its descriptions.

    Example:
        ``class_prompts(PromptOptions("photo"), ["water_bottle"])`` is ``[["a photo of a water bottle."]]``.

    Raises:
        UserError: for descriptions that cannot be read or lack a class.
    """
    options = options or PromptOptions()
    wanted = [*(templates()[options.name] if options.name else []), *options.templates]
    if not wanted and not options.descriptions:
        wanted = templates()["photo"]
    described = _descriptions(options.descriptions, class_names) if options.descriptions else {}
    prompts = []
    for name in class_names:
        texts = [template.replace("{}", _words(name)) for template in wanted] + list(described.get(name, []))
        prompts.append(list(dict.fromkeys(texts)))
    return prompts


def _descriptions(path: str, class_names: Sequence[str]) -> Mapping[str, list[str]]:
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"data prompts.descriptions: {path} cannot be read as JSON ({reason}); correct it") from error
    if not isinstance(found, dict):
        raise UserError(f"data prompts.descriptions: {path} must be an object from class name to a list of texts")
    found = {composed(name): texts for name, texts in found.items()}
    wrong = []
    for name in class_names:
        texts = found.get(name)
        if (
            not texts
            or not isinstance(texts, list)
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            wrong.append(name)
    if wrong:
        raise UserError(
            f"data prompts.descriptions: {path} has no texts for {_some(wrong)}; add a list of texts for each"
        )
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


CaptionMode = Literal["first", "random", "all"]
"""Which of several captions training uses: always the first, one sampled each epoch, or all of them in every epoch."""

RANDOM = -1
"""In the place of a caption's number: sample one."""


class Texts:
    """Which text goes with which sample; the arguments are those of ``ImageDataModule``.

    Captions are the table's own, unless prompts are given or it has none: then they are the prompts of the class.

    Attributes:
        class_prompts: for each class its prompts; empty where there are no classes.
        own: whether captions are the table's own.
        positive_ids: int64 ``(N,)``; rows that share one are positives of each other.
    """

    def __init__(
        self, table: SampleTable, prompts: PromptOptions | None = None, mode: CaptionMode = "random", seed: int = 0
    ) -> None:
        import pyarrow.compute as pc

        if mode not in get_args(CaptionMode):
            raise UserError(f"data caption: must be one of {', '.join(get_args(CaptionMode))}; got {mode!r}")
        self._lists = table.caption_lists
        has_classes = LABEL_TASK in table.tasks and kind_of(table.kinds, LABEL_TASK) in CLASS_KINDS
        self._labels = table.targets[LABEL_TASK] if has_classes else None
        self._seed = seed
        self._mode = mode
        if prompts is not None and LABEL_TASK in table.tasks:
            refuse_kinds({LABEL_TASK: kind_of(table.kinds, LABEL_TASK)}, "data prompts", fix="leave them out")
        if prompts is not None and self._labels is None:
            raise UserError(f"data prompts: {table.origin} has no classes that they could name; leave them out")
        self.class_prompts = class_prompts(prompts, table.tasks[LABEL_TASK] if has_classes else [])
        self.own = prompts is None and bool(pc.any(pc.not_equal(self._lists.values, "")).as_py())
        if mode == "all" and not self.own:
            raise UserError(
                "data caption: all is for captions of the data's own; with class prompts use first or random"
            )
        self.positive_ids = self._positive_ids(table)

    def pairs(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows of a training epoch and the number of the caption of each, both int64 ``(m,)``.

        A row comes several times where all of its captions are used; its number is ``RANDOM`` where one is sampled.
        """
        if self._mode == "all" and self.own:
            counts = self._lists.counts[rows]
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            return np.repeat(rows, counts), np.arange(int(counts.sum()), dtype=np.int64) - starts
        several = self._lists.several if self.own else any(len(prompts) > 1 for prompts in self.class_prompts)
        number = RANDOM if several and self._mode != "first" else 0
        return rows, np.full(len(rows), number, dtype=np.int64)

    def training(
        self, rows: Sequence[int], numbers: Sequence[int], epochs: Sequence[int], draws: Sequence[int]
    ) -> list[str]:
        """Return the caption of each sample of a training batch, a function of seed, epoch, sample and draw."""
        sampled = [
            derive_seed("caption", self._seed, epoch, row, draw) if number == RANDOM else number
            for row, number, epoch, draw in zip(rows, numbers, epochs, draws, strict=True)
        ]
        if self.own:
            counts = self._lists.counts[np.asarray(rows)].tolist()
            return self._lists.pick(rows, [number % count for number, count in zip(sampled, counts, strict=True)])
        return [
            prompts[number % len(prompts)] if prompts else ""
            for prompts, number in zip(map(self._prompts_of, rows), sampled, strict=True)
        ]

    def evaluation(self, rows: Sequence[int]) -> list[list[str]]:
        """Return all captions of each sample; one empty text where the class is unknown."""
        return self._lists.of(rows) if self.own else [self._prompts_of(row) or [""] for row in rows]

    def training_texts(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the distinct captions of some rows and all class prompts, to train a tokenizer on."""
        texts = [prompt for prompts in self.class_prompts for prompt in prompts]
        if self.own:
            texts += [text for captions in self._lists.of(rows.tolist()) for text in captions]
        return list(dict.fromkeys(text for text in texts if text))

    def _prompts_of(self, row: int) -> list[str]:
        if self._labels is None or self._labels[row] == UNKNOWN:
            return []
        return self.class_prompts[int(self._labels[row])]

    def _positive_ids(self, table: SampleTable) -> NDArray[np.int64]:
        """By class with class prompts; otherwise by group where an image has several captions, or by their wording."""
        alone = -1 - np.arange(len(table), dtype=np.int64)
        if not self.own:
            return alone if self._labels is None else np.where(self._labels == UNKNOWN, alone, self._labels)
        if self._lists.several:
            return table.group_ids
        import pyarrow.compute as pc

        texts = pc.utf8_trim_whitespace(self._lists.values).dictionary_encode()
        number: dict[str, int] = {}
        # Arrow can only lower, which is not the same in every language.
        folded = [number.setdefault(text.casefold(), len(number)) for text in texts.dictionary.to_pylist()]
        codes = np.array(folded, dtype=np.int64)[texts.indices.to_numpy()]
        return np.where(codes == number.get("", -1), alone, codes)


NOUN = "noun"
"""Field of a template: the last word of the class name."""

_FIELD = re.compile(r"\{([^{}]*)\}")


def composed_captions(templates: Sequence[str], columns: Mapping[str, Sequence[str]], where: str) -> list[list[str]]:
    """Fill templates such as ``a photo of a {colour} {material} {noun}`` in for each sample.

    What is unknown of an image is left out of its text, and so is a template of which nothing is known.

    Args:
        templates: texts with fields in braces: names of columns; ``{class}``, with blanks for underscores; ``{noun}``,
            its last word, as people say "bottle" for ``tableware_water_bottle``.
        columns: texts of all samples by field, empty where unknown; the class among them under its task's name.
        where: YAML key and file, for the error.

    Returns:
        For each sample its distinct captions, one or more; a single empty one where nothing is known.

    Raises:
        UserError: for an empty template, a brace that is no field's, or an unknown field.
    """
    fields = dict(columns)
    if LABEL_TASK in columns:
        names = [_words(name) for name in columns[LABEL_TASK]]
        fields |= {LABEL_TASK: names, NOUN: [name.rpartition(" ")[2] for name in names]}
    for template in templates:
        if not template.strip():
            raise UserError(f"{where}: a template is empty; write a text with fields such as {{class}}")
        if {"{", "}"} & set(_FIELD.sub("", template)):
            raise UserError(
                f"{where}: {template!r} has a brace that belongs to no field; write fields such as {{class}}"
            )
        if strange := [name for name in _FIELD.findall(template) if name not in fields]:
            raise UserError(f"{where}: {template!r} has no such field as {strange[0]!r}; there are {', '.join(fields)}")
    rows = len(next(iter(fields.values()), ()))
    return [_filled(templates, {name: texts[row] for name, texts in fields.items()}) for row in range(rows)]


def _filled(templates: Sequence[str], values: Mapping[str, str]) -> list[str]:
    texts = []
    for template in templates:
        names = _FIELD.findall(template)
        if not names or any(values[name] for name in names):
            texts.append(_words(_FIELD.sub(lambda field: values[field.group(1)], template)))
    return list(dict.fromkeys(texts)) or [""]


def _words(text: str) -> str:
    return " ".join(text.replace("_", " ").split())
