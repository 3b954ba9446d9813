from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as F

from datamodules.loading.transforms import (
    SizedByEpoch,
    adjust_colours,
    eval_transform,
    mix_batch,
    mix_pending,
    random_crop_box,
    scale_down,
    targets_colour,
    train_transform,
    useful_short_side,
)
from datamodules.options import AugmentOptions, Preset
from vitrail.errors import UserError
from vitrail.seeding import seeded_rng
from vitrail.types import InputOptions, Interpolation

SIZES = [(3, 5), (1, 1), (31, 200), (200, 31), (64, 64), (97, 133)]


def noise(height: int = 60, width: int = 80, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def run(transform: nn.Module, image: torch.Tensor, key: int = 0) -> torch.Tensor:
    with seeded_rng("test", key):
        result = transform(image)
    assert isinstance(result, torch.Tensor)
    return result


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", ["none", "light", "reference"])
def test_every_size_comes_out_square_and_uint8(size: tuple[int, int], preset: Preset) -> None:
    options: InputOptions = {"size": 32, "crop_fraction": 0.9}
    augment = AugmentOptions(preset=preset)
    for transform in (eval_transform(options), train_transform(options, augment)):
        image = run(transform, noise(*size))
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.uint8


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_matches_pillow(interpolation: Interpolation) -> None:
    image = noise(90, 120)
    options: InputOptions = {"size": 28, "crop_fraction": 0.875, "interpolation": interpolation}
    pil_image = Image.fromarray(image.permute(1, 2, 0).numpy())
    resized = pil_image.resize((32 * 120 // 90, 32), Image.Resampling[interpolation.upper()])
    left, top = round((resized.width - 28) / 2), round((resized.height - 28) / 2)
    expected = F.pil_to_tensor(resized.crop((left, top, left + 28, top + 28)))
    assert (eval_transform(options)(image).int() - expected.int()).abs().max() <= 2


def test_memory_layout_does_not_change_the_result() -> None:
    planar = noise(90, 120)
    interleaved = planar.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for transform in (
        eval_transform({"size": 48}),
        train_transform({"size": 48}, AugmentOptions(preset="reference")),
    ):
        assert run(transform, planar).equal(run(transform, interleaved))


def test_without_augmentation_training_images_are_evaluation_images() -> None:
    options: InputOptions = {"size": 40, "crop_fraction": 0.9}
    for augment in (
        AugmentOptions(preset="none"),
        AugmentOptions(preset="light", random_resized_crop=[], horizontal_flip=0),
    ):
        state = torch.get_rng_state()
        assert train_transform(options, augment)(noise()).equal(eval_transform(options)(noise()))
        assert torch.get_rng_state().equal(state), "and nothing is drawn"


@pytest.mark.parametrize(
    "option", ["horizontal_flip", "rotation", "translate", "brightness", "contrast", "saturation", "hue", "erasing"]
)
def test_each_augmentation_acts_alone_and_repeats_itself(option: str) -> None:
    augment = AugmentOptions(**{option: 20.0 if option == "rotation" else 0.4})  # type: ignore[arg-type]
    transform = train_transform({"size": 32}, augment)
    images = [run(transform, noise(), key) for key in range(8)]
    assert len({image.numpy().tobytes() for image in images}) > 1
    again = train_transform({"size": 32}, augment)
    assert all(run(again, noise(), key).equal(images[key]) for key in range(8))


@pytest.mark.parametrize(("rotation", "translate"), [(15.0, 0.1), (180.0, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("size", [24, 33])
def test_rotation_and_shift_are_those_of_torchvision(rotation: float, translate: float, size: int) -> None:
    ours = train_transform({"size": size}, AugmentOptions(rotation=rotation, translate=translate))
    shift = (translate, translate) if translate else None
    oracle = T.RandomAffine(rotation, shift, interpolation=InterpolationMode.BILINEAR, fill=None)
    square = eval_transform({"size": size})(noise())
    for key in range(10):
        warped = run(ours, noise(), key)
        assert (warped.int() - run(oracle, square, key).int()).abs().max() <= 1
        assert not warped.equal(square)


def test_the_reference_preset_is_its_steps_one_after_the_other() -> None:
    augment = AugmentOptions(preset="reference", erasing=0.0)
    at_once = train_transform({"size": 32}, augment)
    crop, planes, flip, shift, colours, levels = at_once.children()
    for key in range(10):
        stepwise = run(nn.Sequential(crop, planes, flip, shift, levels, colours, levels), noise(), key)
        difference = (run(at_once, noise(), key).int() - stepwise.int()).abs()
        assert float(difference.float().mean()) < 0.5, "what differs is rounding between two steps"
        assert difference.max() <= 3


def test_erasing_covers_the_share_asked_for() -> None:
    transform = train_transform({"size": 50}, AugmentOptions(erasing=1.0, erasing_scale=[0.2, 0.2]))
    original = eval_transform({"size": 50})(noise())
    for key in range(10):
        erased = run(transform, noise(), key)
        share = float((erased != original).any(0).double().mean())
        assert share == pytest.approx(0.2, abs=0.03)
        assert [int(channel[(erased != original).any(0)].unique()) for channel in erased] == [124, 116, 104]


def test_colour_is_safe_from_hue_jitter_unless_asked_for() -> None:
    assert targets_colour({"class": ["a"], "colour": ["red"]})
    assert targets_colour(["main_Color"])
    assert not targets_colour(["class", "material"])
    assert AugmentOptions(preset="reference").filled().hue == 0.1
    assert AugmentOptions(preset="reference").filled(hue_safe=True).hue == 0.0
    assert AugmentOptions(preset="reference", hue=0.05).filled(hue_safe=True).hue == 0.05


def test_a_safe_transform_keeps_every_hue() -> None:
    red = torch.zeros(3, 40, 40, dtype=torch.uint8)
    red[0] = 200
    red[1:] = 40
    augment = AugmentOptions(preset="reference", erasing=0.0, rotation=0.0, translate=0.0)
    for key in range(20):
        safe = run(train_transform({"size": 20}, augment.filled(hue_safe=True)), red, key).int()
        assert (safe[1] - safe[2]).abs().max() <= 1, "still a pure red, at whatever brightness"
    unsafe = [run(train_transform({"size": 20}, augment), red, key).int() for key in range(20)]
    assert max(int((image[1] - image[2]).abs().max()) for image in unsafe) > 20


def coloured() -> torch.Tensor:
    image = noise(120, 120, seed=3)
    image[:, :10] = image[:1, :10]  # greys have no hue
    image[:, 10] = 0
    image[0, 11], image[1, 11] = 255, 255  # ties of the largest channel
    return image


@pytest.mark.parametrize("turns", [-0.5, -0.31, -0.1, 0.0, 0.07, 0.25, 0.5])
def test_hue_shift_matches_torchvision(turns: float) -> None:
    image = coloured()
    assert (adjust_colours(image, {"hue": turns}).int() - F.adjust_hue(image, turns).int()).abs().max() <= 1


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.3, 2.5])
def test_other_colour_changes_match_torchvision(factor: float) -> None:
    image = coloured()
    for kind, oracle in (
        ("brightness", F.adjust_brightness),
        ("contrast", F.adjust_contrast),
        ("saturation", F.adjust_saturation),
    ):
        # torchvision rounds the grey value down first, which the factor magnifies.
        difference = adjust_colours(image, {kind: factor}).int() - oracle(image, factor).int()
        assert difference.abs().max() <= 1 + abs(factor - 1)


def test_colour_changes_are_made_in_the_order_given() -> None:
    image = coloured()
    dark_first = adjust_colours(image, {"brightness": 2.0, "contrast": 0.3})
    flat_first = adjust_colours(image, {"contrast": 0.3, "brightness": 2.0})
    assert not dark_first.equal(flat_first)
    expected = F.adjust_contrast(F.adjust_brightness(image, 2.0), 0.3)
    assert (dark_first.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("scale", [(0.8, 1.0), (0.08, 0.3), (1.0, 1.0)])
def test_crop_and_flip_are_those_of_torchvision(interpolation: Interpolation, scale: tuple[float, float]) -> None:
    size = 24
    ours = train_transform(
        {"size": size, "interpolation": interpolation},
        AugmentOptions(random_resized_crop=list(scale), horizontal_flip=0.5),
    )
    mode, flips = InterpolationMode(interpolation), 0
    for seed, (height, width) in enumerate([(30, 40), (24, 24), (17, 60), (9, 8), (60, 20), (200, 5), (5, 300)] * 4):
        image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).permute(2, 0, 1)
        torch.manual_seed(seed)
        box = random_crop_box(height, width, scale)
        expected = F.resized_crop(image, *box, [size, size], mode, antialias=True)
        if torch.rand(1) < 0.5:
            expected = F.horizontal_flip(expected)
            flips += 1
        torch.manual_seed(seed)
        assert torch.equal(ours(image), expected)
    assert 5 < flips < 23


@pytest.mark.parametrize(("height", "width"), [(256, 341), (300, 300), (90, 40)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.8, 1.0)])
def test_parts_are_distributed_as_those_of_torchvision(height: int, width: int, scale: tuple[float, float]) -> None:
    number = 2000
    torch.manual_seed(0)
    ours = torch.tensor([random_crop_box(height, width, scale) for _ in range(number)], dtype=torch.float64)
    crop = T.RandomResizedCrop(8, scale)
    image = torch.empty(3, height, width)
    params = [crop.make_params([image]) for _ in range(number)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in params], dtype=torch.float64)
    parts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 3] / box[:, 2],
    }
    for name, of in parts.items():
        assert stats.ks_2samp(of(ours).numpy(), of(theirs).numpy()).pvalue > 1e-3, name


