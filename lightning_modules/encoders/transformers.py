"""Models of ``transformers``: configurations, weights and image preprocessing, from the hub or a local folder."""

from __future__ import annotations

import json
import logging as levels
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from lightning_modules.encoders.tokenizer import SPECIAL_IDS
from lightning_modules.encoders.weights import (
    LeftOut,
    copy_weights,
    described_misfits,
    hub_directory,
    plain_weights,
    read_json,
    weight_files,
)
from vitrail.errors import UserError, first_line
from vitrail.types import CropRounding, Interpolation, Resize

Configuration = Any
"""A ``transformers`` configuration, whose attributes have no common type."""

_PRETRAINING_HEADS = (
    "cls. predictions. sop_classifier. lm_head. vocab_transform. vocab_layer_norm. vocab_projector. "
    "generator_predictions. generator_lm_head. discriminator_predictions. lm_predictions. mask_predictions. "
    "pred_layer. head.dense. head.norm. decoder.bias"
)

TEXT_HEADS: dict[str, tuple[str, ...]] = {
    "pretraining head": tuple(_PRETRAINING_HEADS.split()),
    "classifier": ("classifier.", "pre_classifier.", "qa_outputs.", "score."),
    "pooler": ("pooler.", "sequence_summary."),
    "projection": ("text_projection.",),
}
"""Unused heads in the files of text encoders, by prefixes of their names."""

_CLIP_TEXT_LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
_CLIP_VISION_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Radford et al., 2021; the defaults of the library are ViT-B/32.
    "openai/clip-vit-base-patch32": {"model_type": "clip"},
    "openai/clip-vit-base-patch16": {"model_type": "clip", "vision_config": {"patch_size": 16}},
    "openai/clip-vit-large-patch14": {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": _CLIP_TEXT_LARGE,
        "vision_config": _CLIP_VISION_LARGE,
    },
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": _CLIP_TEXT_LARGE,
        "vision_config": {**_CLIP_VISION_LARGE, "image_size": 336},
    },
    # Zhai et al., 2023; the defaults of the library are the base size.
    "google/siglip-base-patch16-224": {"model_type": "siglip"},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip",
        "text_config": {**_SO400M, "projection_size": 1152},
        "vision_config": {**_SO400M, "image_size": 384, "patch_size": 14},
    },
    # Wang et al., MiniLM, 2020, fine-tuned for sentences by N. Reimers; mean pooling.
    "sentence-transformers/all-MiniLM-L6-v2": {
        "model_type": "bert",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
    },
    # BERT-Tiny (Turc et al., Well-Read Students Learn Better, 2019).
    "google/bert_uncased_L-2_H-128_A-2": {
        "model_type": "bert",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
    # Devlin et al., 2019; Sanh et al., 2019.
    "google-bert/bert-base-uncased": {"model_type": "bert"},
    "bert-base-uncased": {"model_type": "bert"},
    "distilbert/distilbert-base-uncased": {"model_type": "distilbert"},
    "distilbert-base-uncased": {"model_type": "distilbert"},
    # Wang et al., Qwen2-VL, 2024.
    "Qwen/Qwen2-VL-2B-Instruct": {
        "model_type": "qwen2_vl",
        "tie_word_embeddings": True,
        "vision_config": {"hidden_size": 1536},
        "text_config": {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
        },
    },
}
"""Configurations that can be built without a network, as far as they differ from the library's defaults."""


def model_configuration(name: str, pretrained: bool, key: str) -> Configuration:
    """Configuration of a model."""
    if not name:
        raise UserError(f"{key}: is missing; give a local folder or a name on the hub")
    directory = model_directory(name, key)
    hint = "give the folder of a model"
    values = read_json(Path(directory) / "config.json", key, hint) if directory else ARCHITECTURES[name]
    configuration = configuration_from_values(values, key)
    if not pretrained:
        text = getattr(configuration, "text_config", configuration)
        for attribute, value in SPECIAL_IDS.items():
            setattr(text, attribute, value)
    return configuration


