"""Columns of strings: what counts as missing, from pandas to Arrow, to indices into a vocabulary, and into a hash."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vitrail.types import LABEL_TASK, UNKNOWN

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray


def composed(text: str) -> str:
    """The text in the Unicode normal form NFC, in which the same letters are the same characters."""
    return unicodedata.normalize("NFC", text)


class Missing:
    """What counts as missing, one rule for labels, attributes, groups and captions, and how often it did.

    Args:
        texts: that mean unknown, in any case; the empty text always does.

    Attributes:
        texts: that mean unknown, besides the empty one, in lower case.
        counts: for each column the number of rows by the text that made them unknown; the empty text is not listed.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.texts = frozenset(composed(text).strip().casefold() for text in texts)
        self.counts: dict[str, dict[str, int]] = {}

    def means_unknown(self, text: str) -> bool:
        """Whether a text, blanks around it aside, stands for no value."""
        text = text.strip()
        return not text or text.casefold() in self.texts

    def known(self, column: str, texts: Iterable[str], aliases: Mapping[str, str] | None = None) -> list[str]:
        """The texts of a column in NFC without blanks around them, empty where they are missing, which is counted.

        Args:
            column: ``class``, ``group``, ``caption`` or what ``attribute_column`` says, as a report calls it.
            texts: one of each row.
            aliases: texts to replace before.
        """
        known: dict[str, str] = {}
        kept = []
        for text in texts:
            if (value := known.get(text)) is None:
                stripped = composed(text).strip()
                value = (aliases or {}).get(stripped, stripped)
                value = known[text] = "" if self.means_unknown(value) else value
            if not value and (stripped := text.strip()):
                counts = self.counts.setdefault(column, {})
                counts[stripped] = counts.get(stripped, 0) + 1
            kept.append(value)
        return kept


def attribute_column(task: str) -> str:
    """What reports call the column of a task, which may be called like another column of the table."""
    return task if task == LABEL_TASK else f"attribute {task}"


def strings_of(column: pd.Series[Any], fill: pa.LargeStringArray | str = "") -> pa.LargeStringArray:
    """The column as Arrow strings in one piece; missing and, with an array to fill from, empty values are filled."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # The pandas conversion first: it also takes columns of mixed types, which Arrow refuses.
    strings = pa.chunked_array([pa.array(column.astype("string"), type=pa.large_string())]).combine_chunks()
    strings = pc.fill_null(strings, fill)
    if not isinstance(fill, str):
        strings = pc.if_else(pc.equal(strings, ""), fill, strings)
    return pa.concat_arrays([strings])


def codes_of(strings: pa.LargeStringArray, vocabulary: Sequence[str]) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Indices into the vocabulary (``UNKNOWN`` where it lacks the value), and the values it lacks with counts."""
    encoded = strings.dictionary_encode()
    place = {value: index for index, value in enumerate(vocabulary)}
    distinct = encoded.dictionary.to_pylist()
    by_code = np.array([place.get(value, UNKNOWN) for value in distinct], dtype=np.int64)
    codes = encoded.indices.to_numpy()
    counts = np.bincount(codes, minlength=len(distinct))
    missing = {value: int(count) for value, count in zip(distinct, counts, strict=True) if value not in place}
    return by_code[codes], missing


def hash_strings(digest: hashlib._Hash, strings: pa.LargeStringArray) -> None:
    """Feeds lengths and bytes, so that neither chunking nor offsets matter."""
    _, offset_buffer, data = strings.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)[strings.offset :][: len(strings) + 1]
    digest.update(np.diff(offsets).tobytes())
    if data is not None:
        digest.update(data[int(offsets[0]) : int(offsets[-1])])
