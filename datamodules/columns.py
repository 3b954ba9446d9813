"""Columns of strings in Arrow: from pandas, to indices into a vocabulary, and into a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.schema import UNKNOWN

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray


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