def model_directory(name: str, key: str) -> str:
    """Local folder with the configuration of a model; empty if it is in ``ARCHITECTURES``."""
    if Path(name).is_dir():
        return name
    return "" if name in ARCHITECTURES else hub_directory(name, key, with_weights=False)


def configuration_from_values(values: dict[str, Any], key: str = "towers") -> Configuration:
    """Build a configuration."""
    from transformers import CONFIG_MAPPING

    kind = str(values.get("model_type", ""))
    if kind not in CONFIG_MAPPING:
        raise UserError(f"{key}: transformers knows no model of the type {kind!r}; give another model")
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:
        raise UserError(
            f"{key}: not a valid configuration of a {kind} ({first_line(error)}); fix its config.json"
        ) from error


def configuration_values(configuration: Configuration) -> dict[str, Any]:
    """The configuration as plain values for checkpoints."""
    values: dict[str, Any] = json.loads(configuration.to_json_string(use_diff=False))
    return values


def build_model(configuration: Configuration) -> nn.Module:
    """Build a network with random weights in float32."""
    from transformers import AutoModel

    try:
        model: nn.Module = cast("Any", AutoModel).from_config(configuration, dtype=torch.float32)
    except (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"towers: no {configuration.model_type} can be built from its configuration ({first_line(error)}); fix "
            "its config.json, or give another model"
        ) from error
    if getattr(model, "pooler", None) is not None:
        # Unused, so that DDP would wait for its gradient.
        model.pooler = None  # type: ignore[assignment]
    return model


