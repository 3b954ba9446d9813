"""Tests of where images are put on the map."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from sklearn.decomposition import PCA

from app.logic.explore import Explorer, Filter
from app.state.galleries import ServedGallery
from app.widgets.charts import METHODS, PALETTE, lay_out, map_points, methods
from tests.app.explored_gallery import N, explored_gallery
from vitrail.errors import UserError


def test_places_are_scikit_learns_to_scale_in_the_unit_square(served: ServedGallery, explorer: Explorer) -> None:
    placed = lay_out(served.gallery, explorer.ids, "PCA")
    expected = PCA(2, svd_solver="full").fit_transform(served.gallery.vectors(explorer.ids).astype(np.float64))
    ratios = pdist(placed.places) / pdist(expected)
    assert ratios.max() == pytest.approx(ratios.min(), rel=1e-6)
    assert placed.places.min() == pytest.approx(0)
    assert placed.places.max() == pytest.approx(1)
    assert placed.rows.tolist() == [*range(N)]
    assert placed.text == f"{N} images"


def test_of_many_images_some_are_drawn_and_that_is_said(served: ServedGallery, explorer: Explorer) -> None:
    placed = lay_out(served.gallery, explorer.ids, "t-SNE", limit=40)
    assert placed.text == f"40 of {N} images, a random sample"
    assert len(set(placed.rows.tolist())) == 40
    assert placed.rows.tolist() == sorted(placed.rows.tolist())
    again = lay_out(served.gallery, explorer.ids, "t-SNE", limit=40)
    assert np.array_equal(placed.places, again.places)
    assert np.array_equal(placed.rows, again.rows)


@pytest.mark.parametrize("method", ["", "pca", "MDS", None, 3, ["PCA"], "x" * 9999])
def test_an_unknown_projection_is_refused(served: ServedGallery, explorer: Explorer, method: str) -> None:
    with pytest.raises(UserError, match="must be one of PCA, t-SNE") as said:
        lay_out(served.gallery, explorer.ids, method)
    assert len(str(said.value)) < 200


def test_projections_that_are_not_installed_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, offered in ((None, ["PCA", "t-SNE"]), (object(), ["PCA", "t-SNE", "UMAP"])):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, there=there: there)
        assert methods() == offered
    assert set(METHODS) == {"PCA", "t-SNE", "UMAP"}


def test_points_say_what_the_browser_draws(served: ServedGallery, explorer: Explorer) -> None:
    placed = lay_out(served.gallery, explorer.ids, "PCA", limit=100)
    shown = explorer.find(explorer.filter(class_name="mug"))
    selected = int(placed.rows[7])
    points = json.loads(json.dumps(map_points(explorer, placed, shown, "colour", selected)))
    assert points["ids"] == [f"p{row}" for row in placed.rows]
    assert [points["names"][code] for code in points["codes"]] == [
        explorer.value_of(row, "colour") for row in placed.rows.tolist()
    ]
    assert [bool(is_shown) for is_shown in points["shown"]] == [
        row in set(shown.tolist()) for row in placed.rows.tolist()
    ]
    assert np.allclose(np.stack([points["x"], points["y"]], axis=1) / 10_000, placed.places, atol=1e-4)
    assert points["selected"] == 7
    assert points["colours"] == list(PALETTE)


def test_a_selected_image_that_was_not_drawn_is_not_marked(served: ServedGallery, explorer: Explorer) -> None:
    placed = lay_out(served.gallery, explorer.ids, "PCA", limit=100)
    absent = next(row for row in range(N) if row not in set(placed.rows.tolist()))
    everything = explorer.find(Filter())
    assert map_points(explorer, placed, everything, "class", absent)["selected"] == -1
    one_colour = map_points(explorer, placed, everything, "")
    assert (set(one_colour["codes"]), one_colour["names"]) == ({0}, ["image"])  # type: ignore[call-overload]


def test_one_image_and_none_have_a_map(tmp_path: Path) -> None:
    served = explored_gallery(tmp_path / "gallery", n=6)
    one = lay_out(served.gallery, ["p0"], "PCA")
    assert one.places.tolist() == [[0.5, 0.5]]
    assert lay_out(served.gallery, [], "PCA").places.shape == (0, 2)
