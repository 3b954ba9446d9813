from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from experiments.export.weights import groups_of
from lightning_modules.checkpoint import load_task
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.encoders.captioning import Captioner
from lightning_modules.encoders.tokenizer import trained_tokenizer
from lightning_modules.options import CaptioningOptions, TowerOptions
from tests.support.models import (
    CLASSES,
    TEXTS,
    TinyPairs,
    pair_batch,
    same_weights,
    tiny_pair,
    tiny_trainer,
    write_bert,
    write_open_clip,
    write_whole_model,
)
from vitrail.errors import UserError
from vitrail.programs import main
from vitrail.runs import Run

SMALL = {"width": 32, "queries": 4, "layers": 2}


def attention(layer: nn.MultiheadAttention, query: torch.Tensor, memory: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """By hand, one head."""
    weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, memory, memory), weights, biases, strict=True))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
    return scores.softmax(dim=-1) @ v @ layer.out_proj.weight.T + layer.out_proj.bias


def by_hand(captioner: Captioner, image: torch.Tensor, captions: list[list[int]]) -> torch.Tensor:
    """The paper's loss of one caption after the other, without any padding."""
    linear, norm = captioner.image_projection
    losses = []
    for tokens, ids in zip(image, captions, strict=True):
        memory = norm(linear(tokens[None]))
        pooled = captioner.pooler_norm(attention(captioner.pooler, captioner.queries[None], memory, causal=False))
        inputs = [captioner.start, *(captioner.tokens[number] for number in ids[:-1])]
        hidden = (torch.stack(inputs) + captioner.positions[: len(ids)])[None]
        for layer in captioner.layers:
            assert isinstance(layer, nn.TransformerDecoderLayer)
            own = layer.norm1(hidden)
            hidden = hidden + attention(layer.self_attn, own, own, causal=True)
            hidden = hidden + attention(layer.multihead_attn, layer.norm2(hidden), pooled, causal=False)
            hidden = hidden + layer.linear2(F.gelu(layer.linear1(layer.norm3(hidden))))
        likelihood = (captioner.norm(hidden)[0] @ captioner.tokens.T).log_softmax(dim=-1)
        losses += [-likelihood[place, number] for place, number in enumerate(ids)]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_and_gradients_are_those_written_by_hand(side: str) -> None:
    torch.manual_seed(0)
    captioner = Captioner(CaptioningOptions(**SMALL), 12, 30, 9).double()
    image, captions = torch.randn(3, 5, 12, dtype=torch.float64), [[1, 7, 8, 3], [1, 3], [1, 9, 4, 7, 5, 3]]
    rows, masks = [], []
    for ids in captions:
        padding = [0] * (7 - len(ids))
        rows.append([*ids, *padding] if side == "right" else [*padding, *ids])
        masks.append([*[1] * len(ids), *padding] if side == "right" else [*padding, *[1] * len(ids)])
    names, parameters = zip(*captioner.named_parameters(), strict=True)
    ours = captioner(image, torch.tensor(rows), torch.tensor(masks)).sum() / sum(map(len, captions))
    expected = by_hand(captioner, image, captions)
    torch.testing.assert_close(ours, expected.float(), atol=1e-5, rtol=0)
    found, wanted = (torch.autograd.grad(loss, parameters) for loss in (ours, expected))
    for name, one, other in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4, msg=name)
        assert other.abs().max() > 0, name


def test_greedy_captions_are_the_most_probable_next_tokens_up_to_the_end() -> None:
    torch.manual_seed(0)
    captioner = Captioner(CaptioningOptions(**SMALL), 12, 30, 9).eval()
    image = torch.randn(4, 5, 12)
    whole = captioner.generate(image, None)
    assert {len(ids) for ids in whole} == {9}
    with torch.no_grad():
        for row, ids in enumerate(whole):
            logits = captioner.logits(captioner.pooled(image[row : row + 1]), torch.tensor([ids[:-1]]))
            assert logits[0].argmax(dim=-1).tolist() == ids
    end = whole[0][4]
    assert captioner.generate(image, end)[0] == whole[0][: whole[0].index(end)]


def trained(folder: Path, epochs: int) -> Any:
    """A dual encoder that writes captions, its first and its last loss, and its run."""
    options: dict[str, Any] = {"loss_options": {"captioning": SMALL}, "lr": 3e-3, "schedule": "constant"}
    task = tiny_pair(folder / "clip", class_names=None, weight_decay=0.0, **options)
    before = tiny_trainer(folder, max_epochs=1)
    before.fit(task, TinyPairs(captions=True))
    first = float(before.callback_metrics["train/captioning_loss"])
    trainer = tiny_trainer(folder, max_epochs=epochs)
    trainer.fit(task, TinyPairs(captions=True))
    run = folder / "run"
    trainer.save_checkpoint(run / "checkpoints" / "best.ckpt")
    (run / "config.yaml").write_text("name: captions\n", encoding="utf-8")
    return task.eval(), first, float(trainer.callback_metrics["train/captioning_loss"]), run


