from __future__ import annotations

import numpy as np
import pytest

from datamodules.wares.outlines import Part, Points, ellipse, turned
from datamodules.wares.render import Box, Finish, Light, Plane, Pose, normals, polygon_mask, shade

LIGHT = Light((0.0, -0.6, 0.8), ambient=0.5, power=0.6)
UPRIGHT = Pose(np.array([[20.0, 0.0], [0.0, 20.0]]), np.array([32.0, 32.0]))
ROUND = Part(ellipse(0, 0, 1, 1), relief=1.0)


def painted(material: str, behind: Plane, albedo: float = 0.5) -> Plane:
    """A round thing in the middle of an image of 64 pixels."""
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


def test_pixels_and_ware_units_are_each_others_inverse() -> None:
    pose = Pose(np.array([[18.0, -7.0], [6.0, 21.0]]), np.array([30.0, 35.0]))
    x, y = pose.to_ware(Box(12, 40, 13, 41))
    point: Points = np.array([[float(x[0, 0]), float(y[0, 0])]])
    assert pose.to_image(point)[0] == pytest.approx([12.5, 40.5], abs=1e-4)


def test_a_turned_piece_faces_left_at_its_left_and_right_at_its_right() -> None:
    piece = turned([(-1.0, 0.8), (1.0, 0.8)], tilt=0.2)
    box = Box(16, 20, 48, 44)
    faced = normals(piece, np.ones((24, 32), dtype=np.float32), UPRIGHT.to_ware(box), UPRIGHT)
    assert faced[0, 12, 1] < -0.5
    assert faced[0, 12, 30] > 0.5
    assert faced[2, 12, 16] > 0.99
    assert (faced**2).sum(axis=0) == pytest.approx(np.ones((24, 32)), abs=1e-4)


@pytest.mark.parametrize("material", ["plastic", "metal", "fabric", "leather", "matte"])
def test_only_glass_shows_what_is_behind_it(material: str) -> None:
    dark, light = np.zeros((3, 64, 64), dtype=np.float32), np.ones((3, 64, 64), dtype=np.float32)
    assert (painted(material, dark) == painted(material, light)).all()
    assert np.abs(painted("glass", dark) - painted("glass", light)).mean() > 0.4


def test_materials_differ_in_light() -> None:
    behind = np.full((3, 64, 64), 0.5, dtype=np.float32)
    looks = {material: painted(material, behind) for material in ("plastic", "metal", "glass", "fabric", "leather")}
    assert looks["plastic"].max() > looks["fabric"].max() + 0.2, "a highlight"
    assert looks["metal"].std() > looks["leather"].std() * 1.2, "bright and dark bands"
    grain = np.abs(np.diff(looks["fabric"][0, 10:30, 10:30], axis=1)).mean()
    assert grain > 2 * np.abs(np.diff(looks["plastic"][0, 10:30, 10:30], axis=1)).mean(), "a weave"


def test_the_lit_side_is_brighter() -> None:
    image = painted("matte", np.zeros((3, 64, 64), dtype=np.float32)).mean(axis=0)
    assert image[3:8, 18:24].mean() > image[-8:-3, 18:24].mean() + 0.1
