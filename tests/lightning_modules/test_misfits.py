from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experiments.export.quantize import quantize_weights
from experiments.export.weights import read_weights, write_weights
from experiments.train.cli import refuse_conflicting_checkpoint
from lightning_modules.base import VisionTask
from lightning_modules.checkpoint import load_task
from lightning_modules.encoders.dual import build_towers
from lightning_modules.encoders.image import ImageEncoder
from lightning_modules.encoders.text import TextEncoder
from lightning_modules.encoders.transformers import model_configuration
from lightning_modules.ensemble import Ensemble
from lightning_modules.generative.model import VisionLanguageModel
from lightning_modules.options import TowerOptions
from tests.lightning_modules.generative.tiny_answers import tiny_answerer
from tests.support.models import TEXTS, tiny_classifier, tiny_pair, write_bert, write_clip, write_qwen2_vl, write_siglip
from vitrail.errors import UserError

State = dict[str, torch.Tensor]


class Arrival(NamedTuple):
    """Weights on disk, and what reads them."""

    state: State
    write: Callable[[State], object]  # replaces them
    loads: Sequence[Callable[[], object]]  # all that a command may do with them
    name: str  # suffix of the name of the weight that is changed
    origin: str  # beginning of the error message


def timm_file(folder: Path, architecture: str, state: State, name: str) -> Arrival:
    path = folder / "w.safetensors"

    def load() -> None:
        ImageEncoder(architecture, 32, str(path)).load_pretrained()

    def write(changed: State) -> None:
        save_file({key: value.contiguous() for key, value in changed.items()}, path)

    return Arrival(state, write, [load], name, f"pretrained: {path} ")


def timm_release(folder: Path) -> Arrival:
    return timm_file(
        folder, "test_vit", timm.create_model("test_vit", num_classes=5).state_dict(), "blocks.2.norm1.weight"
    )


def lenient_timm_release(folder: Path) -> Arrival:
    """timm itself would complete this one at random."""
    state = timm.create_model("dla46x_c", num_classes=5).state_dict()
    return timm_file(folder, "dla46x_c", state, "level4.tree1.tree1.bn2.running_mean")


def checkpoint_as_file(folder: Path) -> Arrival:
    return timm_file(
        folder, "test_efficientnet", tiny_classifier().state_dict(), "encoder.backbone.blocks.3.0.bn2.bias"
    )


def open_clip_file(folder: Path) -> Arrival:
    from open_clip.model import CLIP

    vision = {"layers": 10, "width": 256, "head_width": 64, "patch_size": 16, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    state = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).state_dict()
    return timm_file(folder, "vit_xsmall_patch16_clip_224", state, "visual.transformer.resblocks.1.ln_1.weight")


def transformers_folder(folder: Path, load: Callable[[Path], object], key: str, name: str) -> Arrival:
    path = folder / "model.safetensors"

    def write(changed: State) -> None:
        save_file(changed, path, {"format": "pt"})

    return Arrival(load_file(path), write, [lambda: load(folder)], name, f"{key}: {folder} does not fit: ")


def whole_model(folder: Path) -> None:
    build_towers(TowerOptions(model=str(folder)), 32).load_pretrained()


def text_tower(folder: Path) -> TextEncoder:
    configuration = model_configuration(str(folder), True, "towers.text")
    tower = TextEncoder(str(folder), configuration, pretrained=True, pooling="mean", max_length=12)
    tower.load_pretrained()
    return tower


def generative(folder: Path) -> None:
    VisionLanguageModel(str(folder), image_size=16, texts=TEXTS).load()


def clip_folder(folder: Path) -> Arrival:
    return transformers_folder(
        write_clip(folder), whole_model, "towers.model", "vision_model.encoder.layers.1.mlp.fc1.bias"
    )


def siglip_folder(folder: Path) -> Arrival:
    return transformers_folder(write_siglip(folder), whole_model, "towers.model", "vision_model.head.probe")


def bert_folder(folder: Path) -> Arrival:
    return transformers_folder(write_bert(folder), text_tower, "towers.text", "encoder.layer.1.output.dense.weight")