@pytest.mark.parametrize(("height", "width"), [(200, 5), (5, 300)])
def test_where_no_part_fits_it_is_torchvisions_middle(height: int, width: int) -> None:
    params = T.RandomResizedCrop(8, (0.9, 1.0)).make_params([torch.empty(3, height, width)])
    assert random_crop_box(height, width, (0.9, 1.0)) == tuple(
        params[key] for key in ("top", "left", "height", "width")
    )


def test_scaling_down_is_the_evaluations() -> None:
    image = torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8).permute(2, 0, 1)
    transform = eval_transform({"size": 20, "crop_fraction": 0.8})
    assert torch.equal(transform(scale_down(image, 25, "bicubic")), transform(image))
    assert scale_down(image, 50, "bicubic") is image


@pytest.mark.parametrize("options", [{"size": 64}, {"size": 32, "crop_fraction": 0.875, "interpolation": "bilinear"}])
@pytest.mark.parametrize("size", [(2000, 3), (3, 2000), (1, 999), (999, 1), (40, 9000)])
def test_of_a_strip_only_the_center_is_scaled(
    size: tuple[int, int], options: InputOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = eval_transform(options)(image)
    monkeypatch.setattr("datamodules.loading.transforms._MOST_ENLARGED", 0)
    center = eval_transform(options)(image)
    assert center.shape == whole.shape
    # Pillow and torch round a few pixels of a resized image differently.
    assert (center.int() - whole.int()).abs().max() <= 2


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 80_000_000)])
def test_a_strip_costs_little(size: tuple[int, int]) -> None:
    image = torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, *size)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for transform in (
            eval_transform({"size": 224}),
            train_transform({"size": 224}, AugmentOptions(preset="reference")),
        ):
            assert transform(image).shape == (3, 224, 224)
    # One of them would be 3 to 60 GB in full.
    assert sum(max(0, event.cpu_memory_usage) for event in profile.events()) < 200 * 2**20


