"""Generative models as classifiers: they answer a question about the image with a label of the data."""

# No postponed annotations: jsonargparse would lose the ranges of the arguments.

from collections.abc import Mapping
from itertools import takewhile
from typing import Any, NamedTuple, Self, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_modules.base import LoggedSplit, known_targets, real_outputs, real_rows, training_outputs
from lightning_modules.classification import ScoredTask
from lightning_modules.encoders.image import warn_of_other_inputs
from lightning_modules.encoders.weights import WeightsOrigin, misfits
from lightning_modules.finetune import without_base
from lightning_modules.generative.answers import Question, checked_answers, checked_questions, label_texts
from lightning_modules.generative.model import Architectures, Images, VisionLanguageModel
from lightning_modules.generative.prompts import Prompts, checked_prompts
from lightning_modules.generative.weights import checked_memory
from lightning_modules.metrics import MeanLoss, MeanOverSamples
from lightning_modules.options import (
    AnswerOptions,
    LanguageLoraOptions,
    MemoryOptions,
    NonNegative,
    OptimOptions,
    ScheduleName,
    checked,
)
from vitrail.errors import UserError
from vitrail.types import UNKNOWN, Batch, InputOptions, Outputs

_NETWORK = "vlm.model."


class Answered(NamedTuple):
    """Predictions for a batch."""

    logits: dict[str, torch.Tensor]  # by task float32 `(B, C)`
    named: list[torch.Tensor]  # for free answers by task bool `(B,)`, which of them name a label; otherwise empty
    features: torch.Tensor  # of the images, float32 `(B, D)`


