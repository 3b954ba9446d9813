from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from scipy.stats import rankdata

from retrieval.gallery import Gallery
from retrieval.search.searcher import (
    MAX_CHARACTERS,
    Encoder,
    Query,
    Ranker,
    Searcher,
    reciprocal_rank_fusion,
)
from retrieval.search.text import TextIndex, words
from tests.support.galleries import CLASSES, COLOURS, MATERIALS, identity, meaning_vector, small_gallery, small_rows
from vitrail.errors import UserError
from vitrail.types import TextReading

KNOWN = {part: name for name in (*CLASSES, *COLOURS, *MATERIALS) for part in words(name)}


class MeaningEncoder:
    """Knows the words of the small gallery, and reads four of them."""

    def __init__(self) -> None:
        self.encoded = 0

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        self.encoded += len(texts)
        return np.stack([meaning_vector(*(KNOWN[word] for word in words(text) if word in KNOWN)) for text in texts])

    def encode_image(self, path: Path) -> NDArray[np.float32]:
        return meaning_vector(*path.stem.split("-"))

    def reading(self, text: str) -> TextReading:
        asked = words(text)
        unknown = [word for word in asked[:4] if word not in KNOWN]
        return TextReading(len(asked[:4]) - len(unknown), unknown, " ".join(asked[4:]))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return small_gallery(tmp_path_factory.mktemp("full") / "gallery")


@pytest.fixture(scope="module")
def searcher(gallery: Gallery) -> Searcher:
    return Searcher(gallery, MeaningEncoder)


def _refuse() -> Encoder:
    raise AssertionError("the model was loaded")


def test_vector_ranks_by_cosine(gallery: Gallery, searcher: Searcher) -> None:
    result = searcher.search(Query("blue plastic bottles"), 5)
    ids = gallery.table(["id"]).column("id").to_pylist()
    cosines = gallery.vectors(ids) @ meaning_vector("blue", "plastic", "tableware_water_bottle")
    best = np.argsort(-cosines, kind="stable")[:5]
    assert [hit.id for hit in result.hits] == [ids[row] for row in best]
    np.testing.assert_allclose([hit.score for hit in result.hits], cosines[best], atol=1e-6)
    assert result.ranker == "vector"
    assert result.hits[0].id == "p7"  # which the model takes for a black one; the vector knows better


def test_text_finds_what_was_predicted_without_loading_the_model(gallery: Gallery) -> None:
    """Image 7 is a blue plastic bottle that the model takes for a black one."""
    searcher = Searcher(gallery, _refuse)
    result = searcher.search(Query("Blue plastic bottles!"), 12, "text")
    found = [hit.id for hit in result.hits]
    assert found[0] == "p6"
    said = gallery.rows(found, ["predicted_class", "predicted_colour", "predicted_material"]).to_pylist()
    asked = {"tableware_water_bottle", "blue", "plastic"}
    assert all(asked & set(row.values()) for row in said)
    assert [hit.score for hit in result.hits] == sorted((hit.score for hit in result.hits), reverse=True)
    assert 0 < result.hits[-1].score < result.hits[0].score < 1
    assert [
        hit.id for hit in Searcher(gallery, text_source="label").search(Query("blue plastic bottle"), 1, "text").hits
    ] == ["p7"]


def test_equal_scores_keep_the_order_of_the_gallery(searcher: Searcher) -> None:
    hits = searcher.search(Query("bag"), 12, "text").hits
    by_score: dict[float, list[int]] = {}
    for hit in hits:
        by_score.setdefault(hit.score, []).append(int(hit.id[1:]))
    assert any(len(group) > 1 for group in by_score.values())
    assert all(group == sorted(group) for group in by_score.values())


def test_hybrid_is_the_reciprocal_rank_fusion_of_both(searcher: Searcher) -> None:
    query = Query("black leather bag")
    vectors = [hit.id for hit in searcher.search(query, 12, "vector").hits]
    by_words = searcher.search(query, 12, "text").hits
    expected: dict[str, float] = {}
    for rank, identifier in enumerate(vectors, start=1):
        expected[identifier] = 1 / (60 + rank)
    for hit in by_words:
        better = sum(other.score > hit.score for other in by_words)
        equal = sum(other.score == hit.score for other in by_words)
        expected[hit.id] += 1 / (60 + better + (equal + 1) / 2)
    result = searcher.search(query, 12, "hybrid")
    assert {hit.id: pytest.approx(hit.score, rel=1e-9) for hit in result.hits} == expected
    assert [hit.id for hit in result.hits] == sorted(expected, key=lambda name: (-expected[name], int(name[1:])))


