"""Values of tasks of every kind, as they are filtered and counted."""

import numpy as np
import pyarrow as pa
import pytest

from app.state.galleries import NO_LABEL, NOT_KNOWN, facet_of


def column(values: list[object], kind: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, kind)])


def test_an_image_has_each_of_its_labels() -> None:
    facet = facet_of(column([["dog", "cat"], [], None, ["cat"]], pa.list_(pa.string())))
    assert facet.values == ("cat", "dog", NO_LABEL, NOT_KNOWN)
    assert facet.having(["cat"]).tolist() == [True, False, False, True]
    assert facet.having(["dog", NOT_KNOWN]).tolist() == [True, False, True, False]
    assert [facet.values[code] for code in facet.first] == ["dog", NO_LABEL, NOT_KNOWN, "cat"]
    assert facet.known == ["cat", "dog", NO_LABEL]


def test_classes_with_an_order_keep_it() -> None:
    facet = facet_of(column(["worn", "new", None, "used", "other"], pa.string()), ["new", "used", "worn", "broken"])
    assert facet.values == ("new", "used", "worn", "other", NOT_KNOWN)
    assert [facet.values[code] for code in facet.first] == ["worn", "new", NOT_KNOWN, "used", "other"]


def test_numbers_are_in_ranges_of_about_the_same_size() -> None:
    numbers: list[object] = [None, *np.random.default_rng(0).gamma(2, 20, 100).tolist()]
    facet = facet_of(column(numbers, pa.float32()))
    assert len(facet.values) == 6
    assert facet.values[-1] == NOT_KNOWN
    assert np.bincount(facet.codes)[:5].min() >= 15
    low, high = map(float, facet.values[1].split(" to "))
    inside = [number is not None and low <= float(str(number)) < high for number in numbers]
    assert facet.having([facet.values[1]]).tolist() == inside
    assert facet.having([NOT_KNOWN]).tolist() == [number is None for number in numbers]


@pytest.mark.parametrize("kind", [pa.string(), pa.list_(pa.string()), pa.float32()])
def test_columns_without_any_value(kind: pa.DataType) -> None:
    assert facet_of(column([None, None], kind)).values == (NOT_KNOWN,)
    assert len(facet_of(column([], kind)).having([])) == 0
