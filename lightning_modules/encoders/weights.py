"""Pretrained weights from the hub or files, loaded completely or refused, with their origin.

No missing weight is initialised at random, except the last norm of networks pretrained by FCMAE, which lack it. Unused
weights are reported: classifiers and heads of pretraining, and text tower and projection of an open_clip file.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import re
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from threading import Thread
from typing import Any, TypedDict, cast, get_args
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from vitrail.errors import UserError, first_line
from vitrail.files import file_sha256

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
FORMATS = (".safetensors", ".pth", ".ckpt", ".pt", ".bin")
REACH_SECONDS = 5.0
OWN_PREFIX = "encoder.backbone."

_OWN_OTHERS = ("encoder.normalize.", "head.", "heads.", "outputs.", "log_variances")
"""Prefixes of other weights in the checkpoints of classifiers."""

_OPEN_CLIP = "visual."
_OPEN_CLIP_PROJECTION = ("visual.proj", "visual.head.", "visual.attnpool.c_proj.")
_OPEN_CLIP_OTHERS = (
    *("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection", "text."),
    *("attn_mask", "logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size"),
)

_POSITIONS = ("pos_emb", "positional_embedding", "rel_pos", "relative_position", "attention_bias")
"""Parts of the names of position embeddings, which timm resizes to the image size."""

_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask", "mask_token", "attention_bias_idxs")
"""Suffixes of weights in releases that timm drops."""

_UNUSED_PARTS = {
    "auxiliary head": r"AuxLogits\.",
    "attention pooling": r"attn_pool\.",
    "unused projections": r"level\d+\.project\.",
}
"""Patterns of weights in releases that timm's networks (Inception, SigLIP, DLA) lack."""

LeftOut = dict[str, list[str]]
"""Names of unused weights by kind."""


class WeightsOrigin(TypedDict):
    """Origin of pretrained weights, recorded in checkpoints and in ``run.json``."""

    part: str  # option that names them
    name: str  # of the architecture or model
    source: str  # repository on the hub, or absolute path of the file or folder
    revision: str | None  # commit on the hub
    sha256: dict[str, str]  # digest of each file by its name
    left_out: dict[str, int]  # number of unused weights by kind


def weights_origin(part: str, name: str, place: Path, left_out: LeftOut) -> WeightsOrigin:
    """Describe the origin of weights."""
    place = place.absolute()
    files = [place] if place.is_file() else weight_files(place)
    source, revision = str(place), None
    # The hub's cache: models--OWNER--NAME/snapshots/COMMIT.
    commit = files[0].parent
    if commit.parent.name == "snapshots" and commit.parent.parent.name.startswith("models--"):
        source, revision = commit.parent.parent.name.removeprefix("models--").replace("--", "/"), commit.name
    counts = {kind: len(names) for kind, names in left_out.items() if names}
    return {
        "part": part,
        "name": name,
        "source": source,
        "revision": revision,
        "sha256": {file.name: file_sha256(file) for file in files},
        "left_out": counts,
    }


def origin_place(origin: WeightsOrigin) -> Path:
    """Return the folder or file where the weights of an origin are now, downloaded if necessary.

    Raises:
        UserError: they are gone, or their files have changed since.
    """
    source, part = origin["source"], origin["part"]
    place = Path(source)
    if origin["revision"]:
        files = list(origin["sha256"])
        place = Path(hub_directory(source, part, revision=origin["revision"], files=files))
    hint = f"put the former weights of {origin['name']} there, or run `test` again for a new run with others"
    for name, digest in origin["sha256"].items():
        file = place if place.is_file() else place / name
        if not file.is_file():
            raise UserError(f"{part}: {file} is gone, which the checkpoint names instead of holding it; {hint}")
        if file_sha256(file) != digest:
            raise UserError(f"{part}: {file} has changed since the checkpoint was written (SHA-256 differs); {hint}")
    return place


