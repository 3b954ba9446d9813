from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLImageProcessor

from lightning_modules.generative.model import VisionLanguageModel
from lightning_modules.options import LanguageLoraOptions, MemoryOptions
from tests.lightning_modules.generative.tiny_answers import QUESTIONS, TEXTS, images, plain_likelihoods, tiny_model
from tests.support.models import write_qwen2_vl
from vitrail.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2_vl(tmp_path_factory.mktemp("model"), texts=TEXTS, scale=8.0)


@pytest.fixture(scope="module")
def model(folder: Path) -> VisionLanguageModel:
    return tiny_model(folder)


def test_patches_are_those_of_the_library(model: VisionLanguageModel) -> None:
    processor = Qwen2VLImageProcessor(
        patch_size=8, merge_size=2, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], min_pixels=1, max_pixels=9999
    )
    image = images(3)
    expected = processor(list(image), return_tensors="pt")
    torch.testing.assert_close(model.patches(image), expected["pixel_values"], atol=1e-5, rtol=1e-5)
    assert expected["image_grid_thw"].tolist() == [[1, 4, 4]] * 3
    assert model.image_tokens == 4


@pytest.mark.parametrize(("size", "side"), [(32, 32), (40, 32), (41, 48), (5, 16), (64, 64)])
@torch.no_grad()
def test_any_size_is_scaled_to_whole_patches(folder: Path, size: int, side: int) -> None:
    model = VisionLanguageModel(str(folder), image_size=size, texts=TEXTS)
    model.load()
    assert model.side == side
    assert model.encode_images(images(2, size)).features.shape == (2, 32)
    grey = torch.full((1, 3, size, size), 128, dtype=torch.uint8)
    # Scaling leaves one colour as it is; the channels stand one after the other in a patch.
    expected = model.normalize(grey[:, :, :1, :1]).flatten().repeat_interleave(2 * 8 * 8)
    torch.testing.assert_close(model.patches(grey), expected.expand((side // 8) ** 2, -1))


@torch.no_grad()
def test_reading_on_is_reading_at_once(model: VisionLanguageModel) -> None:
    assert model.prompts is not None
    seen = model.encode_images(images(3))
    ids = model.prompts.prompt(QUESTIONS["class"], model.image_tokens)
    whole = model.read(seen, ids)
    for cut in (len(ids) - 1, len(ids) - 5):
        part = model.read(seen, ids[:cut])
        on = model.extend(part, torch.tensor(ids[cut:]))
        torch.testing.assert_close(on.hidden, whole.hidden, atol=1e-5, rtol=1e-4)
        assert (on.length, on.position) == (whole.length, whole.position)
        assert part.cache.get_seq_length() == cut
    assert model.extend(whole, torch.tensor([], dtype=torch.int64)) is whole


def test_the_loss_is_of_the_answers_alone(model: VisionLanguageModel) -> None:
    assert model.prompts is not None
    ids = model.prompts.prompt(QUESTIONS["class"], model.image_tokens)
    image = images(3)
    answers = [model.prompts.answer(text) for text in ("rose", "yellow iris", "a much longer answer")]
    losses = model.answer_losses(model.encode_images(image), ids, answers)
    for row, answer in enumerate(answers):
        expected = -plain_likelihoods(model, image[row : row + 1], ids, answer).mean()
        torch.testing.assert_close(losses[row], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_network_that_is_there_takes_the_weights_over(folder: Path, model: VisionLanguageModel) -> None:
    late = VisionLanguageModel(str(folder), image_size=32, texts=TEXTS)
    late.build()
    parameters = list(late.parameters())
    late.load()
    late.load()
    assert all(one is other for one, other in zip(parameters, late.parameters(), strict=True))
    expected = model.encode_images(images(2)).features
    torch.testing.assert_close(late.eval().encode_images(images(2)).features, expected)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    write_qwen2_vl(tmp_path, texts=TEXTS)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    model = VisionLanguageModel(str(tmp_path), image_size=32, texts=TEXTS)
    model.build()
    assert model.model.lm_head.weight is model.model.model.language_model.embed_tokens.weight


def test_without_pretrained_weights_nothing_but_the_configuration_is_needed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = VisionLanguageModel(str(tmp_path), image_size=32, texts=TEXTS, pretrained=False)
    assert model.prompts is not None
    assert model.prompts.prompt("What?", 4).count(model.configuration.image_token_id) == 4
    # What a checkpoint keeps is enough to build the same network again.
    again = VisionLanguageModel("gone", image_size=32, texts=[], pretrained=False, architectures=model.architectures)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    with pytest.raises(UserError, match="no vocabulary file"):
        VisionLanguageModel(str(tmp_path), image_size=32, texts=TEXTS).load()


def test_random_weights_stay_random(folder: Path) -> None:
    model = VisionLanguageModel(str(folder), image_size=32, texts=["other texts"], pretrained=False)
    before, prompts = {name: value.clone() for name, value in model.state_dict().items()}, model.prompts
    model.load()
    assert model.prompts is prompts
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_prompt_with_another_number_of_tokens_is_refused(model: VisionLanguageModel) -> None:
    assert model.prompts is not None
    with pytest.raises(UserError, match="has 5 tokens of the image instead of 4"):
        model.read(model.encode_images(images(1)), model.prompts.prompt("a <|image_pad|>?", 4))


def test_activations_may_be_computed_again(folder: Path) -> None:
    gradients = []
    for again in (False, True):
        model = VisionLanguageModel(
            str(folder),
            image_size=32,
            texts=TEXTS,
            memory=MemoryOptions(gradient_checkpointing=again),
            lora=LanguageLoraOptions(rank=2),
        )
        torch.manual_seed(0)
        model.load()
        model.train()
        assert model.prompts is not None
        ids = model.prompts.prompt("What?", 4)
        seen = model.encode_images(images(2))
        loss = model.answer_losses(seen, ids, [model.prompts.answer("rose")] * 2).mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        assert model.model.is_gradient_checkpointing == again
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    torch.testing.assert_close(gradients[0], gradients[1])
