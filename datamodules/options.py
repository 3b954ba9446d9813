"""The option groups that every DataModule takes: documentation, defaults and ranges in one place.

The command line checks a YAML and flags against the types and shows them in ``--help``; ``Options`` checks what Python
callers give. Hyper-parameters in checkpoints are plain dictionaries (they must load with ``weights_only=True``).
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, Union, cast, get_args, get_origin, get_type_hints

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from vitrail.errors import UserError
from vitrail.types import (
    LABEL_TASK,
    MODEL_IMAGE_DEFAULTS,
    CropRounding,
    InputOptions,
    Interpolation,
    Resampler,
    Resize,
)

if not TYPE_CHECKING:  # jsonargparse would evaluate a block `if TYPE_CHECKING`
    # PyTorch cannot scale a color image to a single pixel.
    Side = restricted_number_type(None, int, (">=", 2))
    Folds = restricted_number_type(None, int, (">=", 3))
    Fraction = restricted_number_type(None, float, [(">", 0), ("<=", 1)])
    Share = restricted_number_type(None, float, [(">=", 0), ("<", 1)])
    Degrees = restricted_number_type(None, float, [(">=", 0), ("<=", 180)])
    Turns = restricted_number_type(None, float, [(">=", 0), ("<=", 0.5)])
    Magnitude = restricted_number_type(None, int, [(">=", 0), ("<=", 30)])
else:
    Side = int
    Folds = int
    Fraction = float
    Share = float
    Degrees = float
    Turns = float
    Magnitude = int

Sampling = Literal["shuffle", "balanced", "distinct"]
OnBadImage = Literal["error", "skip"]
LeakKind = Literal["groups", "exact", "near"]
Verify = Literal["full", "headers", "never"]
CacheMode = Literal["auto", "always", "never"]
SplitName = Literal["train", "val", "test"]
Preset = Literal["none", "light", "reference"]
Policy = Literal["none", "randaugment", "trivialaugment", "autoaugment", "augmix", "three_augment"]
CropInterpolation = Literal["image", "bilinear", "bicubic", "random"]


@dataclass(frozen=True)
class Options:
    """A group of options; values that do not fit their types are refused with the key and what is allowed."""

    argument: ClassVar[str] = ""
    """Argument of the DataModule, for messages."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            value = _checked(f"data {self.argument}.{option.name}", hints[option.name], getattr(self, option.name))
            object.__setattr__(self, option.name, value)

    @classmethod
    def of(cls, given: Self | Mapping[str, Any] | None) -> Self:
        """Return the options that a dictionary holds, such as the hyper-parameters of a checkpoint.

        Raises:
            UserError: for an unknown key or a value out of range.
        """
        if isinstance(given, cls):
            return given
        known = [option.name for option in fields(cls)]
        values = cast("Mapping[str, Any]", given or {})
        if unknown := sorted(set(values) - set(known)):
            raise UserError(f"data {cls.argument}: unknown key {unknown[0]!r}; known keys are {', '.join(known)}")
        return cls(**values)


@dataclass(frozen=True)
class ImageOptions(Options):
    """How images are brought to the size that the network takes.

    All but the size may be left open (null): then it is as the model's weights or checkpoint want it, or, where they
    want nothing, as stated in brackets.

    Attributes:
        size: side of the square image in pixels, at least 2.
        resize: ``crop`` scales the short side to ``size / crop_fraction`` and crops the center, ``squash`` scales both
            sides to it, whatever the aspect ratio, ``pad`` the long side, with gray borders [crop].
        crop_fraction: share of the scaled image that the evaluation's center crop keeps, above 0, at most 1 [1].
        interpolation: filter of every resize, always with antialiasing [bicubic].
        crop_rounding: how half of an odd margin is rounded: ``even`` to the even neighbor, as torchvision and timm do,
            or ``down``, as transformers does [even].
        resampler: what resizes in evaluation: ``torch``, as transformers, or ``pillow``, as open_clip, which is
            slower; their results differ by one level of 255 in a few pixels [torch].
        value_range: which values of images with more than 8 bits a channel become black and white; images of 8 bits
            are left as they are. ``[lo, hi]``, where values outside are clipped; ``dtype`` for all of 16 bits; ``auto``
            for the smallest of 8, 10, 12, 14 and 16 bits (of floating point also 0 to 1) that fits all images of the
            data set, which the run records and every command that uses its model takes from there. Streams are not
            read beforehand: there such images are refused with auto.
        max_pixels: larger images, width times height, are refused before they are decoded, because a small file can
            hold one that fills the memory; raise it for scans and satellite images.
    """

    argument: ClassVar[str] = "image"

    size: Side = 224
    resize: Resize | None = None
    crop_fraction: Fraction | None = None
    interpolation: Interpolation | None = None
    crop_rounding: CropRounding | None = None
    resampler: Resampler | None = None
    value_range: Literal["dtype", "auto"] | list[float] = "auto"
    max_pixels: PositiveInt = 89_478_485

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.value_range, list):
            finite = [value for value in self.value_range if math.isfinite(value)]
            if len(finite) != 2 or len(self.value_range) != 2 or finite[0] >= finite[1]:
                raise UserError(
                    f"data image.value_range: must be auto, dtype, or [lo, hi] with lo below hi; got {self.value_range}"
                )

    @property
    def given(self) -> frozenset[str]:
        """Which of the options that a model may have a say in are not left open."""
        return frozenset(key for key in MODEL_IMAGE_DEFAULTS if getattr(self, key) is not None)

    def resolved(self) -> InputOptions:
        """Return all values, defaults where they are left open."""
        defaults: Mapping[str, Any] = MODEL_IMAGE_DEFAULTS
        # The limit is of reading; what a model takes does not depend on it.
        values = {option.name: getattr(self, option.name) for option in fields(self) if option.name != "max_pixels"}
        return cast(
            "InputOptions", {key: defaults.get(key) if value is None else value for key, value in values.items()}
        )


