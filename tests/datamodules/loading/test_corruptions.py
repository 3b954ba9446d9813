from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from datamodules.loading.corruptions import LEVELS, SIDE, corrupted, scaled
from evaluation.robustness import CONSISTENCY, IMAGENET_C, SEVERITIES

ALL = [(name, severity) for name, levels in LEVELS.items() for severity in range(1, len(levels) + 1)]
GREY = torch.full((3, 64, 80), 128, dtype=torch.uint8)


def photo(height: int = 64, width: int = 80) -> torch.Tensor:
    """Soft shapes, as photographs have them."""
    rng = np.random.default_rng(0)
    soft = gaussian_filter(rng.random((height, width, 3)), (6, 6, 0))
    soft = (soft - soft.min()) / np.ptp(soft)
    return torch.from_numpy((soft * 255).astype(np.uint8)).permute(2, 0, 1).contiguous()


@pytest.mark.parametrize(("name", "severity"), ALL)
def test_an_image_keeps_its_shape_and_changes_by_key_alone(name: str, severity: int) -> None:
    image = photo()

    made = corrupted(image, name, severity, (0, 5))

    assert made.dtype == torch.uint8
    assert made.shape == image.shape
    assert not torch.equal(made, image)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 -- no global generator takes part
    assert torch.equal(made, corrupted(image, name, severity, (0, 5)))


def test_samples_severities_and_seeds_have_random_numbers_of_their_own() -> None:
    made = [
        corrupted(GREY, "impulse_noise", severity, (seed, sample)) != 128
        for seed, sample, severity in itertools.product((0, 1), (5, 6), (4, 5))
    ]

    assert all(not torch.equal(one, other) for one, other in itertools.combinations(made, 2))


@pytest.mark.parametrize("name", sorted(set(IMAGENET_C) - {"elastic_transform", "frost", "snow", "zoom_blur"}))
def test_the_last_severity_is_further_from_the_image_than_the_first(name: str) -> None:
    image = photo().float()

    first, last = ((corrupted(photo(), name, severity).float() - image).abs().mean() for severity in (1, 5))

    assert last > first


def test_every_corruption_of_the_mean_error_has_its_severities() -> None:
    assert all(len(LEVELS[name]) == len(SEVERITIES) for name in IMAGENET_C)
    assert len(set(IMAGENET_C)) == 15
    assert set(CONSISTENCY) <= set(LEVELS)


def test_noise_has_the_deviation_of_its_level() -> None:
    values = {
        name: corrupted(GREY, name, 1).float() / 255 for name in ("gaussian_noise", "shot_noise", "impulse_noise")
    }

    assert float(values["gaussian_noise"].std()) == pytest.approx(LEVELS["gaussian_noise"][0], rel=0.05)
    assert float(values["shot_noise"].var()) == pytest.approx(128 / 255 / LEVELS["shot_noise"][0], rel=0.1)
    changed = values["impulse_noise"] != 128 / 255
    assert float(changed.float().mean()) == pytest.approx(LEVELS["impulse_noise"][0], rel=0.2)
    assert set(values["impulse_noise"][changed].tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "pixelate", "resolution"])
def test_blur_and_resolution_keep_the_brightness_and_take_detail(name: str) -> None:
    image = torch.randint(0, 256, (3, 128, 140), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    made = corrupted(image, name, 5)

    assert float(made.float().mean()) == pytest.approx(float(image.float().mean()), abs=6)
    assert made.float().diff(dim=2).abs().mean() < 0.8 * image.float().diff(dim=2).abs().mean()
    assert torch.equal(corrupted(GREY, name, 5), GREY)


def test_contrast_brightness_and_jpeg_are_what_they_say() -> None:
    image = photo()

    flat, bright = corrupted(image, "contrast", 1).float(), corrupted(image, "brightness", 2)
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="JPEG", quality=20)

    assert float(flat.std(dim=(1, 2))[0] / image.float().std(dim=(1, 2))[0]) == pytest.approx(0.4, abs=0.01)
    hues = [np.asarray(Image.fromarray(one.permute(1, 2, 0).numpy()).convert("HSV")) for one in (image, bright)]
    assert hues[1][..., 2] == pytest.approx(np.minimum(hues[0][..., 2] + 51.0, 255), abs=1)
    jpeg = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
    assert torch.equal(corrupted(image, "jpeg", LEVELS["jpeg"].index(20) + 1), jpeg)


def test_a_flip_mirrors_and_a_shift_moves_by_its_pixels() -> None:
    image = photo(SIDE, SIDE)

    assert torch.equal(corrupted(image, "flip", 1), image.flip(2))
    for sample in range(6):
        moved = corrupted(image, "shift", 3, (0, sample))
        steps = [
            step
            for step in itertools.product((-4, 0, 4), repeat=2)
            if torch.equal(moved.roll(step, (1, 2))[:, 8:-8, 8:-8], image[:, 8:-8, 8:-8])
        ]
        assert len(steps) == 1
        assert steps[0] != (0, 0)


def test_large_images_are_scaled_down_and_lengths_shrink_with_small_ones() -> None:
    large, small = scaled(torch.zeros(3, 600, 900, dtype=torch.uint8)), photo(24, 30)

    assert large.shape == (3, SIDE, SIDE * 3 // 2)
    assert scaled(small) is small
    point = torch.zeros(3, 257, 257, dtype=torch.uint8)
    point[:, 128, 128] = 255
    reach = [
        int((corrupted(one, "defocus_blur", 5)[0] > 0).any(dim=1).sum()) for one in (point, point[:, 97:161, 97:161])
    ]
    assert reach[0] > 3 * reach[1]
    for name, severity in ALL:
        assert corrupted(photo(1, 3), name, severity).shape == (3, 1, 3)
