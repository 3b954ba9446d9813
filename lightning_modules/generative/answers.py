"""How a generative model's answer to a question becomes logits over the labels of a task.

By default labels are scored (``generative.scoring``). The alternatives generate an answer by greedy decoding.
Constrained decoding allows only tokens that continue a label; it may prefer a label that begins well to one that is
likelier as a whole. Of a free answer ``LabelMatcher`` finds the label that it names: by whole words, normalised,
synonyms included, the longest name first, because a plain search finds "iris" in "yellow iris", "rose" in "primrose".
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lightning_modules.generative.model import Images, Prefix, VisionLanguageModel
from lightning_modules.generative.prompts import Prompts
from lightning_modules.generative.scoring import ROOT, LabelScorer, LabelTrie
from lightning_modules.metrics import MeanLoss
from lightning_modules.options import AnswerOptions, checked
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK, UNKNOWN


@dataclass(frozen=True)
class Generated:
    """B generated answers."""

    tokens: list[list[int]]  # of each answer, its end included where it came to one
    log_likelihood: torch.Tensor  # float32 `(B,)`, of each whole answer


def generate_label(model: VisionLanguageModel, prefix: Prefix, trie: LabelTrie) -> tuple[list[int], torch.Tensor]:
    """Generate one of the labels.

    Returns:
        Numbers of the labels, and float32 ``(B,)``: the log-likelihood of each among all labels.
    """
    label_of = {path[-1]: number for number, path in enumerate(trie.paths)}
    nodes = [ROOT] * len(prefix.hidden)
    likelihood = torch.zeros(len(nodes), device=prefix.hidden.device)
    while True:
        logits = model.logits(prefix.hidden)
        allowed = torch.full_like(logits, -torch.inf)
        for row, node in enumerate(nodes):
            # Rows that have ended go on with any token, which changes nothing.
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
        prefix = model.extend(prefix, chosen[:, None])


def generate(model: VisionLanguageModel, prefix: Prefix, end_id: int, longest: int) -> Generated:
    """Generate the likeliest next tokens, up to the end of the answer."""
    generated: list[list[int]] = [[] for _ in prefix.hidden]
    likelihood = torch.zeros(len(generated), device=prefix.hidden.device)
    going = torch.ones_like(likelihood, dtype=torch.bool)
    for step in range(longest):
        best, chosen = model.logits(prefix.hidden).log_softmax(dim=-1).max(dim=-1)
        likelihood = likelihood + best * going
        for tokens, token, goes_on in zip(generated, chosen.tolist(), going.tolist(), strict=True):
            if goes_on:
                tokens.append(token)
        going = going & (chosen != end_id)
        if step + 1 == longest or not going.any():
            break
        prefix = model.extend(prefix, chosen[:, None])
    return Generated(generated, likelihood)


_SHORTEST_PLURAL = 4


def words_of(text: str) -> tuple[str, ...]:
    """Words of a text: lower case, without accents and punctuation, plain plurals folded."""
    plain = "".join(one for one in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(one))
    # An apostrophe belongs to its word: "bird's" is one, "bird-of-paradise" are three.
    found = re.findall(r"[^\W_]+", re.sub(r"['’`]", "", plain))
    return tuple(_singular(word) for word in found)


class LabelMatcher:
    """Finds the label that an answer names."""

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
        """Number of the label that an answer names."""
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


QUESTION = "What is shown in this image? Answer with its name only."
"""The default question of the main task."""

_LABELS = "{labels}"


class Answers(NamedTuple):
    """Predictions for B images."""

    logits: torch.Tensor  # float32 `(B, C)`
    named: torch.Tensor | None  # bool `(B,)`, whether the answer named a label; None where only labels can be generated


def checked_answers(options: AnswerOptions, labels: Sequence[str]) -> AnswerOptions:
    """The options, if they fit together and the labels of all tasks."""
    given = checked(AnswerOptions, options, "answers")
    if given.content_free != "none" and given.how != "scores":
        raise UserError(f"answers.content_free: needs how: scores; leave it out with how: {given.how}")
    if unknown := sorted(set(given.synonyms) - set(labels)):
        raise UserError(f"answers.synonyms: the data have no label {unknown[0]!r}; they have {', '.join(labels[:10])}")
    return given


def checked_questions(tasks: dict[str, list[str]], questions: dict[str, str] | None) -> dict[str, str]:
    """The questions by task."""
    asked = {LABEL_TASK: QUESTION} if questions is None else questions
    unknown = sorted(set(asked) - set(tasks))
    if unknown or not asked:
        raise UserError(f"questions: the data have no {', '.join(unknown) or 'task'}; they have {', '.join(tasks)}")
    for task in asked:
        if len(tasks[task]) < 2:
            raise UserError(f"tasks: {task!r} has fewer than two classes; leave it out, or fix the data's class names")
    return asked


def label_texts(names: Sequence[str]) -> list[str]:
    """Class names as plain words."""
    return [" ".join(name.replace("_", " ").split()) for name in names]


class Question:
    """A question with a closed set of answers.

    Attributes:
        ids: of the prompt, up to where the answer begins.
        labels: token ids of each label, its end included.
        prompts: made the token ids.
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
        """Answers about B images.

        A generated label has the likelihood of its answer, and the other labels share the rest. Where an answer
        names no label, or several, all labels have the same logit, which is no prediction
        (``metrics.predicted_classes``) and counts as wrong.
        """
        device = prefix.hidden.device
        if self._how == "scores":
            return Answers(self.scorer(model, prefix), None)
        if self._how == "constrained":
            numbers, likelihood = generate_label(model, prefix, self.scorer.trie)
            chosen = torch.tensor(numbers, device=device)
            return Answers(generated_logits(chosen, likelihood, len(self.labels)), None)
        generated = generate(model, prefix, self.prompts.end_id, self._longest)
        found = [self._matcher(self.prompts.text(tokens)) for tokens in generated.tokens]
        named = torch.tensor([one is not None for one in found], device=device)
        chosen = torch.tensor([one or 0 for one in found], device=device)
        logits = generated_logits(chosen, generated.log_likelihood, len(self.labels))
        return Answers(torch.where(named[:, None], logits, -math.log(len(self.labels))), named)


