from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageEnhance

from datamodules.checks import near_duplicates as duplicates
from datamodules.checks.near_duplicates import (
    MIN_RESEMBLANCE,
    Thumbnail,
    exact_pairs,
    near_pairs,
    resemblance,
    same_image,
)
from datamodules.checks.verify import HASH_BOXES, hash_boxes
from datamodules.wares import ware_spec
from datamodules.wares.render import draw_ware

Pixels = npt.NDArray[np.uint8]

PHOTOS = Path(os.environ.get("VITRAIL_DATA", "")) / "products" / "images"


def found_pairs(images: list[Pixels], parts: list[int]) -> set[tuple[int, int]]:
    hashes = np.array([hash_boxes(Image.fromarray(image)) for image in images], dtype=np.uint64)
    readable = np.ones(len(images), dtype=bool)
    pairs, _ = near_pairs(hashes, np.array(parts, dtype=np.int8), readable, lambda row: images[row])
    assert pairs.tolist() == sorted(pairs.tolist())
    return {(first, second) for first, second in pairs.tolist()}


def encoded(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )


def several_at_once(image: Image.Image) -> Image.Image:
    smaller = cropped(image, 0.03, 0.0, 0.02, 0.04).resize((72, 80), Image.Resampling.BICUBIC)
    return encoded(ImageEnhance.Brightness(smaller).enhance(0.93), 75)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG quality 40": lambda image: encoded(image, 40),
    "scaled to 60 %": lambda image: image.resize((58, 58), Image.Resampling.BICUBIC),
    "scaled to 170 %": lambda image: image.resize((163, 163), Image.Resampling.BICUBIC),
    "another shape": lambda image: image.resize((90, 110), Image.Resampling.BILINEAR),
    "10 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "10 % darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.15),
    "3 % cut off all around": lambda image: cropped(image, 0.03, 0.03, 0.03, 0.03),
    "5 % cut off left and top": lambda image: cropped(image, 0.05, 0.05, 0.0, 0.0),
    "several at once": several_at_once,
}


@pytest.fixture(scope="module")
def originals() -> list[Pixels]:
    """Thirty different objects."""
    return [draw_ware(ware_spec(5, number), number, 96) for number in range(30)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_nothing_else(change: str, originals: list[Pixels]) -> None:
    copies = [np.asarray(CHANGES[change](Image.fromarray(image))) for image in originals]
    pairs = found_pairs([*originals, *copies], [0] * 30 + [1] * 30)
    wanted = {(number, number + 30) for number in range(30)}
    assert pairs <= wanted
    assert len(pairs) >= 28


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the product photos in $VITRAIL_DATA/products")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_of_a_real_photo_is_found(change: str) -> None:
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))[::15]]
    copies = [CHANGES[change](photo) for photo in photos]
    count = len(photos)
    pairs = found_pairs([np.asarray(image) for image in [*photos, *copies]], [0] * count + [1] * count)
    wanted = {(number, number + count) for number in range(count)}
    assert pairs <= wanted
    assert len(pairs) >= 0.9 * count


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the product photos in $VITRAIL_DATA/products")
def test_no_two_of_the_real_product_photos_are_near_duplicates() -> None:
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(PHOTOS.glob("*.jpg"))]
    # Every photo in a part of its own, so that views of one object are compared as well.
    hashes = np.array([hash_boxes(Image.fromarray(photo)) for photo in photos], dtype=np.uint64)
    parts: Any = np.arange(len(photos))
    pairs, radius = near_pairs(hashes, parts, np.ones(len(photos), dtype=bool), lambda row: photos[row])
    assert pairs.tolist() == []
    assert radius == 8


def test_other_views_and_look_alikes_are_no_duplicates(originals: list[Pixels]) -> None:
    views = [draw_ware(ware_spec(5, number), 1000 + number, 96) for number in range(30)]
    recoloured = [np.ascontiguousarray(image[..., ::-1]) for image in originals]
    mirrored = [np.ascontiguousarray(image[:, ::-1]) for image in originals]
    for others in (views, recoloured, mirrored):
        assert found_pairs([*originals, *others], [0] * 30 + [1] * 30) == set()


def test_pairs_within_a_part_and_unreadable_images_are_left_out(originals: list[Pixels]) -> None:
    images = [originals[0], originals[0], originals[0], originals[1]]
    assert found_pairs(images, [0, 0, 2, 1]) == {(0, 2), (1, 2)}
    hashes = np.array([hash_boxes(Image.fromarray(image)) for image in images], dtype=np.uint64)
    readable = np.array([True, True, False, True])
    parts = np.array([0, 0, 2, 1], dtype=np.int8)
    assert len(near_pairs(hashes, parts, readable, lambda row: images[row])[0]) == 0
    nothing = np.zeros(4, dtype=bool)
    assert near_pairs(hashes, parts, nothing, lambda row: images[row])[0].shape == (0, 2)


