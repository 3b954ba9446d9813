"""How likely a model finds each of a closed set of labels as the answer to a question about a picture.

The picture and the question are read once. All labels are read behind that one reading, in one pass: they are laid out
as a tree, in which labels with a common beginning share its tokens, and each token sees its own label only. So a label
costs its own tokens and nothing else, and its score is that of a plain pass over the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from lightning_modules.label_trie import ROOT, LabelTrie, packed, trie_of
from lightning_modules.picture_reading import Reading
from lightning_modules.vision_language import VisionLanguageModel

TOKENS_AT_A_TIME = 512
"""Tokens of labels that are read in one pass."""

LOGITS_AT_A_TIME = 2**25
"""Numbers of the vocabulary's logits that are held at a time, 128 MiB."""


class LabelScorer:
    """Scores the labels of one task.

    Args:
        labels: token ids of each label, its end included.
        length_normalised: whether a score is the mean over a label's tokens or their sum, with which long labels are
            at a disadvantage, but which a softmax makes true probabilities of.
        tokens_at_a_time: of labels that are read in one pass.

    Raises:
        UserError: if two labels are the same to the tokenizer.
    """

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

    def __call__(self, model: VisionLanguageModel, reading: Reading) -> torch.Tensor:
        """Log-likelihood of each label, the mean over its tokens or their sum.

        Args:
            model: that read.
            reading: of B pictures with the question, up to where the answer begins.

        Returns:
            float32 ``(B, C)``.
        """
        scores = torch.empty(len(reading.hidden), len(self.labels), device=reading.hidden.device)
        for numbers, tree in self._trees:
            tokens = token_log_likelihoods(model, reading, tree)
            for number, path in zip(numbers, tree.paths, strict=True):
                total = tokens[:, path].sum(dim=1)
                scores[:, number] = total / len(path) if self.length_normalised else total
        return scores


def token_log_likelihoods(model: VisionLanguageModel, reading: Reading, tree: LabelTrie) -> torch.Tensor:
    """Log-likelihood of each node's token behind those of its ancestors.

    Args:
        model: that read.
        reading: of B pictures with the question; not changed.
        tree: of labels.

    Returns:
        float32 ``(B, nodes)``.
    """
    device = reading.hidden.device
    inner = tree.inner
    hidden = reading.hidden[:, None]
    if inner:
        place = {node: index for index, node in enumerate(inner)}
        sees = torch.zeros(len(inner), len(inner), dtype=torch.bool)
        for index, node in enumerate(inner):
            if tree.parents[node] != ROOT:
                sees[index] = sees[place[tree.parents[node]]]
            sees[index, index] = True
        tokens, depths = (
            torch.tensor([of[node] for node in inner], device=device) for of in (tree.tokens, tree.depths)
        )
        hidden = torch.cat([hidden, model.read_tree(reading, tokens, depths, sees.to(device))], dim=1)
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