@dataclass(frozen=True)
class LoaderOptions(Options):
    """How samples become batches.

    Attributes:
        batch_size: samples of a batch on each process, at least 1.
        contrastive_batch_size: samples of a training batch on each process, at least ``batch_size``, which then is the
            number that a dual encoder encodes at a time; 0 for ``batch_size``.
        num_workers: processes that read and augment, 0 for none; results do not depend on it. ``auto`` takes one less
            than the cores at hand for each training process, at most 16, and 0 where images come from the cache and are
            at most cropped and mirrored, unless a GPU waits for them. A line at the start reports the number.
        sampling: ``shuffle`` samples each training image once an epoch, ``balanced`` samples with replacement by the
            inverse frequency of the class; ``distinct`` leaves samples out of an epoch so that no batch, over all
            processes, has two that are positives of each other.
        balance_on: task whose classes ``balanced`` makes equally frequent.
        drop_last: leave out the last training batch where it is not full. One of a single image is always left out,
            because BatchNorm cannot normalise it.
        cache: whether images are decoded once and kept on disk under ``$VITRAIL_CACHE``, scaled to what the network
            needs: ``auto`` where there is room for them, ``always`` or ``never``. Evaluation gets the same pixels with
            and without; random crops of images that are larger come out of the smaller ones. Where ``auto`` finds too
            little room, training images that are cropped at random are kept as JPEG files of quality 95, which a note
            reports and the checkpoint records, and of all others as many as fit.
        cache_limit_gb: gigabytes that all cached images together may take, above 0. The data sets that were not used
            for longest make room.
        predict: splits that ``predict`` goes through, in the table's order.
    """

    argument: ClassVar[str] = "loader"

    batch_size: PositiveInt = 32
    contrastive_batch_size: NonNegativeInt = 0
    num_workers: NonNegativeInt | Literal["auto"] = "auto"
    sampling: Sampling = "shuffle"
    balance_on: str = LABEL_TASK
    drop_last: bool = False
    cache: CacheMode = "auto"
    cache_limit_gb: PositiveFloat = 20.0
    predict: list[SplitName] = field(default_factory=lambda: ["test"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.contrastive_batch_size < self.batch_size:
            raise UserError(
                "data loader.contrastive_batch_size: must be 0 or at least loader.batch_size, "
                f"{self.batch_size}; got {self.contrastive_batch_size}"
            )
        if not self.predict:
            raise UserError("data loader.predict: must be at least one of train, val, test; got []")

    @property
    def training_batch_size(self) -> int:
        """Samples of a training batch on each process."""
        return int(self.contrastive_batch_size or self.batch_size)


@dataclass(frozen=True)
class CheckOptions(Options):
    """What happens when the data have faults, before any training.

    Attributes:
        on_bad_image: ``error`` lists the unreadable images and stops; ``skip`` leaves them out and notes them in the
            run record.
        allow_leaks: kinds of leaks between splits that are tolerated: ``groups`` (a group in several splits),
            ``exact`` (the same pixels), ``near`` (nearly the same image).
        missing: texts that mean that a label, attribute, group or caption is unknown, in any case, in addition to the
            empty cell and null (NaN in Parquet); ``none``, ``NA`` and the like are values unless named here. By default
            none, in Products ``unknown`` and ``nan``, in Fashion ``NA``.
        verify: how far images are read before the first training on them. ``full`` decodes each once, which finds the
            unreadable ones and duplicates; ``headers`` opens each file and compares the files' bytes, so that a
            damaged image ends the run when it is first needed, and only identical files are found to be duplicates;
            ``never`` opens none. The run records it.
    """

    argument: ClassVar[str] = "checks"

    on_bad_image: OnBadImage = "error"
    allow_leaks: list[LeakKind] = field(default_factory=list)
    missing: list[str] | None = None
    verify: Verify = "full"


@dataclass(frozen=True)
class AugmentOptions(Options):
    """Augmentation of training images: a preset gives all values, every further key overrides one.

    Attributes:
        preset: ``none``, ``light`` (crop and flip) or ``reference`` (crop, flip, rotation, translation, color jitter,
            erasing).
        random_resized_crop: smallest and largest share of the area that a random crop keeps, above 0, at most 1; empty
            for the evaluation's center crop.
        horizontal_flip: probability of mirroring.
        rotation: largest rotation to either side in degrees, 0 to 180.
        translate: largest shift along each axis as a share of the side, 0 to 1.
        brightness: largest relative change of brightness, 0 or more.
        contrast: largest relative change of contrast, 0 or more.
        saturation: largest relative change of saturation, 0 or more.
        hue: largest shift of the hue in turns, 0 to 0.5. A preset's hue becomes 0 where a color is the target; a value
            given here is kept.
        erasing: probability of erasing a rectangle.
        erasing_scale: smallest and largest share of the area that is erased, above 0, at most 1.
        mixup: alpha of the Beta distribution of mixup's share, 0 for off.
        cutmix: alpha of the Beta distribution of CutMix's share, 0 for off.
        crop_interpolation: filter of the random crop: that of ``image``, ``bilinear``, ``bicubic``, or one of these two
            at ``random``.
        random_crop: pixels of reflected border around the whole image, scaled to the network's size, out of which a
            square is cropped instead of ``random_resized_crop`` (DeiT III); 0 for off.
        policy: ``randaugment`` (Cubuk et al., 2020), ``trivialaugment`` (TrivialAugmentWide; Müller and Hutter, 2021),
            ``autoaugment`` (that of ImageNet; Cubuk et al., 2019), ``augmix`` (Hendrycks et al., 2020), or
            ``three_augment``: grayscale, solarization or blur (Touvron et al., DeiT III, 2022).
        policy_magnitude: strength of ``randaugment``, 0 to 30; three times that of timm's names (``rand-m7``).
        policy_operations: operations of ``randaugment`` on an image.
        grayscale: probability of removing colors.
        blur: probability of a Gaussian blur with a standard deviation of 0.1 to 2 pixels.
        repeats: views of an image in a batch (repeated augmentation; Hoffer et al., 2020). An epoch keeps its length,
            so it has that much fewer images.
        sizes: sides of the training images by epoch, ``[[first epoch, side], …]``, in place of ``image.size`` (Tan and
            Le, EfficientNetV2, 2021); evaluation keeps ``image.size``.
        mix_probability: probability that a batch is mixed.
        mix_switch: where both are on, the probability of CutMix instead of mixup.
        mix_end_epoch: first epoch without mixing; 0 for none.
        mix_on_device: whether images are mixed on the model's device instead of in the loader; results are the same.
    """

    argument: ClassVar[str] = "augment"

    preset: Preset = "none"
    random_resized_crop: list[float] | None = None
    horizontal_flip: ClosedUnitInterval | None = None
    rotation: Degrees | None = None
    translate: ClosedUnitInterval | None = None
    brightness: NonNegativeFloat | None = None
    contrast: NonNegativeFloat | None = None
    saturation: NonNegativeFloat | None = None
    hue: Turns | None = None
    erasing: ClosedUnitInterval | None = None
    erasing_scale: list[float] | None = None
    mixup: NonNegativeFloat | None = None
    cutmix: NonNegativeFloat | None = None
    crop_interpolation: CropInterpolation = "image"
    random_crop: NonNegativeInt = 0
    policy: Policy = "none"
    policy_magnitude: Magnitude = 9
    policy_operations: PositiveInt = 2
    grayscale: ClosedUnitInterval = 0.0
    blur: ClosedUnitInterval = 0.0
    repeats: PositiveInt = 1
    sizes: list[list[NonNegativeInt]] = field(default_factory=list)
    mix_probability: ClosedUnitInterval = 1.0
    mix_switch: ClosedUnitInterval = 0.5
    mix_end_epoch: NonNegativeInt = 0
    mix_on_device: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value in (("random_resized_crop", self.random_resized_crop), ("erasing_scale", self.erasing_scale)):
            may_be_empty = value is None or (key == "random_resized_crop" and not value)
            if not may_be_empty and not (value and len(value) == 2 and 0 < value[0] <= value[1] <= 1):
                raise UserError(f"data augment.{key}: must be [smallest, largest], above 0 and at most 1; got {value}")
        if self.random_crop and self.random_resized_crop:
            raise UserError("data augment.random_crop: does not go with random_resized_crop; leave one of them out")
        firsts = [entry[0] for entry in self.sizes if len(entry) == 2 and entry[1] > 1]
        if len(firsts) < len(self.sizes) or firsts != sorted(set(firsts)):
            raise UserError(
                f"data augment.sizes: must be [[first epoch, side], …] in order of epochs; got {self.sizes}"
            )

    def filled(self, *, hue_safe: bool = False) -> AugmentOptions:
        """Return the options with the preset's values where they are left open.

        Args:
            hue_safe: whether a color is the target, so that the preset's hue jitter would falsify it.
        """
        values = PRESETS[self.preset] | ({"hue": 0.0} if hue_safe else {})
        if self.random_crop:
            values = {**values, "random_resized_crop": []}
        return replace(self, **{key: value for key, value in values.items() if getattr(self, key) is None})

    @property
    def is_random(self) -> bool:
        """Whether an image looks different in every epoch; mixing apart. Only of filled options."""
        keys = [key for key in PRESETS["reference"] if key not in ("erasing_scale", "mixup", "cutmix")]
        return self.policy != "none" or any(getattr(self, key) for key in (*keys, *_RANDOM_WITHOUT_PRESET))


_RANDOM_WITHOUT_PRESET = ("random_crop", "grayscale", "blur", "sizes")

_OFF: dict[str, Any] = {
    **{option.name: 0.0 for option in fields(AugmentOptions) if option.default is None},
    "random_resized_crop": [],
    "erasing_scale": [0.02, 0.33],
}
_LIGHT: dict[str, Any] = {**_OFF, "random_resized_crop": [0.8, 1.0], "horizontal_flip": 0.5}
PRESETS: dict[Preset, dict[str, Any]] = {
    "none": _OFF,
    "light": _LIGHT,
    "reference": {
        **_LIGHT,
        "rotation": 15.0,
        "translate": 0.1,
        "brightness": 0.3,
        "contrast": 0.3,
        "saturation": 0.3,
        "hue": 0.1,
        "erasing": 0.1,
    },
}


def plain(value: Any) -> Any:
    """Return options as dictionaries of plain values, which checkpoints may contain."""
    if is_dataclass(value) and not isinstance(value, type):
        return {option.name: plain(getattr(value, option.name)) for option in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    # jsonargparse's restricted numbers are classes of their own.
    base = next((kind for kind in (int, float) if isinstance(value, kind) and not isinstance(value, bool)), None)
    return value if base is None else base(value)


def _checked(key: str, hint: Any, value: Any) -> Any:
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for choice in choices:
        with suppress(TypeError, ValueError):
            return _fitting(choice, value)
    wanted = " or ".join(_described(choice) for choice in choices if choice is not type(None))
    raise UserError(f"{key}: must be {wanted}; got {value!r}")


def _fitting(hint: Any, value: Any) -> Any:
    """The value where it fits one type, lists copied so that no one's list is the default of all.

    Raises:
        TypeError, ValueError: where it does not fit.
    """
    origin = get_origin(hint)
    if origin is Literal and value in get_args(hint):
        return value
    if origin is list and isinstance(value, list | tuple):
        return [_fitting(get_args(hint)[0], item) for item in value]
    if hasattr(hint, "_restrictions") and isinstance(value, int | float):
        return plain(hint(value))
    is_number = hint is float and isinstance(value, int) and not isinstance(value, bool)
    if is_number or (type(value) is hint) or (origin is dict and isinstance(value, dict)):
        return value
    raise TypeError(hint)


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is list:
        return f"a list, each {_described(get_args(hint)[0])}"
    if hasattr(hint, "_restrictions"):
        return str(hint._expression).replace("v", "")
    return f"of type {getattr(hint, '__name__', hint)}"