@pytest.mark.slow
def test_training_lowers_the_loss_and_captions_name_what_is_there(tmp_path: Path) -> None:
    task, first, last, run = trained(tmp_path, 50)
    assert last < first / 3
    batch = pair_batch(list(range(12)), captions=True)
    captions = task.captions_of(batch["image"])
    right = [caption.startswith(CLASSES[number % 4]) for number, caption in enumerate(captions)]
    assert sum(right) >= 6, captions  # three by chance
    again = load_task(run / "checkpoints" / "best.ckpt")
    assert same_weights(task, again)
    assert again.captions_of(batch["image"]) == captions  # type: ignore[operator]  # a dual encoder
    assert not [name for names in groups_of(again).values() for name in names if "captioner" in name]


def test_predict_writes_captions_without_any_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, _, _, run = trained(tmp_path, 4)
    image = pair_batch([0], captions=True)["image"]
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    [caption] = task.captions_of(image)
    [found] = Run(run).predict(tmp_path / "photo.png")
    assert found.row() == {"image": str(tmp_path / "photo.png"), "caption": caption, "error": None}
    assert caption in repr(found)
    assert main("vitrail", ["predict", str(run), str(tmp_path / "photo.png")]) == 0
    assert caption in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["clip", "siglip", "test_resnet", "test_vit"])
def test_image_tokens_come_with_the_same_features(kind: str, tmp_path: Path) -> None:
    towers: dict[str, Any] = {"image": kind, "image_pretrained": False, "text": str(write_bert(tmp_path / "bert"))}
    if not kind.startswith("test_"):
        towers = {"model": str(write_whole_model(tmp_path / "model", kind))}
    task = DualEncoder(TowerOptions(**towers), image_size=32, pretrained=False).eval()
    image = pair_batch([1, 2])["image"]
    with torch.no_grad():
        features, tokens = task.towers.with_image_tokens(image)
        torch.testing.assert_close(features, task.towers.image_features(image))
    width, vocabulary_size, _ = task.towers.caption_sizes
    assert tokens.shape[0::2] == (2, width)
    assert tokens.shape[1] >= 1
    assert vocabulary_size == 400


def test_cached_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    found = []
    for chunk_size in (0, 2):
        task = tiny_pair(tmp_path / "clip", chunk_size=chunk_size, loss_options={"captioning": SMALL})
        task.towers.tokenizer = trained_tokenizer(TEXTS, 400, 20, fixed_length=False)
        loss = task._training_loss(pair_batch([0, 1, 2, 3, 4]))
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        gradients = {name: value.grad for name, value in task.named_parameters() if value.grad is not None}
        assert any(name.startswith("captioner.") for name in gradients)
        found.append((loss.detach(), gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_validation_is_that_of_the_first_captions_without_padding(tmp_path: Path) -> None:
    task = tiny_pair(tmp_path / "clip", class_names=None, loss_options={"captioning": SMALL})
    task.towers.tokenizer = trained_tokenizer(TEXTS, 400, 20, fixed_length=False)
    trainer = tiny_trainer(tmp_path)
    trainer.validate(task, TinyPairs(captions=True), verbose=False)
    batch = pair_batch([20, 21, 22, 23, 24, 25, 26], captions=True)
    with torch.no_grad():
        ids, attended = task._tokens([texts[0] for texts in batch["captions"]])
        losses = task._described(batch["image"], ids, attended)[:, -1]
    expected = float(losses.sum() / attended.sum())
    assert float(trainer.callback_metrics["val/captioning_loss"]) == pytest.approx(expected, rel=1e-5)


def test_what_does_not_go_with_captions_is_refused(tmp_path: Path) -> None:
    captioning: dict[str, Any] = {"loss_options": {"captioning": SMALL}}
    with pytest.raises(UserError, match="captioning: does not go with few_shot"):
        tiny_pair(tmp_path / "clip", few_shot={"method": "coop"}, **captioning)
    pretrained = {"model": str(write_whole_model(tmp_path / "whole", "clip"))}
    assert tiny_pair(tmp_path / "clip", towers=pretrained).ready_without_training
    assert not tiny_pair(tmp_path / "clip", towers=pretrained, **captioning).ready_without_training
    model = str(write_open_clip(tmp_path / "open_clip", "vit"))
    with pytest.raises(UserError, match=r"captioning: .*open_clip has no image tokens here; use other towers"):
        tiny_pair(tmp_path / "clip", towers={"model": model, "pretrained": False}, **captioning)
