from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger

from datamodules.captions import PromptOptions, class_prompts
from lightning_modules.checkpoint import load_task
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.options import TowerOptions
from tests.support.models import (
    CLASSES,
    PROMPTS,
    SIZE,
    Recorder,
    TinyPairs,
    pair_batch,
    same_weights,
    tiny_pair,
    tiny_trainer,
    write_bert,
    write_clip,
)
from vitrail.errors import UserError


def test_classes_are_learned_from_their_prompts(tmp_path: Path) -> None:
    task = tiny_pair(tmp_path / "clip", lr=1e-2, optim_options={"warmup_epochs": 5.0})
    trainer = tiny_trainer(tmp_path, max_epochs=40, check_val_every_n_epoch=40)
    trainer.fit(task, TinyPairs())
    metrics = trainer.callback_metrics
    assert float(metrics["val/class/accuracy"]) > 0.7  # chance is a quarter
    assert {"val/loss", "val/class/mean_per_class", "val/class/top3", "train/loss", "train/logit_scale"} <= set(metrics)


def test_zero_shot_logits_come_from_the_mean_of_the_prompts(tmp_path: Path) -> None:
    task, kept = tiny_pair(tmp_path / "clip"), Recorder()
    trainer = tiny_trainer(tmp_path, callbacks=[kept], limit_train_batches=1)
    trainer.fit(task, TinyPairs())
    outputs = kept.outputs[-1]
    assert outputs["sample_id"].tolist() == [24, 25, 26]
    assert outputs["targets"]["class"].tolist() == [0, 1, 2]
    task.eval()
    with torch.no_grad():
        classes = torch.stack([F.normalize(task.encode_text(prompts).mean(0), dim=0) for prompts in PROMPTS])
        image = task.encode_image(pair_batch([24, 25, 26])["image"])
        expected = task.objective.logit_scale()[0] * image @ classes.T
    torch.testing.assert_close(outputs["logits"]["class"], expected)
    torch.testing.assert_close(outputs["image_embedding"], image)
    loss = F.cross_entropy(torch.cat([o["logits"]["class"] for o in kept.outputs]), torch.arange(7) % 4)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(loss), rel=1e-5)


def test_every_caption_is_embedded_where_the_data_have_their_own(tmp_path: Path) -> None:
    task, kept = tiny_pair(tmp_path / "clip", class_names=None), Recorder()
    trainer = tiny_trainer(tmp_path, callbacks=[kept])
    trainer.fit(task, TinyPairs(captions=True))
    last = kept.outputs[-1]
    assert last["logits"] == {}
    assert last["text_image"].tolist() == [24, 24, 25, 25, 26, 26]
    assert last["text_embedding"].shape == (6, 16)
    torch.testing.assert_close(last["text_embedding"].norm(dim=1), torch.ones(6))
    assert {"val/loss", "train/loss"} <= set(trainer.callback_metrics)


def test_images_without_captions_do_not_count_in_the_loss_of_an_evaluation(tmp_path: Path) -> None:
    task = tiny_pair(tmp_path / "clip", class_names=None).eval()
    task.towers.tokenizer = task.towers.train_tokenizer([prompt for prompts in PROMPTS for prompt in prompts])
    others, some, none = (pair_batch(ids, captions=True) for ids in ([20, 22], [20, 21, 22], [20, 21]))
    some["captions"][1], none["captions"] = [], [[], []]
    with torch.no_grad():
        expected, _ = task._shared_step(others, "val")
        loss, outputs = task._shared_step(some, "val")
        torch.testing.assert_close(loss, expected)
        assert outputs["text_image"].tolist() == [20, 20, 22, 22]
        assert len(outputs["image_embedding"]) == 3
        assert float(task._shared_step(none, "val")[0]) == 0


def test_classes_with_the_same_prompts_are_reported(tmp_path: Path) -> None:
    names = ["water_bottle", "water bottle", "mug"]
    prompts = class_prompts(PromptOptions("photo"), names)
    with pytest.warns(UserWarning, match="classes 'water_bottle' and 'water bottle' have the same prompts"):
        tiny_pair(tmp_path / "clip", class_names=names, class_prompts=prompts)


