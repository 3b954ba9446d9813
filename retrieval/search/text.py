"""Search in text fields of images: TF-IDF over predicted labels, true labels or captions, ranked by cosine.

Counts of words in each field are multiplied by the field's weight and added, then scikit-learn's ``TfidfTransformer``
does the rest (smoothed idf, rows of unit length). A query is weighted by the same idf. Many images have the same text,
so the matrix has one row for each distinct combination.

Words are runs of letters, digits and combining marks of any script, in lower case, without ``'s``;
``tableware_water_bottle`` is three words. English plurals are folded by their spelling, without a dictionary (compare
Harman, How effective is suffixing?, JASIS 1991, the "S" stemmer):

- three letters or fewer, and endings ``ss``, ``us``, ``is``: unchanged (glass, bus, iris)
- ``ies``: ``y`` (berries); a word in ``ie`` too, so that movie and movies match
- ``es`` after ``ss``, ``x``, ``zz``, ``ch`` or ``sh``: removed (glasses, boxes, watches, brushes)
- any other ``s``: removed (bottles, sneakers, shoes, vases)

The result need not be English (jeans: jean, canvas: canva): it is only compared with other results. Irregular plurals
(knives, mice) and those in ``oes`` (tomatoes) do not match their singulars.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
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

TextSource = Literal["all", "predicted", "label", "caption"]
"""Which text fields are searched; ``all`` are the predicted and the true labels."""

TEXT_FIELDS: dict[TextSource, str] = {
    "all": "labels and predictions",
    "predicted": "predicted labels",
    "label": "true labels",
    "caption": "captions",
}
"""What they are called in tables and on pages."""

CLASS_WEIGHT, OTHER_WEIGHT = 2.0, 1.0
"""Weights of the class, and of any other field."""

# Words that the rule for `s` would not fold to their singular.
_EXCEPTIONS = {"buses": "bus", "gases": "gas", "lens": "lens", "lenses": "lens"}

_POSSESSIVE = re.compile("['’]s(?!\\w)")

_SHORTEST_HEAD = 3
"""Letters that a word must have to be looked for at the end of others."""


def words(text: str) -> list[str]:
    """Return the words of a text in any script, in their order, folded."""
    return [fold_plural(word) for word in raw_words(text)]


def raw_words(text: str) -> list[str]:
    """Return the words of a text in their order, lower case, with their plurals."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = _POSSESSIVE.sub("", text.casefold())
    return "".join(letter if _belongs_to_word(letter) else " " for letter in text).split()


