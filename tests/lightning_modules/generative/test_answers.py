from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_modules.generative.answers import (
    LabelMatcher,
    Question,
    checked_answers,
    generate_label,
    generated_logits,
    label_texts,
    words_of,
)
from lightning_modules.generative.model import VisionLanguageModel
from lightning_modules.generative.prompts import trained_prompts
from lightning_modules.generative.scoring import ROOT, token_log_likelihoods, trie_of
from lightning_modules.options import AnswerOptions
from tests.lightning_modules.generative.tiny_answers import LABELS, QUESTIONS, images, plain_likelihoods, tiny_model
from vitrail.errors import UserError

PROMPTS = trained_prompts(["What?"], 400)


def test_a_generated_label_has_its_likelihood_and_the_others_share_the_rest() -> None:
    shares = generated_logits(torch.tensor([2, 0]), torch.tensor([0.7, 0.4]).log(), 4).softmax(dim=1)
    torch.testing.assert_close(shares, torch.tensor([[0.1, 0.1, 0.7, 0.1], [0.4, 0.2, 0.2, 0.2]]))
    for likelihood in (float("-inf"), -20.0, 0.0):
        logits = generated_logits(torch.tensor([1, 3]), torch.full((2,), likelihood), 4)
        assert logits.argmax(dim=1).tolist() == [1, 3]
        assert logits.isfinite().all()
        torch.testing.assert_close(logits.exp().sum(dim=1), torch.ones(2))


