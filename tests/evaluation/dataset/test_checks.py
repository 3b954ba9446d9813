from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from evaluation.dataset.checks import label_section, leak_section
from tests.support.runs import looks_of, small_collection


def audit(**leaks: Any) -> dict[str, Any]:
    """What the audit reports, as far as the page needs it."""
    return {"leaks": {"groups": [], "exact": [], "near": [], "near_radius": 8, **leaks}}


def sample(row: int, split: str) -> dict[str, str]:
    return {"name": f"photo {row}", "split": split}


def test_leaks_are_listed_and_shown_side_by_side() -> None:
    found = audit(
        groups=[{"group": "object 3", "counts": {"train": 2, "val": 1}}],
        exact=[{"first": sample(1, "train"), "second": sample(25, "val")}],
        near=[{"first": sample(2, "train"), "second": sample(30, "val")}],
    )
    section = leak_section(small_collection(), found)
    table = section.tables["leaks"]
    assert table["kind"].tolist() == ["group in several splits", "identical images", "nearly identical images"]
    assert table["first"].tolist() == ["object 3", "photo 1", "photo 2"]
    assert table["splits"].tolist() == ["train 2, val 1", "train, val", "train, val"]
    texts = [axes.texts[0].get_text() for axes in section.figures["leaks"].axes]
    assert texts == [
        "photo 1\ntrain, pair 1",
        "photo 25\nval, pair 1",
        "photo 2\ntrain, pair 2",
        "photo 30\nval, pair 2",
    ]
    counted = "In several splits: groups 1, pairs of identical images 1, pairs of nearly identical images 1. "
    assert section.paragraphs[0].startswith(counted)


def test_generated_images_are_not_said_to_be_compared() -> None:
    section = leak_section(small_collection(), audit(near_radius=None))
    assert section.paragraphs[0].startswith("In several splits: groups 0. ")
    assert "generated" in section.missing[0]
    assert not section.tables
    assert not section.figures


def test_data_that_name_no_objects_are_not_called_free_of_leaks_between_them() -> None:
    bare = small_collection()
    bare = replace(bare, groups=bare.names)
    section = leak_section(bare, audit(own_groups=True))
    assert "groups" not in section.paragraphs[0]
    assert "whether one is in several splits is not known" in section.missing[0]
    bare.targets["class"][8] = 2
    looks = looks_of(bare)
    paragraphs = label_section(bare, "class", looks.rows, looks.features, "pixels").paragraphs[0]
    assert "no image is evaluated by itself" in paragraphs
    assert "no object is evaluated by its own" not in paragraphs


def test_a_wrong_label_is_suspected() -> None:
    wrong = small_collection()
    wrong.targets["class"][8] = 2  # a red one, called blue
    looks = looks_of(wrong)
    section = label_section(wrong, "class", looks.rows, looks.features, "pixels")
    table = section.tables["suspects_class"]
    (first, *_) = table[["name", "split", "label", "suggested"]].itertuples(index=False, name=None)
    assert first == ("photo 8", "train", "blue", "red")
    assert section.figures["suspects_class"].axes[0].texts[0].get_text() == "blue\n→ red"
    assert "linear probe on pixels" in section.paragraphs[0]


def test_what_cannot_be_evaluated_is_reported() -> None:
    one = small_collection(targets={"class": np.zeros(40, np.int64)})
    looks = looks_of(one)
    section = label_section(one, "class", looks.rows, looks.features, "pixels")
    assert section.missing == [
        "label issues: there are fewer than two classes with a labelled sample, so nothing to compare."
    ]
    assert "no labels" in label_section(one, None, looks.rows, looks.features, "pixels").missing[0]
    single = small_collection()
    single.targets["class"][:] = np.where(np.arange(40) == 4, 3, np.arange(40) % 2)
    section = label_section(single, "class", looks.rows, looks_of(single).features, "pixels")
    alone = "Samples that cannot be evaluated, because no other group has a label like theirs: 1."
    assert section.missing == [alone]
    assert "suspects_class" not in section.tables or "photo 4" not in section.tables["suspects_class"]["name"].tolist()


def test_doubts_of_a_weak_probe_are_not_shown() -> None:
    rng = np.random.default_rng(0)
    collection = small_collection()
    labels = collection.targets["class"]
    labels[:] = rng.integers(4, size=40)  # colours say nothing of these
    guesses = label_section(collection, "class", collection.usable, looks_of(collection).features, "pixels")
    assert not guesses.paragraphs
    assert not guesses.tables
    assert "doubts a label means nothing" in guesses.missing[0]
    # Right for about seven of ten: doubts are shown, but not taken for the share of wrong labels.
    features = np.eye(4)[np.where(np.arange(40) % 10 < 6, labels, rng.integers(4, size=40))]
    half = label_section(collection, "class", collection.usable, features, "vectors")
    assert "labels of class are suspected" in half.paragraphs[0]
    assert "estimated" not in half.paragraphs[0]
    sure = label_section(collection, "class", collection.usable, np.eye(4)[labels], "vectors")
    assert "The estimated share of wrong labels is 0.0%" in sure.paragraphs[0]


def test_unknown_labels_are_left_out() -> None:
    collection = small_collection()
    collection.targets["class"][:20] = -1
    looks = looks_of(collection)
    section = label_section(collection, "class", looks.rows, looks.features, "pixels")
    assert "of 20 labels of class" in section.paragraphs[0]


def test_what_was_not_compared_is_not_counted() -> None:
    why = "fewer than two splits have images"
    section = leak_section(small_collection(), audit(not_checked={"groups": why, "exact": why, "near": why}))
    assert section.paragraphs[0].startswith("In several splits: nothing was compared.")
    assert f"Not checked: nearly identical images ({why})." in section.missing
    section = leak_section(small_collection(), audit(not_checked={"near": "allowed, so not looked for"}))
    assert section.paragraphs[0].startswith("In several splits: groups 0, pairs of identical images 0.")
