""""""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from retrieval.search.text import TfidfIndex, fold_plural, raw_words, words

CLASSES = ["tableware_water_bottle", "travel_handbag", "footwear_sneakers", "tableware_water_bottle", "travel_handbag"]
COLOURS = ["blue", "black", "blue", "red", None]


def _index() -> TfidfIndex:
    return TfidfIndex({"class": CLASSES, "colour": COLOURS}, {"class": 2, "colour": 1})


def test_scores_are_those_of_scikit_learn_where_a_weight_is_a_repetition() -> None:
    texts = [f"{name} {name} {colour or ''}" for name, colour in zip(CLASSES, COLOURS, strict=True)]
    vectorizer = TfidfVectorizer(analyzer=words).fit(texts)
    query = "blue sneakers and bottles, blue"
    expected = cosine_similarity(vectorizer.transform(texts), vectorizer.transform([query]))[:, 0]
    np.testing.assert_allclose(_index().match(query).scores, expected, atol=2e-6)
    expected = cosine_similarity(vectorizer.transform(texts), vectorizer.transform([texts[1]]))[:, 0]
    np.testing.assert_allclose(_index().like(1), expected, atol=2e-6)


def test_rarity_is_counted_over_all_documents_not_over_distinct_ones() -> None:
    """Nine of twelve images are the same bottle: its word says little, though it is in one distinct row only."""
    texts = ["bottle"] * 9 + ["mug", "mug cap", "bottle mug"]
    index = TfidfIndex({"class": texts}, {"class": 1})
    vectorizer = TfidfVectorizer(analyzer=words).fit(texts)
    for query in ("bottle mug", "bottle cap"):
        expected = cosine_similarity(vectorizer.transform(texts), vectorizer.transform([query]))[:, 0]
        np.testing.assert_allclose(index.match(query).scores, expected, atol=2e-6)
    of_distinct = TfidfVectorizer(analyzer=words).fit(sorted(set(texts)))
    other = cosine_similarity(of_distinct.transform(texts), of_distinct.transform(["bottle mug"]))[:, 0]
    assert np.abs(index.match("bottle mug").scores - other).max() > 0.05


def test_a_heavier_field_pulls_its_matches_up() -> None:
    fields = {"class": ["bottle", "cap"], "colour": ["red", "blue"]}
    # "bottle" and "blue" are equally rare; each document has one of them.
    as_class = TfidfIndex(fields, {"class": 2, "colour": 1}).match("blue bottle").scores
    as_colour = TfidfIndex(fields, {"class": 1, "colour": 2}).match("blue bottle").scores
    assert as_class[0] > as_class[1]
    assert as_colour[0] < as_colour[1]


def test_documents_with_the_same_words_have_the_same_score() -> None:
    scores = TfidfIndex({"class": ["a_cap", "b", "a_cap", "cap_a"]}, {"class": 1}).match("cap a").scores
    assert scores[0] == scores[2] == scores[3] > scores[1] == 0


def test_unknown_words_are_named_as_they_were_typed() -> None:
    matches = _index().match("Purple bottles from ブルー, purple")
    assert matches.unknown == ["purple", "ブルー"]
    assert matches.scores.argmax() in {0, 3}
    nothing = _index().match("синяя бутылка")
    assert nothing.unknown == ["синяя", "бутылка"]
    assert not nothing.scores.any()


def test_function_words_are_reported_only_alone_and_stand_for_no_other() -> None:
    index = TfidfIndex({"class": ["brand", "bag_with_handle"]}, {"class": 1})
    matches = index.match("a bag and the cap")
    assert (matches.unknown, matches.read_as) == (["cap"], {})
    assert index.match("the bag").unknown == []
    assert index.match("and the").unknown == ["and", "the"]
    # Where documents hold one it counts like any other.
    assert index.match("with").scores.tolist()[1] > 0


def test_a_word_stands_for_compounds_that_end_in_it_unless_it_is_known_itself() -> None:
    matches = _index().match("black bags")
    assert matches.read_as == {"bags": ["handbag"]}
    assert matches.unknown == []
    assert matches.scores.argmax() == 1
    assert _index().match("bottle").read_as == {}
    # Two letters are no word to be looked for inside of others.
    assert _index().match("ag").unknown == ["ag"]


def test_compounds_share_the_weight_of_the_word_that_was_asked() -> None:
    index = TfidfIndex({"class": ["handbag", "mailbag", "cap"]}, {"class": 1})
    matches = index.match("bag cap")
    # All words are equally rare, so the query is (½, ½, 1) and each document a unit vector.
    np.testing.assert_allclose(matches.scores, np.array([0.5, 0.5, 1]) / np.sqrt(1.5), atol=2e-6)


def test_documents_without_words_are_found_by_nothing() -> None:
    index = TfidfIndex({"class": [None, "", "?"]}, {"class": 1})
    assert index.match("cap").unknown == ["cap"]
    assert index.match("cap").scores.tolist() == [0, 0, 0]
    assert index.like(0).tolist() == [0, 0, 0]
    assert len(TfidfIndex({"class": []}, {"class": 1}).match("cap").scores) == 0


def test_fields_and_weights_must_fit() -> None:
    for weights in ({}, {"class": 0.0}, {"class": float("nan")}, {"class": 1, "colour": 1}):
        with pytest.raises(ValueError, match="weight"):
            TfidfIndex({"class": CLASSES}, weights)
    with pytest.raises(ValueError, match="lengths"):
        TfidfIndex({"class": CLASSES, "colour": ["blue"]}, {"class": 1, "colour": 1})


def test_a_class_name_is_split_at_underscores_and_lower_cased() -> None:
    assert words("Tableware_Water-Bottle, 500ml") == ["tableware", "water", "bottle", "500ml"]


@pytest.mark.parametrize(
    ("plural", "singular"),
    [
        ("bottles", "bottle"),
        ("boxes", "box"),
        ("axes", "axe"),
        ("watches", "watch"),
        ("brushes", "brush"),
        ("glasses", "glass"),
        ("berries", "berry"),
        ("ties", "tie"),
        ("sneakers", "sneaker"),
        ("shoes", "shoe"),
        ("vases", "vase"),
        ("sizes", "size"),
        ("buses", "bus"),
        ("lenses", "lens"),
        ("cups", "cup"),
    ],
)
def test_a_plain_plural_and_its_singular_are_one_word(plural: str, singular: str) -> None:
    assert fold_plural(plural) == fold_plural(singular) == singular


def test_movie_and_movies_meet_although_berry_and_berries_do() -> None:
    assert fold_plural("movies") == fold_plural("movie")


@pytest.mark.parametrize("word", ["glass", "bus", "gas", "cactus", "iris", "lens", "blue", "s", "", "500", "ключис"])
def test_what_is_no_plain_plural_stays(word: str) -> None:
    assert fold_plural(word) == word


def test_a_possessive_adds_no_word() -> None:
    assert words("women's bags, men’s caps") == ["women", "bag", "men", "cap"]


def test_other_scripts_keep_their_words_whole() -> None:
    assert raw_words("синяя бутылка") == ["синяя", "бутылка"]
    # Vowel signs are combining marks; at each of them a rule of letters and digits alone would split.
    assert raw_words("नीली बोतल") == ["नीली", "बोतल"]
    assert raw_words("ＢＬＵＥ") == ["blue"]


def test_a_text_without_letters_has_no_words() -> None:
    assert words(" _-!? \n\t…") == []
