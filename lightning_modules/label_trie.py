"""Labels as a tree of tokens: what several labels begin with is read once, and only labels can be walked through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vitrail.errors import UserError

ROOT = -1
"""Stands for the end of the prompt, from which every label sets out."""


@dataclass
class LabelTrie:
    """Labels whose common beginnings are shared; a node is one token, and parents come before their children.

    Attributes:
        tokens: token of each node.
        parents: node in front of each node, or ``ROOT``.
        depths: 0 for a label's first token.
        children: for each node, and ``ROOT``, the nodes behind it by token.
        paths: for each label its nodes from the first to the last token.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    children: dict[int, dict[int, int]] = field(default_factory=lambda: {ROOT: {}})
    paths: list[list[int]] = field(default_factory=list)

    @property
    def inner(self) -> list[int]:
        """Nodes that something comes behind, in order; the others need never be read."""
        return [node for node in range(len(self.tokens)) if self.children[node]]

    def add(self, label: Sequence[int]) -> None:
        """Add a label's tokens, the last of which ends it."""
        node = ROOT
        path: list[int] = []
        for token in label:
            if token not in self.children[node]:
                new = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(len(path))
                self.children[node][token] = new
                self.children[new] = {}
            node = self.children[node][token]
            path.append(node)
        self.paths.append(path)


def trie_of(labels: Sequence[Sequence[int]]) -> LabelTrie:
    """The tree of these labels.

    Args:
        labels: token ids of each, the end included; none may begin with another whole one.

    Raises:
        UserError: if two labels are the same to the tokenizer.
    """
    trie = LabelTrie()
    for label in labels:
        trie.add(label)
    ends: dict[int, int] = {}
    for number, path in enumerate(trie.paths):
        if path[-1] in ends:
            raise UserError(
                f"labels: numbers {ends[path[-1]]} and {number} are the same text; give them different names"
            )
        ends[path[-1]] = number
    return trie


def packed(labels: Sequence[Sequence[int]], largest: int) -> list[tuple[list[int], LabelTrie]]:
    """The labels in trees of limited size, those with common beginnings together.

    Args:
        labels: token ids of each, the end included.
        largest: tokens of a tree; a label that has more of them has a tree of its own.

    Returns:
        For each tree the numbers of its labels, in the order of its paths, and the tree.
    """
    trees: list[tuple[list[int], LabelTrie]] = []
    for number in sorted(range(len(labels)), key=lambda one: list(labels[one])):
        if not trees or len(trees[-1][1].tokens) + len(labels[number]) > largest:
            trees.append(([], LabelTrie()))
        trees[-1][0].append(number)
        trees[-1][1].add(labels[number])
    return trees
