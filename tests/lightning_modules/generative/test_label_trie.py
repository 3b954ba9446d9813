from __future__ import annotations

import pytest

from lightning_modules.generative.scoring import ROOT, packed, trie_of
from vitrail.errors import UserError

LABELS = [[1, 2, 9], [1, 3, 9], [1, 9], [4, 2, 9]]


def test_common_beginnings_are_one_node() -> None:
    trie = trie_of(LABELS)
    assert [[trie.tokens[node] for node in path] for path in trie.paths] == LABELS
    assert trie.tokens.count(1) == 1
    assert len(trie.tokens) == 9
    assert set(trie.children[ROOT]) == {1, 4}
    assert set(trie.children[trie.paths[0][0]]) == {2, 3, 9}


def test_parents_come_first_and_ends_are_not_read() -> None:
    trie = trie_of(LABELS)
    assert all(parent < node for node, parent in enumerate(trie.parents))
    assert [trie.depths[node] for node in trie.paths[0]] == [0, 1, 2]
    assert [trie.tokens[node] for node in trie.inner] == [1, 2, 3, 4, 2]


def test_the_same_label_twice_is_refused() -> None:
    with pytest.raises(UserError, match="numbers 1 and 2 are the same text"):
        trie_of([[1, 9], [2, 9], [2, 9]])


@pytest.mark.parametrize("largest", [1, 3, 6, 100])
def test_packed_trees_hold_every_label_once(largest: int) -> None:
    trees = packed(LABELS, largest)
    found = {}
    for numbers, tree in trees:
        for number, path in zip(numbers, tree.paths, strict=True):
            assert number not in found
            found[number] = [tree.tokens[node] for node in path]
        assert len(tree.tokens) <= largest or len(tree.paths) == 1
    assert [found[number] for number in range(len(LABELS))] == LABELS