def distilbert_folder(folder: Path) -> Arrival:
    write_bert(folder, kind="distilbert")
    return transformers_folder(folder, text_tower, "towers.text", "transformer.layer.0.ffn.lin1.weight")


def qwen_folder(folder: Path) -> Arrival:
    return transformers_folder(write_qwen2_vl(folder), generative, "model", "layers.1.mlp.up_proj.weight")


def checkpoint(folder: Path, task: VisionTask, name: str) -> Arrival:
    """Read by everything that opens a run, and by ``--ckpt_path``."""
    path = folder / "best.ckpt"
    content: dict[str, Any] = {"pytorch-lightning_version": "2.6.6", "state_dict": task.state_dict()}
    content["hyper_parameters"] = dict(task.hparams)
    task.on_save_checkpoint(content)
    loads = [lambda: load_task(path), lambda: refuse_conflicting_checkpoint(task, path)]
    return Arrival(content["state_dict"], lambda new: torch.save({**content, "state_dict": new}, path), loads, name, "")


def classifier_checkpoint(folder: Path) -> Arrival:
    return checkpoint(folder, tiny_classifier(), "encoder.backbone.blocks.3.0.bn2.num_batches_tracked")


def adapted_pair_checkpoint(folder: Path) -> Arrival:
    task = tiny_pair(folder, lora={"rank": 2})
    task.towers.tokenizer = task.towers.train_tokenizer(list(TEXTS))
    return checkpoint(folder, task, "text_model.encoder.layers.1.self_attn.q_proj.lora_B.default.weight")


def adapters_checkpoint(folder: Path) -> Arrival:
    task = tiny_answerer(folder, lora={"rank": 2})
    task.load_pretrained()
    return checkpoint(folder, task, "layers.1.self_attn.q_proj.lora_A.default.weight")


def ensemble_checkpoint(folder: Path) -> Arrival:
    (folder / "checkpoints").mkdir()
    (folder / "run.json").write_text(json.dumps({"data": {}}))
    member = checkpoint(folder / "checkpoints", tiny_classifier(), "")
    member.write(member.state)
    ensemble = Ensemble([str(folder)], tta_views=["identity", "hflip"])
    return checkpoint(folder, ensemble, "members.0.head.weight")


def export(folder: Path, *, quantized: bool = False) -> Arrival:
    task = tiny_classifier()
    if quantized:
        quantize_weights(task)
    path = folder / "model.safetensors"
    write_weights(task, path, {"version": 1} if quantized else {"version": 1, "weights": task.weights_digest()})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    name = "head._weight_zero_point" if quantized else "head.bias"
    return Arrival(load_file(path), lambda new: save_file(new, path, metadata), [lambda: read_weights(path)], name, "")


def eight_bit_export(folder: Path) -> Arrival:
    """Weights that are several tensors each."""
    return export(folder, quantized=True)


KINDS = (
    *(timm_release, lenient_timm_release, checkpoint_as_file, open_clip_file),
    *(clip_folder, siglip_folder, bert_folder, distilbert_folder, qwen_folder),
    *(classifier_checkpoint, adapted_pair_checkpoint, adapters_checkpoint, ensemble_checkpoint, export),
    eight_bit_export,
)


def damaged(state: State, name: str) -> Iterator[tuple[State, str]]:
    """The weights without one, with one renamed, one cut, and one too many; and what the refusal has to match."""
    value = state[name]
    others = {key: other for key, other in state.items() if key != name}
    cut = value[..., :-1].clone() if value.ndim else value.repeat(2)
    # What conversions rename is named as the network has it.
    last = name.rpartition(".")[2]
    yield others, rf"1 missing \(\S*{last}"
    yield {**others, f"{name}x": value}, rf"1 missing \(\S*{last}.*1 unexpected \(\S*{last}x"
    yield {**others, name: cut}, rf"1 of another shape \(\S*{last} is "
    yield {**state, "nonsense.weight": torch.zeros(2)}, r"1 unexpected \(nonsense\.weight\)"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_one_weight_missing_renamed_reshaped_or_added_is_refused(
    kind: Callable[[Path], Arrival], tmp_path: Path
) -> None:
    arrival = kind(tmp_path)
    arrival.write(arrival.state)
    for load in arrival.loads:
        load()  # intact
    [name] = [name for name in arrival.state if name.endswith(arrival.name)]
    for state, message in damaged(arrival.state, name):
        arrival.write(state)
        for load in arrival.loads:
            with pytest.raises(UserError, match=message) as refusal:
                load()
            assert str(refusal.value).startswith(arrival.origin)
            assert "\n" not in str(refusal.value)


