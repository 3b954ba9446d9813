from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation.dataset.checks import label_section, leak_section
from evaluation.dataset.label_issues import find_label_issues, out_of_fold
from tests.support.runs import looks_of, small_collection
from vitrail.errors import UserError


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
    counted = "In several splits: 1 groups, 1 pairs of identical images, 1 pairs of nearly identical images. "
    assert section.paragraphs[0].startswith(counted)


def test_generated_images_are_not_said_to_be_compared() -> None:
    section = leak_section(small_collection(), audit(near_radius=None))
    assert section.paragraphs[0].startswith("In several splits: 0 groups. ")
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
    assert section.paragraphs[0].startswith("In several splits: 0 groups, 0 pairs of identical images.")


NUM_CLASSES, DIM = 4, 12


def blobs(n: int = 320, spread: float = 0.5, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Features around a centre for each class; four samples in a row are one group."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.integers(NUM_CLASSES, size=n // 4), 4)
    return np.eye(NUM_CLASSES, DIM)[labels] * 3 + rng.normal(size=(n, DIM)) * spread, labels


def by_hand(
    probability: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], set[tuple[int, int]]]:
    """Confident joint and suspects as Northcutt et al. write them (equation 1), sample by sample."""
    count = probability.shape[1]
    threshold = [
        probability[labels == code, code].mean() if (labels == code).any() else np.inf for code in range(count)
    ]
    joint, suspects = np.zeros((count, count), np.int64), set()
    for row, label in enumerate(labels.tolist()):
        able = [code for code in range(count) if probability[row, code] >= threshold[code]]
        if able:
            best = max(able, key=lambda code: probability[row, code])
            joint[label, best] += 1
            if best != label:
                suspects.add((row, best))
    return joint, suspects


@pytest.mark.parametrize("seed", range(5))
def test_joint_and_suspects_are_those_of_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probability = rng.dirichlet(np.ones(5), size=120)
    labels = rng.integers(4, size=120)  # the fifth class has no sample
    issues = find_label_issues(probability, labels)
    joint, suspects = by_hand(probability, labels)
    np.testing.assert_array_equal(issues.joint, joint)
    assert set(zip(issues.rows.tolist(), issues.suggested.tolist(), strict=True)) == suspects
    assert (np.diff(issues.margin) >= 0).all()
    counts = np.bincount(labels, minlength=5)
    scaled = joint / np.maximum(joint.sum(axis=1, keepdims=True), 1) * counts[:, None]
    assert issues.noise == pytest.approx(1 - np.trace(scaled) / scaled.sum())
    own = probability[np.arange(120), labels]
    best_other = np.where(np.arange(5)[None] == labels[:, None], -1, probability).max(axis=1)
    np.testing.assert_allclose(issues.margin, (own - best_other)[issues.rows])


def test_flipped_labels_are_found() -> None:
    features, labels = blobs(640)
    rng = np.random.default_rng(1)
    flipped = rng.choice(len(labels), 64, replace=False)
    given = labels.copy()
    given[flipped] = (given[flipped] + rng.integers(1, NUM_CLASSES, 64)) % NUM_CLASSES
    groups = np.arange(len(labels)) // 4
    issues = find_label_issues(out_of_fold(features, given, groups, NUM_CLASSES), given)
    found = set(issues.rows.tolist())
    right = found & set(flipped.tolist())
    assert len(right) >= 0.7 * len(flipped)
    assert len(right) >= 0.95 * len(found)
    assert (issues.suggested == labels[issues.rows])[np.isin(issues.rows, flipped)].mean() > 0.95
    assert issues.noise == pytest.approx(0.1, abs=0.02)


def test_clean_labels_are_left_alone() -> None:
    features, labels = blobs()
    issues = find_label_issues(out_of_fold(features, labels, np.arange(len(labels)) // 4, NUM_CLASSES), labels)
    assert len(issues.rows) == 0
    assert issues.noise == 0
    assert issues.accuracy == 1
    assert issues.evaluated == len(labels)


def test_no_sample_is_evaluated_by_its_own_group() -> None:
    # A feature names the group and nothing else: a classifier that has seen the group knows its label, no other does.
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    labels = rng.integers(2, size=40)[groups]
    features = np.eye(40)[groups]
    accuracy = find_label_issues(out_of_fold(features, labels, groups, 2), labels).accuracy
    alone = find_label_issues(out_of_fold(features, labels, np.arange(200), 2), labels).accuracy
    assert alone == 1.0
    assert accuracy < 0.75


def test_a_class_of_one_group_is_not_evaluated() -> None:
    features, labels = blobs(80)
    labels[:4] = NUM_CLASSES  # one group of its own class
    said = out_of_fold(features, labels, np.arange(80) // 4, NUM_CLASSES + 1)
    assert np.isnan(said[:4]).all()
    assert np.isfinite(said[4:]).all()
    np.testing.assert_allclose(said[4:].sum(axis=1), 1)
    issues = find_label_issues(said, labels)
    assert issues.evaluated == 76
    assert not set(issues.rows.tolist()) & set(range(4))


def test_nothing_evaluated_is_nothing_suspected() -> None:
    issues = find_label_issues(np.full((3, 2), np.nan), np.array([0, 1, 0]))
    assert (len(issues.rows), issues.evaluated) == (0, 0)
    assert np.isnan(issues.noise)
    assert np.isnan(issues.accuracy)


@pytest.mark.parametrize(
    ("labels", "groups", "features", "message"),
    [
        ([0, 0, 0], [0, 1, 2], [[0.0], [1.0], [2.0]], "fewer than two classes"),
        ([0, 1, 2], [0, 1, 2], [[0.0], [1.0], [2.0]], "no class has two labelled samples"),
        ([0, 1, 0], [5, 5, 5], [[0.0], [1.0], [2.0]], "all samples are of one group"),
        ([0, 1, 0], [0, 1, 2], [[0.0], [np.inf], [2.0]], "features are not finite"),
    ],
)
def test_labels_that_cannot_be_evaluated_are_refused(
    labels: list[int], groups: list[int], features: list[list[float]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        out_of_fold(np.array(features), np.array(labels), np.array(groups), 2)


def test_classes_of_fewer_samples_than_folds_are_evaluated_in_fewer() -> None:
    features = np.array([[0.0], [0.1], [1.0], [1.1]])
    said = out_of_fold(features, np.array([0, 0, 1, 1]), np.arange(4), 2)
    np.testing.assert_allclose(said.sum(axis=1), 1)
