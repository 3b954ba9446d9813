"""Models of the ``transformers`` library: configurations and weights, from the hub, a local folder, or by name alone.

The configurations of the best known architectures are here as data, so that those can be built, with random weights,
where there is no network. A checkpoint keeps the configuration, so it needs neither folder nor hub.
"""

from __future__ import annotations

import json
import logging as levels
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lightning_modules.encoders.image import (
    LeftOut,
    copy_weights,
    described_misfits,
    hub_directory,
    plain_weights,
    weight_files,
)
from lightning_modules.encoders.tokenizer import SPECIAL_IDS
from vitrail.errors import UserError

Configuration = Any
"""A ``transformers`` configuration; the library has no useful common type for attributes."""

TEXT_HEADS: dict[str, tuple[str, ...]] = {
    "pretraining head": (
        *(
            "cls.",
            "predictions.",
            "sop_classifier.",
            "lm_head.",
            "vocab_transform.",
            "vocab_layer_norm.",
            "vocab_projector.",
        ),
        *("generator_predictions.", "generator_lm_head.", "discriminator_predictions.", "lm_predictions."),
        *("mask_predictions.", "pred_layer.", "head.dense.", "head.norm.", "decoder.bias"),
    ),
    "classifier": ("classifier.", "pre_classifier.", "qa_outputs.", "score."),
    "pooler": ("pooler.", "sequence_summary."),
    "projection": ("text_projection.",),
}
"""What a file may hold besides a text encoder, by the beginnings of the names: heads that nothing here reads."""

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
"""Configurations by hub name, as far as they differ from the library's defaults."""


def model_configuration(name: str, pretrained: bool, key: str) -> Configuration:
    """The configuration of a model, without its weights.

    Args:
        name: local folder with ``config.json``, or name on the hub.
        pretrained: whether its weights will be loaded; else the special tokens are those of a tokenizer of ours.
        key: of the option that names it, for messages.

    Raises:
        UserError: if it cannot be had.
    """
    if not name:
        raise UserError(f"{key}: is missing; give a local folder or a name on the hub")
    directory = model_directory(name, key)
    values = _read_configuration(Path(directory), key) if directory else ARCHITECTURES[name]
    configuration = configuration_from_values(values, key)
    if not pretrained:
        text = getattr(configuration, "text_config", configuration)
        for attribute, value in SPECIAL_IDS.items():
            setattr(text, attribute, value)
    return configuration


def model_directory(name: str, key: str) -> str:
    """Local folder with the configuration of a model; empty where it is known without one.

    Raises:
        UserError: if it cannot be had.
    """
    if Path(name).is_dir():
        return name
    return "" if name in ARCHITECTURES else hub_directory(name, key, with_weights=False)


def configuration_from_values(values: dict[str, Any], key: str = "towers") -> Configuration:
    """The configuration with these values.

    Args:
        values: as ``config.json`` holds them; ``model_type`` says which kind.
        key: of the option that names it, for messages.

    Raises:
        UserError: if ``transformers`` does not know the kind or does not take the values.
    """
    from transformers import CONFIG_MAPPING

    kind = str(values.get("model_type", ""))
    if kind not in CONFIG_MAPPING:
        raise UserError(f"{key}: transformers knows no model of the type {kind!r}; give another model")
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:
        raise UserError(
            f"{key}: is no configuration of a {kind} ({_first_line(error)}); mend its config.json"
        ) from error


def configuration_values(configuration: Configuration) -> dict[str, Any]:
    """The configuration as plain values, which a checkpoint can keep."""
    values: dict[str, Any] = json.loads(configuration.to_json_string(use_diff=False))
    return values


def build_model(configuration: Configuration) -> nn.Module:
    """The network with random weights, in float32.

    Raises:
        UserError: if the values of its configuration contradict each other.
    """
    from transformers import AutoModel

    try:
        model: nn.Module = cast("Any", AutoModel).from_config(configuration, dtype=torch.float32)
    except (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"towers: no {configuration.model_type} can be built from its configuration ({_first_line(error)}); mend "
            "its config.json, or give another model"
        ) from error
    if getattr(model, "pooler", None) is not None:
        # BERT's pooler is a classifier of sentence pairs; nobody reads it here, and DDP would wait for its gradient.
        model.pooler = None  # type: ignore[assignment]
    return model


def load_model(
    model: nn.Module, directory: str, key: str, unused: Mapping[str, tuple[str, ...]] | None = None
) -> LeftOut:
    """Load pretrained weights into a network that ``build_model`` made.

    Args:
        model: its parameters stay the same objects.
        directory: local folder of the pretrained model.
        key: of the option that names it, for messages.
        unused: what the files may hold besides, by kind: beginnings of names. None for nothing.

    Returns:
        What was left out.

    Raises:
        UserError: if the weights cannot be read or do not fit.
    """
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
    # What the network here lacks on purpose (BERT's pooler) may be missing, too.
    left_out = refuse_misfits(report, expected.keys(), f"{key}: {directory}", unused or {})
    if dropped := sorted(source.state_dict().keys() - expected.keys() - set(report["missing_keys"])):
        left_out["pooler"] = [*left_out.get("pooler", []), *dropped]
    copy_weights(source, model, f"{key}: {directory}")
    return left_out


def refuse_misfits(
    report: Mapping[str, Any],
    expected: Collection[str],
    origin: str,
    unused: Mapping[str, tuple[str, ...]],
) -> LeftOut:
    """Refuse weights that ``transformers`` completed at random or ignored.

    Args:
        report: of ``from_pretrained`` with ``output_loading_info`` and ``ignore_mismatched_sizes``.
        expected: names of the weights that are needed.
        origin: for the message.
        unused: what the files may hold besides, by kind: beginnings of names.

    Returns:
        What the files hold besides.

    Raises:
        UserError: names what is missing, unexpected or of another shape.
    """
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
    """Let ``transformers`` read a folder without progress bars and reports, and turn what it raises into one line.

    Raises:
        UserError: if the folder has no weights, or they cannot be read.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it is over before it is seen
    verbosity = logging.get_verbosity()
    logging.set_verbosity(levels.ERROR)  # what its report would say is refused
    try:
        weight_files(directory, f"{key}: ")
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key}: the weights in {directory} cannot be read ({_first_line(error)})") from error
    finally:
        logging.set_verbosity(verbosity)


def _read_configuration(directory: Path, key: str) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} cannot be read ({_first_line(error)}); give the folder of a model") from error
    if not isinstance(values, dict):
        raise UserError(f"{key}: {path} is no configuration of a model")
    return values


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
