"""Search by words: TF-IDF over what is said of images, in weighted fields, ranked by cosine.

The counts of each field are multiplied by its weight and added, then scikit-learn's ``TfidfTransformer`` does the rest
(smoothed idf, rows of unit length). A query is weighted by the same idf. Images often have the same words, so the
matrix has one row for each distinct combination.

Words of a text, the same for queries and for what they search: lower case, split, plain plurals folded.

A word is a run of letters, digits and combining marks of any script, so ``tableware_water_bottle`` is three words.
``'s`` is left out. English plurals are folded by their spelling, without a dictionary (compare Harman, How effective
is suffixing?, JASIS 1991, the "S" stemmer):

- three letters or fewer, and endings ``ss``, ``us``, ``is``: as they are (glass, bus, iris)
- ``ies``: ``y`` (berries); a word in ``ie`` too, so that movie and movies meet
- ``es`` after ``ss``, ``x``, ``zz``, ``ch`` or ``sh``: left out (glasses, boxes, watches, brushes)
- any other ``s``: left out (bottles, sneakers, shoes, vases)

The result need not be English (jeans: jean, canvas: canva): it is only compared with other results. Irregular plurals
(knives, mice) and those in ``oes`` (tomatoes) are other words than their singulars.

What is said of a gallery's images in words, and the search in it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval.schema import LABEL, PREDICTED
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from retrieval.gallery import Gallery


# What the rule for `s` would tear away from its plural or its singular.
_EXCEPTIONS = {"buses": "bus", "gases": "gas", "lens": "lens", "lenses": "lens"}

_POSSESSIVE = re.compile("['’]s(?!\\w)")


def words(text: str) -> list[str]:
    """Words of a text in their order, folded.

    Args:
        text: in any script.
    """
    return [fold_plural(word) for word in raw_words(text)]


def raw_words(text: str) -> list[str]:
    """Words of a text in their order, lower case, with their plurals."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = _POSSESSIVE.sub("", text.casefold())
    return "".join(letter if _belongs_to_word(letter) else " " for letter in text).split()


