from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.checkpoint import load_task
from lightning_modules.dual_encoder import DualEncoder
from tests.fakes_models import write_bert
from tests.lightning_modules.tiny import SIZE, tiny_trainer
from tests.lightning_modules.tiny_pairs import CLASSES, PROMPTS, TinyPairs, pair_batch, tiny_pair
from vitrail.errors import UserError


def test_class_prompts_are_encoded_once_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_pair(tmp_path / "clip")
    calls: list[int] = []
    encode = DualEncoder.encode_text

    def noted(self: DualEncoder, texts: list[str]) -> torch.Tensor:
        calls.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(DualEncoder, "encode_text", noted)
    tiny_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(task, TinyPairs())
    assert calls == [8, 8]


def test_a_checkpoint_alone_reads_text_and_images(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert", pooling="mean")
    towers = {"image": "test_resnet", "image_pretrained": False, "text": str(bert), "embed_dim": 8}
    task = DualEncoder(towers, CLASSES, PROMPTS, image_size=SIZE)  # type: ignore[arg-type]  # a plain dictionary
    trainer = tiny_trainer(tmp_path)
    trainer.fit(task, TinyPairs())
    path = tmp_path / "alone.ckpt"
    trainer.save_checkpoint(path)
    for file in sorted(bert.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    again: Any = load_task(path)
    task.eval()
    with torch.no_grad():
        assert torch.equal(task.encode_text(["a rose"]), again.encode_text(["a rose"]))
        image = pair_batch([1])["image"]
        assert torch.equal(task.encode_image(image), again.encode_image(image))
    assert again.tasks == {"class": CLASSES}


def test_without_tokenizer_or_texts_the_way_out_is_told(tmp_path: Path) -> None:
    task = tiny_pair(tmp_path / "clip")
    with pytest.raises(UserError, match="no tokenizer yet"):
        task.encode_text(["a rose"])


@torch.no_grad()
def test_many_texts_are_encoded_as_few_are(tmp_path: Path) -> None:
    task = tiny_pair(tmp_path / "clip").eval()
    texts = [f"number {index} of {CLASSES[index % 4]}" for index in range(300)]
    task.towers.tokenizer = task.towers.train_tokenizer(texts)
    embedded = task.encode_text(texts)
    assert embedded.shape == (300, 16)
    torch.testing.assert_close(embedded[290:292], task.encode_text(texts[290:292]))
    assert task.encode_text([]).shape == (0, 16)