def test_several_queries_at_once_are_answered_like_one_by_one(gallery: Gallery) -> None:
    queries = [Query("blue bag"), Query(like="p3"), Query("purple"), Query("black sneakers")]
    for ranker in ("vector", "text", "hybrid"):
        encoder = MeaningEncoder()
        searcher = Searcher(gallery, lambda encoder=encoder: encoder)  # type: ignore[misc]
        together = searcher.search_all(queries, 4, ranker)
        alone = [searcher.search(query, 4, ranker) for query in queries]
        assert [[hit.id for hit in result.hits] for result in together] == [[hit.id for hit in r.hits] for r in alone]
        assert [result.notes for result in together] == [result.notes for result in alone]


@pytest.mark.parametrize("ranker", ["vector", "text", "hybrid"])
def test_like_leaves_the_asked_image_out_and_needs_no_model(gallery: Gallery, ranker: Ranker) -> None:
    result = Searcher(gallery, _refuse).search(Query(like="p0"), 12, ranker)
    assert "p0" not in [hit.id for hit in result.hits]
    # A black leather bag shares two of three words with each of these.
    assert {hit.id for hit in result.hits[:4]} == {"p1", "p2", "p4", "p8"}
    if ranker != "text":
        assert len(result.hits) == 11


def test_an_image_file_finds_images_like_it(searcher: Searcher) -> None:
    assert searcher.search(Query(image=Path("blue-leather-sneakers.jpg")), 1).hits[0].id == "p10"
    with pytest.raises(UserError, match="--ranker hybrid: an image file has no text fields"):
        searcher.search(Query(image=Path("blue.jpg")), 1, "hybrid")


@pytest.mark.parametrize("ranker", ["vector", "text", "hybrid"])
def test_a_filter_holds_before_the_best_are_chosen_and_changes_no_score(searcher: Searcher, ranker: Ranker) -> None:
    query = Query("blue plastic bottle")
    everything = searcher.search(query, 12, ranker).hits
    filtered = searcher.search(query, 3, ranker, "label_class = 'sneakers'").hits
    assert {hit.id for hit in filtered} <= {"p8", "p9", "p10", "p11"}
    assert len(filtered) == 3
    if ranker != "hybrid":  # whose ranks are those among what is left
        assert filtered == [hit for hit in everything if hit in filtered]


@pytest.mark.parametrize("ranker", ["vector", "text", "hybrid"])
def test_a_filter_that_leaves_nothing_is_noted(searcher: Searcher, ranker: Ranker) -> None:
    result = searcher.search(Query("blue bag"), 3, ranker, "colour = 'green'")
    assert result.hits == []
    assert result.notes == ["no image fits the filter"]


def test_text_of_another_gallery_is_joined_by_id(tmp_path: Path, gallery: Gallery) -> None:
    classifiers = small_gallery(tmp_path / "classifiers", task="MultiTaskClassifier", encodes_text=False)
    mute = small_gallery(tmp_path / "mute", predicts={})
    with pytest.raises(UserError, match="its model predicts no labels"):
        Searcher(mute).search(Query("bag"), 3, "text")
    searcher = Searcher(mute, MeaningEncoder, text_gallery=classifiers)
    expected = Searcher(gallery, MeaningEncoder)
    for ranker in ("text", "hybrid"):
        assert (
            searcher.search(Query("blue bag"), 12, ranker).hits == expected.search(Query("blue bag"), 12, ranker).hits
        )
    with classifiers.writing() as writer:
        writer.remove(["p0", "p5"])
    fewer = Searcher(mute, text_gallery=Gallery.open(classifiers.uri)).search(Query("bag"), 12, "text")
    assert [hit.id for hit in fewer.hits] == ["p1", "p2"]
    assert f"2 of 12 images have no text in {classifiers.uri}" in fewer.notes


def test_labels_and_predictions_are_searched_together(gallery: Gallery) -> None:
    """The model takes p3, a bag, for sneakers: both words find it, behind the images on which both agree."""
    index = TextIndex(gallery, "all")
    for word, own in (("bag", ["p0", "p1", "p2"]), ("sneakers", ["p8", "p9", "p10", "p11"])):
        found = [index.ids[row] for row in index.search(word).rows]
        assert sorted(found[:-1]) == sorted(own)
        assert found[-1] == "p3"


def test_labels_alone_are_all_text_where_nothing_is_predicted(tmp_path: Path) -> None:
    index = TextIndex(small_gallery(tmp_path / "mute", predicts={}), "all")
    assert sorted(index.ids[row] for row in index.search("bag").rows) == ["p0", "p1", "p2", "p3"]


