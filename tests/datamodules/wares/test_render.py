from __future__ import annotations

import hashlib

import numpy as np
import pytest

from datamodules.wares.outlines import Part, Points, band, ellipse, rounded_box, turned
from datamodules.wares.render import (
    COLOURS,
    CONDITIONS,
    KINDS,
    MATERIALS,
    MATERIALS_OF,
    Box,
    Finish,
    Light,
    Plane,
    Pose,
    WareSpec,
    draw_ware,
    normals,
    polygon_mask,
    shade,
)

MUG = WareSpec("mug", "red", "plastic", "new", 7)


@pytest.mark.parametrize("resolution", [16, 33, 96, 160])
def test_an_image_has_the_size_asked_for(resolution: int) -> None:
    image = draw_ware(MUG, 1, resolution)
    assert image.shape == (resolution, resolution, 3)
    assert image.dtype == np.uint8
    assert image.std() > 5


def test_every_kind_in_every_material_and_condition() -> None:
    assert len(KINDS) == 10
    seen = set()
    for number, kind in enumerate(KINDS):
        for place, material in enumerate(MATERIALS_OF[kind]):
            condition = CONDITIONS[(number + place) % 3]
            image = draw_ware(WareSpec(kind, "blue", material, condition, number), place, 48)
            seen.add(hashlib.sha256(image.tobytes()).hexdigest())
    assert len(seen) == sum(map(len, MATERIALS_OF.values()))
    assert set(MATERIALS) == {material for materials in MATERIALS_OF.values() for material in materials}


MEAN_COLOURS = (
    ((86.4, 88.1, 63.2), (81.2, 80.5, 67.2)),
    ((114.0, 119.2, 132.8), (74.1, 62.8, 65.2)),
    ((93.6, 61.9, 37.9), (77.2, 58.4, 38.2)),
    ((155.1, 149.2, 144.3), (133.4, 125.9, 130.7)),
    ((199.0, 219.9, 194.8), (156.3, 141.3, 114.5)),
    ((139.2, 127.5, 108.8), (135.2, 124.7, 106.6)),
    ((178.6, 165.7, 149.0), (160.5, 154.9, 147.8)),
    ((119.4, 129.7, 125.2), (114.7, 106.2, 81.5)),
    ((99.5, 91.3, 78.0), (128.7, 94.1, 64.1)),
    ((98.1, 90.2, 78.7), (76.8, 91.6, 86.9)),
)
"""Of each kind's image the mean red, green and blue of its upper and its lower half."""


def test_images_are_those_of_earlier_versions_and_other_machines() -> None:
    """Runs and galleries of generated data refer to these images. Processors round differently, so no hash of them."""
    for number, kind in enumerate(KINDS):
        materials = MATERIALS_OF[kind]
        spec = WareSpec(
            kind, sorted(COLOURS)[number % 8], materials[number % len(materials)], CONDITIONS[number % 3], number
        )
        image = np.asarray(draw_ware(spec, number, 48), np.float64)
        halves = [half.mean((0, 1)) for half in (image[:24], image[24:])]
        np.testing.assert_allclose(halves, MEAN_COLOURS[number], atol=0.5)


def test_views_of_an_object_differ() -> None:
    views = [draw_ware(MUG, view, 48).astype(int) for view in range(6)]
    differences = [np.abs(views[i] - views[j]).mean() for i in range(6) for j in range(i)]
    assert min(differences) > 10


def test_larger_images_show_the_same_scene() -> None:
    small, large = draw_ware(MUG, 9, 64).astype(float), draw_ware(MUG, 9, 128).astype(float)
    reduced = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.corrcoef(small.ravel(), reduced.ravel())[0, 1] > 0.95


LIGHT = Light((0.0, -0.6, 0.8), ambient=0.5, power=0.6)
UPRIGHT = Pose(np.array([[20.0, 0.0], [0.0, 20.0]]), np.array([32.0, 32.0]))
ROUND = Part(ellipse(0, 0, 1, 1), relief=1.0)


def painted(material: str, behind: Plane, albedo: float = 0.5) -> Plane:
    """A round part in the middle of an image of 64 pixels."""
    found = polygon_mask([UPRIGHT.to_image(ROUND.outline)], 64)
    assert found is not None
    mask, box = found
    place = UPRIGHT.to_ware(box)
    finish = Finish(material, np.full((3, 1, 1), albedo, dtype=np.float32), gloss=1.0, grain=0.5)
    rows, columns = box.slices
    return shade(finish, normals(ROUND, mask, place, UPRIGHT), LIGHT, place, behind[:, rows, columns])


def test_coverage_is_the_area_of_the_polygon() -> None:
    square = np.array([[10.0, 20.0], [30.0, 20.0], [30.0, 50.0], [10.0, 50.0]])
    found = polygon_mask([square], 64)
    assert found is not None
    assert found[0].sum() == pytest.approx(20 * 30, rel=0.05)
    assert found[0].max() == 1


def test_a_polygon_is_cut_at_the_border_and_nothing_is_left_outside() -> None:
    square = np.array([[-10.0, -10.0], [10.0, -10.0], [10.0, 10.0], [-10.0, 10.0]])
    found = polygon_mask([square], 64)
    assert found is not None
    assert found[1] == Box(0, 0, 11, 11)
    assert polygon_mask([square - 50], 64) is None


@pytest.mark.parametrize("material", ["plastic", "metal", "fabric", "leather", "matte"])
def test_only_glass_shows_what_is_behind_it(material: str) -> None:
    dark, light = np.zeros((3, 64, 64), dtype=np.float32), np.ones((3, 64, 64), dtype=np.float32)
    assert (painted(material, dark) == painted(material, light)).all()
    assert np.abs(painted("glass", dark) - painted("glass", light)).mean() > 0.4


def area(outline: Points) -> float:
    """By the shoelace formula."""
    x, y = outline.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def test_areas_of_outlines() -> None:
    assert area(rounded_box(-1, -2, 1, 2, 0.3)) == pytest.approx(8 - (4 - np.pi) * 0.09, rel=0.01)
    can = turned([(-1.0, 0.5), (1.0, 0.5)], tilt=0.3)
    assert can.profile is not None
    assert area(band(can.profile, -0.2, 0.2, 0.3, "accent").outline) == pytest.approx(0.4, rel=0.02)