def load_model(
    model: nn.Module, directory: str, key: str, unused: Mapping[str, tuple[str, ...]] | None = None
) -> LeftOut:
    """Load pretrained weights into a network of ``build_model``; return the names of unused ones."""
    from transformers import AutoModel

    expected = plain_weights(model)
    with reading_weights(directory, key), torch.random.fork_rng(devices=[]):
        source, report = AutoModel.from_pretrained(
            directory,
            local_files_only=True,
            dtype=torch.float32,
            config=model.config,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    # Weights that ``build_model`` drops may be missing, too.
    left_out = refuse_misfits(report, expected.keys(), f"{key}: {directory}", unused or {})
    if dropped := sorted(source.state_dict().keys() - expected.keys() - set(report["missing_keys"])):
        left_out["pooler"] = [*left_out.get("pooler", []), *dropped]
    copy_weights(source, model, f"{key}: {directory}")
    return left_out


def refuse_misfits(
    report: Mapping[str, Any], expected: Collection[str], origin: str, unused: Mapping[str, tuple[str, ...]]
) -> LeftOut:
    """Refuse weights that ``transformers`` initialised at random or ignored; return the names of unused ones."""
    left_out = {
        kind: sorted(name for name in report["unexpected_keys"] if name.startswith(begins))
        for kind, begins in unused.items()
    }
    known = {name for names in left_out.values() for name in names}
    reshaped = {name: (tuple(theirs), tuple(ours)) for name, theirs, ours in report["mismatched_keys"]}
    wrong = described_misfits(
        set(report["missing_keys"]) & set(expected),
        set(report["unexpected_keys"]) - known,
        {name: shapes for name, shapes in reshaped.items() if name in expected},
    )
    if wrong:
        raise UserError(f"{origin} does not fit: {wrong}; give the folder of a whole model of this kind")
    return left_out


@contextmanager
def reading_weights(directory: str, key: str) -> Iterator[None]:
    """Silence ``transformers`` while it reads a folder, and convert its errors to one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    verbosity = logging.get_verbosity()
    logging.set_verbosity(levels.ERROR)
    try:
        weight_files(directory, f"{key}: ")
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key}: the weights in {directory} cannot be read ({first_line(error)})") from error
    finally:
        logging.set_verbosity(verbosity)


PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files of image processors; ``transformers`` 5 writes and prefers the first."""

_FILTERS: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Preprocessing(NamedTuple):
    """Preprocessing apart from the size; see ``datamodules.options.ImageOptions``."""

    resize: Resize
    crop_fraction: float
    interpolation: Interpolation
    crop_rounding: CropRounding


def image_processor(directory: str, key: str) -> Any:
    """Load the image processor of a model's folder, if any."""
    folder = Path(directory)
    files = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
    contents = {file.name: read_json(file, key, "fix its image_mean and image_std") for file in files}
    # processor_config.json may be of the text alone.
    if PROCESSOR_FILES[1] not in contents and "image_processor" not in contents.get(PROCESSOR_FILES[0], {}):
        return None
    from transformers import AutoImageProcessor

    try:
        return cast("Any", AutoImageProcessor).from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise _unreadable(folder, key, error) from error


def statistics_of(processor: Any, directory: str, key: str) -> Statistics:
    """Mean and standard deviation of an image processor for pixels in [0, 1]."""
    try:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if processor.do_normalize:
            mean, std = processor.image_mean, processor.image_std
        scale = 255 * float(processor.rescale_factor) if processor.do_rescale else 255.0
        # EfficientNet's, for ALIGN, may subtract 1 from the scaled pixels, and divide by the deviation again.
        offset = float(bool(getattr(processor, "rescale_offset", False)))
        power = 2 if getattr(processor, "include_top", False) else 1
        found = Statistics(
            tuple((float(m) + offset) / scale for m in mean), tuple(float(s) ** power / scale for s in std)
        )
        finite = all(math.isfinite(value) for value in (*found.mean, *found.std))
        if not finite or min(found.std) <= 0 or (len(found.mean), len(found.std)) != (3, 3):
            raise ValueError("need three numbers each, std above 0")
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _unreadable(Path(directory), key, error) from error
    return found


def preprocessing_of(processor: Any, directory: str, key: str) -> Preprocessing:
    """Preprocessing of an image processor, refused (UserError) if it is not supported."""

    def refused(what: str) -> UserError:
        return UserError(f"{key}: {directory} needs images {what}, which is not supported; give another model")

    interpolation = _FILTERS.get(getattr(processor, "resample", None) or 0)
    size, crop = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size"))
    size, crop = ({name: value for name, value in one.items() if value is not None} for one in (size, crop))
    if getattr(processor, "max_num_patches", None):  # NaFlex, of which square images are read
        return Preprocessing("squash", 1.0, interpolation or "bilinear", "down")
    if not getattr(processor, "do_resize", False):
        raise refused("in their own size (do_resize: false)")
    if interpolation is None:
        raise refused(f"scaled by resample {getattr(processor, 'resample', None)} instead of bilinear or bicubic")
    if getattr(processor, "do_pad", False):
        raise refused("with borders (do_pad: true)")
    cropped = int(crop.get("height", 0)) if getattr(processor, "do_center_crop", False) else 0
    if cropped and crop.get("width") != cropped:
        raise refused(f"of {crop.get('width')} × {cropped} pixels")
    if set(size) == {"shortest_edge"} and cropped:
        resize: Resize = "crop"
        side = int(size["shortest_edge"])
    elif set(size) == {"height", "width"} and size["height"] == size["width"]:
        resize, side = "squash", int(size["height"])
    else:
        raise refused(f"of the size {size}" + ("" if cropped else " without a center crop"))
    if cropped > side:
        raise refused(f"of {side} pixels with borders up to {cropped}")
    return Preprocessing(resize, (cropped or side) / side, interpolation, "down")


def _unreadable(path: Path, key: str, error: BaseException) -> UserError:
    reason = first_line(error)
    return UserError(
        f"{key}: {path} has no image_mean and image_std that can be read ({reason}); fix its {PROCESSOR_FILES[1]}"
    )
