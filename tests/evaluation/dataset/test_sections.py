from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from evaluation.dataset.sections import (
    Collection,
    caption_section,
    class_section,
    contingency,
    cooccurrence_section,
    cramers_v,
    labels_section,
    main_task,
    numbers_section,
    size_section,
    splits_section,
)
from tests.support.runs import looks_of, small_collection
from vitrail.errors import UserError
from vitrail.types import UNKNOWN


def test_splits_are_counted_and_what_is_empty_is_reported() -> None:
    section = splits_section(small_collection(unreadable={3: "cut short", 5: "no such file"}))
    table = {str(row[0]): list(row[1:]) for row in section.tables["splits"].itertuples(index=False, name=None)}
    assert table["samples"] == [20, 20, 0]
    assert table["groups"] == [20, 20, 0]
    assert table["class: classes that occur, of 4"] == [4, 4, 0]
    assert table["material: samples without a known value"] == [1, 0, 0]
    assert section.paragraphs[0].startswith("40 samples of 20 groups")
    assert section.missing[0] == "The test split is empty."
    assert "cannot be read, left out where images are needed (2): " in section.missing[1]
    assert "photo 3: cut short; photo 5: no such file" in section.missing[1]


def test_classes_are_counted_by_split_in_order_of_frequency() -> None:
    targets = {"class": np.array([2] * 8 + [0] * 5 + [1] * 7 + [1] * 20)}
    section = class_section(small_collection(targets=targets, tasks={"class": ["a", "b", "c", "d"]}))
    table = section.files["classes_class"]
    assert table["class"].tolist() == ["c", "b", "a", "d"]
    assert table["train"].tolist() == [8, 7, 5, 0]
    assert table["val"].tolist() == [0, 20, 0, 0]
    assert "3 of 4 classes occur in train, c most often (40.0%" in section.paragraphs[0]
    assert "a most rarely (5)" in section.paragraphs[0]
    bars: Any = section.figures["classes_class"].axes[0]
    assert [bar.get_width() for bar in bars.patches] == [8, 7, 5, 0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["c", "b", "a", "d"]


def test_odd_classes_are_reported() -> None:
    targets = {"class": np.array([0] * 19 + [1] + [2] * 20), "one": np.zeros(40, np.int64)}
    section = class_section(small_collection(targets=targets, tasks={"class": ["a", "b", "c"], "one": ["only"]}))
    assert section.missing == [
        "class: 1 class has one training sample only: b",
        "class: 1 class is never trained: c",
        "one has one class only, so there is nothing to distinguish.",
    ]


def test_many_classes_are_drawn_as_curves() -> None:
    names = [f"class {code}" for code in range(160)]
    targets = {"class": np.arange(40)}
    section = class_section(small_collection(targets=targets, tasks={"class": names}))
    assert len(section.figures["classes_class"].axes) == 1
    assert len(section.files["classes_class"]) == 160


def test_a_task_without_known_values_is_no_error() -> None:
    targets = {"class": np.full(40, UNKNOWN)}
    section = class_section(small_collection(targets=targets, tasks={"class": ["a"]}))
    assert section.paragraphs == ["class: no training sample has a known value."]


def of_other_kinds(**changes: Any) -> Collection:
    """40 samples with tags and a price, the first 20 train: ``a`` and ``b`` exclude each other, train has no ``d``."""
    rng = np.random.default_rng(0)
    tags = rng.integers(0, 2, (40, 4)).astype(np.int8)
    tags[:, 1] = 1 - tags[:, 0]
    tags[:20, 3], tags[20, 3] = 0, 1
    tags[2], tags[25] = UNKNOWN, UNKNOWN
    price = np.arange(40, dtype=np.float32)
    price[3] = np.nan
    targets = {"tags": tags, "price": price, **changes}
    return small_collection(others={"tags": list("abcd"), "price": []}, other_targets=targets)


def test_labels_are_counted_alone_and_together() -> None:
    collection = of_other_kinds()
    section, tags = labels_section(collection), collection.other_targets["tags"]
    counts = section.files["labels_tags"].set_index("tags")
    together = section.files["together_tags"].set_index("label")
    for place, name in enumerate("abcd"):
        assert list(counts.loc[name]) == [
            (tags[rows, place] == 1).sum() for rows in (slice(20), slice(20, 40), slice(0))
        ]
        for other, second in enumerate("abcd"):
            assert together.loc[name, second] == ((tags[:, place] == 1) & (tags[:, other] == 1)).sum()
    train = tags[:20][tags[:20, 0] != UNKNOWN] == 1
    text = section.paragraphs[0]
    assert f"has {train.sum(axis=1).mean():.2f} labels on average" in text
    assert "b and a occur without each other most (phi -1.00)" in text
    assert section.missing == ["tags: 1 label applies to no training sample: d"]
    assert set(section.figures) == {"labels_tags", "together_tags"}
    rows = splits_section(collection).tables["splits"].set_index("number of")
    assert list(rows.loc["tags: labels that occur, of 4"]) == [3, 4, 0]
    assert list(rows.loc["tags: samples without a known value"]) == [1, 1, 0]


def test_a_label_of_every_sample_and_one_of_none_are_reported() -> None:
    tags = np.ones((40, 4), np.int8)
    tags[:, 2:] = 0
    assert labels_section(of_other_kinds(tags=tags)).missing == [
        "tags: 2 labels apply to no training sample: c, d",
        "tags: no training sample is without a, b.",
    ]
    section = labels_section(of_other_kinds(tags=np.full((40, 4), UNKNOWN, np.int8)))
    assert section.paragraphs == ["tags: no label applies to a training sample."]


def test_numbers_are_described_by_split() -> None:
    collection = of_other_kinds()
    section = numbers_section(collection)
    table = section.tables["numbers_price"].set_index("price")
    assert list(table.loc["count"]) == [19, 20]
    assert table.loc["mean", "val"] == pytest.approx(29.5)
    assert section.missing == ["price: 20 of 20 in val are outside of the range of train."]
    assert set(section.figures) == {"numbers_price"}
    constant = numbers_section(of_other_kinds(price=np.full(40, 7.0, np.float32)))
    assert constant.missing == ["price: all training samples have 7, so there is nothing to predict."]
    unknown = numbers_section(of_other_kinds(price=np.full(40, np.nan, np.float32)))
    assert (unknown.missing, unknown.figures) == (["price: no value is known."], {})


def test_sizes_are_reported() -> None:
    collection = small_collection()
    looks = looks_of(collection)
    assert looks.sizes[:2].tolist() == [[24, 24], [30, 20]]
    paragraphs = size_section(looks).paragraphs[0]
    assert "40 images: the median is 30 × 20 pixels, short sides go from 20 to 24" in paragraphs
    same = looks_of(small_collection(read=lambda row: np.zeros((8, 9, 3), np.uint8)))
    assert size_section(same).paragraphs == ["All are 9 × 8 pixels (40 images)."]
    some = size_section(dataclasses.replace(same, of=400)).paragraphs
    assert some == ["All that were read are 9 × 8 pixels (40 of 400 images)."]


def test_captions_are_counted_by_word_and_empty_ones_are_not() -> None:
    section = caption_section(small_collection())
    assert section.paragraphs[0].startswith("40 captions: median 3 words, nine in ten have 2 to 4, the longest 4")
    assert not section.missing
    assert "no captions of their own" in caption_section(small_collection(captions=None)).missing[0]
    some = caption_section(
        small_collection(captions=lambda rows: [[""] if row == 7 else ["x"] for row in rows.tolist()])
    )
    assert some.missing == ["Samples without a caption: 1."]
    blank = caption_section(small_collection(captions=lambda rows: [[" "] for _ in rows.tolist()]))
    assert (blank.paragraphs, blank.missing) == ([], ["No caption has a word."])


def test_labels_that_go_together() -> None:
    collection = small_collection()
    section = cooccurrence_section(collection)
    assert section.paragraphs[0].startswith("class and material go together most (Cramér's V 1.00)")
    assert set(section.figures) == {"association", "class_material"}
    table = contingency(collection, "class", "material")
    known = collection.targets["material"] != UNKNOWN
    expected = confusion_matrix(collection.targets["class"][known], collection.targets["material"][known])
    np.testing.assert_array_equal(table.to_numpy(), expected[:, :2])
    assert table.to_numpy().sum() == 39


def test_cramers_v_ignores_what_does_not_occur() -> None:
    targets = {"class": np.arange(40) % 2, "other": np.arange(40) % 2}
    exact = small_collection(targets=targets, tasks={"class": ["a", "b", "never"], "other": ["x", "y", "never"]})
    assert cramers_v(contingency(exact, "class", "other")) == pytest.approx(1)
    alone = small_collection(targets={"class": np.zeros(40, np.int64), "other": np.arange(40) % 2},
                             tasks={"class": ["a"], "other": ["x", "y"]})  # fmt: skip
    assert np.isnan(cramers_v(contingency(alone, "class", "other")))
    section = cooccurrence_section(alone)
    assert not section.paragraphs  # no strength was computed, so none is the highest
    assert section.missing == ["No two labels are known together with two values each, so nothing can go together."]


def test_data_without_labels_have_sections_without_numbers() -> None:
    bare = small_collection(tasks={}, targets={})
    assert class_section(bare).missing == ["The data have no labels, so there are no classes to count."]
    assert cooccurrence_section(bare).missing == ["The data have no attributes next to the class."]
    assert main_task(bare, None) is None
    assert main_task(small_collection(), None) == "class"
    with pytest.raises(UserError, match="--task size: the data have class, material"):
        main_task(small_collection(), "size")


def test_images_are_sampled_evenly_and_the_same_again() -> None:
    collection = small_collection()
    assert collection.sample(40, 0).tolist() == list(range(40))
    rows = collection.sample(10, 1)
    assert rows.tolist() == sorted(set(rows.tolist())) == collection.sample(10, 1).tolist()
    assert collection.sample(10, 2).tolist() != rows.tolist()


def test_nothing_to_look_at_is_refused() -> None:
    with pytest.raises(UserError, match="Small: has no image that can be read"):
        looks_of(small_collection(usable=np.zeros(0, np.int64)))
