from __future__ import annotations

from dataclasses import replace

import numpy as np

from evaluation.report.images import map_figure, map_section, mistakes_section
from retrieval.gallery import Gallery
from tests.evaluation.predictions_fixture import make_predictions
from vitrail.types import UNKNOWN


def test_map_has_every_image_once(gallery: Gallery) -> None:
    section = map_section(gallery, "test", "class")
    table = section.files["embedding_map"]
    assert sorted(table["id"]) == sorted(gallery.table(["id"]).column("id").to_pylist())
    classes = table["label_class"]
    places = table[["PCA x", "PCA y"]].to_numpy()
    centres = np.stack([places[classes == name].mean(axis=0) for name in sorted(set(classes))])
    nearest = np.linalg.norm(places[:, None] - centres[None], axis=2).argmin(axis=1)
    assert [sorted(set(classes))[place] for place in nearest] == classes.tolist()
    assert len(section.figures["embedding_map"].axes) == 3 - len(section.missing)


def test_without_a_known_target_nothing_is_said_of_mistakes() -> None:
    found = make_predictions(6)
    unknown = replace(found, targets={**found.targets, "colour": np.full(6, UNKNOWN)})
    section = mistakes_section(unknown, {}, "test", 3, None)
    assert not any(said.startswith("colour:") for said in section.says)
    assert "Of 'colour' no target is known, so mistakes cannot be told." in section.missing


def test_many_classes_have_marks_of_their_own() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([f"c{number:02}" for number in range(45)])
    figure = map_figure({"PCA": rng.normal(size=(45, 2))}, labels)
    seen = set()
    for points in figure.axes[0].collections:
        seen.add((np.asarray(points.get_facecolor()).tobytes(), np.asarray(points.get_paths()[0].vertices).tobytes()))
    assert len(seen) == 45
