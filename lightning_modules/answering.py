"""How a generative model's answer to a question becomes logits over the labels of a task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypedDict, get_args

import torch

from lightning_modules.constrained_generation import say_anything, say_label
from lightning_modules.label_matching import LabelMatcher
from lightning_modules.label_scoring import LabelScorer
from lightning_modules.picture_reading import Reading
from lightning_modules.prompting import Prompts
from lightning_modules.vision_language import VisionLanguageModel
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

How = Literal["scores", "constrained", "free"]
ContentFree = Literal["none", "grey"]

QUESTION = "What is shown in this picture? Answer with its name only."
"""Asked for the main task where nothing else is said."""

_LONGEST_ANSWER = 16
_LABELS = "{labels}"


class AnswerOptions(TypedDict, total=False):
    """How labels are found; what is left out has the value in brackets.

    Attributes:
        how: ``scores`` takes the log-likelihood of each label; ``constrained`` lets the model say a label and nothing
            else; ``free`` lets it say anything and looks for the label that it names [scores].
        length_normalised: whether a label's score is the mean over its tokens, or their sum [true].
        content_free: ``grey`` takes away from each label the score that it has for a grey picture, that is, what the
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
    """What came of B pictures.

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
        picture_tokens: of a picture.

    Attributes:
        ids: of the prompt, up to where the answer begins.
        labels: token ids of each label, its end included.
        prompts: made the token ids.

    Raises:
        UserError: if two labels cannot be told apart.
    """

    def __init__(
        self, text: str, names: Sequence[str], options: AnswerOptions, prompts: Prompts, picture_tokens: int
    ) -> None:
        texts = label_texts(names)
        self.ids = prompts.prompt(text.replace(_LABELS, ", ".join(texts)), picture_tokens)
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
        """Answers about B pictures.

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
