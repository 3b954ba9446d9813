"""The texts that go with pictures: captions of their own, one or several, or the prompts of their class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from datamodules.columns import strings_of
from datamodules.prompts import PromptOptions, class_prompts
from vitrail.errors import UserError
from vitrail.seeding import counted_seed
from vitrail.types import LABEL_TASK, UNKNOWN

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray

    from datamodules.table import SampleTable

CaptionMode = Literal["first", "random", "all"]
"""Which of several captions training sees: always the first, one drawn each epoch, or all of them in every epoch."""

RANDOM = -1
"""In the place of a caption's number: draw one."""


@dataclass(frozen=True, eq=False)
class CaptionLists:
    """One caption or more of each of N samples, in columns.

    Attributes:
        values: Arrow strings ``(M,)``, all captions, sample by sample.
        offsets: int64 ``(N + 1,)``, where each sample's captions begin.
    """

    values: pa.LargeStringArray
    offsets: NDArray[np.int64]

    @classmethod
    def from_column(cls, column: pd.Series[Any]) -> CaptionLists:
        """Builds it from a column of texts or of lists of texts; a sample without has one empty text."""
        import pyarrow as pa

        if not any(isinstance(value, list | tuple) for value in column):
            return cls(strings_of(column), np.arange(len(column) + 1, dtype=np.int64))
        lists = [_as_list(value) for value in column]
        counts = np.array([len(texts) for texts in lists], dtype=np.int64)
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        return cls(pa.array([text for texts in lists for text in texts], type=pa.large_string()), offsets)

    @property
    def counts(self) -> NDArray[np.int64]:
        """int64 ``(N,)``, captions of each sample, at least 1."""
        return np.diff(self.offsets)

    @property
    def several(self) -> bool:
        """Whether some sample has more than one."""
        return len(self.values) > len(self.offsets) - 1

    @property
    def first(self) -> pa.LargeStringArray:
        """Arrow strings ``(N,)``, the first caption of each sample."""
        return self.values.take(self.offsets[:-1]) if self.several else self.values

    def of(self, rows: Sequence[int]) -> list[list[str]]:
        """All captions of some samples."""
        return [self.values[int(self.offsets[row]) : int(self.offsets[row + 1])].to_pylist() for row in rows]

    def pick(self, rows: Sequence[int], numbers: Sequence[int]) -> list[str]:
        """One caption each of some samples, by its number."""
        places = self.offsets[np.asarray(rows, dtype=np.int64)] + np.asarray(numbers, dtype=np.int64)
        picked: list[str] = self.values.take(places).to_pylist()
        return picked


class Texts:
    """Which text goes with which sample.

    Captions are the table's own, unless prompts are asked for or it has none: then they are the prompts of the class.

    Args:
        table: of the samples.
        prompts: class prompts; where they are given, they are the captions too.
        mode: which of several captions, or of several prompts, training sees.
        seed: of the draw.

    Attributes:
        class_prompts: for each class its prompts; empty where there are no classes.
        own: whether captions are the table's own.

    Raises:
        UserError: if the mode is unknown or does not fit.
    """

    def __init__(
        self, table: SampleTable, prompts: PromptOptions | None = None, mode: CaptionMode = "random", seed: int = 0
    ) -> None:
        if mode not in get_args(CaptionMode):
            raise UserError(f"data caption: {mode!r} is unknown; choose one of {', '.join(get_args(CaptionMode))}")
        self._lists = table.caption_lists
        self._labels = table.targets.get(LABEL_TASK)
        self._seed = seed
        self._mode = mode
        self.class_prompts = class_prompts(prompts, table.tasks.get(LABEL_TASK, []))
        self.own = prompts is None and bool(len(self._lists.values)) and _has_text(self._lists.values)
        if mode == "all" and not self.own:
            raise UserError(
                "data caption: all is for captions of the data's own; with class prompts use first or random"
            )
        self.positive_ids = self._positive_ids(table)

    def pairs(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples of a training epoch, each with the number of its caption.

        Args:
            rows: int64 ``(n,)``, rows of the table.

        Returns:
            Rows and numbers int64 ``(m,)``; a row comes several times where all of its captions are to be seen, and
            its number is ``RANDOM`` where one is to be drawn.
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
        """The caption of each sample of a training batch, a function of seed, epoch, sample and draw."""
        drawn = [
            counted_seed("caption", self._seed, epoch, row, draw) if number == RANDOM else number
            for row, number, epoch, draw in zip(rows, numbers, epochs, draws, strict=True)
        ]
        if self.own:
            counts = self._lists.counts[np.asarray(rows)].tolist()
            return self._lists.pick(rows, [number % count for number, count in zip(drawn, counts, strict=True)])
        return [
            prompts[number % len(prompts)] if prompts else ""
            for prompts, number in zip(map(self._prompts_of, rows), drawn, strict=True)
        ]

    def evaluation(self, rows: Sequence[int]) -> list[list[str]]:
        """All captions of each sample of an evaluation batch; one empty text where the class is not known."""
        return self._lists.of(rows) if self.own else [self._prompts_of(row) or [""] for row in rows]

    def training_texts(self, rows: NDArray[np.int64]) -> list[str]:
        """Distinct texts to train a tokenizer on: the captions of these rows and all class prompts."""
        texts = [prompt for prompts in self.class_prompts for prompt in prompts]
        if self.own:
            texts += [text for captions in self._lists.of(rows.tolist()) for text in captions]
        return list(dict.fromkeys(text for text in texts if text))

    def _prompts_of(self, row: int) -> list[str]:
        if self._labels is None or self._labels[row] == UNKNOWN:
            return []
        return self.class_prompts[int(self._labels[row])]

    def _positive_ids(self, table: SampleTable) -> NDArray[np.int64]:
        """int64 ``(N,)``: rows that share one are positives of each other.

        With class prompts that is the class, and a sample without one is alone. With captions of their own it is the
        picture's group where there are several captions, else the wording of the caption.
        """
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


def _as_list(value: Any) -> list[str]:
    """The texts of one cell: a list, one text, or something missing."""
    import pandas as pd

    if isinstance(value, list | tuple):
        return [str(text) for text in value] or [""]
    return [""] if pd.isna(value) else [str(value)]


def _has_text(values: pa.LargeStringArray) -> bool:
    import pyarrow.compute as pc

    return bool(pc.any(pc.greater(pc.utf8_length(values), 0)).as_py())