def test_galleries_without_a_common_image_are_refused(tmp_path: Path, gallery: Gallery) -> None:
    other = small_gallery(tmp_path / "other")
    with other.writing() as writer:
        writer.remove([f"p{number}" for number in range(12)])
    with pytest.raises(UserError, match="has none of the images of"):
        TextIndex(gallery, "predicted", other)


def gallery_of_contents(folder: Path, contents: list[str]) -> Gallery:
    """The small gallery with other contents under the same ids, and other words."""
    made = small_gallery(folder)
    images, _ = small_rows(made.identity)
    column = images.schema.get_field_index("content")
    with made.writing() as writer:
        writer.add(images.set_column(column, "content", pa.array(contents)))
    return made


def test_text_of_other_images_under_the_same_ids_is_not_used(tmp_path: Path, gallery: Gallery) -> None:
    own = gallery.table(["content"]).column("content").to_pylist()
    with pytest.raises(
        UserError, match=r"none of the images of .*: 12 of the same ids are there, but with other images"
    ):
        TextIndex(gallery, "predicted", gallery_of_contents(tmp_path / "all", ["f" * 64] * 12))
    some = gallery_of_contents(tmp_path / "some", [*["f" * 64] * 3, *own[3:]])
    found = Searcher(gallery, text_gallery=some).search(Query("bag"), 12, "text")
    assert {hit.id for hit in found.hits} == set()  # p0 to p3 are bags, p3 is taken for something else
    assert f"3 of 12 images have another content in {some.uri} under the same id; its text is left out" in (found.notes)
    unknown = gallery_of_contents(tmp_path / "unknown", ["", *own[1:]])
    found = Searcher(gallery, text_gallery=unknown).search(Query("bag"), 12, "text")
    assert {hit.id for hit in found.hits} == {"p0", "p1", "p2"}
    assert any("1 of 12 images are joined with" in note and "by id alone" in note for note in found.notes)


def test_weights_of_fields_can_be_given(gallery: Gallery) -> None:
    def first(weights: dict[str, float]) -> str:
        return Searcher(gallery, weights=weights).search(Query("leather sneakers"), 1, "text").hits[0].id

    # Images 8 and 10 are both; what is only one of them follows the weights.
    assert first({}) in {"p8", "p10"}
    heavy = Searcher(gallery, weights={"material": 50}).search(Query("leather sneakers"), 12, "text").hits
    assert [hit.id for hit in heavy[:6]] == ["p8", "p10", "p0", "p2", "p4", "p6"]
    with pytest.raises(UserError, match="--weight size: there is no such field; there are class, colour, material"):
        first({"size": 1})
    with pytest.raises(UserError, match="--weight class=0: must be above 0"):
        first({"class": 0})


def test_captions_are_text_fields_too(gallery: Gallery) -> None:
    result = Searcher(gallery, text_source="caption").search(Query("blue plastic sneakers"), 1, "text")
    assert result.hits[0].id == "p11"


@pytest.mark.parametrize("ranker", ["vector", "text", "hybrid"])
def test_a_query_of_unknown_words_says_so_and_finds_nothing(searcher: Searcher, ranker: Ranker) -> None:
    result = searcher.search(Query("синяя бутылка"), 3, ranker)
    assert result.hits == []
    assert any("синяя, бутылка" in note for note in result.notes)


@pytest.mark.parametrize("ranker", ["vector", "text", "hybrid"])
def test_single_unknown_words_are_named(searcher: Searcher, ranker: Ranker) -> None:
    result = searcher.search(Query("purple bag"), 3, ranker)
    assert len(result.hits) == 3
    assert any("'purple'" in note for note in result.notes)


def test_what_the_model_does_not_read_is_noted(searcher: Searcher) -> None:
    notes = searcher.search(Query("blue plastic bottle and a bag"), 1, "vector").notes
    assert "the model reads only the beginning of the query, not 'a bag'" in notes


@pytest.mark.parametrize("ranker", ["vector", "text", "hybrid"])
def test_more_than_there_are_gives_all_and_says_so(searcher: Searcher, ranker: Ranker) -> None:
    result = searcher.search(Query("blue bag"), 100, ranker)
    assert len(result.hits) == (7 if ranker == "text" else 12)
    assert result.notes == [f"100 were requested, {len(result.hits)} were found; 12 are in the gallery"]
    filtered = searcher.search(Query("blue bag"), 100, ranker, "label_class = 'bag'")
    assert filtered.notes == ["100 were requested, 4 were found; 4 fit the filter"]


