from __future__ import annotations

import math

import numpy as np
import pytest

from datamodules.wares.outlines import Points, band, circle_points, ellipse, inset, ribbon, rounded_box, smooth, turned


def area(outline: Points) -> float:
    """By the shoelace formula."""
    x, y = outline.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def test_a_smooth_curve_goes_through_its_points() -> None:
    points = [(0.0, 0.0), (1.0, 0.5), (2.0, -0.5), (1.0, -2.0)]
    closed, opened = smooth(points), smooth(points, closed=False)
    for curve in (closed, opened):
        for point in points:
            assert np.abs(curve - point).sum(axis=1).min() < 1e-9
    assert tuple(opened[0]) == points[0]
    assert tuple(opened[-1]) == points[-1]


def test_a_ribbon_has_length_times_width() -> None:
    assert area(ribbon([(0.0, 0.0), (3.0, 4.0)], 0.2)) == pytest.approx(1.0)
    assert area(ribbon([(0.0, 0.0), (2.0, 0.0)], (0.0, 1.0))) == pytest.approx(1.0)


def test_areas() -> None:
    assert area(ellipse(1, 2, 3, 0.5)) == pytest.approx(math.pi * 1.5, rel=0.02)
    assert area(rounded_box(-1, -2, 1, 2, 0.3)) == pytest.approx(8 - (4 - math.pi) * 0.09, rel=0.01)
    box = rounded_box(-1, -2, 1, 2, 0.3)
    assert area(inset(box, 0.1)) == pytest.approx(0.81 * area(box))


def test_a_turned_piece_is_its_profile_with_round_ends() -> None:
    can = turned([(-1.0, 0.5), (1.0, 0.5)], tilt=0.3)
    assert area(can.outline) == pytest.approx(2 + math.pi * 0.5 * 0.15, rel=0.02)
    assert can.profile is not None
    stripe = band(can.profile, -0.2, 0.2, 0.3, "accent")
    assert area(stripe.outline) == pytest.approx(0.4, rel=0.02)


def test_shared_points_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        circle_points(0.0, 1.0, 5)[0, 0] = 2.0