def fold_plural(word: str) -> str:
    """The singular of a plain English plural; every other word stays, but see the module.

    Args:
        word: lower case.
    """
    if word in _EXCEPTIONS or len(word) <= 3 or not word.isascii():
        return _EXCEPTIONS.get(word, word)
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    if word.endswith("ie"):
        return f"{word[:-2]}y"
    # Four letters are rather the plural of three that end in e (axes) than of two.
    if len(word) > 4 and word.endswith(("sses", "xes", "zzes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


@lru_cache(maxsize=4096)
def _belongs_to_word(letter: str) -> bool:
    """Letters, digits, and the marks without which words of many scripts would fall apart."""
    return unicodedata.category(letter)[0] in "LNM"


CLASS_WEIGHT, OTHER_WEIGHT = 2.0, 1.0
"""How much the words of the class, and those of any other field, count."""

_SHORTEST_HEAD = 3
"""Letters that a word must have to be looked for at the end of others."""

_FUNCTION_WORDS = frozenset(raw_words("a an and are at by for from in is my of on or that the this to with"))
"""What a person need not be told of when no document holds it, and what no other word is looked for instead of."""


@dataclass(frozen=True, eq=False)
class WordMatches:
    """How well N documents answer a query.

    Attributes:
        scores: float32 ``(N,)``, cosines, 0 where no word is shared.
        unknown: words of the query that no document holds, as they were asked, in order; without "and" and its like,
            unless there is nothing else.
        read_as: words that no document holds, with those that end in them and were looked for instead.
    """

    scores: NDArray[np.float32]
    unknown: list[str]
    read_as: dict[str, list[str]]


def default_weights(fields: Sequence[str]) -> dict[str, float]:
    """Weights of fields: the class counts twice."""
    return {field: CLASS_WEIGHT if field == LABEL_TASK else OTHER_WEIGHT for field in fields}


class TfidfIndex:
    """Documents of several fields, searched by words.

    Args:
        fields: the text of each of N documents by field, None or empty where there is none.
        weights: of each field, above 0.

    Raises:
        ValueError: if a field has no weight, a weight is not above 0, or fields are of different lengths.
    """

    def __init__(self, fields: Mapping[str, Sequence[str | None]], weights: Mapping[str, float]) -> None:
        from scipy.sparse import csr_matrix
        from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

        if not fields or set(fields) != set(weights) or any(not weight > 0 for weight in weights.values()):
            raise ValueError(f"fields {sorted(fields)} need one weight above 0 each, got {dict(weights)}")
        if len({len(texts) for texts in fields.values()}) > 1:
            raise ValueError("fields are of different lengths")
        rows: dict[tuple[str, ...], int] = {}
        self._row = np.array(
            [rows.setdefault(texts, len(rows)) for texts in zip(*_without_none(fields), strict=True)], dtype=np.int64
        )
        columns = [[row[place] for row in rows] for place in range(len(fields))]
        vocabulary = sorted({word for texts in columns for text in texts for word in words(text)})
        self._places = {word: place for place, word in enumerate(vocabulary)}
        self._matrix: csr_matrix = csr_matrix((len(rows), 0), dtype=np.float64)
        if not vocabulary:
            return
        counter = CountVectorizer(analyzer=words, vocabulary=vocabulary)
        counts = sum(
            weights[field] * counter.transform(texts) for field, texts in zip(fields, columns, strict=True)
        ).tocsr()
        # How rare a word is, is counted over documents, not over distinct ones.
        self._idf = TfidfTransformer().fit(counts[self._row])
        self._matrix = self._idf.transform(counts)

    def __len__(self) -> int:
        return len(self._row)

    @property
    def vocabulary(self) -> list[str]:
        """All words, folded, in ascending order."""
        return list(self._places)

    def match(self, text: str) -> WordMatches:
        """Score all documents for a query.

        A word that no document holds stands for those that end in it, because that is where the head of an English
        compound is (a handbag is a bag); they share its weight.

        Args:
            text: the query.
        """
        query = np.zeros(len(self._places))
        unknown: dict[str, None] = {}
        read_as: dict[str, list[str]] = {}
        for asked in raw_words(text):
            word = fold_plural(asked)
            if word in self._places:
                query[self._places[word]] += 1
            elif asked not in _FUNCTION_WORDS and (compounds := self._compounds(word)):
                read_as[asked] = compounds
                query[[self._places[compound] for compound in compounds]] += 1 / len(compounds)
            else:
                unknown[asked] = None
        telling = [asked for asked in unknown if asked not in _FUNCTION_WORDS]
        return WordMatches(self._cosines(query), telling if telling or query.any() else list(unknown), read_as)

    def like(self, document: int) -> NDArray[np.float32]:
        """Cosines of all documents with one of them.

        Args:
            document: its place, 0 to N − 1.

        Returns:
            float32 ``(N,)``.
        """
        if not self._matrix.shape[1]:
            return np.zeros(len(self), dtype=np.float32)
        of_rows = (self._matrix @ self._matrix[int(self._row[document])].T).toarray()[:, 0]
        return _for_documents(of_rows, self._row)

    def _compounds(self, word: str) -> list[str]:
        if len(word) < _SHORTEST_HEAD:
            return []
        return [known for known in self._places if known.endswith(word)]

    def _cosines(self, counts: NDArray[np.float64]) -> NDArray[np.float32]:
        if not counts.any():
            return np.zeros(len(self), dtype=np.float32)
        query = counts * self._idf.idf_
        return _for_documents(self._matrix @ (query / np.linalg.norm(query)), self._row)


def _for_documents(of_rows: NDArray[np.float64], row: NDArray[np.int64]) -> NDArray[np.float32]:
    """Rounded before they are compared, so that equal documents have equal scores whatever the order of summing."""
    scores: NDArray[np.float32] = np.round(of_rows, 6).astype(np.float32)[row]
    return scores


def _without_none(fields: Mapping[str, Sequence[str | None]]) -> list[list[str]]:
    return [[text or "" for text in texts] for texts in fields.values()]


WordSource = Literal["predicted", "label", "caption"]
"""What the words are: a model's answers, the true labels, or the captions of the data."""


class RankedRows(NamedTuple):
    """Rows of a gallery, best first.

    Attributes:
        rows: int64 ``(n,)``, places of images in the gallery's order.
        scores: float32 ``(n,)``.
        notes: what a person should know of it, one line each.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    notes: list[str]


class GalleryWords:
    """Ranks the images of a gallery by TF-IDF.

    Args:
        gallery: whose images are ranked.
        source: what the words are.
        words_gallery: another gallery of the same images that the words are taken from, joined by id; an image
            whose content is another there gets no words.
        weights: of fields (task names, or ``caption``) that are not to have their default ones.

    Attributes:
        ids: of the gallery's images, in its order.
        notes: what a person should know of the words, one line each.

    Raises:
        UserError: if there are no such words or fields, or the galleries share no image, or only ids.
    """

    def __init__(
        self,
        gallery: Gallery,
        source: WordSource,
        words_gallery: Gallery | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        speaker = gallery if words_gallery is None else words_gallery
        columns = _columns(speaker, source)
        table = speaker.table(["id", *columns.values()])
        texts = {field: table.column(column).to_pylist() for field, column in columns.items()}
        self.ids: list[str] = table.column("id").to_pylist()
        self.notes: list[str] = []
        if words_gallery is not None:
            places, self.notes = _joined(gallery, words_gallery)
            self.ids = gallery.table(["id"]).column("id").to_pylist()
            texts = {
                field: [None if place is None else column[place] for place in places] for field, column in texts.items()
            }
        self._index = TfidfIndex(texts, _checked_weights(list(columns), weights or {}))
        self._row_of = {identifier: row for row, identifier in enumerate(self.ids)}

    def rows_of(self, ids: list[str]) -> NDArray[np.int64]:
        """Places of images, int64 ``(n,)``, of ids that are there."""
        return np.array([self._row_of[identifier] for identifier in ids], dtype=np.int64)

    def by_text(self, text: str, allowed: NDArray[np.int64] | None) -> RankedRows:
        """Images that share a word with a text.

        Args:
            text: the query.
            allowed: rows that may be found; all by default.
        """
        matches = self._index.match(text)
        notes = [f"no image has the word {word!r} or one that ends so" for word in matches.unknown]
        if len(notes) > 1:
            notes = [f"no image has any of the words {', '.join(matches.unknown)}"]
        notes += [f"{asked!r} is read as {' or '.join(found)}" for asked, found in matches.read_as.items()]
        if not matches.scores.any():
            notes = ["no word of the query is known: " + (", ".join(matches.unknown) or "it has none")]
        return _ranked(matches.scores, allowed, [*notes, *self.notes])

    def like(self, identifier: str, allowed: NDArray[np.int64] | None) -> RankedRows:
        """Images of which similar things are said as of one of them, without itself.

        Args:
            identifier: id of an image that is there.
            allowed: rows that may be found; all by default.
        """
        row = self._row_of[identifier]
        scores = self._index.like(row)
        notes = [] if scores.any() else [f"nothing is said of {identifier} in words"]
        scores[row] = 0
        return _ranked(scores, allowed, [*notes, *self.notes])


def _joined(gallery: Gallery, words_gallery: Gallery) -> tuple[list[int | None], list[str]]:
    """Where the words of each image of a gallery stand in another one, None for nowhere; and notes.

    Ids are what users call their images, and two data sets may both have a ``00001.jpg``. So contents are compared.

    Raises:
        UserError: where the galleries have no image in common.
    """
    own, theirs = (one.table(["id", "content"]) for one in (gallery, words_gallery))
    there = zip(theirs.column("id").to_pylist(), theirs.column("content").to_pylist(), strict=True)
    known = {identifier: (place, content) for place, (identifier, content) in enumerate(there)}
    places: list[int | None] = []
    missing = other = unchecked = 0
    for identifier, content in zip(own.column("id").to_pylist(), own.column("content").to_pylist(), strict=True):
        place, told = known.get(identifier, (None, ""))
        missing += place is None
        if place is not None and content and told and content != told:
            place, other = None, other + 1
        elif place is not None and not (content and told):
            unchecked += 1
        places.append(place)
    if places and all(place is None for place in places):
        others = (
            f": {other:,} of the same ids are there, but their images are others (or were read from elsewhere: images "
            "in shards are told apart by their place)"
        )
        raise UserError(
            f"--words-gallery {words_gallery.uri}: has none of the images of {gallery.uri}{others if other else ''}; "
            "name a gallery of the same data"
        )
    notes = []
    if missing:
        notes.append(f"{missing:,} of {len(places):,} images have no words in {words_gallery.uri}")
    if other:
        notes.append(
            f"{other:,} of {len(places):,} images have another content in {words_gallery.uri} under the same id; "
            "their words are left out"
        )
    if unchecked:
        notes.append(
            f"{unchecked:,} of {len(places):,} images are joined with {words_gallery.uri} by id alone: their content "
            "is not known to both galleries"
        )
    return places, notes


def _ranked(scores: NDArray[np.float32], allowed: NDArray[np.int64] | None, notes: list[str]) -> RankedRows:
    rows = np.flatnonzero(scores) if allowed is None else np.sort(allowed)[scores[np.sort(allowed)] != 0]
    order = rows[np.argsort(-scores[rows], kind="stable")]
    return RankedRows(order, scores[order], notes)


def _columns(gallery: Gallery, source: WordSource) -> dict[str, str]:
    """The columns that hold the words, by field."""
    if source == "caption":
        return {"caption": "caption"}
    prefix, tasks = (
        (PREDICTED, list(gallery.identity.predicts)) if source == "predicted" else (LABEL, gallery.identity.labels)
    )
    if tasks:
        return {task: f"{prefix}{task}" for task in tasks}
    what = "its model predicts nothing" if source == "predicted" else "its data have no labels"
    raise UserError(
        f"{gallery.uri}: has no words to search, because {what}; choose other ones with --words, name a gallery that "
        "has some with --words-gallery, or use --ranker clip"
    )


def _checked_weights(fields: list[str], given: Mapping[str, float]) -> dict[str, float]:
    for field, weight in given.items():
        if field not in fields:
            raise UserError(f"--weight {field}: there is no such field; there are {', '.join(fields)}")
        if not 0 < weight < float("inf"):
            raise UserError(f"--weight {field}={weight}: must be above 0")
    return {**default_weights(fields), **given}