def test_images_of_usual_shapes_take_the_usual_way() -> None:
    transform = eval_transform({"size": 224})
    transform._only_center = None  # type: ignore[assignment]  # fails if it is called
    for size in ((100, 7000), (4000, 3000), (50, 50)):
        assert transform(torch.zeros(3, *size, dtype=torch.uint8)).shape == (3, 224, 224)


def batch(size: int = 6, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)


def test_mixup_is_the_weighted_mean() -> None:
    images = batch()
    images[0], images[1] = 255, 0
    before = images.clone()
    for key in range(40):
        mixed, mix = mix_batch(images, (key,), mixup=0.5, cutmix=0.0)
        assert mix is not None
        assert (mixed.dtype, mix["lam"].dtype, mix["partner"].dtype) == (torch.uint8, torch.float32, torch.int64)
        lam = mix["lam"].view(-1, 1, 1, 1)
        expected = lam * images.float() + (1 - lam) * images[mix["partner"]].float()
        assert (mixed.float() - expected).abs().max() <= 0.5
        assert sorted(mix["partner"].tolist()) == list(range(6))
    mix_batch(images, (3,), mixup=0.0, cutmix=1.0)
    assert images.equal(before), "the batch itself does not change"


def test_cutmix_pastes_a_box_and_returns_the_share_that_is_left() -> None:
    side = 24
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, side, side).contiguous()
    shares = []
    for key in range(60):
        mixed, mix = mix_batch(images, (key,), mixup=0.0, cutmix=1.0)
        assert mix is not None
        for row in range(8):
            own = mixed[row, 0] == row
            if mix["partner"][row] != row:
                assert float(own.double().mean()) == pytest.approx(float(mix["lam"][row]), abs=1e-6)
                assert (mixed[row, 0][~own] == mix["partner"][row]).all()
                rows, columns = torch.where(~own)
                if len(rows):
                    area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
                    assert int(area) == len(rows), "what was pasted is one box"
            assert (mixed[row] == mixed[row, :1]).all(), "all channels alike"
        shares.append(float(mix["lam"][0]))
    assert len(set(shares)) > 40
    # The share is uniform for alpha 1 and can only grow where the box is clipped.
    assert 0.5 < sum(shares) / len(shares) < 0.85


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixups_share_is_beta_distributed(alpha: float) -> None:
    images = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    shares = []
    for key in range(400):
        _, mix = mix_batch(images, (key,), mixup=alpha, cutmix=0.0)
        assert mix is not None
        shares.append(float(mix["lam"][0]))
    # In steps of 1/128, so compare the distribution functions with half a step of room.
    grid = [0.1, 0.3, 0.5, 0.7, 0.9]
    for point in grid:
        below = sum(share < point for share in shares) / len(shares)
        assert below == pytest.approx(stats.beta(alpha, alpha).cdf(point), abs=0.09)


