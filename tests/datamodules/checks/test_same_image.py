from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from datamodules.checks.near_duplicates import MIN_RESEMBLANCE, Thumbnail, resemblance, same_image
from datamodules.wares import ware_spec
from datamodules.wares.render import draw_ware

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def image() -> Pixels:
    return draw_ware(ware_spec(2, 1), 3, 128)


def same(one: Pixels, other: Pixels) -> bool:
    answers = {same_image(Thumbnail(a), Thumbnail(b)) for a, b in ((one, other), (other, one))}
    assert len(answers) == 1, "the order does not matter"
    return answers.pop()


def toned(image: Pixels, gain: float, offset: float = 0.0) -> Pixels:
    return (image * gain + offset).clip(0, 255).astype(np.uint8)


def test_a_image_is_itself(image: Pixels) -> None:
    assert same(image, image)


@pytest.mark.parametrize(
    "cut", [(0, 0, 0, 0.08), (0.08, 0, 0, 0), (0.04, 0.04, 0.04, 0.04), (0.06, 0, 0, 0.06), (0.01, 0.05, 0.03, 0.0)]
)
def test_a_small_crop_is_the_same_image_and_half_of_it_is_not(
    image: Pixels, cut: tuple[float, float, float, float]
) -> None:
    left, top, right, bottom = (round(share * 128) for share in cut)
    assert same(image, image[top : 128 - bottom, left : 128 - right])
    assert not same(image, image[:, 64:])


def test_a_change_of_tone_may_be_slight_only(image: Pixels) -> None:
    assert same(image, toned(image, 0.9))
    assert same(image, toned(image, 1.0, 12))
    assert not same(image, toned(image, 0.5))
    assert not same(image, toned(image, -1.0, 255)), "a negative"


def test_one_changed_place_is_enough_to_differ(image: Pixels) -> None:
    marked = image.copy()
    marked[48:80, 48:80] = (250, 20, 250)
    assert not same(image, marked)


def test_another_colour_is_another_product(image: Pixels) -> None:
    assert not same(image, np.ascontiguousarray(image[..., [1, 2, 0]]))


def test_the_same_tones_with_another_texture_differ() -> None:
    base = np.asarray(Image.fromarray(draw_ware(ware_spec(2, 1), 3, 32)).resize((128, 128), Image.Resampling.BICUBIC))
    y, x = np.mgrid[0:128, 0:128]
    stripes = 18 * np.where(x // 6 % 2 == 0, 1, -1)[..., None]
    checks = 18 * np.where((x // 6 + y // 6) % 2 == 0, 1, -1)[..., None]
    one, other = ((base.astype(int) + pattern).clip(0, 255).astype(np.uint8) for pattern in (stripes, checks))
    assert same(one, one)
    assert not same(one, other)


def test_empty_images_are_like_nothing() -> None:
    white, grey = (np.full((40, 40, 3), level, dtype=np.uint8) for level in (250, 245))
    assert not same(white, white)
    assert not same(white, grey)


def test_resemblance_is_a_correlation(image: Pixels) -> None:
    other = draw_ware(ware_spec(2, 5), 8, 128)
    one, toned_one, two = (Thumbnail(pixels) for pixels in (image, toned(image, 0.8, 10), other))
    values = resemblance([(one, one), (one, toned_one), (one, two)])
    assert values[0] == pytest.approx(1)
    assert values[1] > 0.999
    assert values[2] < MIN_RESEMBLANCE
