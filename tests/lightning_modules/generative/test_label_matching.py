from __future__ import annotations

import pytest

from lightning_modules.generative.answers import LabelMatcher, words_of
from vitrail.errors import UserError

LABELS = ["iris", "rose", "rose of sharon", "yellow iris", "bird of paradise", "bishop of llandaff", "cosmos"]


def by_substring(answer: str) -> str | None:
    """The reference's way: the first label that is a part of the answer."""
    return next((label for label in LABELS if label in answer.lower()), None)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("yellow iris", "yellow iris"),
        ("It is a Yellow  Iris!", "yellow iris"),
        ("yellow-iris.", "yellow iris"),
        ("an iris", "iris"),
        ("Irises? No: one IRIS", "iris"),
        ("roses", "rose"),
        ("a Bird-of-Paradise flower", "bird of paradise"),
        ("Rosé", "rose"),
        ("cosmos", "cosmos"),
        # A shorter name begins where the longer one does: the longer one is meant, and it alone.
        ("a rose of Sharon", "rose of sharon"),
        ("rose-of-sharon, the flower", "rose of sharon"),
        ("a rose of some kind", "rose"),
    ],
)
def test_labels_are_found_by_whole_words_and_the_longest_wins(answer: str, label: str) -> None:
    assert LabelMatcher(LABELS)(answer) == LABELS.index(label)


@pytest.mark.parametrize(
    "answer", ["primrose", "", "a flower", "an iris or a rose", "rose of sharon or rose", "bird", "irisation", "?!"]
)
def test_an_answer_that_names_none_or_several_names_none(answer: str) -> None:
    assert LabelMatcher(LABELS)(answer) is None


def test_the_substring_error_of_the_reference() -> None:
    assert by_substring("yellow iris") == "iris"
    assert by_substring("primrose") == "rose"
    matcher = LabelMatcher(LABELS)
    assert matcher("yellow iris") == LABELS.index("yellow iris")
    assert matcher("primrose") is None


def test_synonyms_name_their_label() -> None:
    matcher = LabelMatcher(LABELS, {"bird of paradise": ["strelitzia", "crane flower"], "rose": ["Rosa"]})
    assert matcher("This looks like a Strelitzia.") == LABELS.index("bird of paradise")
    assert matcher("crane flowers") == LABELS.index("bird of paradise")
    assert matcher("a rosa, that is, a rose") == LABELS.index("rose")


def test_a_name_cannot_mean_two_labels() -> None:
    with pytest.raises(UserError, match="'flag' would mean both 'iris' and 'rose'"):
        LabelMatcher(LABELS, {"iris": ["flag"], "rose": ["flag"]})
    with pytest.raises(UserError, match="would mean both"):
        LabelMatcher(["Rose", "roses"])
    with pytest.raises(UserError, match="no label 'lily'"):
        LabelMatcher(LABELS, {"lily": ["lilium"]})
    with pytest.raises(UserError, match="has no letters"):
        LabelMatcher(["-", "rose"])


def test_words_are_normalised() -> None:
    assert words_of("The Lady's  slippers: ÉTÉ_glass") == ("the", "lady", "slipper", "ete", "glass")