@pytest.mark.parametrize("radius", duplicates.RADII)
def test_candidates_are_all_pairs_within_the_radius(radius: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(radius)
    base = rng.integers(0, 2**64, (40, 1), dtype=np.uint64)
    # Each hash is one of forty with up to twelve bits turned over.
    flips = np.zeros((300, len(HASH_BOXES)), dtype=np.uint64)
    for _ in range(12):
        flips |= np.uint64(1) << rng.integers(0, 64, flips.shape, dtype=np.uint64)
    hashes = base[rng.integers(0, 40, 300)] ^ (flips * (rng.random(flips.shape) < 0.7).astype(np.uint64))
    hashes ^= np.uint64(1) << rng.integers(0, 64, flips.shape, dtype=np.uint64)
    parts = rng.integers(0, 3, 300).astype(np.int8)
    readable = rng.random(300) < 0.9
    distances = np.bitwise_count(hashes[:, None, :] ^ hashes[None, :, :1]).min(axis=2)
    expected = {
        (i, j)
        for i in range(300)
        for j in range(i + 1, 300)
        if min(distances[i, j], distances[j, i]) <= radius and parts[i] != parts[j] and readable[i] and readable[j]
    }
    monkeypatch.setattr(duplicates, "_CHUNK", 500)
    monkeypatch.setattr(duplicates, "RADII", (radius,))
    looked_at: set[tuple[int, int]] = set()
    monkeypatch.setattr(duplicates, "Thumbnail", lambda row: row)
    monkeypatch.setattr(duplicates, "resemblance", lambda block: note(looked_at, block))
    near_pairs(hashes, parts, readable, lambda row: row)  # type: ignore[arg-type,return-value]
    assert looked_at == expected


def note(looked_at: set[tuple[int, int]], block: list[tuple[int, int]]) -> npt.NDArray[np.float32]:
    looked_at.update(block)
    return np.zeros(len(block), dtype=np.float32)


def test_where_too_many_images_look_alike_the_radius_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.zeros((60, len(HASH_BOXES)), dtype=np.uint64)
    hashes[:] = np.arange(60, dtype=np.uint64)[:, None] << np.uint64(20)
    images = [draw_ware(ware_spec(0, number), number, 32) for number in range(60)]
    parts = (np.arange(60) % 2).astype(np.int8)
    monkeypatch.setattr(duplicates, "_AFFORDABLE", 60 * 60)
    _, radius = near_pairs(hashes, parts, np.ones(60, dtype=bool), lambda row: images[row])
    assert radius == 0


def test_exact_pairs_cross_parts() -> None:
    content = np.array([3, 1, 2, 1, 3, 3, 9, 9], dtype=np.uint8)[:, None].repeat(32, axis=1)
    parts = np.array([0, 0, 0, 0, 1, 2, 2, 2], dtype=np.int8)
    assert exact_pairs(content, parts, np.ones(8, dtype=bool)).tolist() == [[0, 4], [0, 5]]
    readable = np.array([True, True, True, True, False, True, True, True])
    assert exact_pairs(content, parts, readable).tolist() == [[0, 5]]
    assert exact_pairs(content, np.zeros(8, dtype=np.int8), np.ones(8, dtype=bool)).tolist() == []


@pytest.fixture(scope="module")
def image() -> Pixels:
    return draw_ware(ware_spec(2, 1), 3, 128)


def same(one: Pixels, other: Pixels) -> bool:
    answers = {same_image(Thumbnail(a), Thumbnail(b)) for a, b in ((one, other), (other, one))}
    assert len(answers) == 1, "the order does not matter"
    return answers.pop()


def toned(image: Pixels, gain: float, offset: float = 0.0) -> Pixels:
    return (image * gain + offset).clip(0, 255).astype(np.uint8)


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
    assert same(image, image)
    assert same(image, toned(image, 0.9))
    assert same(image, toned(image, 1.0, 12))
    assert not same(image, toned(image, 0.5))
    assert not same(image, toned(image, -1.0, 255)), "a negative"


def test_one_changed_place_and_another_colour_are_enough_to_differ(image: Pixels) -> None:
    marked = image.copy()
    marked[48:80, 48:80] = (250, 20, 250)
    assert not same(image, marked)
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
