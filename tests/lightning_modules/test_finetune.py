from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from callbacks.finetuning import BackboneUnfreezing
from experiments.export.graphs import graph_of, towers_of
from lightning_modules.checkpoint import load_task
from lightning_modules.classification import ImageClassifier
from lightning_modules.encoders.dual import Towers, build_towers
from lightning_modules.finetune import add_lora, freeze, without_base
from lightning_modules.generative.model import VisionLanguageModel
from lightning_modules.optim import is_frozen, parameter_groups
from lightning_modules.options import LanguageLoraOptions, LoraOptions, MemoryOptions, TowerOptions
from tests.support.models import (
    TinyData,
    make_batch,
    same_weights,
    tiny_classifier,
    tiny_trainer,
    write_bert,
    write_clip,
    write_qwen2_vl,
    write_siglip,
)
from vitrail.errors import UserError


def clip(name: str, size: int) -> Towers:
    # Without memory for the weights: only their number is asked.
    with torch.device("meta"):
        return build_towers(TowerOptions(model=name, pretrained=False), size)


def trainable(towers: Towers) -> int:
    return sum(parameter.numel() for parameter in towers.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [("openai/clip-vit-base-patch32", 224, 21.14), ("openai/clip-vit-large-patch14-336", 336, 40.75)],
)
def test_early_layers_leaves_the_reference_numbers_of_parameters(name: str, size: int, millions: float) -> None:
    towers = clip(name, size)
    freeze(towers, "early_layers")
    assert round(trainable(towers) / 1e6, 2) == millions  # without the logit scale


def test_each_mode_leaves_its_part() -> None:
    counts = {}
    for mode in ("none", "text_only", "vision_only", "towers"):
        towers = clip("openai/clip-vit-base-patch32", 224)
        freeze(towers, mode)
        counts[mode] = trainable(towers)
    image, text = (sum(p.numel() for p in towers.backbone(side).parameters()) for side in ("image", "text"))
    assert counts["none"] == image + text + 768 * 512 + 512 * 512
    assert counts["text_only"] == image + 768 * 512
    assert counts["vision_only"] == text + 512 * 512
    assert counts["towers"] == 768 * 512 + 512 * 512


def test_a_residual_network_keeps_its_last_two_blocks() -> None:
    towers = build_towers(
        TowerOptions(image="resnet18", image_pretrained=False, text="bert-base-uncased", text_pretrained=False), 64
    )
    freeze(towers, "early_layers")
    free = {name for name, parameter in towers.backbone("image").named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in free} == {"layer4"}


def test_a_model_without_projections_has_nothing_to_train(tmp_path: Path) -> None:
    towers = build_towers(TowerOptions(model=str(write_siglip(tmp_path))), 32)
    with pytest.raises(UserError, match="nothing to train"):
        freeze(towers, "towers")


def test_adapters_are_the_only_free_weights_of_the_towers_that_were_chosen(tmp_path: Path) -> None:
    for chosen in ("both", "image", "text"):
        towers = build_towers(TowerOptions(model=str(write_clip(tmp_path)), pretrained=False), 32)
        add_lora(towers, LoraOptions(rank=3, towers=chosen), 32)
        for side in ("image", "text"):
            free = [name for name, p in towers.backbone(side).named_parameters() if p.requires_grad]
            assert all("lora_" in name for name in free)
            # Four linear layers in each of two blocks, two matrices each.
            assert len(free) == (16 if chosen in {"both", side} else 0)


def test_pretrained_weights_find_their_place_beneath_the_adapters(tmp_path: Path) -> None:
    from transformers import CLIPModel

    folder = write_clip(tmp_path)
    towers = build_towers(TowerOptions(model=str(folder)), 32)
    add_lora(towers, LoraOptions(), 32)
    towers.load_pretrained()
    peer = CLIPModel.from_pretrained(folder).state_dict()
    own = {name.replace(".base_layer.", "."): value for name, value in towers.state_dict().items()}
    for name, value in peer.items():
        assert own[f"model.{name}"].equal(value), name


def test_a_network_without_attention_cannot_be_adapted(tmp_path: Path) -> None:
    towers = build_towers(TowerOptions(image="test_resnet", image_pretrained=False, text=str(write_bert(tmp_path))), 32)
    with pytest.raises(UserError, match="image tower has no attention layers"):
        add_lora(towers, LoraOptions(), 32)
    add_lora(towers, LoraOptions(towers="text"), 32)


def test_layers_whose_weights_are_read_without_calling_them_get_no_adapters(tmp_path: Path) -> None:
    towers = build_towers(TowerOptions(model=str(write_siglip(tmp_path)), pretrained=False), 32)
    add_lora(towers, LoraOptions(rank=2), 32)
    adapted = [name for name, module in towers.named_modules() if hasattr(module, "lora_A")]
    # Four layers in each of two blocks of both towers; not the out_proj of the head's nn.MultiheadAttention.
    assert len(adapted) == 16
    assert not [name for name in adapted if "head" in name]
    assert all(module.training for module in towers.modules())


