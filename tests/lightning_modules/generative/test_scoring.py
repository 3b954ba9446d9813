from __future__ import annotations

import pytest
import torch

from lightning_modules.generative import scoring as label_scoring
from lightning_modules.generative.model import VisionLanguageModel
from lightning_modules.generative.scoring import LabelScorer
from tests.lightning_modules.generative.tiny_answers import LABELS, QUESTIONS, images, plain_likelihoods, tiny_model

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
def test_one_reading_serves_all_and_stays_as_it_was(model: VisionLanguageModel) -> None:
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
