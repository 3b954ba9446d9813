from __future__ import annotations

import itertools

import pytest

from retrieval.metrics import AttributeQuery, attribute_queries, class_texts
from vitrail.errors import UserError

LABELS: dict[str, list[str | None]] = {
    "class": ["tableware_water_bottle", "personal_care_shampoo_bottle", "travel_handbag", "travel_handbag", None],
    "colour": ["blue", "blue", "black", None, "blue"],
    "material": ["plastic", "glass", "leather", "leather", ""],
    "condition": ["new", "used", "used", "worn", None],
}


def by_text(queries: list[AttributeQuery]) -> dict[str, list[int]]:
    assert len({query.text for query in queries}) == len(queries)
    return {query.text: query.relevant.tolist() for query in queries}


def test_texts_and_answers() -> None:
    answers = by_text(attribute_queries(LABELS))
    assert answers["blue plastic bottle"] == [0]
    assert answers["bottle"] == [0, 1]
    assert answers["blue bottle"] == [0, 1]
    assert answers["blue"] == [0, 1, 4]
    assert answers["used"] == [1, 2]
    assert answers["leather handbag"] == [2, 3]
    assert answers["new blue plastic bottle"] == [0]
    assert "black plastic" not in answers
    assert list(answers) == sorted(answers)


def test_equals_brute_force_over_all_combinations() -> None:
    said = {**LABELS, "class": [name.rpartition("_")[2] if name else None for name in LABELS["class"]]}
    order = ["condition", "colour", "material", "class"]
    expected = {}
    for values in itertools.product(*([None, *dict.fromkeys(filter(None, said[task]))] for task in order)):
        wanted = [(task, value) for task, value in zip(order, values, strict=True) if value]
        rows = [row for row in range(5) if all(said[task][row] == value for task, value in wanted)]
        if wanted and rows:
            expected[" ".join(value for _, value in wanted)] = rows
    assert len(expected) > 30
    assert by_text(attribute_queries(LABELS)) == expected


def test_nothing_is_asked_of_what_is_unknown() -> None:
    queries = attribute_queries({"colour": [None, ""], "class": ["a_cap", None]})
    assert by_text(queries) == {"cap": [0]}


@pytest.mark.parametrize(
    ("rule", "texts"),
    [
        ("last", ["bottle", "bottle", "handbag", "cap"]),
        ("unique", ["water bottle", "shampoo bottle", "handbag", "cap"]),
        ("full", ["tableware water bottle", "personal care shampoo bottle", "travel handbag", "cap"]),
    ],
)
def test_what_classes_are_called(rule: str, texts: list[str]) -> None:
    names = ["tableware_water_bottle", "personal_care_shampoo_bottle", "travel_handbag", "cap"]
    assert class_texts(names, rule) == dict(zip(names, texts, strict=True))  # type: ignore[arg-type]


def test_a_name_that_ends_another_is_said_whole() -> None:
    assert class_texts(["bottle", "water_bottle"], "unique") == {"bottle": "bottle", "water_bottle": "water bottle"}


def test_names_are_told_apart_from_classes_that_no_image_shows() -> None:
    queries = attribute_queries({"class": ["water_bottle"]}, "unique", class_names=["water_bottle", "shampoo_bottle"])
    assert [query.text for query in queries] == ["water bottle"]


def test_head_is_the_class_or_what_is_named_last() -> None:
    heads = {query.text: query.head for query in attribute_queries(LABELS)}
    assert heads["new blue plastic bottle"] == heads["bottle"] == "class=bottle"
    assert heads["used blue"] == "colour=blue"


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="attribute queries need labels"):
        attribute_queries({})
    with pytest.raises(UserError, match="'first' is unknown; choose one of last, unique, full"):
        attribute_queries(LABELS, "first")  # type: ignore[arg-type]