def test_a_tower_that_only_reads_its_weights_cannot_be_adapted(tmp_path: Path) -> None:
    class Reader(nn.Module):
        """As timm's BEiT and Swin Transformer V2 do."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(3, 3)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(image.mean(dim=(2, 3)), self.qkv.weight)

    towers: Any = build_towers(
        TowerOptions(image="test_resnet", image_pretrained=False, text=str(write_bert(tmp_path))), 32
    )
    towers.image.backbone = Reader()
    with pytest.raises(UserError, match=r"the image tower never calls its attention layers \(qkv"):
        add_lora(towers, LoraOptions(), 32)


@pytest.mark.parametrize(("part", "matrices"), [("language", 16), ("vision", 8), ("both", 24)])
def test_adapters_of_a_language_model_are_the_only_free_weights_and_begin_as_nothing(
    tmp_path: Path, part: Any, matrices: int
) -> None:
    folder = str(write_qwen2_vl(tmp_path))
    memory = MemoryOptions(precision="bfloat16")
    plain = VisionLanguageModel(folder, image_size=32, texts=[], memory=memory)
    adapted = VisionLanguageModel(
        folder, image_size=32, texts=[], memory=memory, lora=LanguageLoraOptions(rank=3, parts=part)
    )
    for model in (plain, adapted):
        model.load()
    free = {name: value for name, value in adapted.model.named_parameters() if value.requires_grad}
    # Two blocks with four linear layers in the language model, two in the vision tower; two matrices each.
    assert len(free) == matrices
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in free.items())
    assert {"visual" in name for name in free} == {"language": {False}, "vision": {True}, "both": {True, False}}[part]
    image = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(adapted.eval().encode_images(image).features, plain.eval().encode_images(image).features)


def test_what_a_checkpoint_needs_of_an_adapted_network() -> None:
    state = {"net.a.lora_A.weight": 1, "net.a.base_layer.weight": 2, "net.b": 3, "head.b": 4}
    assert without_base(state, "net.") == {"net.a.lora_A.weight": 1, "head.b": 4}


def trained_names(task: ImageClassifier) -> set[str]:
    return {name for name, parameter in task.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("kind", "suffixes"), [("lora", {"A", "B"}), ("dora", {"A", "B", "magnitude_vector"})])
def test_a_classifier_trains_its_adapters_and_heads_alone(kind: str, suffixes: set[str]) -> None:
    task = tiny_classifier(backbone="test_vit", backbone_options={"adapter": {"kind": kind, "rank": 3}})
    names = {
        f"encoder.backbone.blocks.{block}.attn.qkv.lora_{s}.default.weight" for block in range(6) for s in suffixes
    }
    assert trained_names(task) == names | {"head.weight", "head.bias"}
    width = 64
    sizes = {"A": 3 * width, "B": 3 * width * 3, "magnitude_vector": 3 * width}
    trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    assert trained == 6 * sum(sizes[suffix] for suffix in suffixes) + 4 * width + 4
    groups = parameter_groups(task, task.backbones, weight_decay=0.1, layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) == 6  # one for each block; the last one has the head's


def test_bitfit_trains_biases_and_heads_alone_and_keeps_the_statistics() -> None:
    task = tiny_classifier(backbone_options={"adapter": {"kind": "bitfit"}})
    names = {name for name, _ in task.backbone.named_parameters() if name.endswith("bias")}
    assert trained_names(task) == {f"encoder.backbone.{name}" for name in names} | {"head.weight", "head.bias"}
    before = {name: value.clone() for name, value in task.backbone.named_buffers()}
    task.train()
    task(make_batch([1, 2, 3])["image"])
    assert all(torch.equal(value, before[name]) for name, value in task.backbone.named_buffers())


@pytest.mark.parametrize("kind", ["lora", "dora", "bitfit"])
def test_adapters_start_as_the_pretrained_network(tmp_path: Path, kind: str) -> None:
    plain = tiny_classifier(backbone="test_vit")
    torch.save(plain.backbone.state_dict(), tmp_path / "w.pth")
    adapted = tiny_classifier(
        backbone="test_vit", pretrained=str(tmp_path / "w.pth"), backbone_options={"adapter": {"kind": kind}}
    )
    adapted.load_pretrained()
    image = make_batch([1, 2])["image"]
    with torch.no_grad():
        assert torch.equal(adapted.eval().encoder(image), plain.eval().encoder(image))


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow), "bitfit"])
def test_adapters_go_through_phases_a_checkpoint_and_an_export(tmp_path: Path, kind: str) -> None:
    def made() -> ImageClassifier:
        pl.seed_everything(5)
        adapter = {"kind": kind, **({} if kind == "bitfit" else {"rank": 2})}
        return tiny_classifier(backbone="test_vit", backbone_options={"adapter": adapter})

    def unfreezing() -> BackboneUnfreezing:
        return BackboneUnfreezing(1, lr=1e-2, backbone_lr=1e-2, head_lr=1e-2)

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    task, start = made(), made().state_dict()
    frozen = []

    class Frozen(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
            frozen.append(is_frozen(task.backbone))

    tiny_trainer(tmp_path, max_epochs=2, callbacks=[unfreezing(), Save(), Frozen()]).fit(task, TinyData())
    assert frozen == [True] * 3 + [False] * 3
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == trained_names(made())
    resumed = made()
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[unfreezing()])
    trainer.fit(resumed, TinyData(), ckpt_path=str(tmp_path / "0.ckpt"))
    assert same_weights(task, resumed)
    loaded = load_task(tmp_path / "1.ckpt")
    [tower] = towers_of(loaded)
    assert not any(getattr(module, "merged", True) is False for module in tower.module.modules())
    image = make_batch([1, 2])["image"]
    with torch.no_grad():
        expected = task.eval()(image)["class"]
        assert torch.equal(loaded(image)["class"], expected)
        torch.testing.assert_close(graph_of(tower).module()(image)[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "test_resnet",
            {},
            "adapter.kind: lora, but test_resnet has no attention layers to adapt; choose kind: bitfit",
        ),
        ("test_vit", {"kind": "bitfit", "rank": 4}, "bitfit trains biases, which have no rank"),
        ("test_vit", {"kind": "loha"}, "adapter.kind: must be one of lora, dora, bitfit; got 'loha'"),
    ],
)
def test_adapters_that_do_not_fit_are_user_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_classifier(backbone=name, backbone_options={"adapter": options})
