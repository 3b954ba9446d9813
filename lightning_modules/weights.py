"""Pretrained weights of an encoder, from the hub or a file, in full or not at all."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torch import nn

from datamodules.schema import UserError
from lightning_modules.encoders import create_backbone, known_architecture

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
FORMATS = (".safetensors", ".pth", ".ckpt", ".pt", ".bin")
REACH_SECONDS = 5.0
OWN_PREFIX = "encoder.backbone."


def load_backbone(backbone: nn.Module, path: str, name: str, image_size: int) -> None:
    """Load weights into a network without classifier; only the classifier's own are left out.

    Args:
        backbone: as ``create_backbone`` makes it; its parameters stay the same objects.
        path: of a weights file, also of a checkpoint of ours with the same backbone.
        name: of the architecture in timm.
        image_size: height and width in pixels that the network is built for; position embeddings are resized.

    Raises:
        UserError: if the file cannot be read or does not fit.
    """
    weights = read_weights(path)
    classifier = known_architecture(name).classifier or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    prefixes = tuple(f"{prefix}." for prefix in classifiers)
    weights = {key: value for key, value in weights.items() if not key.startswith(prefixes)}
    try:
        # Not to move the random state that initialises everything that is built after us.
        with torch.random.fork_rng(devices=[]):
            source = create_backbone(name, image_size, weights)
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"pretrained: {path} does not fit {name}: {_difference(weights, backbone)}") from error
    copy_weights(source, backbone, f"pretrained: {path}")


def copy_weights(source: nn.Module, target: nn.Module, origin: str) -> None:
    """Copy all weights, also into a target that has adapters (LoRA), whose base layers are named differently.

    Raises:
        UserError: if a weight is missing or has another shape.
    """
    weights = source.state_dict()
    missing = []
    for name, value in target.state_dict().items():
        if "lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if plain not in weights or weights[plain].shape != value.shape:
            missing.append(plain)
        else:
            value.copy_(weights[plain])
    if missing:
        raise UserError(
            f"{origin} does not fit: {len(missing)} weights are missing or of another shape ({missing[0]}, …)"
        )


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """Read weights without running code from the file; half precision becomes float32.

    Args:
        path: ``.safetensors``, or ``.pth``, ``.pt``, ``.bin`` or ``.ckpt`` with or without the usual wrapping. Of a
            checkpoint of ours the backbone is read.

    Raises:
        UserError: if there is no such file or it is not such a file.
    """
    from timm.models import load_state_dict

    if not Path(path).is_file():
        raise UserError(f"pretrained: there is no file {path}; give true, false or the path of a weights file")
    if not path.endswith(FORMATS):
        raise UserError(f"pretrained: {path} is none of {', '.join(FORMATS)}")
    try:
        weights: dict[str, Any] = load_state_dict(path, weights_only=True)
    except Exception as error:
        raise UserError(f"pretrained: {path} cannot be read as plain weights: {_first_line(error)}") from error
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"pretrained: {path} holds no weights; a state_dict of tensors is needed")
    own = {key.removeprefix(OWN_PREFIX): value for key, value in weights.items() if key.startswith(OWN_PREFIX)}
    return {key: value.float() if value.is_floating_point() else value for key, value in (own or weights).items()}


def hub_file(source: Any) -> str:
    """Path of the weights in the hub's local cache, downloaded if need be.

    Left alone, huggingface_hub tries for 47 seconds or more before it gives up, and even looks for newer versions
    of what it has. So what is in the cache is used as it is, and one short request tells whether to try at all.

    Args:
        source: timm's ``PretrainedCfg``.

    Raises:
        UserError: if they cannot be had.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository = source.hf_hub_id
    if not repository:
        raise UserError(f"pretrained: true, but these weights are not on the hub; download {source.url}, give its path")
    for name in HUB_FILES:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return cached
    if constants.HF_HUB_OFFLINE:
        raise _unavailable(repository, "HF_HUB_OFFLINE is set")
    if not reachable(constants.ENDPOINT, REACH_SECONDS):
        raise _unavailable(repository, f"no answer from {constants.ENDPOINT}")
    try:
        try:
            return hf_hub_download(repository, HUB_FILES[0])
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            return hf_hub_download(repository, HUB_FILES[1])
    except Exception as error:
        raise _unavailable(repository, _first_line(error)) from error


def hub_directory(name: str, key: str, *, with_weights: bool = True) -> str:
    """Local folder of a model of the hub, downloaded if need be; as quick to give up as ``hub_file``.

    Args:
        name: owner and name on the hub.
        key: of the option that names it, for messages.
        with_weights: whether weights and tokenizer are needed, or its configuration only.

    Raises:
        UserError: if it cannot be had.
    """
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json") if _is_repository(name) else None
    if not _is_repository(name):
        raise UserError(f"{key}: {name!r} is neither a local folder nor a name on the hub (owner/name)")
    if isinstance(cached, str) and (not with_weights or _has_weights(Path(cached).parent)):
        return str(Path(cached).parent)
    if constants.HF_HUB_OFFLINE:
        raise _unavailable(name, "HF_HUB_OFFLINE is set", key)
    if not reachable(constants.ENDPOINT, REACH_SECONDS):
        raise _unavailable(name, f"no answer from {constants.ENDPOINT}", key)
    try:
        folder = snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model"])
        if with_weights and not _has_weights(Path(folder)):
            folder = snapshot_download(name, allow_patterns=[HUB_FILES[0]])
        if with_weights and not _has_weights(Path(folder)):
            folder = snapshot_download(name, allow_patterns=["pytorch_model.bin", "*.safetensors"])
        return folder
    except Exception as error:
        raise _unavailable(name, _first_line(error), key) from error


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or (folder / "pytorch_model.bin").exists()


def reachable(url: str, seconds: float) -> bool:
    """Whether a server answers anything at all, be it an error.

    Args:
        url: http or https; proxies are taken from the environment.
        seconds: after which it counts as silent.
    """
    answers: list[bool] = []
    # A thread, because no timeout covers the look-up of the name.
    thread = Thread(target=lambda: answers.append(_answers(url, seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    return any(answers)


def _answers(url: str, seconds: float) -> bool:
    try:
        with urlopen(Request(url, method="HEAD"), timeout=seconds):
            return True
    except HTTPError:
        return True
    except URLError as error:
        # A certificate that Python does not trust is for the hub's own client to judge.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False


def _unavailable(repository: str, cause: str, key: str = "pretrained") -> UserError:
    return UserError(
        f"{key}: the weights {repository} cannot be fetched ({cause}); connect to the network or point HF_HOME to "
        f"a cache that has them, or give the path of a {'weights file' if key == 'pretrained' else 'local folder'}, or "
        f"set pretrained: false"
    )


def _difference(weights: dict[str, torch.Tensor], backbone: nn.Module) -> str:
    """What is missing, too much or of another shape, the first few names of each."""
    expected = backbone.state_dict()
    kinds = {
        "missing": expected.keys() - weights.keys(),
        "unexpected": weights.keys() - expected.keys(),
        "of another shape": {
            key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape
        },
    }
    return "; ".join(
        f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', …' if len(keys) > 3 else ''})"
        for kind, keys in kinds.items()
        if keys
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
