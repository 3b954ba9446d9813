"""A generative model as a classifier: an image and a question as input, a label of the data as answer."""

# No postponed annotations: jsonargparse would lose the ranges of the arguments.

from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_modules.base import LoggedSplit, known_targets, real_outputs, real_rows, with_embedding
from lightning_modules.classification import ScoredTask
from lightning_modules.encoders.image import warn_of_other_inputs
from lightning_modules.encoders.weights import WeightsOrigin, misfits
from lightning_modules.finetune import without_base
from lightning_modules.generative.answers import (
    Answered,
    Questioning,
    checked_answers,
    checked_questions,
    label_texts,
)
from lightning_modules.generative.model import Architectures, VisionLanguageModel
from lightning_modules.generative.prompts import Prompts, checked_prompts
from lightning_modules.generative.weights import checked_memory
from lightning_modules.metrics import MeanOverSamples
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
from vitrail.types import Batch, InputOptions, Outputs

_NETWORK = "vlm.model."


class GenerativeClassifier(ScoredTask):
    """Qwen2-VL (Wang et al., 2024), or another model of its interface, asked about each image.

    In evaluation its answers become logits over the labels, so metrics, predictions and reports are those of every
    classifier. The training loss is the mean negative log-likelihood of the answer's tokens, by which ``scores`` ranks
    labels. ``val/loss`` is the cross-entropy of the logits, as of other classifiers.

    With ``lora`` a checkpoint contains the adapters alone. The model's own weights are found again under ``model``,
    and others than those that the adapters were trained on are refused.

    Args:
        model: an image-text-to-text model: local folder or name on the hub.
        tasks: class names of each task, linked from the data.
        image_size: height and width in pixels, linked from the data.
        pretrained: whether it has its pretrained weights; else its tokenizer is made of the questions and labels.
        questions: what is asked, by task; tasks without a question are left out. ``{labels}`` stands for the list of
            the labels. By default the main task is asked for by "What is shown in this image? …".
        answers: how answers become logits.
        memory: precision, four bits and gradient checkpointing.
        lora: low-rank adapters; the model's own weights are frozen then.
        lr: highest learning rate.
        weight_decay: AdamW's; not applied to biases and norms.
        schedule: course of the learning rate.
        optim_options: rarer settings of the optimizer.
        architectures: configuration of the model, as a checkpoint keeps it; not to be set by hand.

    Raises:
        UserError: if the settings do not fit together.
    """

    def __init__(
        self,
        model: str,
        tasks: dict[str, list[str]],
        *,
        image_size: int = 224,
        pretrained: bool = True,
        questions: dict[str, str] | None = None,
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
        self.questions = checked_questions(tasks, questions)
        self.keep_scores({task: tasks[task] for task in self.questions})
        labels = [name for names in self.tasks.values() for name in names]
        self.answers = checked_answers(answers, labels)
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
        self._questioning = Questioning(self.vlm, self.tasks, self.questions, self.answers)
        self.named = nn.ModuleList(MeanOverSamples() for _ in self.tasks if self.answers.how == "free")

    @property
    def backbone(self) -> nn.Module:
        """The whole network; it has no other part."""
        return cast("nn.Module", self.vlm.model)

    @property
    def compilable_networks(self) -> list[nn.Module]:
        """The vision tower and the language model; what holds both is never called as a whole."""
        return [self.vlm.model.model.visual, self.vlm.model.model.language_model]

    @property
    def ready_without_training(self) -> bool:
        """Whether it is pretrained; adapters begin as nothing."""
        return self.vlm.pretrained

    @property
    def frozen_sides(self) -> list[str]:
        """None: the mean of an image's tokens, which is its feature, is not enough to answer."""
        return []

    @property
    def embedding_dim(self) -> int:
        """Length of ``image_embedding`` in the outputs."""
        return int(self.vlm.configuration.text_config.hidden_size)

    def fetch_weights(self) -> None:
        """Load the pretrained weights and their tokenizer."""
        self.vlm.load(None if self._trainer is None else self.trainer.strategy.root_device)

    def loaded_origins(self) -> list[WeightsOrigin]:
        """See ``VisionTask``."""
        return [self.vlm.origin] if self.vlm.origin else []

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """See ``VisionTask``; the mean of an image's tokens."""
        return self.vlm.encode_images(image).features

    @property
    def pretrained_inputs(self) -> InputOptions | None:
        """See ``VisionTask``."""
        return self.vlm.input_options if self.vlm.pretrained else None

    def warn_of_other_inputs(self, options: InputOptions) -> None:
        """One warning line where images are made otherwise than for the pretrained weights; any size is accepted."""
        if self.vlm.pretrained:
            warn_of_other_inputs(self.vlm.name, options, {**self.vlm.input_options, "size": options["size"]})
        if options["size"] != self.vlm.side:
            rank_zero_warn(
                f"data.image.size: images of {options['size']} px are scaled to {self.vlm.side} px, because "
                f"{self.vlm.name} reads squares of {self.vlm.patch * self.vlm.merge} px"
            )

    def setup(self, stage: str) -> None:
        """Make the network, before it is moved to its device.

        Adapters need the pretrained weights whether or not a checkpoint is going to bring the adapters. All others are
        loaded only when it is known that no checkpoint has brought them.
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
        """As torch's; forgets the scores of a grey image, because weights may change now."""
        self._questioning.forget()
        return super().train(mode)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of each task.

        Args:
            image: uint8 ``(B, 3, H, W)``, RGB.

        Returns:
            For each task float32 ``(B, C)``.
        """
        return self._questioning.answers(image).logits

    def predict_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of a batch, whose targets may be unknown."""
        found = self._questioning.answers(batch["image"])
        return with_embedding(
            real_outputs(batch, found.logits, known_targets(batch, self.tasks)), batch, found.features
        )

    def epoch_values(self, split: LoggedSplit) -> dict[str, Any]:
        """See ``ScoredTask``; ``<task>/named`` is the share of free answers that name a label."""
        values = super().epoch_values(split)
        if split != "train":
            for task, counter in zip(self.tasks, self.named, strict=False):
                if (share := cast("MeanOverSamples", counter).compute()) is not None:
                    values[f"{task}/named"] = share
                cast("MeanOverSamples", counter).reset()
        return values

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add tokenizer and configuration; leave out weights that can be found again."""
        super().on_save_checkpoint(checkpoint)
        hyper_parameters = checkpoint["hyper_parameters"]
        checkpoint["hyper_parameters"] = {**hyper_parameters, "architectures": self.vlm.architectures}
        checkpoint["tokenizer"] = dict(self._questioning.prompts.state)
        if self._adapters_alone and "state_dict" in checkpoint:
            checkpoint["base_digest"] = self.vlm.digest
            for states in ("state_dict", "current_model_state"):  # the second one where weights are averaged
                if states in checkpoint:
                    checkpoint[states] = without_base(checkpoint[states], _NETWORK)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the tokenizer, and make the network that the weights belong to."""
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
        """As ``VisionTask``'s, but what a checkpoint leaves out is not missing; empty before the network is made."""
        if self.vlm.model is None:
            return ""
        own = self.state_dict()
        return misfits(state_dict, without_base(own, _NETWORK) if self._adapters_alone else own)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``VisionTask``'s; the model's own weights stay unchanged next to adapters."""
        self._questioning.forget()
        if self._adapters_alone:
            if strict and (wrong := self.misfits(state_dict)):
                raise UserError(f"the weights do not fit {type(self).__name__}: {wrong}")
            strict = False
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _shared_step(self, batch: Batch, split: LoggedSplit) -> tuple[torch.Tensor, Outputs]:
        """Loss of the answers in training; in evaluation cross-entropy of the logits, as of every classifier."""
        targets = known_targets(batch, self.tasks)
        if split == "train":
            if "mix" in batch:
                raise UserError(
                    "data augment.mixup, cutmix: an answer is one label; leave them out with a generative model"
                )
            means = self._questioning.losses(batch["image"], targets)
            return self.count(split, means, {}, targets), real_outputs(batch, {}, {})
        found = self._questioning.answers(batch["image"])
        loss = self.count(split, self.plain_losses(found.logits, targets), found.logits, targets)
        self._count_named(found, real_rows(batch))
        outputs = real_outputs(batch, found.logits, targets)
        return loss, with_embedding(outputs, batch, found.features) if split == "test" else outputs

    def _count_named(self, found: Answered, real: torch.Tensor) -> None:
        samples = int(real.sum())
        for counter, rows in zip(self.named, found.named, strict=False):
            cast("MeanOverSamples", counter).update(rows[real].float().sum() / max(samples, 1), samples)
