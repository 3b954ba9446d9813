"""Log-likelihood of each label as the answer to a question about an image.

Image and question are encoded once, and all labels continue that prefix in one pass: they form a trie, in which labels
share common beginnings and each token attends to its own label only. Scores equal those of separate passes, and of
``DynamicCache.batch_repeat_interleave``, which needs a copy of the prefix for each label and encodes common beginnings
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from lightning_modules.generative.model import Prefix, VisionLanguageModel
from vitrail.errors import UserError

ROOT = -1
"""The end of the prompt, where every label starts."""


@dataclass
class LabelTrie:
    """Prefix tree of labels; a node is one token, and parents precede their children.

    Attributes:
        tokens: token of each node.
        parents: parent of each node, or ``ROOT``.
        depths: depth of each node, 0 for a label's first token.
        children: children by token of each node and of ``ROOT``.
        paths: nodes of each label from the first to the last token.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    children: dict[int, dict[int, int]] = field(default_factory=lambda: {ROOT: {}})
    paths: list[list[int]] = field(default_factory=list)

    @property
    def inner(self) -> list[int]:
        """Nodes with children, in order; the others need not be encoded."""
        return [node for node in range(len(self.tokens)) if self.children[node]]

    def add(self, label: Sequence[int]) -> None:
        """Add a label's tokens, with the end token."""
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

    def node_of(self, tokens: Sequence[int]) -> int:
        """Node of a label's first tokens; ``ROOT`` for none."""
        node = ROOT
        for token in tokens:
            node = self.children[node].get(token, node)  # what follows an end is padding
        return node


def trie_of(labels: Sequence[Sequence[int]]) -> LabelTrie:
    """The trie of these labels."""
    trie = LabelTrie()
    for number, label in enumerate(labels):
        if (first := labels.index(label)) != number:
            raise UserError(f"labels: numbers {first} and {number} are the same text; give them different names")
        trie.add(label)
    return trie


def packed(labels: Sequence[Sequence[int]], largest: int) -> list[tuple[list[int], LabelTrie]]:
    """Sort the labels into tries of limited size; return for each trie the indices of its labels, and the trie."""
    trees: list[tuple[list[int], LabelTrie]] = []
    for number in sorted(range(len(labels)), key=lambda one: list(labels[one])):
        if not trees or len(trees[-1][1].tokens) + len(labels[number]) > largest:
            trees.append(([], LabelTrie()))
        trees[-1][0].append(number)
        trees[-1][1].add(labels[number])
    return trees


TOKENS_AT_A_TIME = 512
"""Label tokens encoded in one pass."""

LOGITS_AT_A_TIME = 2**25
"""Logits in memory at a time, 128 MiB."""


class LabelScorer:
    """Scores the labels of one task."""

    def __init__(
        self, labels: Sequence[Sequence[int]], length_normalised: bool = True, tokens_at_a_time: int = TOKENS_AT_A_TIME
    ) -> None:
        self.labels = labels
        self.trie = trie_of(labels)
        self.length_normalised = length_normalised
        self._tokens_at_a_time = tokens_at_a_time

    @cached_property
    def _trees(self) -> list[tuple[list[int], LabelTrie]]:
        return packed(self.labels, self._tokens_at_a_time)

    def __call__(self, model: VisionLanguageModel, prefix: Prefix) -> torch.Tensor:
        """Log-likelihood of each label, mean or sum over its tokens, float32 ``(B, C)``."""
        scores = torch.empty(len(prefix.hidden), len(self.labels), device=prefix.hidden.device)
        for numbers, tree in self._trees:
            tokens = token_log_likelihoods(model, prefix, tree)
            for number, path in zip(numbers, tree.paths, strict=True):
                total = tokens[:, path].sum(dim=1)
                scores[:, number] = total / len(path) if self.length_normalised else total
        return scores


def token_log_likelihoods(model: VisionLanguageModel, prefix: Prefix, tree: LabelTrie) -> torch.Tensor:
    """Log-likelihood of each node's token given its ancestors, float32 ``(B, nodes)``."""
    device = prefix.hidden.device
    inner = tree.inner
    hidden = prefix.hidden[:, None]
    if inner:
        place = {node: index for index, node in enumerate(inner)}
        attends = torch.zeros(len(inner), len(inner), dtype=torch.bool)
        for index, node in enumerate(inner):
            if tree.parents[node] != ROOT:
                attends[index] = attends[place[tree.parents[node]]]
            attends[index, index] = True
        tokens, depths = (
            torch.tensor([of[node] for node in inner], device=device) for of in (tree.tokens, tree.depths)
        )
        hidden = torch.cat([hidden, model.extend_tree(prefix, tokens, depths, attends.to(device))], dim=1)
    found = torch.empty(len(hidden), len(tree.tokens), device=device)
    sources = [ROOT, *inner]
    vocabulary = int(model.configuration.text_config.vocab_size)
    step = max(1, LOGITS_AT_A_TIME // (len(hidden) * vocabulary))
    for start in range(0, len(sources), step):
        logits = model.logits(hidden[:, start : start + step])
        norms = logits.logsumexp(dim=-1)
        rows, nodes = [], []
        for row, source in enumerate(sources[start : start + step]):
            behind = list(tree.children[source].values())
            rows += [row] * len(behind)
            nodes += behind
        wanted = torch.tensor([tree.tokens[node] for node in nodes], device=device)
        found[:, nodes] = logits[:, rows, wanted] - norms[:, rows]
    return found
