"""Which label a free answer names: normalised, by whole words, synonyms included.

Searching for labels as parts of the answer finds "iris" in "yellow iris", and "rose" in "primrose"; here words are
compared, and the longest name wins.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

from vitrail.errors import UserError

_SHORTEST_PLURAL = 4


def words_of(text: str) -> tuple[str, ...]:
    """Words of a text: lower case, without accents and punctuation, plain plurals folded."""
    plain = "".join(one for one in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(one))
    # An apostrophe belongs to its word: "bird's" is one, "bird-of-paradise" are three.
    found = re.findall(r"[^\W_]+", re.sub(r"['’`]", "", plain))
    return tuple(_singular(word) for word in found)


class LabelMatcher:
    """Finds the label that an answer names.

    Args:
        labels: names of the labels.
        synonyms: for some labels further names.

    Raises:
        UserError: for synonyms of a label that is not there, and a name that stands for two labels.
    """

    def __init__(self, labels: Sequence[str], synonyms: Mapping[str, Sequence[str]] | None = None) -> None:
        if strange := sorted(set(synonyms or {}) - set(labels)):
            raise UserError(f"synonyms: there is no label {strange[0]!r}; labels are {', '.join(labels[:10])}, …")
        self._labels: dict[tuple[str, ...], int] = {}
        for number, label in enumerate(labels):
            for name in (label, *(synonyms or {}).get(label, ())):
                words = words_of(name)
                if not words:
                    raise UserError(f"synonyms: {name!r} of {label!r} has no letters; leave it out")
                if self._labels.setdefault(words, number) != number:
                    other = labels[self._labels[words]]
                    raise UserError(f"synonyms: {name!r} would mean both {other!r} and {label!r}; leave one out")
        self._longest = max(map(len, self._labels), default=0)

    def __call__(self, answer: str) -> int | None:
        """Number of the label that an answer names.

        Returns:
            None where it names none, or several: "an iris or a rose" is no answer.
        """
        words = words_of(answer)
        found: set[int] = set()
        place = 0
        while place < len(words):
            for length in range(min(self._longest, len(words) - place), 0, -1):
                number = self._labels.get(words[place : place + length])
                if number is not None:
                    found.add(number)
                    place += length - 1
                    break
            place += 1
        return found.pop() if len(found) == 1 else None


def _singular(word: str) -> str:
    if len(word) >= _SHORTEST_PLURAL and word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word
