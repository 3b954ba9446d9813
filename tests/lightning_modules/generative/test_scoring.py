from __future__ import annotations

import pytest
import torch

from lightning_modules.generative import scoring as label_scoring
from lightning_modules.generative.model import VisionLanguageModel
from lightning_modules.generative.scoring import ROOT, LabelScorer, packed, trie_of
from tests.lightning_modules.generative.tiny_answers import LABELS, QUESTIONS, images, plain_likelihoods, tiny_model
from vitrail.errors import UserError

TEXTS = [name.replace("_", " ") for name in LABELS["class"]]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return tiny_model(tmp_path_factory.mktemp(request.param), request.param)


def asked(model: VisionLanguageModel) -> tuple[list[int], list[list[int]]]:
    """Tokens of a question, and of the labels as answers."""
    assert model.prompts is not None
    return model.prompts.prompt(QUESTIONS["class"], model.image_tokens), [model.prompts.answer(text) for text in TEXTS]


@torch.no_grad()
def test_scores_are_those_of_a_plain_pass_over_each_text(model: VisionLanguageModel) -> None:
    ids, labels = asked(model)
    image = images(3)
    prefix = model.read(model.encode_images(image), ids)
    means, sums = LabelScorer(labels)(model, prefix), LabelScorer(labels, length_normalised=False)(model, prefix)
    assert len({len(label) for label in labels}) > 1
    for number, label in enumerate(labels):
        plain = plain_likelihoods(model, image, ids, label)
        torch.testing.assert_close(means[:, number], plain.mean(dim=1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sums[:, number], plain.sum(dim=1), atol=1e-4, rtol=1e-5)
    # The images matter: else this would show nothing of the shared prefix.
    assert (means - means[0]).abs().max() > 1e-2


@torch.no_grad()
def test_a_prefix_can_be_scored_again(model: VisionLanguageModel) -> None:
    ids, labels = asked(model)
    prefix = model.read(model.encode_images(images(2)), ids)
    scorer = LabelScorer(labels)
    first = scorer(model, prefix)
    assert torch.equal(scorer(model, prefix), first)
    assert prefix.cache.get_seq_length() == len(ids) == prefix.length


@torch.no_grad()
def test_how_labels_are_packed_makes_no_difference(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, labels = asked(model)
    prefix = model.read(model.encode_images(images(2)), ids)
    whole = LabelScorer(labels)(model, prefix)
    torch.testing.assert_close(LabelScorer(labels, tokens_at_a_time=3)(model, prefix), whole, atol=1e-5, rtol=0)
    monkeypatch.setattr(label_scoring, "LOGITS_AT_A_TIME", 1)
    torch.testing.assert_close(LabelScorer(labels)(model, prefix), whole, atol=1e-5, rtol=0)
    turned = LabelScorer(labels[::-1])(model, prefix)
    torch.testing.assert_close(turned.flip(1), whole, atol=1e-5, rtol=0)


TOKENS = [[1, 2, 9], [1, 3, 9], [1, 9], [4, 2, 9]]


def test_common_beginnings_are_one_node() -> None:
    trie = trie_of(TOKENS)
    assert [[trie.tokens[node] for node in path] for path in trie.paths] == TOKENS
    assert trie.tokens.count(1) == 1
    assert len(trie.tokens) == 9
    assert set(trie.children[ROOT]) == {1, 4}
    assert set(trie.children[trie.paths[0][0]]) == {2, 3, 9}


def test_parents_come_first_and_ends_are_not_read() -> None:
    trie = trie_of(TOKENS)
    assert all(parent < node for node, parent in enumerate(trie.parents))
    assert [trie.depths[node] for node in trie.paths[0]] == [0, 1, 2]
    assert [trie.tokens[node] for node in trie.inner] == [1, 2, 3, 4, 2]


def test_the_same_label_twice_is_refused() -> None:
    with pytest.raises(UserError, match="numbers 1 and 2 are the same text"):
        trie_of([[1, 9], [2, 9], [2, 9]])


@pytest.mark.parametrize("largest", [1, 3, 6, 100])
def test_packed_trees_hold_every_label_once(largest: int) -> None:
    trees = packed(TOKENS, largest)
    found = {}
    for numbers, tree in trees:
        for number, path in zip(numbers, tree.paths, strict=True):
            assert number not in found
            found[number] = [tree.tokens[node] for node in path]
        assert len(tree.tokens) <= largest or len(tree.paths) == 1
    assert [found[number] for number in range(len(TOKENS))] == TOKENS