def report_origin(origin: WeightsOrigin) -> None:
    """Print one line with the origin of weights and the unused ones."""
    revision = f" at {origin['revision'][:12]}" if origin["revision"] else ""
    left_out = ", ".join(f"{kind} ({count} weights)" for kind, count in origin["left_out"].items())
    rank_zero_info(
        f"{origin['part']}: pretrained weights of {origin['source']}{revision}"
        + (f"; left out: {left_out}" if left_out else "")
    )


def misfits(given: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Describe weights that are missing, unexpected or of another shape; empty if all fit."""
    shapes = {
        name: (tuple(given[name].shape), tuple(expected[name].shape))
        for name in given.keys() & expected.keys()
        if hasattr(given[name], "shape") and hasattr(expected[name], "shape")
    }
    reshaped = {name: both for name, both in shapes.items() if both[0] != both[1]}
    return described_misfits(expected.keys() - given.keys(), given.keys() - expected.keys(), reshaped)


def described_misfits(
    missing: Iterable[str], unexpected: Iterable[str], reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> str:
    """Describe missing, unexpected and reshaped weights by their first names; empty if there are none."""
    kinds = {
        "missing": sorted(missing),
        "unexpected": sorted(unexpected),
        "of another shape": [f"{name} is {theirs}, not {ours}" for name, (theirs, ours) in sorted(reshaped.items())],
    }
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    )


def known_architecture(name: str) -> Any:
    """Pretrained configuration (``PretrainedCfg``) of an architecture in timm."""
    import timm

    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        tagged = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        close = difflib.get_close_matches(name, tagged or timm.list_models(), n=5, cutoff=0.5) or tagged[:5]
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists what it knows"
        raise UserError(f"backbone: timm does not know {name!r}; {hint}") from None


TimmOptions = Mapping[str, Any]
"""Arguments of a timm network by their names there: strings, numbers, booleans, lists."""

_NOT_OPTIONS = {
    "num_classes": "the task has the classifier",
    "img_size": "the data have the image size (data.image.size)",
    "features_only": "the task needs one vector per image",
    "pretrained": "the model has an argument of this name",
    **dict.fromkeys(("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"), "weights are named by pretrained"),
    **dict.fromkeys(("cache_dir", "scriptable", "exportable", "no_jit", "device", "dtype"), "it is not of the network"),
}


def create_backbone(
    name: str,
    image_size: int,
    weights: dict[str, torch.Tensor] | None = None,
    options: TimmOptions | None = None,
    key: str = "backbone_options.timm",
) -> nn.Module:
    """Build a timm network without classifier.

    Args:
        name: name in timm.
        image_size: height and width of the images in pixels, for architectures with a fixed size.
        weights: pretrained weights; otherwise they are random.
        options: further arguments of the network; activations and norms by their names in ``timm.layers``.
        key: name of the options in messages.

    Raises:
        UserError: timm cannot build the network in this size or with these options.
    """
    source = known_architecture(name)
    options = _checked_options(options or {}, key)
    fixed_size = {"img_size": image_size} if source.fixed_input_size else {}
    # With another number of classes timm reports all misfits in its log, after its conversions of the names.
    overlay = None if weights is None else {"state_dict": weights, "num_classes": 1, "classifier": ()}
    arguments: dict[str, Any] = {
        "pretrained": weights is not None,
        "pretrained_cfg_overlay": overlay,
        "num_classes": 0,
        **fixed_size,
    }
    try:
        backbone = _timm_network(name, {**arguments, **options})
    except Exception as error:  # timm's networks raise many kinds, some of them without a message
        if weights is not None:
            raise
        refuse_options(name, image_size, options, key, error)
        raise UserError(f"image size: {_not_at_this_size(name, image_size, error)}") from error
    _refuse_ignored(backbone, name, options, key)
    patch_size = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    side = patch_size[0] if isinstance(patch_size, Sequence) else patch_size
    if fixed_size and side and image_size % side and image_size != source.input_size[-1]:
        raise UserError(f"image size: {name} cuts images into patches of {side} px, {image_size} px do not fit")
    return backbone


def _timm_network(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network; some take activations and norms by their names, the others as classes."""
    import timm
    from timm.layers import get_act_layer, get_norm_layer

    named = {key: arguments[key] for key in ("act_layer", "norm_layer") if isinstance(arguments.get(key), str)}
    try:
        return cast("nn.Module", timm.create_model(name, **arguments))
    except Exception:
        if not named:
            raise
    look_up = {"act_layer": get_act_layer, "norm_layer": get_norm_layer}
    classes = {key: look_up[key](value) for key, value in named.items()}
    return cast("nn.Module", timm.create_model(name, **{**arguments, **classes}))


def _checked_options(options: TimmOptions, key: str) -> dict[str, Any]:
    for name, value in options.items():
        if name in _NOT_OPTIONS:
            raise UserError(f"{key}.{name}: cannot be set, {_NOT_OPTIONS[name]}; leave it out")
        if name == "in_chans" and value != 3:
            raise UserError(f"{key}.in_chans: images have 3 channels; got {value!r}")
    return dict(options)


def refuse_options(name: str, image_size: int, options: TimmOptions, key: str, error: Exception) -> None:
    """Raise a UserError if it is the options that a network fails with, not the image size."""
    if not options:
        return
    try:
        plain = create_backbone(name, image_size)
        check_encodes(plain, name, image_size, {}, key)
    except UserError:
        return
    _refuse_unknown(plain, name, options, key)
    given = ", ".join(f"{option}: {value}" for option, value in options.items())
    raise UserError(f"{key}: {name} does not work with {given} ({first_line(error)})") from error


def _refuse_ignored(backbone: nn.Module, name: str, options: TimmOptions, key: str) -> None:
    """Refuse options that a network with arbitrary keyword arguments would ignore."""
    parameters = inspect.signature(type(backbone).__init__).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        _refuse_unknown(backbone, name, options, key)


def _refuse_unknown(backbone: nn.Module, name: str, options: TimmOptions, key: str) -> None:
    parameters = [
        parameter
        for kind in type(backbone).__mro__
        if issubclass(kind, nn.Module) and kind is not nn.Module
        for parameter in inspect.signature(kind.__init__).parameters.values()
    ]
    known = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self", *_NOT_OPTIONS}
    # NaFlexViT takes the fields of its configuration as keyword arguments.
    configurations = [one for p in parameters for one in get_args(p.annotation) if is_dataclass(one)]
    known |= {field.name for configuration in configurations for field in fields(configuration)}
    if unknown := sorted(set(options) - known):
        close = difflib.get_close_matches(unknown[0], known, n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(sorted(known))}"
        raise UserError(f"{key}: {name} has no option {unknown[0]!r}; {hint}")


def _not_at_this_size(name: str, image_size: int, error: BaseException) -> str:
    own = known_architecture(name).input_size[-1]
    hint = (
        "choose another size or backbone" if image_size == own else f"set data.image.size: {own}, that of its weights"
    )
    return f"{name} cannot encode images of {image_size} px ({first_line(error)}); {hint}"


def check_encodes(backbone: nn.Module, name: str, image_size: int, options: TimmOptions, key: str) -> int:
    """Encode one black image, and return the length of its feature vector.

    Raises:
        UserError: the network does not take images of this size, or outputs something other than one vector.
    """
    first = next(backbone.parameters())
    image = torch.zeros(1, 3, image_size, image_size, device=first.device, dtype=first.dtype)
    training = backbone.training
    try:
        with torch.no_grad():
            features = backbone.eval()(image)
    except Exception as error:  # windows that do not fit, feature maps without pixels, and the like
        refuse_options(name, image_size, options, key, error)
        raise UserError(f"image size: {_not_at_this_size(name, image_size, error)}") from error
    finally:
        backbone.train(training)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        what = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        where = f"{key}: {name} with these options" if options else f"backbone: {name}"
        raise UserError(
            f"{where} outputs {what} for one image, not one vector; choose a global_pool, or another backbone"
        )
    return int(features.shape[1])


def classifier_weights(name: str, options: TimmOptions | None = None) -> set[str]:
    """Names of the classifier's weights."""
    with torch.device("meta"):
        whole, backbone = (_timm_network(name, {**(options or {}), "num_classes": classes}) for classes in (2, 0))
    return set(whole.state_dict()) - set(backbone.state_dict())


def load_backbone(
    backbone: nn.Module, path: str, name: str, image_size: int, options: TimmOptions | None = None
) -> LeftOut:
    """Load weights into a network without classifier; return the names of unused ones."""
    classifier = classifier_weights(name, options)
    weights, left_out = _backbone_weights(read_weights(path), classifier, path)
    expected = backbone.state_dict()
    what = "is an open_clip file whose image tower does not fit" if "projection" in left_out else "does not fit"
    if wrong := _refused_by_name(weights, expected):
        if "projection" not in left_out:
            wrong = misfits(_without_positions(weights), _without_positions(expected))
        raise UserError(f"pretrained: {path} {what} {name}: {wrong}")
    try:
        with torch.random.fork_rng(devices=[]), _timm_log() as log:
            source = create_backbone(name, image_size, weights, options)
    except UserError:
        raise
    except Exception as error:  # timm's conversions raise many kinds for weights of other networks
        wrong = _misfits_in(error) or misfits(weights, expected) or first_line(error)
        raise UserError(f"pretrained: {path} {what} {name}: {wrong}") from error
    if wrong := _tolerated_by_timm(log, name, classifier, left_out):
        raise UserError(f"pretrained: {path} {what} {name}: {wrong}")
    copy_weights(source, backbone, f"pretrained: {path}")
    return left_out


@contextmanager
def _timm_log() -> Iterator[list[str]]:
    """Capture timm's log, the only place where it reports misfits that it tolerates."""
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("timm.models._builder")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield log
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _tolerated_by_timm(log: Iterable[str], name: str, classifier: set[str], left_out: LeftOut) -> str:
    """Misfits that timm only logs; some releases name their classifier as timm does only once it is converted."""
    text = "\n".join(log)
    missing = {one for found in re.findall(r"Missing keys \((.*)\) discovered", text) for one in found.split(", ")}
    unexpected = {one for found in re.findall(r"Unexpected keys \((.*)\) found", text) for one in found.split(", ")}
    if ".fcmae" in name:
        # FCMAE has no last norm, which therefore starts as the identity.
        missing -= {"head.norm.weight", "head.norm.bias"}
    left_out["classifier"] = sorted({*left_out.get("classifier", ()), *(unexpected & classifier)})
    unexpected -= classifier
    for kind, pattern in _UNUSED_PARTS.items():
        if names := sorted(one for one in unexpected if re.match(pattern, one)):
            left_out[kind] = names
            unexpected -= set(names)
    return described_misfits({one for one in missing if not one.endswith("num_batches_tracked")}, unexpected, {})


def _backbone_weights(
    weights: dict[str, torch.Tensor], classifier: set[str], path: str
) -> tuple[dict[str, torch.Tensor], LeftOut]:
    """The image network's weights in a file, and the names of unused ones."""
    own = any(key.startswith(OWN_PREFIX) for key in weights)
    open_clip = any(key.startswith(_OPEN_CLIP) for key in weights)
    left_out: LeftOut = {}
    if own:
        left_out["head"] = sorted(key for key in weights if key.startswith(_OWN_OTHERS))
        weights = {key: value for key, value in weights.items() if not key.startswith(_OWN_OTHERS)}
    elif open_clip:
        left_out["projection"] = sorted(key for key in weights if key.startswith(_OPEN_CLIP_PROJECTION))
        left_out["text tower"] = sorted(key for key in weights if key.startswith(_OPEN_CLIP_OTHERS))
        others = (*_OPEN_CLIP_PROJECTION, *_OPEN_CLIP_OTHERS)
        weights = {key: value for key, value in weights.items() if not key.startswith(others)}
    if own or open_clip:
        prefix, kind = (OWN_PREFIX, "a checkpoint of a classifier") if own else (_OPEN_CLIP, "an open_clip file")
        if strange := described_misfits((), [key for key in weights if not key.startswith(prefix)], {}):
            raise UserError(f"pretrained: {path} looks like {kind}, but contains other weights: {strange}")
        return {key.removeprefix(OWN_PREFIX): value for key, value in weights.items()}, left_out
    left_out["classifier"] = sorted(weights.keys() & classifier)
    return {key: value for key, value in weights.items() if key not in classifier}, left_out


def _refused_by_name(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """Misfits that timm would hide: it resamples patch embeddings, and some of its filters drop unexpected weights."""
    stems = {"visual.conv1.weight": "patch_embed.proj.weight"}
    reshaped = {}
    for key, value in _without_positions(weights).items():
        name = key.removeprefix("visual.trunk.")
        name = stems.get(key, name)
        if name not in expected:
            continue
        # Some releases have linear layers as 1 × 1 convolutions, or vice versa.
        if value.shape != expected[name].shape and value.numel() != expected[name].numel():
            reshaped[key] = (tuple(value.shape), tuple(expected[name].shape))
    unexpected: Iterable[str] = ()
    if expected.keys() <= weights.keys():
        unexpected = {key for key in weights.keys() - expected.keys() if not key.endswith(_BUFFERS)}
    return described_misfits((), unexpected, reshaped)


def _without_positions(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if not any(part in name for part in _POSITIONS)}


def _misfits_in(error: BaseException) -> str:
    """Misfits in the message of torch's strict loading; empty for another error."""
    text = str(error)
    lists = {
        kind: re.findall(r'"([^"]+)"', found[1])
        for kind in ("Missing", "Unexpected")
        if (found := re.search(rf"{kind} key\(s\) in state_dict: (.*)", text))
    }
    number = r"torch\.Size\(\[([^\]]*)\]\)"
    sizes = re.findall(rf"size mismatch for (\S+): copying a param with shape {number}.*? is {number}", text)
    shapes = {name: (_shape(theirs), _shape(ours)) for name, theirs, ours in sizes}
    return described_misfits(lists.get("Missing", ()), lists.get("Unexpected", ()), shapes)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(side) for side in text.split(",") if side.strip())


def copy_weights(source: nn.Module, target: nn.Module, origin: str) -> None:
    """Copy all weights but those of adapters (LoRA), which either network may have."""
    weights, expected = plain_weights(source), plain_weights(target)
    # Further weights of the source are unused.
    if wrong := misfits({name: weights[name] for name in weights.keys() & expected.keys()}, expected):
        raise UserError(f"{origin} does not fit: {wrong}")
    for name, value in expected.items():
        value.copy_(weights[name])


def plain_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a network without those of adapters, by their original names."""
    return {
        name.replace(".base_layer.", "."): value for name, value in network.state_dict().items() if "lora_" not in name
    }


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """Read weights with ``weights_only=True``; half precision becomes float32."""
    from timm.models import load_state_dict

    if Path(path).is_dir():
        raise UserError(f"pretrained: {path} is a folder; give the weights file in it")
    if not Path(path).is_file():
        raise UserError(f"pretrained: there is no file {path}; give true, false or the path of a weights file")
    if not path.endswith(FORMATS):
        raise UserError(f"pretrained: {path}: must be one of {', '.join(FORMATS)}")
    try:
        weights: dict[str, Any] = load_state_dict(path, weights_only=True)
    except Exception as error:
        raise UserError(f"pretrained: {path} cannot be read as plain weights: {first_line(error)}") from error
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"pretrained: {path} contains no weights; a state_dict of tensors is needed")
    return {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}


def weight_files(directory: str | Path, origin: str = "") -> list[Path]:
    """Weights files in a folder of ``transformers``."""
    folder = Path(directory)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{origin}{folder} contains adapters of peft (adapter_config.json), not a model; merge them into it "
            "(merge_and_unload) and save that"
        )
    for name in HUB_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        shards = read_json(index, origin.removesuffix(": ") or "pretrained", "download it again").get("weight_map")
        files = [folder / name for name in sorted(set(shards.values()))] if isinstance(shards, dict) else []
        absent = [file.name for file in files if not file.is_file()]
        if absent or not files:
            first = (absent or [index.name])[0]
            raise UserError(f"{origin}{folder}: {len(absent)} of {len(files)} weights files are missing ({first}, …)")
        return files
    raise UserError(f"{origin}{folder} has no weights; it needs {' or '.join(HUB_FILES)}, or their index and shards")


def hub_file(source: Any) -> str:
    """Path of the weights in the hub's local cache, downloaded if necessary.

    Cached files are used without looking for newer ones, and one short request decides whether to download at all:
    huggingface_hub by itself gives up after 47 seconds or more.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository = source.hf_hub_id
    if not repository:
        raise UserError(f"pretrained: true, but these weights are not on the hub; download {source.url}, give its path")
    for name in HUB_FILES:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return cached

    def download() -> str:
        try:
            return hf_hub_download(repository, HUB_FILES[0])
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            return hf_hub_download(repository, HUB_FILES[1])

    return downloaded(repository, "pretrained", download)


def local_directory(name: str, key: str) -> str:
    """Local folder of a model with its weights, downloaded if necessary."""
    return name if Path(name).is_dir() else hub_directory(name, key)


def hub_directory(
    name: str,
    key: str,
    *,
    with_weights: bool = True,
    revision: str | None = None,
    files: Sequence[str] = (),
) -> str:
    """Local folder of a model on the hub, downloaded if necessary; see ``hub_file``.

    Args:
        name: of the repository.
        key: option that names it, for messages.
        with_weights: whether it must have weights.
        revision: commit.
        files: names of the weights, of which the first that exists is needed; by default those of ``transformers``.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if not _is_repository(name):
        raise UserError(f"{key}: {name!r} is neither a local folder nor a name on the hub (owner/name)")

    def has_weights(folder: str | Path) -> bool:
        return any((Path(folder) / file).is_file() for file in files) if files else _has_weights(Path(folder))

    for config in ("open_clip_config.json", "config.json") if files else ("config.json",):
        cached = try_to_load_from_cache(name, config, revision=revision)
        if isinstance(cached, str) and (not with_weights or has_weights(Path(cached).parent)):
            return str(Path(cached).parent)

    def download() -> str:
        folder = snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.txt", "*.model"])
        for patterns in [[file] for file in files] or [[HUB_FILES[0]], ["pytorch_model*.bin", "*.safetensors"]]:
            if with_weights and not has_weights(folder):
                folder = snapshot_download(name, revision=revision, allow_patterns=patterns)
        return folder

    return downloaded(name, key, download)


def downloaded(repository: str, key: str, download: Callable[[], str]) -> str:
    """Run a download if the hub responds; see ``hub_file``."""
    from huggingface_hub import constants

    cause: BaseException | None = None
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    elif not reachable(constants.ENDPOINT, REACH_SECONDS):
        reason = f"no response from {constants.ENDPOINT}"
    else:
        try:
            return download()
        except Exception as error:
            reason, cause = first_line(error), error
    raise UserError(
        f"{key}: the weights {repository} cannot be fetched ({reason}); connect to the network or point HF_HOME to "
        f"a cache that has them, or give the path of a {'weights file' if key == 'pretrained' else 'local folder'}, or "
        f"set pretrained: false"
    ) from cause


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def _has_weights(folder: Path) -> bool:
    try:
        return bool(weight_files(folder))
    except UserError:
        return False


def reachable(url: str, seconds: float) -> bool:
    """Whether a server responds at all, even with an error."""
    responses: list[bool] = []
    # In a thread, because no timeout covers the look-up of the name.
    thread = Thread(target=lambda: responses.append(_responds(url, seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    return any(responses)


def _responds(url: str, seconds: float) -> bool:
    try:
        with urlopen(Request(url, method="HEAD"), timeout=seconds):
            return True
    except HTTPError:
        return True
    except URLError as error:
        # The hub's client decides about certificates.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False


def read_json(path: Path, key: str, hint: str, kind: type = dict) -> Any:
    """Read a JSON object, or list, of a model's folder (UserError with key and hint if that fails)."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, kind):
            raise ValueError(f"no {kind.__name__}")
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} cannot be read ({first_line(error)}); {hint}") from error
    return values