def test_questions_may_list_the_labels() -> None:
    question = Question("One of {labels}?", ["red_rose", "iris"], AnswerOptions(), PROMPTS, 3)
    assert question.ids == PROMPTS.prompt("One of red rose, iris?", 3)
    assert question.labels == [PROMPTS.answer("red rose"), PROMPTS.answer("iris")]
    assert label_texts(["a__b ", "c"]) == ["a b", "c"]
    with pytest.raises(UserError, match="the same text"):
        Question("What?", ["a_b", "a b"], AnswerOptions(), PROMPTS, 3)
    options = checked_answers(AnswerOptions(how="free", synonyms={"red_rose": ["rosa"]}), ["red_rose", "iris"])
    matcher = Question("What?", ["red_rose", "iris"], options, PROMPTS, 3)._matcher
    assert matcher("a rosa") == matcher("red rose") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"who": "me"}, "unknown key 'who'"),
        ({"how": "guess"}, "answers.how: must be one of scores, constrained, free; got 'guess'"),
        ({"content_free": "black"}, "answers.content_free: must be one of none, grey"),
        ({"how": "free", "content_free": "grey"}, "needs how: scores"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"synonyms": {"lily": ["lilium"]}}, "no label 'lily'"),
    ],
)
def test_options_are_checked(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked_answers(options, ["rose"])


IMAGE = images(5)
TEXTS = [name.replace("_", " ") for name in LABELS["class"]]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def ids(model: VisionLanguageModel) -> list[int]:
    assert model.prompts is not None
    return model.prompts.prompt(QUESTIONS["class"], model.image_tokens)


@pytest.fixture(scope="module")
def labels(model: VisionLanguageModel) -> list[list[int]]:
    assert model.prompts is not None
    return [model.prompts.answer(text) for text in TEXTS]


def by_the_library(model: VisionLanguageModel, ids: list[int], row: int, **further: Any) -> list[int]:
    """What ``transformers`` itself generates."""
    assert model.prompts is not None
    tokens = torch.tensor([ids])
    rows = model.side // model.patch
    found = model.model.generate(
        input_ids=tokens,
        pixel_values=model.patches(IMAGE[row : row + 1]),
        image_grid_thw=torch.tensor([[1, rows, rows]]),
        mm_token_type_ids=(tokens == model.configuration.image_token_id).int(),
        do_sample=False,
        eos_token_id=model.prompts.end_id,
        pad_token_id=0,
        **further,
    )
    generated: list[int] = found[0, len(ids) :].tolist()
    return generated


@torch.no_grad()
def test_only_labels_are_generated_and_the_same_as_by_the_library(
    model: VisionLanguageModel, ids: list[int], labels: list[list[int]]
) -> None:
    generated, _ = generate_label(model, model.read(model.encode_images(IMAGE), ids), trie_of(labels))

    def allowed(_: int, tokens: torch.Tensor) -> list[int]:
        so_far = tokens[len(ids) :].tolist()
        return [label[len(so_far)] for label in labels if label[: len(so_far)] == so_far and len(label) > len(so_far)]

    for row, number in enumerate(generated):
        expected = by_the_library(model, ids, row, prefix_allowed_tokens_fn=allowed, max_new_tokens=20)
        assert labels[number] == expected
    # Without the constraint, the model generates none of them.
    free = model.generate(model.read(model.encode_images(IMAGE), ids), 2, 8)
    assert not any(tokens in labels for tokens in free.tokens)


@torch.no_grad()
def test_the_likelihood_of_a_label_is_that_among_labels(
    model: VisionLanguageModel, ids: list[int], labels: list[list[int]]
) -> None:
    prefix = model.read(model.encode_images(IMAGE), ids)
    trie = trie_of(labels)
    generated, likelihood = generate_label(model, prefix, trie)
    tokens = token_log_likelihoods(model, prefix, trie)
    for row, number in enumerate(generated):
        total, node = torch.zeros(()), ROOT
        for following in trie.paths[number]:
            siblings = list(trie.children[node].values())
            assert tokens[row, following] == tokens[row, siblings].max()
            total = total + tokens[row, following] - tokens[row, siblings].logsumexp(dim=0)
            node = following
        torch.testing.assert_close(likelihood[row], total, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("longest", [1, 6])
def test_free_answers_are_those_of_the_library(model: VisionLanguageModel, ids: list[int], longest: int) -> None:
    assert model.prompts is not None
    generated = model.generate(model.read(model.encode_images(IMAGE), ids), model.prompts.end_id, longest)
    for row, tokens in enumerate(generated.tokens):
        assert tokens == by_the_library(model, ids, row, max_new_tokens=longest)
        plain = plain_likelihoods(model, IMAGE[row : row + 1], ids, tokens).sum()
        torch.testing.assert_close(generated.log_likelihood[row], plain, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_an_answer_ends_at_its_end_token(model: VisionLanguageModel, ids: list[int]) -> None:
    prefix = model.read(model.encode_images(IMAGE), ids)
    endless = model.generate(prefix, 399, 6)
    end_id = endless.tokens[0][2]
    generated = model.generate(prefix, end_id, 6)
    for tokens, whole in zip(generated.tokens, endless.tokens, strict=True):
        assert tokens == (whole[: whole.index(end_id) + 1] if end_id in whole else whole)
    assert len(generated.tokens[0]) <= 3


FLOWERS = ["iris", "rose", "rose of sharon", "yellow iris", "bird of paradise", "bishop of llandaff", "cosmos"]


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
    assert LabelMatcher(FLOWERS)(answer) == FLOWERS.index(label)


@pytest.mark.parametrize(
    "answer", ["primrose", "", "a flower", "an iris or a rose", "rose of sharon or rose", "bird", "irisation", "?!"]
)
def test_an_answer_that_names_none_or_several_names_none(answer: str) -> None:
    assert LabelMatcher(FLOWERS)(answer) is None


def test_synonyms_name_their_label() -> None:
    matcher = LabelMatcher(FLOWERS, {"bird of paradise": ["strelitzia", "crane flower"], "rose": ["Rosa"]})
    assert matcher("This looks like a Strelitzia.") == FLOWERS.index("bird of paradise")
    assert matcher("crane flowers") == FLOWERS.index("bird of paradise")
    assert matcher("a rosa, that is, a rose") == FLOWERS.index("rose")


def test_words_are_normalised_and_a_name_cannot_mean_two_labels() -> None:
    assert words_of("The Lady's  slippers: ÉTÉ_glass") == ("the", "lady", "slipper", "ete", "glass")
    with pytest.raises(UserError, match="'flag' would mean both 'iris' and 'rose'"):
        LabelMatcher(FLOWERS, {"iris": ["flag"], "rose": ["flag"]})
    with pytest.raises(UserError, match="would mean both"):
        LabelMatcher(["Rose", "roses"])
    with pytest.raises(UserError, match="no label 'lily'"):
        LabelMatcher(FLOWERS, {"lily": ["lilium"]})
    with pytest.raises(UserError, match="has no letters"):
        LabelMatcher(["-", "rose"])