def fold_plural(word: str) -> str:
    """Return the singular of a regular English plural in lower case; other words unchanged, but see the module."""
    if word in _EXCEPTIONS or len(word) <= 3 or not word.isascii():
        return _EXCEPTIONS.get(word, word)
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    if word.endswith("ie"):
        return f"{word[:-2]}y"
    # Four letters are more often the plural of three that end in e (axes) than of two.
    if len(word) > 4 and word.endswith(("sses", "xes", "zzes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


@lru_cache(maxsize=4096)
def _belongs_to_word(letter: str) -> bool:
    # Combining marks too, without which words of many scripts would be split.
    return unicodedata.category(letter)[0] in "LNM"


_FUNCTION_WORDS = frozenset(raw_words("a an and are at by for from in is my of on or that the this to with"))
"""Not reported where no document has them, and no other word is looked for in their place."""


class TextMatches(NamedTuple):
    """How well N documents match a query.

    Attributes:
        scores: float32 ``(N,)``, cosines, 0 where no word is shared.
        unknown: words of the query that no document has, as they were typed, in order; without "and" and the like,
            unless there is nothing else.
        read_as: words that no document has, with those that end in them and were looked for instead.
    """

    scores: NDArray[np.float32]
    unknown: list[str]
    read_as: dict[str, list[str]]


class TfidfIndex:
    """Documents of several text fields.

    Args:
        fields: the text of each of N documents by field, or a list of texts; None or empty where there is none.
        weights: of each field, above 0.

    Raises:
        ValueError: if a field has no weight, a weight is not above 0, or fields are of different lengths.
    """

    def __init__(self, fields: Mapping[str, Sequence[str | list[str] | None]], weights: Mapping[str, float]) -> None:
        from scipy.sparse import csr_matrix
        from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

        if not fields or set(fields) != set(weights) or any(not weight > 0 for weight in weights.values()):
            raise ValueError(f"fields {sorted(fields)} need one weight above 0 each, got {dict(weights)}")
        if len({len(texts) for texts in fields.values()}) > 1:
            raise ValueError("fields are of different lengths")
        rows: dict[tuple[str | None, ...], int] = {}
        as_text = [[" ".join(text) if isinstance(text, list) else text for text in texts] for texts in fields.values()]
        documents = zip(*as_text, strict=True)
        self._row = np.array([rows.setdefault(texts, len(rows)) for texts in documents], dtype=np.int64)
        columns = [[row[place] or "" for row in rows] for place in range(len(fields))]
        vocabulary = sorted({word for texts in columns for text in texts for word in words(text)})
        self._places = {word: place for place, word in enumerate(vocabulary)}
        self._matrix: csr_matrix = csr_matrix((len(rows), 0), dtype=np.float64)
        if not vocabulary:
            return
        counter = CountVectorizer(analyzer=words, vocabulary=vocabulary)
        counts = sum(
            weights[field] * counter.transform(texts) for field, texts in zip(fields, columns, strict=True)
        ).tocsr()
        # Document frequencies are those of all documents, not of the distinct ones.
        self._idf = TfidfTransformer().fit(counts[self._row])
        self._matrix = self._idf.transform(counts)

    def match(self, text: str) -> TextMatches:
        """Score all documents for a query.

        A word that no document has stands for those that end in it, because that is where the head of an English
        compound is (a handbag is a bag); they share its weight.
        """
        query = np.zeros(len(self._places))
        unknown: dict[str, None] = {}
        read_as: dict[str, list[str]] = {}
        for typed in raw_words(text):
            word = fold_plural(typed)
            if word in self._places:
                query[self._places[word]] += 1
            elif typed not in _FUNCTION_WORDS and (compounds := self._compounds(word)):
                read_as[typed] = compounds
                query[[self._places[compound] for compound in compounds]] += 1 / len(compounds)
            else:
                unknown[typed] = None
        reported = [typed for typed in unknown if typed not in _FUNCTION_WORDS]
        if not query.any():
            return TextMatches(np.zeros(len(self._row), np.float32), reported or list(unknown), read_as)
        query *= self._idf.idf_
        return TextMatches(self._of_documents(self._matrix @ (query / np.linalg.norm(query))), reported, read_as)

    def like(self, document: int) -> NDArray[np.float32]:
        """Return cosines of all documents with the one at this place, float32 ``(N,)``."""
        return self._of_documents((self._matrix @ self._matrix[int(self._row[document])].T).toarray()[:, 0])

    def _compounds(self, word: str) -> list[str]:
        return [known for known in self._places if known.endswith(word)] if len(word) >= _SHORTEST_HEAD else []

    def _of_documents(self, of_rows: NDArray[np.float64]) -> NDArray[np.float32]:
        # Rounded before they are compared, so that equal documents have equal scores whatever the order of summing.
        scores: NDArray[np.float32] = np.round(of_rows, 6).astype(np.float32)[self._row]
        return scores


class RankedRows(NamedTuple):
    """Rows of a gallery, best first.

    Attributes:
        rows: int64 ``(n,)``, places of images in the gallery's order.
        scores: float32 ``(n,)``.
        notes: for the user, one line each.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    notes: list[str]


class TextIndex:
    """Ranks the images of a gallery by TF-IDF.

    Args:
        gallery: whose images are ranked.
        source: which text fields.
        text_gallery: another gallery of the same images that the text fields are taken from, joined by id; an image
            whose content is another there gets no text.
        weights: of fields (task names, or ``caption``) that are not to have their default ones.

    Attributes:
        ids: of the gallery's images, in its order.

    Raises:
        UserError: if there are no such fields, or the galleries share no image, or only ids.
    """

    def __init__(
        self,
        gallery: Gallery,
        source: TextSource,
        text_gallery: Gallery | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        columns = _columns(text_gallery or gallery, source)
        table = (text_gallery or gallery).table(["id", *(one for names in columns.values() for one in names)])
        texts = {
            field: _merged([table.column(column).to_pylist() for column in names]) for field, names in columns.items()
        }
        self.ids: list[str] = table.column("id").to_pylist()
        self._notes: list[str] = []
        if text_gallery is not None:
            places, self._notes = _joined(gallery, text_gallery)
            self.ids = gallery.table(["id"]).column("id").to_pylist()
            texts = {
                field: [None if place is None else column[place] for place in places] for field, column in texts.items()
            }
        self._index = TfidfIndex(texts, _field_weights(list(columns), weights or {}))
        self._row_of = {identifier: row for row, identifier in enumerate(self.ids)}

    def rows_of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the places of images, int64 ``(n,)``."""
        return np.array([self._row_of[identifier] for identifier in ids], dtype=np.int64)

    def search(self, text: str, allowed: NDArray[np.int64] | None = None) -> RankedRows:
        """Rank the images that share a word with a text; only ``allowed`` rows where given."""
        matches = self._index.match(text)
        notes = [f"no image has the word {word!r} or one that ends so" for word in matches.unknown]
        if len(notes) > 1:
            notes = [f"no image has any of the words {', '.join(matches.unknown)}"]
        notes += [f"{typed!r} is read as {' or '.join(found)}" for typed, found in matches.read_as.items()]
        if not matches.scores.any():
            notes = ["no word of the query is known: " + (", ".join(matches.unknown) or "it has none")]
        return _ranked(matches.scores, allowed, [*notes, *self._notes])

    def like(self, identifier: str, allowed: NDArray[np.int64] | None = None) -> RankedRows:
        """Rank the images with text like that of the image ``identifier``, without itself."""
        row = self._row_of[identifier]
        scores = self._index.like(row)
        notes = [] if scores.any() else [f"{identifier} has no text"]
        scores[row] = 0
        return _ranked(scores, allowed, [*notes, *self._notes])


def _merged(columns: list[list[str | list[str] | None]]) -> list[str | list[str] | None]:
    """The texts of several columns as one; what two of them have counts once."""
    if len(columns) == 1:
        return columns[0]
    return [
        list(dict.fromkeys(text for one in row if one for text in ([one] if isinstance(one, str) else one)))
        for row in zip(*columns, strict=True)
    ]


def _joined(gallery: Gallery, text_gallery: Gallery) -> tuple[list[int | None], list[str]]:
    """Places of a gallery's images in another one, None for those it lacks; and notes.

    Ids are what users call their images, and two data sets may both have a ``00001.jpg``. So contents are compared.

    Raises:
        UserError: where the galleries have no image in common.
    """
    own, theirs = (one.table(["id", "content"]).to_pydict() for one in (gallery, text_gallery))
    known = {
        identifier: (place, content)
        for place, (identifier, content) in enumerate(zip(theirs["id"], theirs["content"], strict=True))
    }
    places: list[int | None] = []
    missing = other = unchecked = 0
    for identifier, content in zip(own["id"], own["content"], strict=True):
        place, their_content = known.get(identifier, (None, ""))
        missing += place is None
        if place is not None and content and their_content and content != their_content:
            place, other = None, other + 1
        elif place is not None and not (content and their_content):
            unchecked += 1
        places.append(place)
    if places and all(place is None for place in places):
        others = (
            f": {other:,} of the same ids are there, but with other images (or were read from elsewhere: images in "
            "shards are distinguished by their place)"
        )
        raise UserError(
            f"--words-gallery {text_gallery.uri}: has none of the images of {gallery.uri}{others if other else ''}; "
            "name a gallery of the same data"
        )
    notes = {
        f"have no text in {text_gallery.uri}": missing,
        f"have another content in {text_gallery.uri} under the same id; its text is left out": other,
        f"are joined with {text_gallery.uri} by id alone: their content is not known to both galleries": unchecked,
    }
    return places, [f"{count:,} of {len(places):,} images {note}" for note, count in notes.items() if count]


def _ranked(scores: NDArray[np.float32], allowed: NDArray[np.int64] | None, notes: list[str]) -> RankedRows:
    rows = np.flatnonzero(scores) if allowed is None else np.sort(allowed)[scores[np.sort(allowed)] != 0]
    order = rows[np.argsort(-scores[rows], kind="stable")]
    return RankedRows(order, scores[order], notes)


def _columns(gallery: Gallery, source: TextSource) -> dict[str, list[str]]:
    """The columns of each text field."""
    if source == "caption":
        return {"caption": ["caption"]}
    identity = gallery.identity
    found: dict[str, list[str]] = {}
    for prefix, named, sources in (
        (PREDICTED, list(identity.predicts), ("all", "predicted")),
        (LABEL, identity.labels, ("all", "label")),
    ):
        for task in identity.worded(named) if source in sources else []:
            found.setdefault(task, []).append(f"{prefix}{task}")
    if found:
        return found
    faults = {"predicted": "its model predicts no labels", "label": "its data have no labels"}
    what = faults.get(source, " and ".join(faults.values()))
    raise UserError(
        f"{gallery.uri}: has no text fields to search, because {what}; choose others with --words, name a gallery that "
        "has some with --words-gallery, or use --ranker vector"
    )


def _field_weights(fields: list[str], given: Mapping[str, float]) -> dict[str, float]:
    for field, weight in given.items():
        if field not in fields:
            raise UserError(f"--weight {field}: there is no such field; there are {', '.join(fields)}")
        if not 0 < weight < float("inf"):
            raise UserError(f"--weight {field}={weight}: must be above 0")
    return {**{field: CLASS_WEIGHT if field == LABEL_TASK else OTHER_WEIGHT for field in fields}, **given}
