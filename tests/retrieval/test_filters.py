"""Filters mean what pandas makes of them, and nothing but a filter gets through."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from retrieval.filters import LONGEST, Column, checked_filter, filter_columns
from retrieval.gallery import Gallery
from retrieval.schema import ModelIdentity
from tests.support.galleries import OF_EVERY_KIND, gallery_of_every_kind, small_gallery
from vitrail.errors import UserError

COLUMNS = {
    "id": Column("id", "text"),
    "group": Column("group", "text"),
    "colour": Column("predicted_colour", "text"),
    "confidence": Column("confidence_class", "number"),
}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return small_gallery(tmp_path_factory.mktemp("filters") / "gallery")


MEANINGS: dict[str, Callable[[pd.DataFrame], pd.Series[bool]]] = {
    "colour = 'blue'": lambda t: t.predicted_colour == "blue",
    "COLOUR='blue' and Confidence > .5": lambda t: (t.predicted_colour == "blue") & (t.confidence_class > 0.5),
    "colour <> 'blue' OR class = 'bag'": lambda t: (t.predicted_colour != "blue") | (t.predicted_class == "bag"),
    "colour != 'blue' AND (class = 'bag' OR material = 'leather')": lambda t: (
        (t.predicted_colour != "blue") & ((t.predicted_class == "bag") | (t.predicted_material == "leather"))
    ),
    "NOT colour = 'blue' AND class = 'bag'": lambda t: (t.predicted_colour != "blue") & (t.predicted_class == "bag"),
    "class IN ('bag', 'sneakers')": lambda t: t.predicted_class.isin(["bag", "sneakers"]),
    "class NOT IN ('bag', 'sneakers')": lambda t: ~t.predicted_class.isin(["bag", "sneakers"]),
    "class LIKE '%bottle'": lambda t: t.predicted_class.str.endswith("bottle"),
    "class NOT LIKE '%bottle'": lambda t: ~t.predicted_class.str.endswith("bottle"),
    "caption ILIKE 'BLUE%'": lambda t: t.caption.str.startswith("blue"),
    "confidence BETWEEN 0.45 AND 6e-1": lambda t: t.confidence_class.between(0.45, 0.6),
    "confidence NOT BETWEEN 0.45 AND 0.6": lambda t: ~t.confidence_class.between(0.45, 0.6),
    "NOT confidence >= 0.45": lambda t: ~(t.confidence_class >= 0.45),
    "confidence = 0.45 OR confidence IN (0.5, 0.55)": lambda t: t.confidence_class.isin(
        np.array([0.45, 0.5, 0.55], np.float32)
    ),
    "confidence >= -1 AND confidence < 0.52": lambda t: t.confidence_class < 0.52,
    "label_material IS NULL": lambda t: t.label_material.isna(),
    "label_material IS NOT NULL AND split = 'test'": lambda t: t.label_material.notna() & (t.split == "test"),
    "predicted_class <> label_class": lambda t: t.predicted_class != t.label_class,
    "group = 'g1' OR \"group\" = 'g2'": lambda t: t.group.isin(["g1", "g2"]),
    "((((id = 'p1'))))": lambda t: t.id == "p1",
    "id = 'it''s; -- none' OR id = 'p2'": lambda t: t.id == "p2",
    "id = 'p3' OR id = '/* p4 */'": lambda t: t.id == "p3",
    "colour = 'синий' OR colour = '青'": lambda t: t.id == "",
}


@pytest.mark.parametrize("text", MEANINGS)
def test_filters_mean_what_pandas_makes_of_them(gallery: Gallery, text: str) -> None:
    everything = gallery.table([name for name in gallery.columns() if "_" in name or name in _PLAIN]).to_pandas()
    expected = everything[MEANINGS[text](everything)].id.to_list()
    assert gallery.table(["id"], text).column("id").to_pylist() == expected


_PLAIN = {"id", "caption", "group", "split"}


OF_KINDS: dict[str, Callable[[pd.DataFrame], list[bool]]] = {
    "tags contains 'cat'": lambda t: ["cat" in tags for tags in t.predicted_tags],
    "TAGS CONTAINS 'cat''s toy' AND price < 10": lambda t: [
        "cat's toy" in tags and price < 10 for tags, price in zip(t.predicted_tags, t.predicted_price, strict=True)
    ],
    "tags contains any ('cat', 'dog')": lambda t: [bool({"cat", "dog"} & set(tags)) for tags in t.predicted_tags],
    "tags contains all ('cat', 'dog')": lambda t: [{"cat", "dog"} <= set(tags) for tags in t.predicted_tags],
    "tags not contains 'dog'": lambda t: ["dog" not in tags for tags in t.predicted_tags],
    "NOT label_tags contains 'dog'": lambda t: [tags is not None and "dog" not in tags for tags in t.label_tags],
    "label_tags IS NULL": lambda t: [tags is None for tags in t.label_tags],
    "price < 10": lambda t: (t.predicted_price < 10).tolist(),
    "label_price = 12.99 OR deviation_price >= 3": lambda t: (
        (t.label_price == np.float32(12.99)) | (t.deviation_price >= 3)
    ).tolist(),
    "predicted_price > label_price": lambda t: (t.predicted_price > t.label_price).tolist(),
    "grade >= 'fair'": lambda t: t.predicted_grade.isin(["fair", "good"]).tolist(),
    "'good' > grade": lambda t: t.predicted_grade.isin(["poor", "fair"]).tolist(),
    "grade > 'good'": lambda t: [False] * len(t),
    "NOT label_grade > 'good'": lambda t: t.label_grade.notna().tolist(),
    "grade BETWEEN 'poor' AND 'fair'": lambda t: t.predicted_grade.isin(["poor", "fair"]).tolist(),
    "label_grade <> 'good'": lambda t: t.label_grade.isin(["poor", "fair"]).tolist(),
    "predicted_grade = label_grade": lambda t: (t.predicted_grade == t.label_grade).tolist(),
    "confidence > .65": lambda t: (t.confidence_class > np.float32(0.65)).tolist(),
}


@pytest.fixture(scope="module")
def of_every_kind(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return gallery_of_every_kind(tmp_path_factory.mktemp("kinds") / "gallery")


@pytest.mark.parametrize("text", OF_KINDS)
def test_filters_of_lists_numbers_and_ordered_classes(of_every_kind: Gallery, text: str) -> None:
    everything = pd.DataFrame(of_every_kind.table(["id", *OF_EVERY_KIND]).to_pydict())
    for name in OF_EVERY_KIND:
        if name.endswith("_price") or name == "confidence_class":
            everything[name] = everything[name].astype(np.float32)
    expected = everything.id[OF_KINDS[text](everything)].to_list()
    assert of_every_kind.table(["id"], text).column("id").to_pylist() == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tags = 'cat'", "tags CONTAINS 'label'"),
        ("tags LIKE 'c%'", "tags CONTAINS 'label'"),
        ("tags IN ('cat')", "tags CONTAINS 'label'"),
        ("class contains 'bag'", "'class' is no list"),
        ("price contains 'bag'", "'price' is no list"),
        ("tags contains any (1, 2)", "words in single quotes"),
        ("tags contains any (tags)", "words in single quotes"),
        ("tags && 'cat'", "not understood"),
        ("tags contains", "not allowed"),
        ("tags contains 3", "words in single quotes"),
        ("grade > 'great'", "no class of the scale poor < fair < good"),
        ("grade > 3", "no class of the scale"),
        ("price > 'cheap'", "compares text with a number"),
        ("price LIKE '1%'", "is a number"),
        ("confidence_tags > 0.5", "list of numbers"),
    ],
)
def test_filters_that_do_not_go_with_a_kind(of_every_kind: Gallery, text: str, said: str) -> None:
    with pytest.raises(UserError, match="filter: ") as caught:
        of_every_kind.places(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_contains_may_be_the_name_of_a_column() -> None:
    columns = {"contains": Column("label_contains", "list")}
    assert checked_filter("contains contains 'a'", columns) == "array_has_all(`label_contains`, make_array('a'))"


def test_every_comparison_of_every_two_values_is_pythons(gallery: Gallery) -> None:
    ids = gallery.table(["id"]).column("id").to_pylist()
    compare: dict[str, Callable[[str, str], bool]] = {
        "<": lambda a, b: a < b,
        "<=": lambda a, b: a <= b,
        ">": lambda a, b: a > b,
        ">=": lambda a, b: a >= b,
    }
    for sign, value in itertools.product(compare, ("p1", "p10", "p5")):
        found = gallery.table(["id"], f"id {sign} '{value}'").column("id").to_pylist()
        assert found == [name for name in ids if compare[sign](name, value)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("colour =", "not understood at character"),
        ("(colour = 'blue'", "not understood at character"),
        ("colour = 'blue')", "at character 16 near ')'"),
        ("colour = 'blue", "no end"),
        ("colour = 'blue' AND", "not understood"),
        ("colour 'blue'", "not "),
        ("colour", "'colour' at character 1 is not allowed"),
        ("'blue'", "not allowed"),
        ("shade = 'blue'", "no column 'shade' at character 1"),
        ("color = 'blue'", "did you mean 'colour'?"),
        ("colour = blue", "in single quotes: 'blue'"),
        ('colour = "blue"', "in single quotes: 'blue'"),
        ("vector = 'x'", "no column"),
        ("other.colour = 'blue'", "not allowed"),
        ("colour = 'blue';", "';' at character 16"),
        ("colour = 'blue'; DROP TABLE images", "';' at character 16"),
        ("colour = 'blue' -- AND confidence > 1", "comment"),
        ("colour = 'blue' /* x */ AND confidence > 1", "comment"),
        ("-- nothing", "no condition"),
        ("colour = 'x' OR 1 = 1", "'1 = 1' at character 17 compares no column"),
        ("colour = 'x' OR 'a' LIKE 'a'", "not allowed"),
        ("colour = 'x' OR TRUE", "not allowed"),
        ("colour = (SELECT id FROM captions)", "not allowed"),
        ("colour IN (SELECT id FROM captions)", "not allowed"),
        ("EXISTS (SELECT 1)", "not allowed"),
        ("colour = 'x' UNION SELECT id FROM images", "not allowed"),
        ("DROP TABLE images", "not allowed"),
        ("DELETE FROM images", "not allowed"),
        ("lower(colour) = 'blue'", "not allowed"),
        ("colour || 'x' = 'bluex'", "not allowed"),
        ("confidence + 1 > 1", "not allowed"),
        ("CAST(confidence AS INT) = 1", "not allowed"),
        ("CASE WHEN colour = 'x' THEN 1 END", "not allowed"),
        ("colour = 'x' foo", "not allowed"),
        # The table's BETWEEN is asymmetric: the word would be lost, and the filter mean the opposite.
        ("confidence BETWEEN SYMMETRIC .9 AND .1", "not allowed"),
        ("colour LIKE 'x' ESCAPE '!'", "not allowed"),
        ("colour LIKE ANY ('x')", "not allowed"),
        ("colour = ANY ('x')", "not allowed"),
        ("colour IN ()", "not allowed"),
        ("colour IS TRUE", "not allowed"),
        ("colour = ?", "not allowed"),
        ("colour = :name", "not allowed"),
        ("confidence < 1e999", "not allowed"),
        ("confidence = 0x1F", "not allowed"),
        ("colour = 'a' = 'b'", "not allowed"),
        ("colour = NULL", "IS NULL"),
        ("confidence > 'high'", "compares text with a number"),
        ("colour > 3", "compares text with a number"),
        ("colour IN ('blue', 3)", "compares text with a number"),
        ("confidence LIKE '5'", "is a number"),
        ("(" * 31 + "colour = 'x'" + ")" * 31, "nested more than 30"),
        ("(" * 3000 + "colour = 'x'" + ")" * 3000, "nested more than 30"),
        ("NOT " * 40 + "colour = 'x'", "nested more than 30"),
        ("NOT " * 2000 + "colour = 'x'", "nested more than 30"),
        ("colour = '" + "x" * LONGEST + "'", f"at most {LONGEST:,}"),
        ("\x00", "not"),
    ],
)
def test_anything_else_is_one_clear_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match="filter: ") as caught:
        checked_filter(text, COLUMNS)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_longest_and_deepest_filters_that_are_allowed_reach_the_table(gallery: Gallery) -> None:
    terms = LONGEST // len("id='p1' OR ")
    assert gallery.table(["id"], " OR ".join(["id='p1'"] * terms)).num_rows == 1
    assert gallery.table(["id"], " OR ".join(f"id='p{n}'" for n in range(600))).num_rows == 12
    assert gallery.table(["id"], "(" * 29 + "id = 'p1'" + ")" * 29).num_rows == 1
    # OR and AND in turns are the deepest tree that few brackets make.
    nested = "id = 'p1'"
    for depth in range(14):
        nested = f"({nested} {'AND' if depth % 2 else 'OR'} id = 'p1')"
    assert gallery.table(["id"], nested).num_rows == 1


def test_the_users_own_text_never_reaches_the_table() -> None:
    written = checked_filter("Colour='it''s'   and CONFIDENCE>.5", COLUMNS)
    assert written == "((`predicted_colour` = 'it''s') AND (`confidence_class` > CAST(0.5 AS FLOAT)))"


def test_short_names_mean_predictions_where_there_are_some(tmp_path: Path) -> None:
    labelled = small_gallery(tmp_path / "labelled", predicts={})
    assert labelled.table(["id"], "colour = 'blue'").equals(labelled.table(["id"], "label_colour = 'blue'"))
    with pytest.raises(UserError, match="no column 'confidence'"):
        labelled.table(["id"], "confidence > 0.5")
    partly = small_gallery(tmp_path / "partly", predicts={"colour": ["black", "blue"]})
    # The model is wrong about p7's colour.
    blue = partly.table(["id"], "colour = 'blue' AND class = 'tableware_water_bottle'").column("id").to_pylist()
    assert blue == ["p6"]


def test_attributes_that_are_called_like_columns(tmp_path: Path) -> None:
    names = ["id", "split", "group", "label_class", "label_split", "predicted_split", "label_confidence", "vector"]
    names += ["confidence_class", "confidence_split", "label_vector"]
    identity = ModelIdentity("DualEncoder", "w", "run", 4, True, {}, {}, [])
    predicts = {"class": ["a"], "split": ["b"]}
    identity = dataclasses.replace(identity, predicts=predicts, labels=["class", "split", "confidence", "vector"])
    columns = filter_columns(names, identity)
    assert checked_filter("label_split = 'x' AND gallery_split = 'test'", columns) == (
        "((`label_split` = 'x') AND (`split` = 'test'))"
    )
    assert checked_filter("group = 'x' AND vector = 'y'", columns) == "((`group` = 'x') AND (`label_vector` = 'y'))"
    with pytest.raises(UserError, match=r"write label_split or predicted_split or gallery_split$"):
        checked_filter("split = 'x'", columns)
    with pytest.raises(UserError, match=r"write label_confidence or confidence_class$"):
        checked_filter("confidence > 0.5", columns)
    assert checked_filter("confidence_class > 0.5", columns) == "(`confidence_class` > CAST(0.5 AS FLOAT))"
