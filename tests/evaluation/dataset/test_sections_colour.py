from __future__ import annotations

import colorsys

import numpy as np
import pytest
from scipy.stats import gaussian_kde

from evaluation.dataset.features import centre_colour, thumbnail
from evaluation.dataset.sections import LEVELS, centroid_section, class_densities, density, density_section, hsv_pixels
from tests.support.runs import COLOURS, looks_of, small_collection
from vitrail.errors import UserError

AT = (np.arange(LEVELS) + 0.5) / LEVELS


def test_density_is_scipys_away_from_the_ends() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.08, 4000)
    expected = gaussian_kde(values)(AT)
    np.testing.assert_allclose(density(values), expected, atol=0.02 * expected.max())


@pytest.mark.parametrize("circular", [False, True])
def test_density_stays_inside(circular: bool) -> None:
    values = np.random.default_rng(0).beta(0.5, 0.5, 3000)
    assert density(values, circular=circular).mean() == pytest.approx(1)


def test_hue_has_no_ends() -> None:
    red = np.concatenate([np.full(300, 0.99), np.full(100, 0.3)])
    circular, straight = density(red, circular=True), density(red)
    # 0.02 is as near to 0.99 as 0.96 is.
    assert circular[int(0.02 * LEVELS)] == pytest.approx(circular[int(0.96 * LEVELS)], rel=0.1)
    assert straight[int(0.02 * LEVELS)] < 0.1 * circular[int(0.02 * LEVELS)]


def test_density_of_one_value_is_a_peak_and_of_none_nothing() -> None:
    assert density(np.full(50, 0.25)).argmax() in (63, 64)
    assert density(np.zeros(0)).sum() == 0


def test_pixels_are_drawn_from_the_scaled_image() -> None:
    red = np.broadcast_to(np.array(COLOURS["red"], np.uint8), (10, 14, 3))
    rng = np.random.default_rng(0)
    assert hsv_pixels(red, rng, side=16, count=100).shape == (100, 3)
    assert hsv_pixels(red, rng, side=8, count=100).shape == (64, 3)
    expected = colorsys.rgb_to_hsv(*(channel / 255 for channel in COLOURS["red"]))
    np.testing.assert_allclose(hsv_pixels(red, rng, 8, 5), np.tile(expected, (5, 1)), atol=0.01)


def test_centre_is_the_middle_half() -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[10:30, 20:60] = COLOURS["blue"]
    expected = colorsys.rgb_to_hsv(*(channel / 255 for channel in COLOURS["blue"]))
    np.testing.assert_allclose(centre_colour(image), expected, atol=0.01)
    assert centre_colour(np.zeros((1, 1, 3), np.uint8)).tolist() == [0, 0, 0]


def test_densities_distinguish_classes_by_their_hue() -> None:
    collection = small_collection()
    section = density_section(collection, looks_of(collection), "class", ["green", "blue", "grey"], side=16, pixels=50)
    hue = section.figures["hsv_class"].axes[0]
    curves = {line.get_label(): line.get_ydata() for line in hue.lines}
    peaks = {name: AT[int(np.argmax(curve))] for name, curve in curves.items()}
    assert list(peaks) == ["green", "blue", "grey"]
    assert peaks["green"] == pytest.approx(1 / 3, abs=0.05)
    assert peaks["blue"] == pytest.approx(2 / 3, abs=0.05)
    # Grey has no hue: its number would be that of red.
    assert np.asarray(curves["grey"]).sum() == 0
    assert "scaled to 16 × 16, 50 pixels an image" in section.paragraphs[0]


def test_only_hue_goes_round() -> None:
    """Red lies at both ends of the hues; dark and pale do not."""
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    red[:4, :, 2] = 12  # a trace of blue: hues just below 1
    drawn = np.random.default_rng(0)
    hue, saturation, value = class_densities([red], drawn, side=8, count=64)
    pixels = hsv_pixels(red, np.random.default_rng(0), 8, 64)
    np.testing.assert_allclose(hue, density(pixels[:, 0], circular=True))
    np.testing.assert_allclose(saturation, density(pixels[:, 1]))
    np.testing.assert_allclose(value, density(pixels[:, 2]))
    # All of one colour at 0: what a kernel puts beyond the end is at the other one, and only there.
    pure = np.zeros((8, 8, 3), np.uint8)
    pure[..., 0] = 255
    hue, saturation, value = class_densities([pure], drawn, side=8, count=64)
    assert hue[-1] == pytest.approx(hue[1])
    assert hue[-1] > 0
    assert value[0] == 0
    assert saturation[0] == 0


def test_most_frequent_classes_are_chosen_and_strange_ones_refused() -> None:
    targets = {"class": np.array([1] * 30 + [3] * 10)}
    collection = small_collection(targets=targets)
    section = density_section(collection, looks_of(collection), "class", side=8, pixels=9)
    assert [line.get_label() for line in section.figures["hsv_class"].axes[0].lines] == ["green", "grey"]
    some = density_section(collection, looks_of(collection), "class", ["green", "red"], side=8, pixels=9)
    assert some.missing == ["red has no image among 40 images."]
    with pytest.raises(UserError, match="--classes: class has no class 'pink'"):
        density_section(collection, looks_of(collection), "class", ["pink"])


def test_map_has_a_image_for_each_class() -> None:
    collection = small_collection()
    section = centroid_section(collection, looks_of(collection), "class")
    axes = section.figures["isomap_class"].axes[0]
    assert [text.get_text() for text in axes.texts] == list(COLOURS)
    assert "Isomap of 4 classes with 3 neighbours each" in section.paragraphs[0]


def test_too_few_classes_and_no_labels_are_reported() -> None:
    one = small_collection(targets={"class": np.zeros(40, np.int64)})
    assert "class has 1 classes with images" in centroid_section(one, looks_of(one), "class").missing[0]
    for section in (density_section(one, looks_of(one), None), centroid_section(one, looks_of(one), None)):
        assert "no labels" in section.missing[0]
        assert not section.figures
    unknown = small_collection(targets={"class": np.full(40, -1)})
    assert density_section(unknown, looks_of(unknown), "class").missing == ["No image has a known class."]


def test_thumbnail_fits_into_a_square() -> None:
    assert thumbnail(np.zeros((100, 200, 3), np.uint8), 64).shape == (32, 64, 3)
    assert thumbnail(np.zeros((10, 20, 3), np.uint8), 64).shape == (10, 20, 3)
