"""Exports in the layouts of other libraries, which load them without Vitrail.

- ``timm``: a classifier of one task, for ``timm.create_model("hf-hub:OWNER/NAME", pretrained=True)``.
- ``transformers``: a whole model with its trained scale (and bias), for ``AutoModel.from_pretrained``.
- ``open_clip``: likewise, for ``open_clip.create_model_from_pretrained("hf-hub:OWNER/NAME")``.
- ``peft``: the adapters of ``lora`` alone, for ``PeftModel.from_pretrained`` on the base model.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from datamodules.loading.transforms import scaled_side
from experiments.export.graphs import merged
from lightning_modules.base import VisionTask
from lightning_modules.classification import ImageClassifier
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.encoders import open_clip
from lightning_modules.encoders.dual import OpenClipModel, WholeModel
from lightning_modules.encoders.transformers import build_model
from lightning_modules.encoders.weights import copy_weights, plain_weights
from lightning_modules.options import LoraOptions, checked
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK, with_image_defaults

_PILLOW = {"bilinear": 2, "bicubic": 3}


def write_layout(kind: str, task: VisionTask, folder: Path) -> None:
    """Write a task in a layout.

    Raises:
        UserError: the layout is not for this kind of task.
    """
    if getattr(task, "few_shot", None) is not None:
        raise UserError(
            f"export: --format {kind} has no place for the few-shot classifier; choose --format safetensors or onnx"
        )
    if kind != "peft":
        task = merged(task)
    _WRITERS[kind](task, folder)


def reloaded(kind: str, task: VisionTask, folder: Path) -> VisionTask:
    """Return a copy of a task whose weights are those that the other library loads from a folder."""
    found = copy.deepcopy(task if kind == "peft" else merged(task))
    if kind == "timm":
        import timm

        network = timm.create_model(f"local-dir:{folder}", pretrained=True)
        classifier: Any = network.get_classifier()
        encoder, head = cast("Any", found).encoder, cast("Any", found).head
        copy_weights(network, encoder.backbone, str(folder))
        head.load_state_dict(classifier.state_dict())
        return found
    towers = cast("Any", found).towers
    if kind == "peft":
        from safetensors.torch import load_file

        saved = load_file(folder / "adapter_model.safetensors")
        names = {name.replace(".weight", ".default.weight") if "lora_" in name else name: name for name in saved}
        state = {name.removeprefix("base_model.model."): saved[names[name]] for name in names}
        towers.model.load_state_dict(state, strict=False)
        return found
    if kind == "transformers":
        from transformers import AutoModel

        source: Any = AutoModel.from_pretrained(folder)
    else:
        import open_clip as library

        source = library.create_model_from_pretrained(f"local-dir:{folder}", return_transform=False)
    copy_weights(source, towers.model, str(folder))
    scale = cast("DualEncoder", found).objective.logit_scale
    log_scale = source.logit_scale if hasattr(source, "logit_scale") else -source.temperature.log()
    with torch.no_grad():
        scale.log_scale.copy_(log_scale.reshape(()))
    return found


def _write_timm(task: VisionTask, folder: Path) -> None:
    import timm
    from timm.models import save_for_hf

    if not isinstance(task, ImageClassifier) or task.task_kinds.get(LABEL_TASK, "single_label") != "single_label":
        raise UserError("export: timm's layout is for classifiers with one class per image; choose another --format")
    encoder, image = task.encoder, with_image_defaults(task.input_options)
    names = task.tasks[LABEL_TASK]
    options = {**encoder.options, **({"img_size": image["size"]} if _has_fixed_size(encoder.name) else {})}
    network: Any = timm.create_model(encoder.name, pretrained=False, num_classes=len(names), **options)
    classifier = network.get_classifier()
    if encoder.has_two_tokens or not isinstance(classifier, nn.Linear):
        raise UserError(f"export: the classifier of timm's {encoder.name} is no linear layer; choose another --format")
    state = {**plain_weights(encoder.backbone)}
    network.load_state_dict(state, strict=False)
    classifier.load_state_dict(cast("Any", task).head.state_dict())
    mean, std = (buffer.flatten().tolist() for buffer in (encoder.normalize.mean, encoder.normalize.std))
    configuration = {
        "input_size": [3, image["size"], image["size"]],
        "interpolation": image["interpolation"],
        "crop_pct": image["crop_fraction"],
        "crop_mode": {"crop": "center", "squash": "squash", "pad": "border"}[image["resize"]],
        **{"mean": mean, "std": std, "label_names": names, "num_classes": len(names)},
    }
    save_for_hf(
        network,
        folder,
        model_config={"pretrained_cfg": configuration, "num_classes": len(names), "label_names": names},
        safe_serialization=True,
        data_config={key: configuration[key] for key in ("input_size", "interpolation", "crop_pct", "crop_mode")}
        | {"mean": mean, "std": std},
    )


def _has_fixed_size(name: str) -> bool:
    import timm

    return bool(cast("Any", timm.get_pretrained_cfg(name, allow_unregistered=False)).fixed_input_size)


def _write_transformers(task: VisionTask, folder: Path) -> None:
    towers = task.towers if isinstance(task, DualEncoder) else None
    if not isinstance(task, DualEncoder) or not isinstance(towers, WholeModel):
        raise UserError(
            "export: transformers' layout is for a dual encoder whose towers.model is of transformers; choose another "
            "--format"
        )
    _check_size(task, towers.own_size)
    model: Any = build_model(towers.configuration)
    copy_weights(towers.model, model, "export")
    _set_scale(model, task)
    model.save_pretrained(folder)
    _write_image_processor(task, towers, folder)
    _write_tokenizer(task, folder)


def _write_open_clip(task: VisionTask, folder: Path) -> None:
    from safetensors.torch import save_file

    towers = task.towers if isinstance(task, DualEncoder) else None
    if not isinstance(task, DualEncoder) or not isinstance(towers, OpenClipModel):
        raise UserError(
            "export: open_clip's layout is for a dual encoder whose towers.model is of open_clip; choose another "
            "--format"
        )
    model: Any = open_clip.build(towers.configuration, towers.image_size)
    if hasattr(model, "text_decoder"):
        raise UserError("export: the captioner of CoCa is not kept, so open_clip's layout lacks it; choose safetensors")
    copy_weights(towers.model, model, "export")
    _set_scale(model, task)
    save_file(model.state_dict(), folder / open_clip.WEIGHTS)
    model_cfg = copy.deepcopy(towers.configuration.model_cfg)
    model_cfg["vision_cfg"]["image_size"] = towers.image_size
    configuration = {
        "model_cfg": {**model_cfg, "custom_text": True},
        "preprocess_cfg": towers.configuration.preprocess_cfg,
    }
    (folder / open_clip.CONFIG).write_text(json.dumps(configuration, indent=2), encoding="utf-8")
    if model_cfg["text_cfg"].get("hf_tokenizer_name"):
        _write_tokenizer(task, folder)


def _write_peft(task: VisionTask, folder: Path) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    lora = task.hparams.get("lora")
    towers = task.towers if isinstance(task, DualEncoder) else None
    if not lora or not isinstance(towers, WholeModel):
        raise UserError("export: peft's layout is for adapters (lora) in a towers.model of transformers; it has none")
    options = checked(LoraOptions, lora, "lora")
    state = towers.model.state_dict()
    adapters = {name: value for name, value in state.items() if "lora_" in name}
    layers = sorted({name.partition(".lora_")[0] for name in adapters})
    kept = [name for name in ("visual_projection", "text_projection") if hasattr(towers.model, name)]
    trained = {name: state[f"{name}.weight"] for name in kept}
    LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=layers,
        modules_to_save=kept or None,
        base_model_name_or_path=towers.name,
    ).save_pretrained(str(folder))
    prefixed = {f"base_model.model.{name.replace('.default', '')}": value for name, value in adapters.items()}
    prefixed |= {f"base_model.model.{name}.weight": value for name, value in trained.items()}
    tensors = {name: value.contiguous().clone() for name, value in prefixed.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _check_size(task: DualEncoder, own: int) -> None:
    if (size := task.input_options["size"]) != own:
        raise UserError(
            f"export: its images have {size} px, those of the base model {own}; transformers' layout has one size, so "
            "choose --format safetensors or onnx"
        )


def _set_scale(model: Any, task: DualEncoder) -> None:
    """Give the model of another library the trained scale and bias."""
    scale, bias = (value.detach() for value in (task.objective.logit_scale.log_scale, task.objective.logit_scale.bias))
    with torch.no_grad():
        if hasattr(model, "temperature"):
            model.temperature.copy_(torch.exp(-scale).reshape(model.temperature.shape))
        else:
            model.logit_scale.copy_(scale.reshape(model.logit_scale.shape))
        if getattr(model, "logit_bias", None) is not None:
            model.logit_bias.copy_(bias.reshape(model.logit_bias.shape))


def _write_image_processor(task: DualEncoder, towers: WholeModel, folder: Path) -> None:
    image = with_image_defaults(task.input_options)
    mean, std = (buffer.flatten().tolist() for buffer in (towers.normalize.mean, towers.normalize.std))
    size, side = image["size"], scaled_side(task.input_options)
    values: dict[str, Any] = {
        **{"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
        **{"image_mean": mean, "image_std": std, "resample": _PILLOW[image["interpolation"]]},
    }
    if towers.is_naflex:
        patches = math.prod([size // towers.patch_size] * 2)
        values |= {"image_processor_type": "Siglip2ImageProcessor", "patch_size": towers.patch_size}
        values["max_num_patches"] = patches
    elif image["resize"] == "crop":
        values |= {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}}
        values |= {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
        if image["crop_rounding"] != "down" or image["resampler"] != "torch":
            sys.stderr.write(
                "export: transformers crops odd margins and resizes by its own rule, one pixel or level off\n"
            )
    else:
        values |= {"image_processor_type": "CLIPImageProcessor", "size": {"height": side, "width": side}}
        values["do_center_crop"] = side != size
        values["crop_size"] = {"height": size, "width": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")


def _write_tokenizer(task: DualEncoder, folder: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = task.towers.tokenizer
    if tokenizer is None:
        raise UserError("export: the model has no tokenizer; export a trained or pretrained one")
    pipeline = Tokenizer.from_str(tokenizer.state["pipeline"])
    unknown = json.loads(tokenizer.state["pipeline"])["model"].get("unk_token")
    own = cast("Any", PreTrainedTokenizerFast)(
        tokenizer_object=pipeline,
        pad_token=tokenizer.pad_token,
        unk_token=unknown,
        model_max_length=tokenizer.state["max_length"],
    )
    own.save_pretrained(folder)


_WRITERS: dict[str, Callable[[VisionTask, Path], None]] = {
    "timm": _write_timm,
    "transformers": _write_transformers,
    "open_clip": _write_open_clip,
    "peft": _write_peft,
}
