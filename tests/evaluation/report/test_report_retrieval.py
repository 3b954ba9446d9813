from __future__ import annotations

from pathlib import Path

import numpy as np

from evaluation.report.sections import retrieval_section
from retrieval.gallery import Gallery
from tests.retrieval.small_gallery import caption_rows, identity, image_rows, small_gallery, vectors


def test_nearest_images_are_those_of_brute_force(gallery: Gallery) -> None:
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


def test_images_come_from_the_reader(gallery: Gallery) -> None:
    asked: list[str] = []

    def read(name: str) -> np.ndarray | None:
        asked.append(name)
        return np.zeros((8, 8, 3), np.uint8) if len(asked) % 2 else None

    section = retrieval_section(gallery, "test", "class", read, None)
    cards = [card for row in section.cards.values() for card in row]
    assert len(asked) == len(cards)
    assert [card.jpeg is not None for card in cards] == [place % 2 == 0 for place in range(len(cards))]


def test_texts_find_the_images_of_brute_force(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "gallery")
    section = retrieval_section(gallery, "test", "class", None, None)
    ids = gallery.table(["id"]).column("id").to_pylist()
    images = gallery.vectors(ids)
    texts = {title: cards for title, cards in section.cards.items() if title.startswith("“")}
    queries = [title for title in section.cards if title not in texts]
    assert len(texts) == len(queries) == 6
    for query, (title, cards) in zip(queries, texts.items(), strict=True):
        first = gallery.captions_of([query]).slice(0, 1)
        assert title == f"“{first.column('caption')[0].as_py()}”"
        scores = images @ np.array(first.column("vector")[0].as_py(), np.float32)
        assert [card.says[0] for card in cards] == [f"{score:.3f}" for score in np.sort(scores)[::-1][:5]]
        noted = ["the image that the text is of" in card.says for card in cards]
        assert noted == [ids[place] == query for place in np.argsort(-scores, kind="stable")[:5]]
    # An image as a query has the texts nearest to it below.
    said = [line for line in section.cards[queries[0]][0].says if "“" in line]
    assert len(said) == 3


def test_a_text_of_several_images_is_asked_once(tmp_path: Path) -> None:
    gallery = Gallery.create(str(tmp_path / "gallery"), identity(labels=[], predicts={}))
    ids = ["a", "b", "c"]
    rows = image_rows(gallery.identity, ids, vectors(3))
    with gallery.writing() as writer:
        writer.add(rows, caption_rows(gallery.identity, [("a", "mug"), ("c", "cap"), ("b", "mug")], vectors(3, seed=1)))
    titles = list(retrieval_section(gallery, "test", "", None, None).cards)
    assert sorted(titles) == ["a", "b", "c", "“cap”", "“mug”"]


def test_queries_without_captions_ask_no_texts(tmp_path: Path) -> None:
    gallery = Gallery.create(str(tmp_path / "gallery"), identity(labels=[], predicts={}))
    rows = image_rows(gallery.identity, ["a", "b", "c"], vectors(3), split=["test", "test", "train"])
    with gallery.writing() as writer:
        writer.add(rows, caption_rows(gallery.identity, [("c", "a cap")], vectors(1, seed=1)))
    section = retrieval_section(gallery, "test", "", None, None)
    assert sorted(section.cards) == ["a", "b"]
    assert len(section.says) == 1
