"""Tests of searches against a comparison with every image, and of weak matches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from app.logic.search import Request, ResultPage, Searching, other_words, unmatched_words, words_not_shown
from app.state.context import AppContext, Limits
from retrieval.search.searcher import FORMER_RANKERS, MAX_CHARACTERS, Query, Searcher
from retrieval.search.text import words
from tests.support.galleries import KNOWN, SHOWN, MeaningRun, meaning_vector, served_small
from vitrail.errors import UserError


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> AppContext:
    """A dual encoder's gallery, a classifier's, and one of a dual encoder that predicts nothing and is not served."""
    folder, run = tmp_path_factory.mktemp("galleries"), MeaningRun()
    galleries = [
        served_small(folder / "both", "both", run),
        served_small(folder / "classifier", "classifier", run, encodes_text=False),
        served_small(folder / "silent", "silent", predicts={}, labels=[]),
    ]
    return AppContext({}, {gallery.name: gallery for gallery in galleries}, Limits(results=20, offset=40))


@pytest.fixture(scope="module")
def searching(context: AppContext) -> Searching:
    return Searching(context)


def text(said: str, gallery: str = "both", **options: object) -> Request:
    return dataclasses.replace(Request(gallery, Query(text=said)), **options)  # type: ignore[arg-type]


def ids(page: ResultPage) -> list[str]:
    return [result.sample_id for result in page.results]


def test_scores_are_those_of_a_comparison_with_every_image(context: AppContext, searching: Searching) -> None:
    page = searching.search(text("blue leather bag", count=5))
    everything = [f"p{row}" for row in range(len(SHOWN))]
    cosines = context.galleries["both"].gallery.vectors(everything) @ meaning_vector("blue", "leather", "bag")
    best = np.argsort(-cosines)[:5]
    assert ids(page) == [everything[row] for row in best]
    assert [result.score for result in page.results] == pytest.approx(cosines[best].tolist(), abs=1e-6)
    assert page.top == pytest.approx(float(cosines.max()), abs=1e-6)
    assert page.mean == pytest.approx(float(cosines[best].mean()), abs=1e-6)
    assert SHOWN[int(ids(page)[0][1:])] == ("bag", "blue", "leather")
    assert page.results[0].row["predicted_colour"] == "blue"
    assert (page.ranker, page.fitting, page.more) == ("vector", 12, True)


@pytest.mark.parametrize("ranker", ["vector", "text", "hybrid", "clip", "tfidf"])
@pytest.mark.parametrize("filters", [{}, {"colour": ["black"]}])
def test_pages_together_are_the_whole_ranking(
    context: AppContext, searching: Searching, ranker: str, filters: dict[str, list[str]]
) -> None:
    run: Any = MeaningRun()
    where = " OR ".join(f"{name} = '{value}'" for name, values in filters.items() for value in values)
    searcher = Searcher(context.galleries["both"].gallery, lambda: run, text_source="all")
    by: Any = FORMER_RANKERS.get(ranker, ranker)
    whole = searcher.search(Query(text="black plastic bottle"), 12, by, where)
    found: list[tuple[str, float]] = []
    request = text("black plastic bottle", ranker=ranker, filters=filters, count=5)
    for number in (1, 2, 3):
        page = searching.search(dataclasses.replace(request, page=number))
        assert [result.rank for result in page.results] == list(
            range(len(found) + 1, len(found) + len(page.results) + 1)
        )
        found += [(result.sample_id, result.score) for result in page.results]
        assert page.more == (len(found) < len(whole.hits))
        assert page.top == pytest.approx(whole.hits[0].score)
    assert [name for name, _ in found] == [hit.id for hit in whole.hits]
    assert [score for _, score in found] == pytest.approx([hit.score for hit in whole.hits])


def test_filters_are_those_of_the_filter_language(context: AppContext, searching: Searching) -> None:
    filters = {"class": ["bag", "sneakers"], "colour": ["blue"], "split": ["test"], "material": []}
    page = searching.search(text("bag", filters=filters))
    where = "class IN ('bag', 'sneakers') AND colour = 'blue' AND split = 'test'"
    fitting = context.galleries["both"].gallery.table(["id"], where).column("id").to_pylist()
    assert sorted(ids(page)) == sorted(fitting)
    assert page.fitting == len(fitting) > 0


def test_nothing_fits(searching: Searching) -> None:
    # Image 3 is a bag that the model takes for sneakers; no bag is in the split of those left.
    page = searching.search(
        text("bag", filters={"class": ["bag"], "colour": ["blue"], "split": ["val"], "material": ["leather"]})
    )
    assert (page.results, page.fitting, page.top, page.mean, page.more) == ([], 0, None, None, False)


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ({"colour": ["green"]}, "filter colour: no image has 'green'"),
        ({"colour": ["blue' OR 'a' = 'a"]}, "no image has"),
        ({"path": ["x"]}, "can be filtered by class, colour, material, split"),
        ({"x" * 500: ["x"]}, "can be filtered by"),
    ],
)
def test_filters_that_there_are_not(searching: Searching, filters: dict[str, list[str]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        searching.search(text("bag", filters=filters))


def test_like_an_image_of_the_gallery(searching: Searching) -> None:
    page = searching.search(Request("both", Query(like="p5"), count=3))
    assert "p5" not in ids(page)
    shared = [len(set(SHOWN[5]) & set(SHOWN[int(name[1:])])) for name in ids(page)]
    assert shared == [2, 2, 2]
    with pytest.raises(UserError, match="there is no image 'p99'"):
        searching.search(Request("both", Query(like="p99")))


def test_an_image_from_outside(searching: Searching, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "sky.png")
    page = searching.search(Request("both", Query(image=tmp_path / "sky.png"), count=6))
    assert [SHOWN[int(name[1:])][1] for name in ids(page)] == ["blue"] * 6
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no\.png"):
        searching.search(Request("both", Query(image=tmp_path / "no.png")))
    with pytest.raises(UserError, match="an uploaded image has no text; choose vectors"):
        searching.search(Request("both", Query(image=tmp_path / "sky.png"), ranker="text"))


def test_unknown_words_are_said(searching: Searching) -> None:
    by_words = searching.search(text("blue giraffe", ranker="text"))
    assert by_words.notes == ["no image has the word 'giraffe' or one that ends so"]
    by_vectors = searching.search(text("blue giraffe"))
    assert by_vectors.notes == ["the model's tokenizer does not know 'giraffe'"]
    nothing = searching.search(text("giraffe"))
    assert nothing.results == []
    assert nothing.notes == ["the model's tokenizer knows nothing of the query: giraffe"]


def test_who_can_rank(searching: Searching, context: AppContext) -> None:
    assert searching.rankers("both", "text") == ["vector", "text", "hybrid"]
    assert searching.rankers("both", "image") == ["vector"]
    assert searching.rankers("classifier", "text") == ["text"]
    assert searching.rankers("classifier", "like") == ["vector", "text", "hybrid"]
    assert searching.rankers("silent", "image") == []
    assert list(searching.text_fields("both")) == ["all", "predicted", "gallery:classifier", "label", "caption"]
    assert list(searching.text_fields("silent")) == ["gallery:both", "gallery:classifier", "caption"]


def test_a_classifiers_gallery_is_searched_by_words(searching: Searching) -> None:
    page = searching.search(text("blue sneakers", "classifier", count=3))
    assert page.ranker == "text"
    assert sorted(ids(page)) == ["p10", "p11", "p3"]  # the model takes p3 for sneakers


def test_words_of_another_gallery(searching: Searching) -> None:
    page = searching.search(text("blue bag", "silent", fields="gallery:both", count=1))
    assert page.ranker == "text"
    assert ids(page) == ["p2"]
    own = searching.search(text("blue bag", "silent", fields="caption", count=2))
    assert {SHOWN[int(name[1:])][:2] for name in ids(own)} == {("bag", "blue")}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (text("bag", "nowhere"), "gallery 'nowhere': not served"),
        (text("bag", ranker="best"), "ranker: must be one of vector, text, hybrid; got 'best'"),
        (text("bag", "classifier", ranker="vector"), "has no text encoder; choose text"),
        (text("bag", "silent", ranker="clip"), "the run that made the gallery is not served; choose text"),
        (text("bag", fields="gallery:../.."), "has no 'gallery:../..'"),
        (text("bag", count=0), "choose 1 to 20"),
        (text("bag", count=21), "choose 1 to 20"),
        (text("bag", page=0), "page 0"),
        (text("bag", page=4), "page 4: at most 40 results"),
        (text("bag", page=10**30), "results can be shown"),
    ],
)
def test_what_cannot_be_asked(searching: Searching, request_: Request, said: str) -> None:
    with pytest.raises(UserError, match=said):
        searching.search(request_)


def test_queries_that_are_none() -> None:
    for wrong in ("", "  \n", "x" * (MAX_CHARACTERS + 1), "\ud800"):
        with pytest.raises(UserError):
            Query(text=wrong)


class _Certain(MeaningRun):
    """For whom a text without a known word means nothing that an image shows."""

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        vectors = super().encode_texts(texts)
        nothing = -meaning_vector(*KNOWN.values())
        known = np.array([any(word in KNOWN for word in words(text)) for text in texts])
        return np.where(known[:, None], vectors, nothing).astype(np.float32)


@pytest.mark.parametrize(
    ("query", "unmatched"),
    [
        ("blue bag", []),
        ("Bags", []),
        ("a photo of the blue bag", []),
        # The model knows nothing of zebras: other words fit as well.
        ("blue zebra", ["zebra"]),
        ("zebra", ["zebra"]),
        ("the of", []),
    ],
)
def test_words_that_nothing_matches_are_named(tmp_path: Path, query: str, unmatched: list[str]) -> None:
    gallery = served_small(tmp_path / "g", run=_Certain())
    assert unmatched_words(gallery, query, other_words(gallery)) == unmatched


def test_without_the_model_no_word_is_tested(tmp_path: Path) -> None:
    gallery = served_small(tmp_path / "g", run=None)
    assert other_words(gallery) is None
    assert unmatched_words(gallery, "zebra", None) == []


def test_a_word_of_the_gallery_is_no_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.logic.search.OTHER_WORDS", ("bag", "blue", "zeppelin"))
    assert words_not_shown(served_small(tmp_path / "g", run=MeaningRun())) == ["zeppelin"]
