"""Dual encoders of open_clip (Cherti et al., CVPR 2023): configurations, weights and tokenizers.

A model is named by

- ``hf-hub:OWNER/NAME``, a repository on the hub in open_clip's layout,
- a local folder in that layout (``open_clip_config.json``),
- ``open_clip:ARCHITECTURE/TAG``, pretrained weights of its list, such as ``open_clip:RN50/openai``, or
- ``open_clip:ARCHITECTURE//PATH``, a file with such weights; without a tag, it has random weights.

The library is an optional extra, imported only where such a model is built.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from lightning_modules.encoders.tokenizer import TextTokenizer, TokenizerState, pretrained_tokenizer
from lightning_modules.encoders.weights import OPEN_CLIP_FILES, downloaded, hub_directory, read_json
from vitrail.errors import UserError, first_line
from vitrail.types import InputOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "towers.model"
CONFIG, WEIGHTS = "open_clip_config.json", OPEN_CLIP_FILES[0]
HUB, NAMED = "hf-hub:", "open_clip:"

_CLEANED, _TOKENIZER_OPTIONS = ("whitespace", "canonicalize"), {"clean", "strip_sep_token"}
"""What of ``tokenizer_kwargs`` is supported."""

_RESIZES = {"shortest": "crop", "squash": "squash"}


class Configuration(NamedTuple):
    """Plain values for checkpoints."""

    model_cfg: dict[str, Any]  # architecture
    preprocess_cfg: dict[str, Any]  # statistics and resizing of images


def is_open_clip(name: str) -> bool:
    """Whether a model is named as one of open_clip."""
    return name.startswith((HUB, NAMED)) or (Path(name) / CONFIG).is_file()


def configuration_of(name: str) -> Configuration:
    """Read the configuration of a model.

    Raises:
        UserError: there is none.
    """
    from open_clip import get_model_config, get_pretrained_cfg, list_models
    from open_clip.pretrained import list_pretrained_tags_by_model
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    if not name.startswith(NAMED):
        path = Path(_folder(name, with_weights=False)) / CONFIG
        values = read_json(path, KEY, "give a folder in open_clip's layout")
        if not isinstance(values.get("model_cfg"), dict):
            raise UserError(f"{KEY}: {path} has no model_cfg; give a folder in open_clip's layout")
        return Configuration(
            values["model_cfg"], merge_preprocess_dict(PreprocessCfg(), values.get("preprocess_cfg") or {})
        )
    architecture, tag = _named(name)
    model_cfg = get_model_config(architecture)
    if model_cfg is None:
        close = difflib.get_close_matches(architecture, list_models(), n=5, cutoff=0.4)
        raise UserError(
            f"{KEY}: open_clip has no {architecture!r}; did you mean {', '.join(close) or list_models()[0]}?"
        )
    preprocess_cfg = asdict(PreprocessCfg())
    if tag and not Path(tag).is_absolute():
        pretrained = get_pretrained_cfg(architecture, tag)
        if not pretrained:
            tags = list_pretrained_tags_by_model(architecture)
            raise UserError(f"{KEY}: open_clip has no weights {tag!r} of {architecture}; it has {', '.join(tags)}")
        preprocess_cfg = merge_preprocess_dict(preprocess_cfg, pretrained)
        # OpenAI's weights need the activation that they were trained with, whatever the architecture is called.
        model_cfg["quick_gelu"] = bool(pretrained.get("quick_gelu"))
    return Configuration(model_cfg, preprocess_cfg)


def weights_file(name: str) -> Path:
    """Local file with the weights of a model, downloaded if necessary."""
    if Path(name).is_file():
        return Path(name)
    if not name.startswith(NAMED):
        return _file_in(Path(_folder(name, with_weights=True)))
    architecture, tag = _named(name)
    if Path(tag).is_absolute():
        if not Path(tag).is_file():
            raise UserError(f"{KEY}: there is no file {tag}; give the weights of a {architecture}")
        return Path(tag)
    if not tag:
        raise UserError(f"{KEY}: {name} names no weights; give {NAMED}{architecture}/TAG, or set pretrained: false")
    from open_clip import get_pretrained_cfg
    from open_clip.pretrained import download_pretrained

    pretrained = get_pretrained_cfg(architecture, tag)
    if repository := str(pretrained.get("hf_hub", "")).rpartition("/")[0]:
        return _file_in(Path(hub_directory(repository, KEY, files=OPEN_CLIP_FILES)))
    return Path(downloaded(name, KEY, lambda: str(download_pretrained(pretrained))))


def build(configuration: Configuration, image_size: int, patch_dropout: float = 0.0) -> nn.Module:
    """Build a network with random weights, with both towers as modules of their own.

    Raises:
        UserError: open_clip cannot build it.
    """
    import open_clip

    vision = configuration.model_cfg["vision_cfg"]
    if patch_dropout and ("timm_model_name" in vision or isinstance(vision.get("layers"), list)):
        raise UserError("towers.patch_dropout: this model's image tower does not support it; leave it out")
    with TemporaryDirectory() as folder, _quiet():
        (Path(folder) / CONFIG).write_text(json.dumps(configuration._asdict()), encoding="utf-8")
        try:
            model: nn.Module = open_clip.create_model(
                f"local-dir:{folder}",
                load_weights=False,
                device=torch.empty(0).device,  # without values in a context that counts
                pretrained_text=False,
                force_custom_text=True,
                force_patch_dropout=patch_dropout or None,
                force_image_size=None if image_size == own_size(configuration) else image_size,
            )
        except Exception as error:  # of its parts by timm and transformers, too
            raise UserError(
                f"{KEY}: open_clip cannot build this model for images of {image_size} px ({first_line(error)}); set "
                f"data.image.size: {own_size(configuration)}, or give another model"
            ) from error
    return model


def load_file(model: nn.Module, path: Path) -> None:
    """Load weights in any layout that open_clip reads, such as OpenAI's, into a network of ``build``.

    Raises:
        UserError: they cannot be read, or do not fit.
    """
    from open_clip.factory import load_checkpoint

    try:
        with _quiet():
            load_checkpoint(cast("Any", model), str(path), strict=True, weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{KEY}: the weights in {path} do not fit ({reason}); give those of this model") from error


def own_size(configuration: Configuration) -> int:
    """Side of the images that a model was made for."""
    size = configuration.model_cfg["vision_cfg"].get("image_size", 224)
    return int(size[0] if isinstance(size, list | tuple) else size)


def input_options(configuration: Configuration) -> InputOptions:
    """Preprocessing of a model.

    Raises:
        UserError: it is not supported.
    """
    how = configuration.preprocess_cfg
    if how["resize_mode"] not in _RESIZES:
        raise UserError(f"{KEY}: it needs images with borders (resize_mode {how['resize_mode']}); give another model")
    return cast(
        "InputOptions",
        {
            "size": own_size(configuration),
            "resize": _RESIZES[how["resize_mode"]],
            "crop_fraction": 1.0,
            "interpolation": "bilinear" if how["interpolation"] == "bilinear" else "bicubic",
            "crop_rounding": "even",
            "resampler": "pillow",
        },
    )


def tokenizer_of(configuration: Configuration, name: str) -> TextTokenizer:
    """Tokenizer of a model, from its folder if that has one."""
    text = configuration.model_cfg["text_cfg"]
    length = int(text.get("context_length", 77))
    given = text.get("tokenizer_kwargs") or {}
    strange = sorted(set(given) - _TOKENIZER_OPTIONS)
    if strange or given.get("clean", "whitespace") not in _CLEANED:
        name = strange[0] if strange else "clean"
        what = f"{name}: {given[name]}"
        raise UserError(f"{KEY}: its tokenizer needs {what}, which is not supported; give another model")
    if source := text.get("hf_tokenizer_name", ""):
        if text.get("tokenizer_mode"):
            raise UserError(f"{KEY}: texts of the mode {text['tokenizer_mode']} are not supported; give another model")
        folder = "" if name.startswith(NAMED) else _folder(name, with_weights=False)
        if not folder or not (Path(folder) / "tokenizer_config.json").is_file():
            folder = hub_directory(source, KEY, with_weights=False)
        canonical, strip_sep = given.get("clean") == "canonicalize", bool(given.get("strip_sep_token"))
        return pretrained_tokenizer(folder, length, fixed_length=True, canonical=canonical, strip_sep=strip_sep)
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    plain = SimpleTokenizer()
    special = {"bos_token": "<start_of_text>", "eos_token": "<end_of_text>"}
    pipeline = CLIPTokenizer(
        vocab=plain.encoder, merges=list(plain.bpe_ranks), unk_token=special["eos_token"], **special
    ).backend_tokenizer
    state: TokenizerState = {
        "pipeline": pipeline.to_str(),
        "max_length": length,
        "pad_id": 0,
        "fixed_length": True,
    }
    return TextTokenizer(state)


def _named(name: str) -> tuple[str, str]:
    architecture, _, tag = name.removeprefix(NAMED).partition("/")
    return architecture, tag


def _folder(name: str, *, with_weights: bool) -> str:
    if not name.startswith(HUB):
        return name
    return hub_directory(name.removeprefix(HUB), KEY, with_weights=with_weights, files=OPEN_CLIP_FILES)


def _file_in(folder: Path) -> Path:
    found = [folder / file for file in OPEN_CLIP_FILES if (folder / file).is_file()]
    if not found:
        raise UserError(f"{KEY}: {folder} has no weights; it needs {' or '.join(OPEN_CLIP_FILES)}")
    return found[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's log, which warns of missing weights."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def plain(configuration: Configuration) -> Mapping[str, Any]:
    """The configuration for a checkpoint."""
    return cast("Mapping[str, Any]", json.loads(json.dumps(configuration._asdict())))
