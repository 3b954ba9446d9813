"""The questions put to a generative model about each picture: what is read once is shared by all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from lightning_modules.answering import AnswerOptions, Question, common_beginning
from lightning_modules.losses import MeanLoss
from lightning_modules.picture_reading import Pictures, Reading
from lightning_modules.prompting import Prompts
from lightning_modules.vision_language import VisionLanguageModel
from vitrail.errors import UserError
from vitrail.types import UNKNOWN


class Answered(NamedTuple):
    """What a model says of a batch.

    Attributes:
        logits: by task float32 ``(B, C)``.
        named: for free answers by task bool ``(B,)``, which of them named a label; else empty.
        features: of the pictures, float32 ``(B, D)``.
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
            self._blind = self._answered(self._vlm.encode_pictures(grey)).logits
        found = self._answered(self._vlm.encode_pictures(image))
        logits = {task: one - self._blind.get(task, 0.0) for task, one in found.logits.items()}
        return found._replace(logits=logits)

    def losses(self, image: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> dict[str, MeanLoss]:
        """Mean negative log-likelihood of the right answers, by task.

        Args:
            image: uint8 ``(B, 3, H, W)``, RGB.
            targets: by task int64 ``(B,)``, -1 where unknown.
        """
        pictures = self._vlm.encode_pictures(image)
        means = {}
        for task, question in self._asked().items():
            known = (targets[task] != UNKNOWN).float()
            labels = [question.labels[target] for target in targets[task].clamp(min=0).tolist()]
            losses = self._vlm.answer_losses(pictures, question.ids, labels)
            means[task] = MeanLoss((losses * known).sum() / known.sum().clamp(min=1), known.sum())
        return means

    def _answered(self, pictures: Pictures) -> Answered:
        logits, named = {}, []
        readings = self._readings(pictures)
        for task, question in self._asked().items():
            found = question.answer(self._vlm, readings[task])
            logits[task] = found.logits
            named += [] if found.named is None else [found.named]
        return Answered(logits, named, pictures.features)

    def _readings(self, pictures: Pictures) -> dict[str, Reading]:
        """The pictures with each question; what the questions begin with, the picture above all, is read once."""
        ids = {task: question.ids for task, question in self._asked().items()}
        shared = common_beginning(ids)
        reading = self._vlm.read(pictures, shared)
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
                task: Question(text, self._tasks[task], self._answers, prompts, self._vlm.picture_tokens)
                for task, text in self._texts.items()
            }
        return self._questions
