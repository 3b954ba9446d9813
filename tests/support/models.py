"""Tiny models of the real architectures with random weights as `transformers` folders; tiny tasks, data, trainers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from lightning_modules.base import VisionTask
from lightning_modules.classification import ImageClassifier, MultiTaskClassifier
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.encoders.tokenizer import SPECIAL_IDS, trained_tokenizer
from lightning_modules.options import OptimOptions
from tests.support.galleries import meaning_vector
from vitrail.types import UNKNOWN, Batch, InputOptions, TextReading

TEXTS = (
    "a photo of a rose.",
    "a photo of a tulip.",
    "a photo of a daisy.",
    "two dogs play in the snow",
    "a red bicycle leans against a wall",
)

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The part of Qwen2-VL's chat template that is for images and texts."""


def write_clip(folder: Path, *, image_size: int = 32, scale: float = 4.0) -> Path:
    """Write a CLIP with two layers per tower, its tokenizer and its preprocessing."""
    from transformers import CLIPConfig, CLIPModel

    sizes: dict[str, Any] = {**SIZES, "projection_dim": 16}
    special = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 3}
    config = CLIPConfig(
        text_config={**sizes, **special, "vocab_size": 400, "max_position_embeddings": 20},
        vision_config={**sizes, "image_size": image_size, "patch_size": 8},
        projection_dim=16,
        logit_scale_init_value=scale,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    _write_tokenizer(folder, "CLIPTokenizer", pad="<end>")
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics), encoding="utf-8")
    return folder


def write_siglip(folder: Path) -> Path:
    """Write a SigLIP with two layers a tower and a tokenizer."""
    from transformers import SiglipConfig, SiglipModel

    text = {**SIZES, **SPECIAL_IDS, "vocab_size": 400, "max_position_embeddings": 12, "projection_size": 32}
    torch.manual_seed(0)
    SiglipModel(
        SiglipConfig(text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 8})
    ).save_pretrained(folder)
    _write_tokenizer(folder, "PreTrainedTokenizerFast", pad="<pad>")
    return folder


_CROPPED = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
_SQUASHED = {"size": {"height": 32, "width": 32}}
_STATISTICS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
_PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": {"image_processor_type": "CLIPImageProcessor", **_CROPPED, **_STATISTICS},
    "metaclip_2": {"image_processor_type": "CLIPImageProcessor", **_CROPPED, **_STATISTICS},
    "altclip": {"image_processor_type": "CLIPImageProcessor", **_CROPPED, **_STATISTICS, "resample": 2},
    "chinese_clip": {"image_processor_type": "ChineseCLIPImageProcessor", **_CROPPED, **_STATISTICS},
    "align": {
        "image_processor_type": "EfficientNetImageProcessor",
        **_STATISTICS,
        **{"size": {"height": 37, "width": 37}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
        **{"resample": 2, "rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": True},
    },
    "siglip": {"image_processor_type": "SiglipImageProcessor", **_SQUASHED},
    "siglip2": {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 16},
}


def whole_model_values(kind: str) -> dict[str, Any]:
    """The configuration of a tiny dual encoder of ``transformers`` for images of 32 px."""
    special = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 3 if kind in ("clip", "metaclip_2") else 0}
    text: dict[str, Any] = {**SIZES, **special, "vocab_size": 400, "max_position_embeddings": 24}
    vision: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
    if kind == "altclip":
        text["project_dim"] = 16
    if kind == "align":
        vision = {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 32}
    if kind == "siglip2":
        vision = {**SIZES, "num_patches": 16, "patch_size": 8}
    if kind.startswith("siglip"):
        text["projection_size"] = 32
        return {"model_type": kind, "text_config": text, "vision_config": vision}
    projection = 80 if kind == "align" else 16  # the width of ALIGN's last feature map
    return {"model_type": kind, "text_config": text, "vision_config": vision, "projection_dim": projection}


def write_whole_model(folder: Path, kind: str) -> Path:
    """Write a tiny dual encoder of ``transformers`` with its tokenizer and image processor in the hub's layout."""
    from transformers import CONFIG_MAPPING, AutoModel

    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind].from_dict(whole_model_values(kind))
    model: Any = AutoModel.from_config(config)  # type: ignore[no-untyped-call]  # the library's own
    for name in ("logit_scale", "logit_bias", "temperature"):
        if hasattr(model, name):
            getattr(model, name).data.fill_({"logit_scale": 3.0, "logit_bias": -4.0, "temperature": 0.05}[name])
    model.save_pretrained(folder)
    _write_tokenizer(folder, "PreTrainedTokenizerFast", pad="<end>" if kind in ("clip", "metaclip_2") else "<pad>")
    values = json.dumps({"do_resize": True, "do_rescale": True, "do_normalize": True, **_PROCESSORS[kind]})
    (folder / "preprocessor_config.json").write_text(values, encoding="utf-8")
    return folder


OPEN_CLIP_TOWERS: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "timm": {"image_size": 32, "timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear"},
}