def generated_logits(chosen: torch.Tensor, log_likelihood: torch.Tensor, n_labels: int) -> torch.Tensor:
    """Logits of labels of which one was generated.

    Args:
        chosen: int64 ``(B,)``.
        log_likelihood: float32 ``(B,)``, of the answer.
        n_labels: at least 2.

    Returns:
        float32 ``(B, n_labels)``, logarithms of probabilities, that of the chosen one being the largest.
    """
    share = log_likelihood.exp().clamp(1.001 / n_labels, 1 - 1e-6)
    logits = torch.log((1 - share) / (n_labels - 1))[:, None].repeat(1, n_labels)
    return logits.scatter(1, chosen[:, None], share.log()[:, None])


def common_beginning(prompts: Mapping[str, Sequence[int]]) -> list[int]:
    """Tokens with which all prompts begin; a single prompt as a whole."""
    first, *others = prompts.values()
    length = len(first)
    for other in others:
        length = next((at for at in range(min(length, len(other))) if first[at] != other[at]), min(length, len(other)))
    return list(first[:length])


class Answered(NamedTuple):
    """Answers for a batch."""

    logits: dict[str, torch.Tensor]  # by task float32 `(B, C)`
    named: list[torch.Tensor]  # for free answers by task bool `(B,)`, which of them named a label; else empty
    features: torch.Tensor  # of the images, float32 `(B, D)`


class Questioning:
    """Asks a model all questions about each image; what the prompts share is read once."""

    def __init__(
        self,
        vlm: VisionLanguageModel,
        tasks: Mapping[str, list[str]],
        questions: Mapping[str, str],
        answers: AnswerOptions,
    ) -> None:
        self._vlm = vlm
        self._tasks = tasks
        self._texts = questions
        self._answers = answers
        self._questions: dict[str, Question] = {}
        self._prior: dict[str, torch.Tensor] = {}

    @property
    def prompts(self) -> Prompts:
        """The tokenizer and what it makes."""
        if self._vlm.prompts is None:
            raise UserError("model: there are no weights yet; load the pretrained ones, or a checkpoint")
        return self._vlm.prompts

    def forget(self) -> None:
        """Compute the scores of a grey image again, because weights may have changed."""
        self._prior = {}

    def answers(self, image: torch.Tensor) -> Answered:
        """Ask all questions about a batch.

        Args:
            image: uint8 ``(B, 3, H, W)``, RGB.
        """
        if not self._prior and self._answers.content_free != "none":
            grey = (self._vlm.normalize.mean * 255).round().to(torch.uint8).expand(1, *image.shape[1:])
            self._prior = self._answered(self._vlm.encode_images(grey)).logits
        found = self._answered(self._vlm.encode_images(image))
        logits = {task: one - self._prior.get(task, 0.0) for task, one in found.logits.items()}
        return found._replace(logits=logits)

    def losses(self, image: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> dict[str, MeanLoss]:
        """Mean negative log-likelihood of the right answers, by task.

        Args:
            image: uint8 ``(B, 3, H, W)``, RGB.
            targets: by task int64 ``(B,)``, -1 where unknown.
        """
        images = self._vlm.encode_images(image)
        means = {}
        for task, question in self._asked().items():
            known = (targets[task] != UNKNOWN).float()
            labels = [question.labels[target] for target in targets[task].clamp(min=0).tolist()]
            losses = self._vlm.answer_losses(images, question.ids, labels)
            means[task] = MeanLoss((losses * known).sum() / known.sum().clamp(min=1), known.sum())
        return means

    def _answered(self, images: Images) -> Answered:
        logits, named = {}, []
        prefixes = self._prefixes(images)
        for task, question in self._asked().items():
            found = question.answer(self._vlm, prefixes[task])
            logits[task] = found.logits
            named += [] if found.named is None else [found.named]
        return Answered(logits, named, images.features)

    def _prefixes(self, images: Images) -> dict[str, Prefix]:
        """The images with each question; their common beginning, above all the image, is read once."""
        ids = {task: question.ids for task, question in self._asked().items()}
        shared = common_beginning(ids)
        prefix = self._vlm.read(images, shared)
        device = prefix.hidden.device
        return {
            task: self._vlm.extend(prefix, torch.tensor(one[len(shared) :], dtype=torch.int64, device=device))
            for task, one in ids.items()
        }

    def _asked(self) -> dict[str, Question]:
        """The questions in tokens of the current tokenizer."""
        prompts = self.prompts
        if any(question.prompts is not prompts for question in self._questions.values()) or not self._questions:
            self._questions = {
                task: Question(text, self._tasks[task], self._answers, prompts, self._vlm.image_tokens)
                for task, text in self._texts.items()
            }
        return self._questions
