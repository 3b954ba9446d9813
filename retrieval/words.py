"""Words of a text, the same for queries and for what they search: lower case, split, plain plurals folded.

A word is a run of letters, digits and combining marks of any script, so ``tableware_water_bottle`` is three words.
``'s`` is left out. English plurals are folded by their spelling, without a dictionary (compare Harman, How effective
is suffixing?, JASIS 1991, the "S" stemmer):

- three letters or fewer, and endings ``ss``, ``us``, ``is``: as they are (glass, bus, iris)
- ``ies``: ``y`` (berries); a word in ``ie`` too, so that movie and movies meet
- ``es`` after ``ss``, ``x``, ``zz``, ``ch`` or ``sh``: left out (glasses, boxes, watches, brushes)
- any other ``s``: left out (bottles, sneakers, shoes, vases)

The result need not be English (jeans: jean, canvas: canva): it is only compared with other results. Irregular plurals
(knives, mice) and those in ``oes`` (tomatoes) are other words than their singulars.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

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