def write_open_clip(folder: Path, kind: str, **preprocessing: Any) -> Path:
    """Write a tiny dual encoder of open_clip in the hub's layout."""
    import open_clip
    from safetensors.torch import save_file

    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
    config = {"embed_dim": 16, "vision_cfg": OPEN_CLIP_TOWERS[kind], "text_cfg": text, "quick_gelu": kind != "timm"}
    folder.mkdir(exist_ok=True)
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}), encoding="utf-8")
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    model.logit_scale.data.fill_(3.0)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_bert(folder: Path, *, pooling: str = "", kind: str = "bert") -> Path:
    """Write a BERT or DistilBERT and, where wanted, a pooling rule."""
    write_text_model(folder, kind, **({"hidden_dim": 64} if kind == "distilbert" else {}))
    if pooling:
        rules = {"pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_cls_token": pooling == "cls"}
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(rules), encoding="utf-8")
    return folder


def write_text_model(folder: Path, kind: str, **values: Any) -> Path:
    """Write a text model with two layers, and a tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModel

    common = {**SIZES, **SPECIAL_IDS, "vocab_size": 400, "max_position_embeddings": 40}
    config = CONFIG_MAPPING[kind](**{**common, **values})
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)  # type: ignore[no-untyped-call]  # the library's own
    _write_tokenizer(folder, "PreTrainedTokenizerFast", pad="<pad>")
    return folder


def write_qwen2_vl(
    folder: Path, *, texts: Sequence[str] = TEXTS, seed: int = 0, scale: float = 1.0, **changes: Any
) -> Path:
    """Write a Qwen2-VL with two layers per part, its tokenizer and its preprocessing."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    from lightning_modules.generative.prompts import SPECIAL_TOKENS, trained_prompts

    ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    values = qwen2_vl_values(**changes)
    values |= {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
    values |= {"vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}
    values["text_config"] |= {"bos_token_id": 0, "eos_token_id": ids["<|im_end|>"], "pad_token_id": 0}
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    model: Any = AutoModelForImageTextToText.from_config(config)  # type: ignore[no-untyped-call]  # theirs
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(scale)
    model.save_pretrained(folder)
    prompts = trained_prompts(texts, int(values["text_config"]["vocab_size"]))
    (folder / "tokenizer.json").write_text(prompts.state["pipeline"], encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": QWEN_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    preprocessing = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing), encoding="utf-8")
    return folder


def qwen2_vl_values(kind: str = "qwen2_vl", vision: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The configuration of a tiny model that reads squares of 16 px."""
    text = {
        **SIZES,
        "num_key_value_heads": 1,
        "vocab_size": 400,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        **changes,
    }
    patches = {"patch_size": 8, "temporal_patch_size": 2, "spatial_merge_size": 2}
    tower: dict[str, Any] = {"depth": 2, "num_heads": 2, **patches}
    if kind == "qwen2_vl":
        tower |= {"embed_dim": 32, "hidden_size": text["hidden_size"], "mlp_ratio": 2}
    else:
        tower |= {"hidden_size": 32, "out_hidden_size": text["hidden_size"], "intermediate_size": 64}
    if kind == "qwen2_5_vl":
        tower |= {"window_size": 32, "fullatt_block_indexes": [1]}
    if kind == "qwen3_vl":
        tower |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
        text |= {"head_dim": 16}
    return {"model_type": kind, "text_config": text, "vision_config": {**tower, **(vision or {})}}


def _write_tokenizer(folder: Path, kind: str, *, pad: str) -> None:
    state = trained_tokenizer(TEXTS, 400, 20, fixed_length=False).state
    (folder / "tokenizer.json").write_text(state["pipeline"], encoding="utf-8")
    names = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": pad, "unk_token": "<unknown>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 20, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


TASKS = {"class": ["cup", "lamp", "sock", "vase"], "type": ["new", "used"]}
SIZE = 32
BACKBONE = "test_efficientnet"


def tiny_classifier(**changes: Any) -> ImageClassifier:
    arguments: dict[str, Any] = {
        "backbone": BACKBONE,
        "pretrained": False,
        "class_names": TASKS["class"],
        "image_size": SIZE,
    }
    return ImageClassifier(**{**arguments, **changes})


def tiny_multitask(**changes: Any) -> MultiTaskClassifier:
    arguments: dict[str, Any] = {"backbone": BACKBONE, "pretrained": False, "tasks": TASKS, "image_size": SIZE}
    return MultiTaskClassifier(**{**arguments, **changes})


def warm_cosine() -> OptimOptions:
    return OptimOptions(warmup_epochs=1.0, min_lr=1e-6)


def make_batch(ids: list[int], padding: int = 0) -> Batch:
    """A batch that is a function of the ids; every third sample has no second target."""
    rows = []
    for index in ids:
        generator = torch.Generator().manual_seed(index)
        rows.append(torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8))
    sample_id = torch.tensor(ids)
    batch: Batch = {
        "image": torch.stack(rows),
        "label": sample_id % 4,
        "attributes": {"type": torch.where(sample_id % 3 == 0, UNKNOWN, sample_id % 2)},
        "sample_id": sample_id,
    }
    if padding:
        batch["is_padding"] = torch.arange(len(ids)) >= len(ids) - padding
    return batch


class TinyData(pl.LightningDataModule):
    """Ten training and seven validation samples in batches of four, the last validation row being padding."""

    def __init__(self, image_options: InputOptions | None = None) -> None:
        super().__init__()
        self.image_options: InputOptions = image_options or {
            "size": SIZE,
            "crop_fraction": 1.0,
            "interpolation": "bicubic",
        }

    def _loader(self, batches: list[Batch]) -> DataLoader[Batch]:
        return DataLoader(cast("Any", batches), batch_size=None)

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader([make_batch([0, 1, 2, 3]), make_batch([4, 5, 6, 7]), make_batch([8, 9])])

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader([make_batch([20, 21, 22, 23]), make_batch([24, 25, 26, 20], padding=1)])

    def test_dataloader(self) -> DataLoader[Batch]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.val_dataloader()


def tiny_trainer(root: Path, **changes: Any) -> pl.Trainer:
    arguments: dict[str, Any] = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**arguments, **changes})


class Recorder(pl.Callback):
    """Records the learning rates and gradients of each step, and the outputs of validation."""

    def __init__(self) -> None:
        self.lrs: list[list[float]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.outputs: list[Any] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.lrs.append([group["lr"] for group in optimizer.param_groups])
        gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append(gradients)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *rest: Any) -> None:
        self.outputs.append(outputs)


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def seeded_multitask(**changes: Any) -> VisionTask:
    """As ``tiny_multitask`` with a warm-up, the same weights every time."""
    pl.seed_everything(3)
    return tiny_multitask(optim_options=warm_cosine(), **changes)


CLASSES = ["rose", "tulip", "daisy", "iris"]
PROMPTS = [[f"a photo of a {name}.", f"a {name}"] for name in CLASSES]


def pair_batch(ids: list[int], *, padding: int = 0, captions: bool = False) -> Batch:
    """A batch that is a function of the ids: the colour is that of the class, id modulo 4."""
    rows = []
    for index in ids:
        generator = torch.Generator().manual_seed(index)
        base = torch.tensor([60 * (index % 4), 200 - 50 * (index % 4), 30 * (index % 7)]).view(3, 1, 1)
        rows.append((base + torch.randint(0, 40, (3, SIZE, SIZE), generator=generator)).clamp(0, 255).to(torch.uint8))
    sample_id = torch.tensor(ids)
    own = [[f"{CLASSES[index % 4]} number {index}", f"image {index} of a {CLASSES[index % 4]}"] for index in ids]
    batch: Batch = {
        "image": torch.stack(rows),
        "caption": [texts[0] for texts in own] if captions else [PROMPTS[index % 4][0] for index in ids],
        "positive_id": sample_id if captions else sample_id % 4,
        "sample_id": sample_id,
        "is_padding": torch.arange(len(ids)) >= len(ids) - padding,
    }
    if captions:
        batch["captions"] = own
    else:
        batch["label"] = sample_id % 4
    return batch


class TinyPairs(TinyData):
    """Twelve training and seven validation samples, the last validation row being padding."""

    def __init__(self, *, captions: bool = False) -> None:
        super().__init__()
        self.has_captions = captions

    def training_texts(self) -> list[str]:
        return [prompt for prompts in PROMPTS for prompt in prompts]

    def train_dataloader(self) -> DataLoader[Batch]:
        batches = [pair_batch(ids, captions=self.has_captions) for ids in ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11])]
        for batch in batches:
            batch.pop("captions", None)
        return self._loader(batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        captions = self.has_captions
        return self._loader(
            [
                pair_batch([20, 21, 22, 23], captions=captions),
                pair_batch([24, 25, 26, 20], padding=1, captions=captions),
            ]
        )


def tiny_pair(folder: Path, **changes: Any) -> DualEncoder:
    """A CLIP with random weights and no tokenizer yet; the same weights every time."""
    if not (folder / "config.json").exists():
        write_clip(folder, image_size=SIZE)
    pl.seed_everything(3)
    arguments: dict[str, Any] = {
        "towers": {"model": str(folder), "pretrained": False},
        "class_names": CLASSES,
        "class_prompts": PROMPTS,
        "image_size": SIZE,
        "lr": 1e-3,
    }
    arguments |= changes
    if arguments["class_names"] is None:
        arguments["class_prompts"] = None
    return DualEncoder(**arguments)


class PerfectEncoder:
    """Makes of a query the direction that its words have in the gallery."""

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        return np.stack([meaning_vector(*text.replace("bottle", "tableware_water_bottle").split()) for text in texts])

    def encode_image(self, path: Path) -> NDArray[np.float32]:
        raise AssertionError(path)

    def reading(self, text: str) -> TextReading:
        return TextReading(len(text.split()), [], "")