def test_training_images_without_captions_are_reported(tmp_path: Path) -> None:
    class Some(TinyPairs):
        def without_caption(self, split: str) -> int:
            return 3 if split == "train" else 0

    with pytest.warns(UserWarning, match="3 images of the train split have no caption, so they are trained with an"):
        tiny_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(tiny_pair(tmp_path / "clip"), Some())


@pytest.mark.parametrize("loss", ["info_nce", "label_aware", "sigmoid"])
def test_the_logit_scale_is_trained_in_every_freeze_mode(tmp_path: Path, loss: str) -> None:
    for mode in ("none", "text_only", "vision_only", "early_layers", "towers"):
        task = tiny_pair(tmp_path / "clip", loss=loss, freeze=mode, logit_scale={"scale": 5.0, "lr": 0.1})
        tiny_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(task, TinyPairs())
        assert float(task.objective.logit_scale()[0]) != pytest.approx(5.0, abs=0.05), mode


def test_frozen_modules_keep_their_weights_and_are_in_evaluation_mode(tmp_path: Path) -> None:
    task = tiny_pair(tmp_path / "clip", freeze="vision_only")
    begin = {name: value.clone() for name, value in task.state_dict().items()}
    tiny_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(task, TinyPairs())
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, begin[name])}
    assert not any("vision_model" in name or "visual_projection" in name for name in moved)
    assert any("text_model" in name for name in moved)
    task.train()
    assert not task.towers.backbone("image").training
    assert task.towers.backbone("text").training


def test_a_run_in_two_parts_ends_as_one_that_was_never_interrupted(tmp_path: Path) -> None:
    def fit(
        max_epochs: int, ckpt_path: str | None = None, schedule: str = "constant"
    ) -> tuple[pl.Trainer, DualEncoder]:
        task = tiny_pair(tmp_path / "clip", chunk_size=4, logit_scale={"lr": 0.01}, schedule=schedule)
        trainer = tiny_trainer(tmp_path, max_epochs=max_epochs)
        trainer.fit(task, TinyPairs(), ckpt_path=ckpt_path)
        return trainer, task

    # A constant schedule, because others depend on the end of the training.
    fit(2)[0].save_checkpoint(tmp_path / "half.ckpt")
    _, whole = fit(4)
    _, resumed = fit(4, str(tmp_path / "half.ckpt"))
    assert same_weights(whole, resumed)
    assert not same_weights(fit(4, schedule="cosine")[1], resumed)


