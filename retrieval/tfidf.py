"""Search by words: TF-IDF over what is said of pictures, in weighted fields, ranked by cosine.

The counts of each field are multiplied by its weight and added, then scikit-learn's ``TfidfTransformer`` does the rest
(smoothed idf, rows of unit length). A query is weighted by the same idf. Pictures often have the same words, so the
matrix has one row for each distinct combination.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retrieval.words import fold_plural, raw_words, words
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

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
