import pytest

from retrieval.search.text import fold_plural, raw_words, words


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
