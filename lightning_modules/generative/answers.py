"""How a generative model's answer to a question becomes logits over the labels of a task.

The questions put to a generative model about each image: what is read once is shared by all of them.

Answers that are said token by token: only labels, or anything.

Either takes the likeliest next token each time. Where only labels can be said, tokens that no label goes on with are
impossible. A label that begins well may so be preferred to one that is likelier as a whole, which is why labels are
scored by default (``label_scoring``); generation is here to be compared with.

Which label a free answer names: normalised, by whole words, synonyms included.

Searching for labels as parts of the answer finds "iris" in "yellow iris", and "rose" in "primrose"; here words are
compared, and the longest name wins.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict, get_args

import torch

from lightning_modules.generative.model import Images, Reading, VisionLanguageModel
from lightning_modules.generative.prompts import Prompts
from lightning_modules.generative.scoring import ROOT, LabelScorer, LabelTrie
from lightning_modules.losses import MeanLoss
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK, UNKNOWN


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
        reading: of B images with the question; not changed.
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
        reading: of B images with the question; not changed.
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


How = Literal["scores", "constrained", "free"]
ContentFree = Literal["none", "grey"]

QUESTION = "What is shown in this image? Answer with its name only."
"""Asked for the main task where nothing else is said."""

_LONGEST_ANSWER = 16
_LABELS = "{labels}"


class AnswerOptions(TypedDict, total=False):
    """How labels are found; what is left out has the value in brackets.

    Attributes:
        how: ``scores`` takes the log-likelihood of each label; ``constrained`` lets the model say a label and nothing
            else; ``free`` lets it say anything and looks for the label that it names [scores].
        length_normalised: whether a label's score is the mean over its tokens, or their sum [true].
        content_free: ``grey`` takes away from each label the score that it has for a grey image, that is, what the
            model believes without seeing (Zhao et al., ICML 2021; Holtzman et al., EMNLP 2021); or ``none`` [none].
        max_tokens: longest free answer [16].
        synonyms: further names of labels, by label, for free answers [none].
    """

    how: How
    length_normalised: bool
    content_free: ContentFree
    max_tokens: int
    synonyms: dict[str, list[str]]


class Answers(NamedTuple):
    """What came of B images.

    Attributes:
        logits: float32 ``(B, C)``.
        named: bool ``(B,)``, whether the answer named a label; None where nothing else can be answered.
    """

    logits: torch.Tensor
    named: torch.Tensor | None


def checked_answers(options: AnswerOptions | None, labels: Sequence[str]) -> AnswerOptions:
    """The options without unknown keys and impossible values.

    Args:
        options: as given.
        labels: of all tasks.

    Raises:
        UserError: if there are any.
    """
    given = options or {}
    if strange := sorted(set(given) - set(AnswerOptions.__annotations__)):
        known = ", ".join(AnswerOptions.__annotations__)
        raise UserError(f"answers: unknown key {strange[0]!r}; known keys are {known}")
    how, content_free = given.get("how", "scores"), given.get("content_free", "none")
    for key, value, choices in (("how", how, get_args(How)), ("content_free", content_free, get_args(ContentFree))):
        if value not in choices:
            raise UserError(f"answers.{key}: {value!r} is unknown; choose one of {', '.join(choices)}")
    if content_free != "none" and how != "scores":
        raise UserError(f"answers.content_free: only scores can be taken away from; leave it out with how: {how}")
    if given.get("max_tokens", _LONGEST_ANSWER) < 1:
        raise UserError(f"answers.max_tokens: must be at least 1, got {given['max_tokens']}")
    if strange := sorted(set(given.get("synonyms", {})) - set(labels)):
        raise UserError(f"answers.synonyms: the data have no label {strange[0]!r}; they have {', '.join(labels[:10])}")
    return given


def checked_questions(tasks: dict[str, list[str]], questions: dict[str, str] | None) -> dict[str, str]:
    """The questions by task.

    Args:
        tasks: class names of each task of the data.
        questions: as given; none for the default one.

    Raises:
        UserError: if the data lack a task, or a task has not two classes.
    """
    asked = {LABEL_TASK: QUESTION} if questions is None else questions
    unknown = sorted(set(asked) - set(tasks))
    if unknown or not asked:
        raise UserError(f"questions: the data have no {', '.join(unknown) or 'task'}; they have {', '.join(tasks)}")
    for task in asked:
        if len(tasks[task]) < 2:
            raise UserError(f"tasks: {task!r} has fewer than two classes; leave it out, or mend the data's class names")
    return asked


def label_texts(names: Sequence[str]) -> list[str]:
    """Class names as a person would write them."""
    return [" ".join(name.replace("_", " ").split()) for name in names]


class Question:
    """A question with a closed set of answers.

    Args:
        text: of the question; ``{labels}`` in it stands for the list of all labels.
        names: of the labels.
        options: as ``checked_answers`` returns them.
        prompts: make token ids.
        image_tokens: of an image.

    Attributes:
        ids: of the prompt, up to where the answer begins.
        labels: token ids of each label, its end included.
        prompts: made the token ids.

    Raises:
        UserError: if two labels cannot be told apart.
    """

    def __init__(
        self, text: str, names: Sequence[str], options: AnswerOptions, prompts: Prompts, image_tokens: int
    ) -> None:
        texts = label_texts(names)
        self.ids = prompts.prompt(text.replace(_LABELS, ", ".join(texts)), image_tokens)
        self.labels = [prompts.answer(label) for label in texts]
        self.scorer = LabelScorer(self.labels, options.get("length_normalised", True))
        self.prompts = prompts
        self._how = options.get("how", "scores")
        self._longest = options.get("max_tokens", _LONGEST_ANSWER)
        if self._how == "free":
            own = {
                label: (options.get("synonyms") or {}).get(name, []) for name, label in zip(names, texts, strict=True)
            }
            self._matcher = LabelMatcher(texts, own)

    def answer(self, model: VisionLanguageModel, reading: Reading) -> Answers:
        """Answers about B images.

        What was said has the likelihood with which it was said, and the other labels share the rest. Where an answer
        names no label, or several, all labels have the same logit, which is no prediction
        (``metrics.predicted_classes``) and counts as wrong.

        Args:
            model: that read.
            reading: of the images with the question.
        """
        device = reading.hidden.device
        if self._how == "scores":
            return Answers(self.scorer(model, reading), None)
        if self._how == "constrained":
            numbers, likelihood = say_label(model, reading, self.scorer.trie)
            chosen = torch.tensor(numbers, device=device)
            return Answers(said_logits(chosen, likelihood, len(self.labels)), None)
        said = say_anything(model, reading, self.prompts.end_id, self._longest)
        found = [self._matcher(self.prompts.text(tokens)) for tokens in said.tokens]
        named = torch.tensor([one is not None for one in found], device=device)
        chosen = torch.tensor([one or 0 for one in found], device=device)
        logits = said_logits(chosen, said.log_likelihood, len(self.labels))
        return Answers(torch.where(named[:, None], logits, -math.log(len(self.labels))), named)


def said_logits(chosen: torch.Tensor, log_likelihood: torch.Tensor, n_labels: int) -> torch.Tensor:
    """Logits of labels of which one was said.

    Args:
        chosen: int64 ``(B,)``.
        log_likelihood: float32 ``(B,)``, with which it was said.
        n_labels: at least 2.

    Returns:
        float32 ``(B, n_labels)``, logarithms of probabilities, that of the chosen one being the largest.
    """
    share = log_likelihood.exp().clamp(1.001 / n_labels, 1 - 1e-6)
    logits = torch.log((1 - share) / (n_labels - 1))[:, None].repeat(1, n_labels)
    return logits.scatter(1, chosen[:, None], share.log()[:, None])


def common_beginning(prompts: Mapping[str, Sequence[int]]) -> list[int]:
    """Tokens with which all prompts begin; for a single one all of it."""
    first, *others = prompts.values()
    length = len(first)
    for other in others:
        length = next((at for at in range(min(length, len(other))) if first[at] != other[at]), min(length, len(other)))
    return list(first[:length])


class Answered(NamedTuple):
    """What a model says of a batch.

    Attributes:
        logits: by task float32 ``(B, C)``.
        named: for free answers by task bool ``(B,)``, which of them named a label; else empty.
        features: of the images, float32 ``(B, D)``.
    """

    logits: dict[str, torch.Tensor]
    named: list[torch.Tensor]
    features: torch.Tensor


class Questioning:
    """Asks a model.

    Args:
        vlm: the model; its tokenizer may come later.
        tasks: class names of each task.
        questions: text of each task's question.
        answers: how answers become logits.
    """

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
        self._blind: dict[str, torch.Tensor] = {}

    @property
    def prompts(self) -> Prompts:
        """The tokenizer and what it makes.

        Raises:
            UserError: as long as there is none.
        """
        if self._vlm.prompts is None:
            raise UserError("model: there are no weights yet; load the pretrained ones, or a checkpoint")
        return self._vlm.prompts

    def forget(self) -> None:
        """What the model believes without seeing is asked anew, because its weights may be others."""
        self._blind = {}

    def answers(self, image: torch.Tensor) -> Answered:
        """Asks all questions about a batch.

        Args:
            image: uint8 ``(B, 3, H, W)``, RGB.
        """
        if not self._blind and self._answers.get("content_free", "none") != "none":
            grey = (self._vlm.normalize.mean * 255).round().to(torch.uint8).expand(1, *image.shape[1:])
            self._blind = self._answered(self._vlm.encode_images(grey)).logits
        found = self._answered(self._vlm.encode_images(image))
        logits = {task: one - self._blind.get(task, 0.0) for task, one in found.logits.items()}
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
        readings = self._readings(images)
        for task, question in self._asked().items():
            found = question.answer(self._vlm, readings[task])
            logits[task] = found.logits
            named += [] if found.named is None else [found.named]
        return Answered(logits, named, images.features)

    def _readings(self, images: Images) -> dict[str, Reading]:
        """The images with each question; what the questions begin with, the image above all, is read once."""
        ids = {task: question.ids for task, question in self._asked().items()}
        shared = common_beginning(ids)
        reading = self._vlm.read(images, shared)
        device = reading.hidden.device
        return {
            task: self._vlm.read_on(reading, torch.tensor(one[len(shared) :], dtype=torch.int64, device=device))
            for task, one in ids.items()
        }

    def _asked(self) -> dict[str, Question]:
        """The questions in tokens of the present tokenizer."""
        prompts = self.prompts
        if any(question.prompts is not prompts for question in self._questions.values()) or not self._questions:
            self._questions = {
                task: Question(text, self._tasks[task], self._answers, prompts, self._vlm.image_tokens)
                for task, text in self._texts.items()
            }
        return self._questions