def test_both_are_used_with_equal_chance() -> None:
    images = torch.arange(4, dtype=torch.uint8).mul(60).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous()
    blended = 0
    for key in range(200):
        mixed, mix = mix_batch(images, (key,), mixup=5.0, cutmix=5.0)
        assert mix is not None
        blended += not bool(torch.isin(mixed, images).all())
    assert 70 < blended < 130


def test_mixing_is_a_function_of_its_key_alone() -> None:
    images = batch()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, _ = mix_batch(images, (0, 1, 2), mixup=0.4, cutmix=1.0)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(1)
    again, _ = mix_batch(images, (0, 1, 2), mixup=0.4, cutmix=1.0)
    assert first.equal(again)
    other, _ = mix_batch(images, (0, 2, 2), mixup=0.4, cutmix=1.0)
    assert not first.equal(other)


def test_a_single_image_and_alpha_zero_are_not_mixed() -> None:
    images = batch(1)
    assert mix_batch(images, (0,), mixup=1.0, cutmix=1.0) == (images, None)
    images = batch(4)
    assert mix_batch(images, (0,), mixup=0.0, cutmix=0.0) == (images, None)


BILINEAR, MEAN = InterpolationMode.BILINEAR, [124.0, 116.0, 104.0]
IMAGE: InputOptions = {"size": 32, "crop_fraction": 1.0, "interpolation": "bicubic"}


@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        ({"policy": "randaugment", "policy_magnitude": 21}, T.RandAugment(2, 21, interpolation=BILINEAR, fill=MEAN)),
        ({"policy": "trivialaugment"}, T.TrivialAugmentWide(interpolation=BILINEAR, fill=MEAN)),
        ({"policy": "autoaugment"}, T.AutoAugment(interpolation=BILINEAR, fill=MEAN)),
        ({"policy": "augmix"}, T.AugMix(interpolation=BILINEAR, fill=MEAN)),
        ({"grayscale": 0.5}, T.RandomGrayscale(0.5)),
        ({"blur": 0.5}, T.RandomApply([T.GaussianBlur(13, (0.1, 2.0))], 0.5)),
        (
            {"policy": "three_augment"},
            T.RandomChoice([T.Grayscale(3), T.RandomSolarize(128, p=1.0), T.GaussianBlur(13, (0.1, 2.0))]),
        ),
    ],
)
def test_policies_are_those_of_torchvision_on_the_cropped_image(options: dict[str, Any], oracle: Any) -> None:
    augment = AugmentOptions(**options)
    assert augment.filled().is_random
    transform = train_transform(IMAGE, augment)
    cropped = eval_transform(IMAGE)(noise())
    made = [run(transform, noise(), seed) for seed in range(8)]
    assert all(torch.equal(one, run(oracle, cropped, seed)) for seed, one in enumerate(made))
    assert all(one.dtype == torch.uint8 and one.shape == (3, 32, 32) for one in made)
    assert any(not torch.equal(one, made[0]) for one in made)


