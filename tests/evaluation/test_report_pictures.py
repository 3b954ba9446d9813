from __future__ import annotations

import numpy as np

from evaluation.report_pictures import map_figure, map_section
from retrieval.gallery import Gallery


def test_map_has_every_picture_once(gallery: Gallery) -> None:
    section = map_section(gallery, "test", "class")
    table = section.files["embedding_map"]
    assert sorted(table["id"]) == sorted(gallery.table(["id"]).column("id").to_pylist())
    classes = table["label_class"]
    places = table[["PCA x", "PCA y"]].to_numpy()
    centres = np.stack([places[classes == name].mean(axis=0) for name in sorted(set(classes))])
    nearest = np.linalg.norm(places[:, None] - centres[None], axis=2).argmin(axis=1)
    assert [sorted(set(classes))[place] for place in nearest] == classes.tolist()
    assert len(section.figures["embedding_map"].axes) == 3 - len(section.missing)


def test_many_classes_have_marks_of_their_own() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([f"c{number:02}" for number in range(45)])
    figure = map_figure({"PCA": rng.normal(size=(45, 2))}, labels)
    seen = set()
    for points in figure.axes[0].collections:
        seen.add((np.asarray(points.get_facecolor()).tobytes(), np.asarray(points.get_paths()[0].vertices).tobytes()))
    assert len(seen) == 45
