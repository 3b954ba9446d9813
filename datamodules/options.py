"""The options that every DataModule takes, with their defaults and ranges in one place.

They are plain dictionaries at run time (checkpoints must load with ``weights_only=True``) and ``TypedDict`` for the
type checker and for jsonargparse, which refuses unknown keys and wrong types of a YAML. What Python callers pass is
checked here again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict, cast, get_args

from vitrail.errors import UserError
from vitrail.types import LABEL_TASK, CropRounding, Interpolation, Resize

Sampling = Literal["shuffle", "balanced", "distinct"]
OnBadImage = Literal["error", "skip"]
LeakKind = Literal["groups", "exact", "near"]
CacheMode = Literal["auto", "always", "never"]
SplitName = Literal["train", "val", "test"]
Preset = Literal["none", "light", "reference"]


class ImageOptions(TypedDict, total=False):
    """How images are brought to the size that the network sees.

    Of all but the size, what is left out is as the weights that the model begins with want it, or as its checkpoint was
    trained; the values in brackets hold where there are none.

    Attributes:
        size: side of the square image in pixels, at least 1; default 224.
        resize: ``crop`` scales the short side to ``size / crop_fraction`` and crops the center, ``squash`` scales both
            sides to it, whatever the aspect ratio, ``pad`` the long side, with gray borders [crop].
        crop_fraction: share of the scaled image that the evaluation's center crop keeps, in (0, 1] [1].
        interpolation: filter of every resize, always with antialiasing [bicubic].
        crop_rounding: how half of an odd margin is rounded: ``even`` to the even neighbor, as torchvision and timm do,
            or ``down``, as transformers does [even].
        value_range: which values of images with more than 8 bits a channel become black and white; images of 8 bits are
            left as they are. ``[lo, hi]``, where values outside are clipped; ``dtype`` for all of 16 bits; ``auto`` for
            the smallest of 8, 10, 12, 14 and 16 bits (of floating point also 0 to 1) that holds all images of the data
            set, which the run records and every command that uses its model takes from there. Streams are not looked
            through first: there such images are refused with auto [auto].
    """

    size: int
    resize: Resize
    crop_fraction: float
    interpolation: Interpolation
    crop_rounding: CropRounding
    value_range: Literal["dtype", "auto"] | list[float]


class LoaderOptions(TypedDict, total=False):
    """How samples become batches.

    Attributes:
        batch_size: samples of a batch on each process, at least 1; default 32.
        contrastive_batch_size: samples of a training batch on each process, at least ``batch_size``, which then is the
            number that a dual encoder encodes at a time; 0, the default, for ``batch_size``.
        num_workers: processes that read and augment, 0 for none; results do not depend on it; default 0.
        sampling: ``shuffle`` draws each training sample once an epoch, ``balanced`` draws with replacement by the
            inverse frequency of the class; ``distinct`` leaves samples out of an epoch so that no batch, over all
            processes, has two that are positives of each other; default shuffle.
        balance_on: task whose classes ``balanced`` makes equally frequent; default class.
        drop_last: leave out the last training batch where it is not full; default false. One of a single image is
            always left out, because BatchNorm cannot normalise it.
        cache: whether images are decoded once and kept on disk under ``$VITRAIL_CACHE``, scaled to what the network
            needs: ``auto`` where there is room for them, ``always`` or ``never``. Evaluation gets the same pixels with
            and without; random crops of images that are larger come out of the smaller ones; default auto.
        cache_limit_gb: gigabytes that all cached images together may take; default 20. The data sets that were not
            used for longest make room.
        predict: splits that ``predict`` goes through, in the table's order; default test.
    """

    batch_size: int
    contrastive_batch_size: int
    num_workers: int
    sampling: Sampling
    balance_on: str
    drop_last: bool
    cache: CacheMode
    cache_limit_gb: float
    predict: list[SplitName]


class CheckOptions(TypedDict, total=False):
    """What happens when the data are found wanting, before any training.

    Attributes:
        on_bad_image: ``error`` lists the unreadable images and stops; ``skip`` leaves them out and tells so in the
            run record; default error.
        allow_leaks: kinds of leaks between splits that are tolerated: ``groups`` (a group in several splits),
            ``exact`` (the same pixels), ``near`` (nearly the same image); default none.
        missing: texts that mean that a label, attribute, group or caption is unknown, in any case and besides the empty
            cell and null (NaN in Parquet), which always do; ``none``, ``NA`` and the like are values unless named here.
            Default none, in Products ``unknown`` and ``nan``, in Fashion ``NA``.
    """

    on_bad_image: OnBadImage
    allow_leaks: list[LeakKind]
    missing: list[str]


class AugmentOptions(TypedDict, total=False):
    """Augmentation of training images: a preset gives all values, every further key overrides one.

    Attributes:
        preset: ``none``, ``light`` (crop and flip) or ``reference`` (crop, flip, rotation, translation, colour jitter,
            erasing); default none.
        random_resized_crop: smallest and largest share of the area that a random crop keeps; empty for the
            evaluation's centre crop.
        horizontal_flip: probability of mirroring.
        rotation: largest rotation to either side in degrees.
        translate: largest shift along each axis as a share of the side.
        brightness: largest relative change of brightness.
        contrast: largest relative change of contrast.
        saturation: largest relative change of saturation.
        hue: largest shift of the hue in turns, up to 0.5. A preset's hue becomes 0 where a colour is to be learned; a
            value given here holds.
        erasing: probability of erasing a rectangle.
        erasing_scale: smallest and largest share of the area that is erased.
        mixup: alpha of the Beta distribution of mixup's share, 0 for off.
        cutmix: alpha of the Beta distribution of CutMix's share, 0 for off.
    """

    preset: Preset
    random_resized_crop: list[float]
    horizontal_flip: float
    rotation: float
    translate: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    erasing: float
    erasing_scale: list[float]
    mixup: float
    cutmix: float


IMAGE_DEFAULTS: ImageOptions = {
    "size": 224,
    "resize": "crop",
    "crop_fraction": 1.0,
    "interpolation": "bicubic",
    "crop_rounding": "even",
    "value_range": "auto",
}
LOADER_DEFAULTS: LoaderOptions = {
    "batch_size": 32,
    "contrastive_batch_size": 0,
    "num_workers": 0,
    "sampling": "shuffle",
    "balance_on": LABEL_TASK,
    "drop_last": False,
    "cache": "auto",
    "cache_limit_gb": 20.0,
    "predict": ["test"],
}
CHECK_DEFAULTS: CheckOptions = {"on_bad_image": "error", "allow_leaks": [], "missing": []}

_NO_AUGMENTATION: AugmentOptions = {
    "preset": "none",
    "random_resized_crop": [],
    "horizontal_flip": 0.0,
    "rotation": 0.0,
    "translate": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "erasing": 0.0,
    "erasing_scale": [0.02, 0.33],
    "mixup": 0.0,
    "cutmix": 0.0,
}
_RANDOM = (
    *("random_resized_crop", "horizontal_flip", "rotation", "translate"),
    *("brightness", "contrast", "saturation", "hue", "erasing"),
)
PRESETS: dict[Preset, AugmentOptions] = {
    "none": _NO_AUGMENTATION,
    "light": {
        **_NO_AUGMENTATION,
        "preset": "light",
        "random_resized_crop": [0.8, 1.0],
        "horizontal_flip": 0.5,
    },
    "reference": {
        **_NO_AUGMENTATION,
        "preset": "reference",
        "random_resized_crop": [0.8, 1.0],
        "horizontal_flip": 0.5,
        "rotation": 15.0,
        "translate": 0.1,
        "brightness": 0.3,
        "contrast": 0.3,
        "saturation": 0.3,
        "hue": 0.1,
        "erasing": 0.1,
    },
}


def complete_image(options: ImageOptions | None) -> ImageOptions:
    """Fills in the defaults and checks the ranges.

    Raises:
        UserError: for an unknown key or a value out of range.
    """
    filled = cast("ImageOptions", _filled("image", IMAGE_DEFAULTS, options))
    # PyTorch cannot scale a color image to a single pixel.
    _require(filled["size"] >= 2, "image.size", filled["size"], "at least 2")
    _require(0 < filled["crop_fraction"] <= 1, "image.crop_fraction", filled["crop_fraction"], "above 0 and at most 1")
    _require_choice("image.interpolation", filled["interpolation"], get_args(Interpolation))
    _require_choice("image.resize", filled["resize"], get_args(Resize))
    _require_choice("image.crop_rounding", filled["crop_rounding"], get_args(CropRounding))
    _require_value_range(filled["value_range"])
    return filled


def complete_loader(options: LoaderOptions | None) -> LoaderOptions:
    """Fills in the defaults and checks the ranges.

    Raises:
        UserError: for an unknown key or a value out of range.
    """
    filled = cast("LoaderOptions", _filled("loader", LOADER_DEFAULTS, options))
    _require(filled["batch_size"] >= 1, "loader.batch_size", filled["batch_size"], "at least 1")
    _require(filled["num_workers"] >= 0, "loader.num_workers", filled["num_workers"], "0 or more")
    contrastive = filled["contrastive_batch_size"]
    _require(
        contrastive == 0 or contrastive >= filled["batch_size"],
        "loader.contrastive_batch_size",
        contrastive,
        f"0 or at least loader.batch_size, {filled['batch_size']}",
    )
    _require_choice("loader.sampling", filled["sampling"], ("shuffle", "balanced", "distinct"))
    _require_choice("loader.cache", filled["cache"], ("auto", "always", "never"))
    _require(filled["cache_limit_gb"] > 0, "loader.cache_limit_gb", filled["cache_limit_gb"], "above 0")
    _require(bool(filled["predict"]), "loader.predict", filled["predict"], "at least one of train, val, test")
    for split in filled["predict"]:
        _require_choice("loader.predict", split, ("train", "val", "test"))
    return filled


def complete_checks(options: CheckOptions | None, missing: Sequence[str] = ()) -> CheckOptions:
    """Fills in the defaults and checks the values.

    Args:
        options: what the user gave.
        missing: default of ``missing`` for this kind of data.

    Raises:
        UserError: for an unknown key or value.
    """
    filled = cast("CheckOptions", _filled("checks", {**CHECK_DEFAULTS, "missing": list(missing)}, options))
    _require_choice("checks.on_bad_image", filled["on_bad_image"], ("error", "skip"))
    for kind in filled["allow_leaks"]:
        _require_choice("checks.allow_leaks", kind, ("groups", "exact", "near"))
    return filled


def complete_augment(options: AugmentOptions | None, *, hue_safe: bool) -> AugmentOptions:
    """Fills in the values of the preset and checks the ranges.

    Args:
        options: what the user gave.
        hue_safe: whether a colour is to be learned, so that the preset's hue jitter would falsify the target.

    Raises:
        UserError: for an unknown key or a value out of range.
    """
    given = options or {}
    preset = given.get("preset", "none")
    _require_choice("augment.preset", preset, tuple(PRESETS))
    filled = cast("AugmentOptions", _filled("augment", PRESETS[preset], given))
    if hue_safe and "hue" not in given:
        filled["hue"] = 0.0
    limits = {
        "horizontal_flip": (filled["horizontal_flip"], 1.0),
        "rotation": (filled["rotation"], 180.0),
        "translate": (filled["translate"], 1.0),
        "brightness": (filled["brightness"], math.inf),
        "contrast": (filled["contrast"], math.inf),
        "saturation": (filled["saturation"], math.inf),
        "hue": (filled["hue"], 0.5),
        "erasing": (filled["erasing"], 1.0),
        "mixup": (filled["mixup"], math.inf),
        "cutmix": (filled["cutmix"], math.inf),
    }
    for key, (value, largest) in limits.items():
        wanted = "0 or more" if math.isinf(largest) else f"between 0 and {largest:g}"
        _require(0 <= value <= largest, f"augment.{key}", value, wanted)
    _require_range("augment.erasing_scale", filled["erasing_scale"])
    if filled["random_resized_crop"]:
        _require_range("augment.random_resized_crop", filled["random_resized_crop"])
    return filled


def is_random(options: AugmentOptions) -> bool:
    """Whether an image looks different in every epoch; mixing apart.

    Args:
        options: as ``complete_augment`` returns them.
    """
    return any(options.get(key) for key in _RANDOM)


def _filled(key: str, defaults: Mapping[str, object], given: Mapping[str, object] | None) -> dict[str, object]:
    unknown = sorted(set(given or {}) - set(defaults))
    if unknown:
        raise UserError(f"data {key}: unknown key {unknown[0]!r}; known keys are {', '.join(defaults)}")
    # A copy, so that nobody's list is the default of all.
    return copy.deepcopy({**defaults, **(given or {})})


def _require(holds: bool, key: str, value: object, wanted: str) -> None:
    if not holds:
        raise UserError(f"data {key}: is {value!r}, must be {wanted}")


def _require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, key, value, f"one of {', '.join(choices)}")


def _require_value_range(value: object) -> None:
    holds = value in ("dtype", "auto")
    if isinstance(value, list | tuple) and len(value) == 2:
        numbers = [x for x in value if isinstance(x, int | float) and math.isfinite(x)]
        holds = len(numbers) == 2 and numbers[0] < numbers[1]
    _require(holds, "image.value_range", value, "auto, dtype, or [lo, hi] with lo below hi")


def _require_range(key: str, value: list[float]) -> None:
    _require(
        len(value) == 2 and 0 < value[0] <= value[1] <= 1, key, value, "[smallest, largest], above 0 and at most 1"
    )