def test_a_random_crop_comes_out_of_the_whole_scaled_image_with_reflected_borders() -> None:
    transform = train_transform(IMAGE, AugmentOptions(preset="light", random_crop=4, horizontal_flip=0.0))
    oracle = T.Compose(
        [T.Resize(32, InterpolationMode.BICUBIC, antialias=True), T.RandomCrop(32, 4, padding_mode="reflect")]
    )
    for seed in range(4):
        assert torch.equal(run(transform, noise(), seed), run(oracle, noise(), seed))
    with pytest.raises(UserError, match="random_crop: does not go with random_resized_crop"):
        AugmentOptions(random_crop=4, random_resized_crop=[0.5, 1.0])


def test_the_filter_of_a_random_crop_may_be_random() -> None:
    def crops(filter_: Any) -> list[torch.Tensor]:
        transform = train_transform(
            IMAGE, AugmentOptions(preset="light", horizontal_flip=0.0, crop_interpolation=filter_)
        )
        return [run(transform, noise(), seed) for seed in range(12)]

    linear, cubic, mixed = crops("bilinear"), crops("bicubic"), crops("random")
    assert all(torch.equal(one, two) for one, two in zip(cubic, crops("image"), strict=True))
    chosen = {(torch.equal(m, a), torch.equal(m, b)) for m, a, b in zip(mixed, linear, cubic, strict=True)}
    assert chosen == {(True, False), (False, True)}


def test_images_grow_with_the_epoch() -> None:
    transform = train_transform(IMAGE, AugmentOptions(sizes=[[1, 8], [3, 16]]))
    assert isinstance(transform, SizedByEpoch)
    sides = [tuple(transform.at(epoch)(noise()).shape[1:]) for epoch in range(5)]
    assert sides == [(32, 32), (8, 8), (8, 8), (16, 16), (16, 16)]
    assert useful_short_side(IMAGE, AugmentOptions(sizes=[[0, 48]])) == 48
    for wrong in ([[0]], [[3, 8], [1, 16]], [[0, 1]]):
        with pytest.raises(UserError, match=r"sizes: must be \[\[first epoch, side\], …\]"):
            AugmentOptions(sizes=wrong)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixing_on_the_device_is_bit_identical(mixup: float, cutmix: float) -> None:
    images = torch.stack([noise(16, 24, seed) for seed in range(5)])
    for key in range(6):
        mixed, mix = mix_batch(images, (key,), mixup=mixup, cutmix=cutmix)
        same, plan = mix_batch(images, (key,), mixup=mixup, cutmix=cutmix, later=True)
        assert mix is not None
        assert plan is not None
        assert torch.equal(same, images)
        assert torch.equal(mix_pending(images, plan), mixed)
        assert plan.keys() == mix.keys()
        assert torch.equal(plan["partner"], mix["partner"])
        assert torch.equal(plan["lam"], mix["lam"])


def test_a_batch_is_mixed_with_a_probability_and_either_way_with_another() -> None:
    images = torch.stack([noise(8, 8, seed) for seed in range(4)])
    mixes = [mix_batch(images, (key,), mixup=1.0, cutmix=0.0, probability=0.3)[1] for key in range(300)]
    assert 0.2 < sum(mix is not None for mix in mixes) / 300 < 0.4
    for switch in (0.0, 1.0):
        plans = [mix_batch(images, (key,), mixup=1.0, cutmix=1.0, switch=switch, later=True)[1] for key in range(20)]
        assert all(plan is not None and (int(plan["pending"][0]) == 0) is bool(switch) for plan in plans)