class GenerativeClassifier(ScoredTask):
    """Qwen2-VL (Wang et al., 2024), or another model of its interface, asked about each image.

    The training loss is the mean negative log-likelihood of the answer's tokens, by which ``scores`` ranks labels. In
    evaluation answers become logits over the labels, and ``val/loss`` is their cross-entropy.

    With ``lora`` a checkpoint contains only the adapters; the base weights are loaded from ``model`` again, and refused
    if they have changed.

    Args:
        model: an image-text-to-text model: local folder or name on the hub.
        tasks: class names of each task, linked from the data.
        image_size: height and width in pixels, linked from the data.
        pretrained: whether to load its pretrained weights; otherwise its tokenizer is trained on questions and labels.
        answers: the questions, and how answers become logits.
        memory: precision, four bits and gradient checkpointing.
        lora: low-rank adapters; the base weights are frozen then.
        lr: peak learning rate.
        weight_decay: weight decay of AdamW; not applied to biases and norms.
        schedule: learning-rate schedule.
        optim_options: further settings of the optimizer.
        architectures: configuration of the model from a checkpoint; not to be set by hand.
    """

    def __init__(
        self,
        model: str,
        tasks: dict[str, list[str]],
        *,
        image_size: int = 224,
        pretrained: bool = True,
        answers: AnswerOptions = AnswerOptions(),
        memory: MemoryOptions = MemoryOptions(),
        lora: LanguageLoraOptions | None = None,
        lr: NonNegative = 1e-4,
        weight_decay: NonNegative = 0.01,
        schedule: ScheduleName = "cosine",
        optim_options: OptimOptions = OptimOptions(),
        architectures: Architectures | None = None,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, schedule=schedule, optim_options=optim_options)
        self.save_hyperparameters()
        options = checked(AnswerOptions, answers, "answers")
        self.questions = checked_questions(tasks, options.questions)
        self.configure_metrics({task: tasks[task] for task in self.questions})
        labels = [name for names in self.tasks.values() for name in names]
        self.answers = checked_answers(options, labels)
        self.vlm = VisionLanguageModel(
            model,
            image_size=image_size,
            texts=[*self.questions.values(), *label_texts(labels)],
            pretrained=pretrained,
            memory=checked_memory(memory, pretrained=pretrained),
            lora=None if lora is None else checked(LanguageLoraOptions, lora, "lora"),
            architectures=architectures,
        )
        self.input_options: InputOptions = {**self.vlm.input_options}
        self._adapters_alone = pretrained and lora is not None
        self._questions: dict[str, Question] = {}
        self._prior: dict[str, torch.Tensor] = {}
        self.named = nn.ModuleList(MeanOverSamples() for _ in self.tasks if self.answers.how == "free")

    @property
    def backbone(self) -> nn.Module:
        """The whole network."""
        return cast("nn.Module", self.vlm.model)

    @property
    def compilable_networks(self) -> list[nn.Module]:
        """The vision tower and the language model, which are never called as one."""
        return [self.vlm.model.model.visual, self.vlm.model.model.language_model]

    @property
    def ready_without_training(self) -> bool:
        """Whether it is pretrained; adapters start as zero."""
        return self.vlm.pretrained

    @property
    def frozen_sides(self) -> list[str]:
        """None: the image feature, the mean of the tokens, is not enough to answer."""
        return []

    @property
    def embedding_dim(self) -> int:
        """Length of ``image_embedding`` in the outputs."""
        return int(self.vlm.configuration.text_config.hidden_size)

    def fetch_weights(self) -> list[WeightsOrigin]:
        """Load the pretrained weights and their tokenizer."""
        self.vlm.load(None if self._trainer is None else self.trainer.strategy.root_device)
        return [self.vlm.origin] if self.vlm.origin else []

    @property
    def referenced(self) -> str:
        """See ``VisionTask``; adapters have a reference of their own."""
        return _NETWORK if self.vlm.pretrained and self.vlm.lora is None else ""

    def load_referenced(self, place: str) -> None:
        """See ``VisionTask``."""
        self.vlm.load(place=place)

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """Mean of each image's tokens."""
        return self.vlm.encode_images(image).features

    @property
    def pretrained_inputs(self) -> InputOptions | None:
        """See ``VisionTask``."""
        return self.vlm.input_options if self.vlm.pretrained else None

    def warn_of_other_inputs(self, options: InputOptions) -> None:
        """See ``VisionTask``; images of any size are accepted and scaled."""
        if self.vlm.pretrained:
            warn_of_other_inputs(self.vlm.name, options, {**self.vlm.input_options, "size": options["size"]})
        if options["size"] != self.vlm.side:
            rank_zero_warn(
                f"data.image.size: images of {options['size']} px are scaled to {self.vlm.side} px, because "
                f"{self.vlm.name} reads squares of {self.vlm.patch * self.vlm.merge} px"
            )

    def setup(self, stage: str) -> None:
        """Build the network before it is moved to its device.

        Adapters need the pretrained weights even if a checkpoint follows; other weights are loaded only if none does.
        """
        super().setup(stage)
        if self.vlm.lora is not None or self.vlm.memory.four_bit:
            self.load_pretrained()
        else:
            self.vlm.build()

    def on_fit_start(self) -> None:
        """Refuse to train four-bit weights themselves."""
        if self.vlm.memory.four_bit and self.vlm.lora is None:
            raise UserError("memory.four_bit: such weights cannot be trained; add lora, or set it to false")
        super().on_fit_start()

    def train(self, mode: bool = True) -> Self:
        """As torch's; discards the cached scores of a gray image, because weights may change now."""
        self._prior = {}
        return super().train(mode)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of each task, float32 ``(B, C)``, for uint8 RGB images ``(B, 3, H, W)``."""
        return self._answer(image).logits

    def predict_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of a batch, whose targets may be unknown."""
        found = self._answer(batch["image"])
        return real_outputs(batch, found.logits, known_targets(batch, self.tasks), found.features)

    def epoch_values(self, split: LoggedSplit) -> dict[str, Any]:
        """See ``ScoredTask``; ``<task>/named`` is the fraction of free answers that name a label."""
        values = super().epoch_values(split)
        if split != "train":
            for task, counter in zip(self.tasks, self.named, strict=False):
                if (share := cast("MeanOverSamples", counter).compute()) is not None:
                    values[f"{task}/named"] = share
                cast("MeanOverSamples", counter).reset()
        return values

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add tokenizer and configuration; leave out the base weights of adapters."""
        super().on_save_checkpoint(checkpoint)
        hyper_parameters = checkpoint["hyper_parameters"]
        checkpoint["hyper_parameters"] = {**hyper_parameters, "architectures": self.vlm.architectures}
        checkpoint["tokenizer"] = dict(self._prompts().state)
        if self._adapters_alone and "state_dict" in checkpoint:
            checkpoint["base_digest"] = self.vlm.digest
            for states in ("state_dict", "current_model_state"):  # the second one where weights are averaged
                if states in checkpoint:
                    checkpoint[states] = without_base(checkpoint[states], _NETWORK)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the tokenizer, and build the network."""
        super().on_load_checkpoint(checkpoint)
        if self._adapters_alone:
            self.vlm.load(None if self._trainer is None else self.trainer.strategy.root_device)
            if checkpoint.get("base_digest") != self.vlm.digest:
                raise UserError(
                    f"model: {self.vlm.name} has other weights than those that the checkpoint's adapters were trained "
                    "on; put the former weights there, or train again"
                )
        else:
            self.vlm.build()
        self.vlm.prompts = Prompts(checked_prompts(checkpoint.get("tokenizer")))

    def misfits(self, state_dict: Mapping[str, Any]) -> str:
        """See ``VisionTask``; the base weights of adapters may be missing."""
        if self.vlm.model is None:
            return ""
        own = self.state_dict()
        return misfits(state_dict, without_base(own, _NETWORK) if self._adapters_alone else own)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """See ``VisionTask``; the base weights of adapters stay unchanged."""
        self._prior = {}
        if self._adapters_alone:
            if strict and (wrong := self.misfits(state_dict)):
                raise UserError(f"the weights do not fit {type(self).__name__}: {wrong}")
            strict = False
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _shared_step(self, batch: Batch, split: LoggedSplit) -> tuple[torch.Tensor, Outputs]:
        targets = known_targets(batch, self.tasks)
        if split == "train":
            if "mix" in batch:
                raise UserError(
                    "data augment.mixup, cutmix: an answer is one label; leave them out with a generative model"
                )
            losses = self._answer_losses(batch["image"], targets)
            return self.training_loss(losses), training_outputs(batch)
        found = self._answer(batch["image"])
        loss = self.evaluation_loss(split, found.logits, targets)
        real = real_rows(batch)
        samples = int(real.sum())
        for counter, rows in zip(self.named, found.named, strict=False):
            cast("MeanOverSamples", counter).update(rows[real].float().sum() / max(samples, 1), samples)
        return loss, real_outputs(batch, found.logits, targets, found.features if split == "test" else None)

    def _answer(self, image: torch.Tensor) -> Answered:
        """Ask all questions about a batch of images."""
        if not self._prior and self.answers.content_free != "none":
            gray = (self.vlm.normalize.mean * 255).round().to(torch.uint8).expand(1, *image.shape[1:])
            self._prior = self._answer_encoded(self.vlm.encode_images(gray)).logits
        found = self._answer_encoded(self.vlm.encode_images(image))
        return found._replace(logits={task: one - self._prior.get(task, 0.0) for task, one in found.logits.items()})

    def _answer_encoded(self, images: Images) -> Answered:
        """The common prefix of the prompts, above all the image, is encoded once."""
        questions = self._tokenized_questions()
        columns = zip(*(question.ids for question in questions.values()), strict=False)
        shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        prefix = self.vlm.read(images, shared)
        logits, named = {}, []
        for task, question in questions.items():
            rest = torch.tensor(question.ids[len(shared) :], dtype=torch.int64, device=prefix.hidden.device)
            found = question.answer(self.vlm, self.vlm.extend(prefix, rest))
            logits[task] = found.logits
            named += [] if found.named is None else [found.named]
        return Answered(logits, named, images.features)

    def _answer_losses(self, image: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> dict[str, MeanLoss]:
        """Mean negative log-likelihood of the correct answers, by task."""
        images = self.vlm.encode_images(image)
        losses = {}
        for task, question in self._tokenized_questions().items():
            known = (targets[task] != UNKNOWN).float()
            labels = [question.labels[target] for target in targets[task].clamp(min=0).tolist()]
            values = self.vlm.answer_losses(images, question.ids, labels)
            losses[task] = MeanLoss((values * known).sum() / known.sum().clamp(min=1), known.sum())
        return losses

    def _prompts(self) -> Prompts:
        if self.vlm.prompts is None:
            raise UserError("model: there are no weights yet; load the pretrained ones, or a checkpoint")
        return self.vlm.prompts

    def _tokenized_questions(self) -> dict[str, Question]:
        prompts = self._prompts()
        if any(question.prompts is not prompts for question in self._questions.values()) or not self._questions:
            self._questions = {
                task: Question(text, self.tasks[task], self.answers, prompts, self.vlm.image_tokens)
                for task, text in self.questions.items()
            }
        return self._questions