def test_values_changed_in_an_export_are_refused(tmp_path: Path) -> None:
    arrival = export(tmp_path)
    arrival.write({**arrival.state, "head.bias": arrival.state["head.bias"] + 1})
    with pytest.raises(UserError, match="have been changed since the export"):
        read_weights(tmp_path)


@pytest.mark.parametrize("prefix", ["bert.", "other."])
def test_prefixes_are_those_that_transformers_maps(tmp_path: Path, prefix: str) -> None:
    arrival = bert_folder(tmp_path)
    heads = {"cls.predictions.bias": torch.zeros(400), "cls.seq_relationship.weight": torch.zeros(2, 24)}
    arrival.write({**{prefix + name: value for name, value in arrival.state.items()}, **heads})
    if prefix == "other.":
        with pytest.raises(UserError, match=r"\d+ missing \(embeddings.*unexpected \(other\.embeddings"):
            text_tower(tmp_path)
        return
    tower = text_tower(tmp_path)
    for name, value in tower.backbone.state_dict().items():
        assert torch.equal(value, arrival.state[name])
    # What was left out is recorded.
    assert tower.origin is not None
    assert tower.origin["left_out"] == {"pretraining head": 2, "pooler": 2}


def test_names_of_older_releases_are_read(tmp_path: Path) -> None:
    """As those of bert-base-uncased and openai/clip-vit-base-patch32 on the hub."""
    arrival = bert_folder(tmp_path / "bert")
    old = {f"bert.{name}": value for name, value in arrival.state.items()}
    old = {re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name): value for name, value in old.items()}
    old = {re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name): value for name, value in old.items()}
    arrival.write({**old, "bert.embeddings.position_ids": torch.arange(40)[None]})
    for name, value in text_tower(tmp_path / "bert").backbone.state_dict().items():
        assert torch.equal(value, arrival.state[name])
    clip = clip_folder(tmp_path / "clip")
    positions = {
        f"{side}_model.embeddings.position_ids": torch.arange(n)[None] for side, n in (("text", 20), ("vision", 17))
    }
    clip.write({**clip.state, **positions})
    whole_model(tmp_path / "clip")


def test_weights_in_shards_are_read_whole_or_not_at_all(tmp_path: Path) -> None:
    arrival = clip_folder(tmp_path)
    names = sorted(arrival.state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: arrival.state[name] for name in part}, tmp_path / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    towers = build_towers(TowerOptions(model=str(tmp_path)), 32)
    towers.load_pretrained()
    own = towers.state_dict()
    assert all(torch.equal(own[f"model.{name}"], value) for name, value in arrival.state.items())
    assert sorted(towers.origins[0]["sha256"]) == sorted(shards)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 2 weights files are missing \(model-00002"):
        whole_model(tmp_path)


def test_the_older_format_of_a_folder_is_read(tmp_path: Path) -> None:
    arrival = bert_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(arrival.state, tmp_path / "pytorch_model.bin")
    tower = text_tower(tmp_path)
    assert torch.equal(tower.backbone.state_dict()[arrival.name], arrival.state[arrival.name])
    torch.save({name: v for name, v in arrival.state.items() if name != arrival.name}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="1 missing"):
        text_tower(tmp_path)


def test_a_folder_of_adapters_or_without_weights_is_refused(tmp_path: Path) -> None:
    write_bert(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="contains adapters of peft"):
        text_tower(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"towers\.text: .* has no weights"):
        text_tower(tmp_path)
