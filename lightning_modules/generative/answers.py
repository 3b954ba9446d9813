"""From a generative model's outputs to logits over the labels of a task.

By default labels are scored (``generative.scoring``). The alternatives generate an answer by greedy decoding:
constrained to the labels, which may prefer one that begins well to a likelier one, or freely, with ``LabelMatcher``.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from lightning_modules.generative.model import Prefix, VisionLanguageModel
from lightning_modules.generative.prompts import Prompts
from lightning_modules.generative.scoring import LabelScorer, LabelTrie
from lightning_modules.options import AnswerOptions, checked
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK


def generate_label(model: VisionLanguageModel, prefix: Prefix, trie: LabelTrie) -> tuple[list[int], torch.Tensor]:
    """Generate one of the labels greedily.

    Returns:
        Indices of the labels, and float32 ``(B,)``: the log-likelihood of each among all labels.
    """
    label_of = {path[-1]: number for number, path in enumerate(trie.paths)}
    end_id = trie.tokens[trie.paths[0][-1]]

    def allowed(tokens: list[int]) -> list[int]:
        return list(trie.children[trie.node_of(tokens)]) or [end_id]

    found = model.generate(prefix, end_id, max(map(len, trie.paths)), allowed)
    return [label_of[trie.node_of(tokens)] for tokens in found.tokens], found.log_likelihood


def words_of(text: str) -> tuple[str, ...]:
    """Words of a text: lower case, without accents and punctuation, plain plurals folded."""
    plain = "".join(one for one in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(one))
    # An apostrophe belongs to its word: "bird's" is one, "bird-of-paradise" are three.
    words = re.findall(r"[^\W_]+", re.sub(r"['’`]", "", plain))
    return tuple(re.sub(r"(?<=\w\w[^\Ws])s$", "", word) for word in words)


class LabelMatcher:
    """Finds the label that a text names.

    By whole normalised words, synonyms included, the longest name first: a plain search would find "iris" in
    "yellow iris" and "rose" in "primrose".
    """

    def __init__(self, labels: Sequence[str], synonyms: Mapping[str, Sequence[str]] | None = None) -> None:
        if unknown := sorted(set(synonyms or {}) - set(labels)):
            raise UserError(f"synonyms: there is no label {unknown[0]!r}; labels are {', '.join(labels[:10])}, …")
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
        """Index of the only label that the text names, otherwise None."""
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


QUESTION = "What is shown in this image? Answer with its name only."
"""The default question of the main task."""

_LABELS = "{labels}"


class Answers(NamedTuple):
    """Predictions for B images."""

    logits: torch.Tensor  # float32 `(B, C)`
    named: torch.Tensor | None  # bool `(B,)`, whether a free answer names a label; None for other answers


def checked_answers(options: AnswerOptions, labels: Sequence[str]) -> AnswerOptions:
    """Validate the options against each other and the labels of all tasks."""
    given = checked(AnswerOptions, options, "answers")
    if given.content_free != "none" and given.how != "scores":
        raise UserError(f"answers.content_free: needs how: scores; leave it out with how: {given.how}")
    if unknown := sorted(set(given.synonyms) - set(labels)):
        raise UserError(f"answers.synonyms: the data have no label {unknown[0]!r}; they have {', '.join(labels[:10])}")
    return given


def checked_questions(tasks: dict[str, list[str]], questions: dict[str, str] | None) -> dict[str, str]:
    """Validate the questions by task."""
    asked = {LABEL_TASK: QUESTION} if questions is None else questions
    unknown = sorted(set(asked) - set(tasks))
    if unknown or not asked:
        raise UserError(
            f"answers.questions: the data have no {', '.join(unknown) or 'task'}; they have {', '.join(tasks)}"
        )
    return asked


def label_texts(names: Sequence[str]) -> list[str]:
    """Class names as plain words."""
    return [" ".join(name.replace("_", " ").split()) for name in names]


class Question:
    """A question with a closed set of answers.

    Attributes:
        ids: token ids of the prompt.
        labels: token ids of each label, with the end token.
        prompts: the tokenizer.
    """

    def __init__(
        self, text: str, names: Sequence[str], options: AnswerOptions, prompts: Prompts, image_tokens: int
    ) -> None:
        texts = label_texts(names)
        self.ids = prompts.prompt(text.replace(_LABELS, ", ".join(texts)), image_tokens)
        self.labels = [prompts.answer(label) for label in texts]
        self.scorer = LabelScorer(self.labels, options.length_normalised)
        self.prompts = prompts
        self._how, self._longest = options.how, options.max_tokens
        if self._how == "free":
            own = {label: options.synonyms.get(name, []) for name, label in zip(names, texts, strict=True)}
            self._matcher = LabelMatcher(texts, own)

    def answer(self, model: VisionLanguageModel, prefix: Prefix) -> Answers:
        """Predictions for B images.

        A generated label gets the likelihood of its text, and the other labels share the rest. If a text names no
        label, or several, all labels have the same logit, which is no prediction (``metrics.predicted_classes``).
        """
        device = prefix.hidden.device
        if self._how == "scores":
            return Answers(self.scorer(model, prefix), None)
        if self._how == "constrained":
            numbers, likelihood = generate_label(model, prefix, self.scorer.trie)
            chosen = torch.tensor(numbers, device=device)
            return Answers(generated_logits(chosen, likelihood, len(self.labels)), None)
        generated = model.generate(prefix, self.prompts.end_id, self._longest)
        found = [self._matcher(self.prompts.text(tokens)) for tokens in generated.tokens]
        named = torch.tensor([one is not None for one in found], device=device)
        chosen = torch.tensor([one or 0 for one in found], device=device)
        logits = generated_logits(chosen, generated.log_likelihood, len(self.labels))
        return Answers(torch.where(named[:, None], logits, -math.log(len(self.labels))), named)


def generated_logits(chosen: torch.Tensor, log_likelihood: torch.Tensor, n_labels: int) -> torch.Tensor:
    """Log-probabilities, float32 ``(B, n_labels)``, the generated label's being the largest.

    Args:
        chosen: index of the generated label, int64 ``(B,)``.
        log_likelihood: of the generated text, float32 ``(B,)``.
        n_labels: at least 2.
    """
    share = log_likelihood.exp().clamp(1.001 / n_labels, 1 - 1e-6)
    logits = torch.log((1 - share) / (n_labels - 1))[:, None].repeat(1, n_labels)
    return logits.scatter(1, chosen[:, None], share.log()[:, None])
