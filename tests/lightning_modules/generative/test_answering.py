from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_modules.generative.answers import Question, checked_answers, common_beginning, label_texts, said_logits
from lightning_modules.generative.prompts import trained_prompts
from vitrail.errors import UserError

PROMPTS = trained_prompts(["What?"], 400)


def test_what_was_said_has_its_likelihood_and_the_others_share_the_rest() -> None:
    chosen = torch.tensor([2, 0])
    shares = said_logits(chosen, torch.tensor([0.7, 0.4]).log(), 4).softmax(dim=1)
    torch.testing.assert_close(shares, torch.tensor([[0.1, 0.1, 0.7, 0.1], [0.4, 0.2, 0.2, 0.2]]))


@pytest.mark.parametrize("likelihood", [float("-inf"), -20.0, 0.0])
def test_what_was_said_comes_first_however_unlikely(likelihood: float) -> None:
    logits = said_logits(torch.tensor([1, 3]), torch.full((2,), likelihood), 4)
    assert logits.argmax(dim=1).tolist() == [1, 3]
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.exp().sum(dim=1), torch.ones(2))


def test_questions_may_list_the_labels() -> None:
    question = Question("One of {labels}?", ["red_rose", "iris"], {}, PROMPTS, 3)
    assert question.ids == PROMPTS.prompt("One of red rose, iris?", 3)
    assert question.labels == [PROMPTS.answer("red rose"), PROMPTS.answer("iris")]
    assert label_texts(["a__b ", "c"]) == ["a b", "c"]
    with pytest.raises(UserError, match="the same text"):
        Question("What?", ["a_b", "a b"], {}, PROMPTS, 3)


def test_the_common_beginning_of_prompts() -> None:
    assert common_beginning({"a": [1, 2, 3]}) == [1, 2, 3]
    assert common_beginning({"a": [1, 2, 3, 4], "b": [1, 2, 5], "c": [1, 2, 3]}) == [1, 2]
    assert common_beginning({"a": [1, 2], "b": [1, 2, 3]}) == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"who": "me"}, "unknown key 'who'"),
        ({"how": "guess"}, "answers.how: 'guess' is unknown"),
        ({"content_free": "black"}, "answers.content_free: 'black' is unknown"),
        ({"how": "free", "content_free": "grey"}, "only scores"),
        ({"max_tokens": 0}, "at least 1"),
        ({"synonyms": {"lily": ["lilium"]}}, "no label 'lily'"),
    ],
)
def test_options_are_checked(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked_answers(options, ["rose"])


def test_synonyms_of_a_class_name_with_underscores() -> None:
    options = checked_answers({"how": "free", "synonyms": {"red_rose": ["rosa"]}}, ["red_rose", "iris"])
    question = Question("What?", ["red_rose", "iris"], options, PROMPTS, 3)
    assert question._matcher("a rosa") == question._matcher("red rose") == 0