def test_wrong_numbers_rankers_and_ids_are_refused(searcher: Searcher) -> None:
    for top_k in (0, -3):
        with pytest.raises(UserError, match=f"--top-k: must be 1 or more; got {top_k}"):
            searcher.search(Query("bag"), top_k)
    with pytest.raises(UserError, match="--ranker: must be one of vector, text, hybrid; got 'bm25'"):
        searcher.search(Query("bag"), 1, "bm25")  # type: ignore[arg-type]
    for ranker in ("vector", "text", "hybrid"):
        with pytest.raises(UserError, match="there is no image 'p99'"):
            searcher.search(Query(like="p99"), 1, ranker)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Query, "exactly one"),
        (lambda: Query("bag", like="p0"), "exactly one"),
        (lambda: Query(""), "the query is empty"),
        (lambda: Query(" \t\n"), "the query is empty"),
        (lambda: Query("word " * 10_000), f"50,000 characters, {MAX_CHARACTERS:,} are allowed"),
        (lambda: Query("bag \udcff"), "not valid UTF-8"),
    ],
)
def test_a_query_that_is_none_is_refused(make: Callable[[], Query], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_a_gallery_of_a_classifier_searches_by_text_and_by_images(tmp_path: Path) -> None:
    plain = small_gallery(tmp_path / "plain", task="MultiTaskClassifier", encodes_text=False)
    searcher = Searcher(plain)
    assert searcher.search(Query("blue bag"), 1).ranker == "text"
    assert searcher.search(Query(like="p0"), 1).ranker == "vector"
    for ranker in ("vector", "hybrid"):
        with pytest.raises(UserError, match="MultiTaskClassifier does not encode texts; use --ranker text"):
            searcher.search(Query("blue bag"), 1, ranker)
    with pytest.raises(UserError, match="no captions to find"):
        searcher.search_captions(Query(like="p0"), 1)


def test_captions_are_found_once_each(searcher: Searcher) -> None:
    result = searcher.search_captions(Query(like="p7"), 24)
    texts = [hit.caption for hit in result.hits]
    assert sorted(texts[:2]) == ["a blue plastic bottle", "blue plastic bottle"]
    assert {hit.image for hit in result.hits[:2]} == {"p7"}
    assert len(texts) == len(set(texts)) == 24
    assert result.notes == []
    assert searcher.search_captions(Query("black leather bag"), 1).hits[0].image == "p0"
    only = searcher.search_captions(Query("black leather bag"), 3, "label_class = 'sneakers'")
    assert {hit.image for hit in only.hits} <= {"p8", "p9", "p10", "p11"}
    assert searcher.search_captions(Query("purple"), 3).hits == []
    more = searcher.search_captions(Query("bag"), 30)
    assert more.notes == ["there are only 24 different captions"]


def test_an_empty_gallery_says_so(tmp_path: Path) -> None:
    empty = Searcher(Gallery.create(str(tmp_path / "empty"), identity()), MeaningEncoder)
    for ranker in ("vector", "text", "hybrid"):
        result = empty.search(Query("bag"), 3, ranker)
        assert result.hits == []
        assert "the gallery is empty" in result.notes


def _ranking(items: list[int], scores: list[float]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return np.array(items, dtype=np.int64), np.array(scores, dtype=np.float32)


def test_an_item_gets_the_sum_of_its_reciprocal_ranks() -> None:
    items, scores = reciprocal_rank_fusion([_ranking([7, 3, 5], [0.9, 0.5, 0.1]), _ranking([3, 9], [12.0, 11.0])])
    assert items.tolist() == [3, 7, 9, 5]
    np.testing.assert_allclose(scores, [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63])


def test_equal_scores_share_the_mean_of_their_ranks_whatever_their_order() -> None:
    """Against a plain loop over SciPy's ranks."""
    generator = np.random.default_rng(0)
    rankings = [
        (generator.permutation(40)[:30].astype(np.int64), generator.integers(0, 6, 30).astype(np.float32))
        for _ in range(3)
    ]
    expected: dict[int, float] = {}
    for items, scores in rankings:
        for item, rank in zip(items.tolist(), rankdata(-scores, method="average"), strict=True):
            expected[item] = expected.get(item, 0.0) + 1 / (60 + rank)
    items, fused = reciprocal_rank_fusion(rankings)
    assert set(items.tolist()) == set(expected)
    np.testing.assert_allclose(fused, [expected[item] for item in items.tolist()])
    assert (np.diff(fused) <= 0).all()


def test_equal_sums_keep_ascending_items_and_empty_rankings_add_none() -> None:
    assert reciprocal_rank_fusion([_ranking([8, 2], [1.0, 0.5]), _ranking([2, 8], [1.0, 0.5])])[0].tolist() == [2, 8]
    assert reciprocal_rank_fusion([])[0].tolist() == []
    assert reciprocal_rank_fusion([_ranking([], []), _ranking([4], [1.0])])[0].tolist() == [4]
