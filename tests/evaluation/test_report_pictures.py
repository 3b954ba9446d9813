from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evaluation.report_pictures import map_figure, map_section, retrieval_section
from retrieval.gallery import Gallery
from tests.evaluation.small_run import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def gallery(run: Path) -> Gallery:
    return Gallery.open(str(run / "gallery"))


def test_nearest_pictures_are_those_of_brute_force(gallery: Gallery) -> None:
    section = retrieval_section(gallery, "test", "class", None, None)
    table = gallery.table(["id", "group", "label_class"]).to_pydict()
    ids = table["id"]
    vectors = gallery.vectors(ids)
    assert len(section.cards) == 6
    for query, cards in section.cards.items():
        place = ids.index(query)
        scores = vectors @ vectors[place]
        scores[place] = -2
        order = np.argsort(-scores)[:5]
        assert cards[0].says == ["query", f"class: {table['label_class'][place]}"]
        for hit, card in zip(order, cards[1:], strict=True):
            same = ["the same object"] if table["group"][hit] == table["group"][place] else []
            assert card.says == [f"{scores[hit]:.3f}", f"class: {table['label_class'][hit]}", *same]


def test_queries_are_of_as_many_classes_as_there_are(gallery: Gallery) -> None:
    section = retrieval_section(gallery, "test", "class", None, None, seed=3)
    firsts = [cards[0].says[1] for cards in list(section.cards.values())[:3]]
    assert len(set(firsts)) == 3


def test_a_split_that_the_gallery_lacks_is_told(gallery: Gallery) -> None:
    section = retrieval_section(gallery, "val", "class", None, None)
    assert "the whole gallery, which has none of val" in section.says[0]


def test_pictures_come_from_the_reader(gallery: Gallery) -> None:
    asked: list[str] = []

    def read(name: str) -> np.ndarray | None:
        asked.append(name)
        return np.zeros((8, 8, 3), np.uint8) if len(asked) % 2 else None

    section = retrieval_section(gallery, "test", "class", read, None)
    cards = [card for row in section.cards.values() for card in row]
    assert len(asked) == len(cards)
    assert [card.jpeg is not None for card in cards] == [place % 2 == 0 for place in range(len(cards))]


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
