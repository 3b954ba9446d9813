"""Weights of image-text-to-text models: configuration, precision, four bits, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_modules.encoders.transformers import (
    PROCESSOR_FILES,
    Configuration,
    configuration_from_values,
    image_processor,
    model_configuration,
    reading_weights,
    refuse_misfits,
    statistics_of,
)
from lightning_modules.generative.prompts import SPECIAL_TOKENS
from lightning_modules.options import MemoryOptions, checked
from vitrail.errors import UserError

KEY = "model"
"""The option that names the model, for messages."""

_NEEDED = ("image_token_id", "vision_config", "text_config")
_NEEDED_VISION = ("patch_size", "temporal_patch_size", "spatial_merge_size")


def checked_memory(options: MemoryOptions, *, pretrained: bool) -> MemoryOptions:
    """Validate the options."""
    given = checked(MemoryOptions, options, "memory")
    if given.four_bit:
        if find_spec("bitsandbytes") is None:
            raise UserError(
                "memory.four_bit: needs bitsandbytes, which is not installed; pip install -e '.[quantized]', or set "
                "memory.four_bit: false"
            )
        if not pretrained:
            raise UserError("memory.four_bit: there is nothing to quantise in random weights; set it to false")
    return given


def checked_configuration(name: str, pretrained: bool, saved: dict[str, Any] | None = None) -> Configuration:
    """Configuration of an image-text-to-text model of Qwen2-VL's interface."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    configuration = configuration_from_values(saved, KEY) if saved else model_configuration(name, True, KEY)
    vision = getattr(configuration, "vision_config", None)
    fits = all(hasattr(configuration, one) for one in _NEEDED) and all(hasattr(vision, one) for one in _NEEDED_VISION)
    if configuration.model_type not in KNOWN or not fits:
        raise UserError(
            f"{KEY}: {name} is a {configuration.model_type}, not an image-text-to-text model of Qwen2-VL's interface; "
            f"give one such as Qwen/Qwen2-VL-2B-Instruct"
        )
    if any("full" not in kind for kind in getattr(configuration.text_config, "layer_types", None) or ()):
        raise UserError(f"{KEY}: {name} attends to a sliding window; set use_sliding_window: false in its config.json")
    if not pretrained and not saved:
        # The token ids of ``trained_prompts``.
        ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
        configuration.image_token_id, configuration.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
        configuration.vision_start_token_id = ids["<|vision_start|>"]
        configuration.vision_end_token_id = ids["<|vision_end|>"]
        text = configuration.text_config
        text.bos_token_id = text.pad_token_id = ids["<|endoftext|>"]
        text.eos_token_id = ids["<|im_end|>"]
    return configuration


def build_vision_language(configuration: Configuration, options: MemoryOptions, *, empty: bool) -> nn.Module:
    """Build the network with random weights, or with uninitialised ones if ``empty``."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    precision = getattr(torch, options.precision)
    with no_init_weights() if empty else nullcontext():
        model: nn.Module = cast("Any", AutoModelForImageTextToText).from_config(
            configuration, dtype=precision, attn_implementation="sdpa"
        )
    cast("Any", model).tie_weights()  # skipped by no_init_weights
    return model


def load_vision_language(
    directory: str, configuration: Configuration, options: MemoryOptions, device: torch.device
) -> nn.Module:
    """Build the network with its pretrained weights."""
    from transformers import AutoModelForImageTextToText

    precision = getattr(torch, options.precision)
    further: dict[str, Any] = {}
    if options.four_bit:
        from transformers import BitsAndBytesConfig

        further["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # the library's own
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=precision,
        )
        further["device_map"] = {"": device}
    common: dict[str, Any] = {
        "config": configuration,
        "local_files_only": True,
        "dtype": precision,
        "attn_implementation": "sdpa",
        "weights_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    read = cast("Any", AutoModelForImageTextToText).from_pretrained
    with reading_weights(directory, KEY), torch.random.fork_rng(devices=[]):
        if further:
            # The library does not compare shapes of quantized weights; on the meta device it does.
            plain, report = read(directory, **common, device_map={"": torch.device("meta")})
            _refuse_misfits(report, plain, directory)
        model, report = read(directory, **common, **further)
        _refuse_misfits(report, model, directory)
    if further:
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                # On CPUs with AVX-512 BF16 a kernel repacks four-bit weights in the first evaluation, after which
                # they cannot be trained (bitsandbytes 0.50).
                module.support_avx512bf16_for_cpu = False
    return cast("nn.Module", model)


def _refuse_misfits(report: Mapping[str, Any], model: nn.Module, directory: str) -> None:
    refuse_misfits(report, model.state_dict().keys(), f"{KEY}: {directory}", {})


def files_digest(directory: str) -> str:
    """SHA-256 of names, dtypes, shapes and values of the weights in a folder, however they are split into files."""
    from safetensors import safe_open

    folder = Path(directory)
    digest = hashlib.sha256()
    weights: Iterable[tuple[str, torch.Tensor]]
    files = [cast("Any", safe_open)(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
    try:
        if files:
            homes = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # it is no dictionary
            weights = ((name, homes[name].get_tensor(name)) for name in sorted(homes))
        else:
            path = folder / "pytorch_model.bin"
            weights = sorted(torch.load(path, map_location="cpu", weights_only=True, mmap=True).items())
        for name, value in weights:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    except Exception as error:
        raise UserError(f"{KEY}: {directory} has no weights that can be read safely; add model.safetensors") from error
    return digest.hexdigest()


def image_statistics(directory: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, CLIP's if the folder has none."""
    from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    processor = image_processor(directory, KEY) if directory else None
    if processor is not None:
        return statistics_of(processor, directory, KEY)
    if directory:
        rank_zero_warn(
            f"{KEY}: {directory} has no {' and no '.join(PROCESSOR_FILES)}, so its pixel statistics are unknown; "
            "CLIP's mean and std are assumed"
        )
    return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