def test_a_pretrained_clip_is_evaluated_without_training(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip", image_size=SIZE)
    task = DualEncoder(TowerOptions(model=str(folder)), CLASSES, PROMPTS, image_size=SIZE)
    assert task.ready_without_training
    [metrics] = tiny_trainer(tmp_path).test(task, TinyPairs(), verbose=False)
    assert {"test/class/accuracy", "test/class/top3", "test/loss"} <= set(metrics)
    assert float(task.objective.logit_scale()[0]) == pytest.approx(torch.tensor(4.0).exp().item(), rel=1e-4)


def test_a_pretrained_scale_beyond_a_hundred_outlives_training_and_checkpoint(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip", scale=4.765)
    task = DualEncoder(TowerOptions(model=str(folder)), CLASSES, PROMPTS, image_size=SIZE, lr=0.0)
    trainer = tiny_trainer(tmp_path, max_epochs=1, limit_train_batches=1)
    trainer.fit(task, TinyPairs())
    assert torch.equal(task.objective.logit_scale.log_scale.data, torch.tensor(4.765))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = load_task(tmp_path / "last.ckpt")
    assert isinstance(again, DualEncoder)
    again.objective.logit_scale.clamp()
    assert torch.equal(again.objective.logit_scale.log_scale.data, torch.tensor(4.765))


def test_half_precision_trains(tmp_path: Path) -> None:
    task = tiny_pair(tmp_path / "clip", chunk_size=3)
    trainer = tiny_trainer(tmp_path, precision="bf16-mixed", gradient_clip_val=1.0)
    trainer.fit(task, TinyPairs())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_learning_rates_of_towers_projections_and_logit_scale_differ(tmp_path: Path) -> None:
    task = tiny_pair(
        tmp_path / "clip",
        lr=1e-3,
        schedule="constant",
        logit_scale={"lr": 0.1},
        optim_options={"backbone_lr": 1e-5, "layer_decay": 0.5},
    )
    logger = CSVLogger(tmp_path)
    monitor = pl.callbacks.LearningRateMonitor(logging_interval="step")
    tiny_trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[monitor]).fit(task, TinyPairs())
    [path] = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        row = next(iter(csv.DictReader(file)))
    rates = {name.removeprefix("lr-AdamW/"): float(value) for name, value in row.items() if name.startswith("lr-AdamW")}
    assert rates["head_decay"] == 1e-3
    assert rates["logit_scale"] == 0.1
    assert min(value for name, value in rates.items() if name.startswith("text_backbone")) == pytest.approx(1.25e-6)


def test_lora_trains_only_adapters_which_start_as_zero(tmp_path: Path) -> None:
    plain = tiny_pair(tmp_path / "clip")
    task = tiny_pair(tmp_path / "clip", lora={"rank": 2}, lr=1e-2)
    image = pair_batch([1, 2])["image"]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval().encode_image(image), task.eval().encode_image(image))
    begin = {name: value.clone() for name, value in task.state_dict().items()}
    tiny_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(task, TinyPairs())
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, begin[name])}
    assert all(
        "lora_" in name or "projection" in name or "temperature" in name or "contrastive" in name for name in moved
    )
    assert any("lora_B" in name for name in moved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "triplet"}, "loss: must be one of .*; got 'triplet'"),
        ({"freeze": "all"}, "freeze: must be one of .*; got 'all'"),
        ({"freeze": "text_only", "lora": {}}, "does not go with lora"),
        ({"lora": {"rank": 0}}, "lora.rank: must be"),
        ({"lora": {"r": 0}}, "lora: unknown key 'r'"),
        ({"class_prompts": [["a"]]}, "class_prompts: 1 for 4"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_pair(tmp_path / "clip", **changes)


@pytest.mark.parametrize(
    ("freeze", "sides"),
    [("towers", ["image", "text"]), ("text_only", ["text"]), ("vision_only", ["image"]), ("none", [])],
)
def test_what_is_frozen_is_in_evaluation_mode_from_the_beginning(tmp_path: Path, freeze: str, sides: list[str]) -> None:
    assert tiny_pair(tmp_path, freeze=freeze).frozen_sides == sides


def test_class_prompts_are_encoded_once_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_pair(tmp_path / "clip")
    calls: list[int] = []
    encode = DualEncoder.encode_text

    def noted(self: DualEncoder, texts: list[str]) -> torch.Tensor:
        calls.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(DualEncoder, "encode_text", noted)
    tiny_trainer(tmp_path, max_epochs=2).fit(task, TinyPairs())
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


def test_without_tokenizer_or_texts_the_error_has_a_hint(tmp_path: Path) -> None:
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


def test_an_image_tower_of_timm_takes_its_options_and_adapters_keep_its_statistics(tmp_path: Path) -> None:
    towers = {"image": "test_resnet", "image_pretrained": False, "text": str(write_bert(tmp_path))}
    options = {"image_options": {"drop_path_rate": 0.2, "act_layer": "silu"}}
    task = DualEncoder({**towers, **options}, image_size=SIZE, lora={"towers": "text"})  # type: ignore[arg-type]
    image: Any = task.towers.backbone("image")
    assert isinstance(image.act1, torch.nn.SiLU)
    assert task.hparams["towers"]["image_options"] == options["image_options"]
    before = {name: value.clone() for name, value in image.named_buffers()}
    task.train()
    task.encode_image(pair_batch([0, 1, 2])["image"])
    assert all(torch.equal(value, before[name]) for name, value in image.named_buffers())
    wrong = {**towers, "image_options": {"drop_path": 0.2}}
    with pytest.raises(UserError, match=r"^towers.image_options: test_resnet has no option 'drop_path'"):
        DualEncoder(wrong, image_size=SIZE)  # type: ignore[arg-type]
