"""Answers that are said token by token: only labels, or anything.

Either takes the likeliest next token each time. Where only labels can be said, tokens that no label goes on with are
impossible. A label that begins well may so be preferred to one that is likelier as a whole, which is why labels are
scored by default (``label_scoring``); generation is here to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_modules.label_trie import ROOT, LabelTrie
from lightning_modules.picture_reading import Reading
from lightning_modules.vision_language import VisionLanguageModel


@dataclass(frozen=True)
class Said:
    """What B answers say.

    Attributes:
        tokens: of each answer, its end included where it came to one.
        log_likelihood: float32 ``(B,)``, of each whole answer.
    """

    tokens: list[list[int]]
    log_likelihood: torch.Tensor


def say_label(model: VisionLanguageModel, reading: Reading, trie: LabelTrie) -> tuple[list[int], torch.Tensor]:
    """Say one of the labels, and nothing else.

    Args:
        model: that read.
        reading: of B pictures with the question; not changed.
        trie: of the labels.

    Returns:
        Numbers of the labels, and float32 ``(B,)``: the log-likelihood of each, among what could have been said.
    """
    label_of = {path[-1]: number for number, path in enumerate(trie.paths)}
    nodes = [ROOT] * len(reading.hidden)
    likelihood = torch.zeros(len(nodes), device=reading.hidden.device)
    while True:
        logits = model.logits(reading.hidden)
        allowed = torch.full_like(logits, -torch.inf)
        for row, node in enumerate(nodes):
            # Who has come to an end says anything, which counts nothing.
            tokens = list(trie.children[node]) or [0]
            allowed[row, tokens] = logits[row, tokens]
        best, chosen = allowed.log_softmax(dim=-1).max(dim=-1)
        likelihood = likelihood + best
        nodes = [
            trie.children[node][token] if trie.children[node] else node
            for node, token in zip(nodes, chosen.tolist(), strict=True)
        ]
        if all(not trie.children[node] for node in nodes):
            return [label_of[node] for node in nodes], likelihood
        reading = model.read_on(reading, chosen[:, None])


def say_anything(model: VisionLanguageModel, reading: Reading, end_id: int, longest: int) -> Said:
    """Say whatever is likeliest, up to the end of the answer.

    Args:
        model: that read.
        reading: of B pictures with the question; not changed.
        end_id: token that ends an answer.
        longest: largest number of tokens, the end included.
    """
    said: list[list[int]] = [[] for _ in reading.hidden]
    likelihood = torch.zeros(len(said), device=reading.hidden.device)
    going = torch.ones_like(likelihood, dtype=torch.bool)
    for step in range(longest):
        best, chosen = model.logits(reading.hidden).log_softmax(dim=-1).max(dim=-1)
        likelihood = likelihood + best * going
        for tokens, token, goes_on in zip(said, chosen.tolist(), going.tolist(), strict=True):
            if goes_on:
                tokens.append(token)
        going = going & (chosen != end_id)
        if step + 1 == longest or not going.any():
            break
        reading = model.read_on(reading, chosen[:, None])
    return Said(said, likelihood)
