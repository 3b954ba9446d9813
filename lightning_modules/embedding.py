"""What tasks share that put pictures and texts into one space: encoding, tokenizer, class prompts, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.base import VisionTask
from lightning_modules.blocks import stands_still
from lightning_modules.encoders import InputOptions
from lightning_modules.optim import OptimOptions
from lightning_modules.schedules import ScheduleName
from lightning_modules.text_memory import TextMemory
from lightning_modules.text_tokenizer import TextTokenizer, checked_state
from lightning_modules.towers import SIDES, Side, Towers
from lightning_modules.weights import WeightsOrigin
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

_TEXTS_AT_A_TIME = 256


@runtime_checkable
class GivesTexts(Protocol):
    """A DataModule that has texts to train a tokenizer on."""

    def training_texts(self) -> list[str]:
        """Captions of the training split, or class prompts."""


class EmbeddingTask(VisionTask):
    """A task that embeds pictures and texts.

    Args:
        towers: encode them.
        class_names: of the data; none for data without classes.
        class_prompts: prompts of each class.
        lr: highest learning rate.
        weight_decay: AdamW's.
        schedule: course of the learning rate.
        optim_options: rarer settings.

    Attributes:
        tasks: class names of the data's main task, if it has one.

    Raises:
        UserError: if there is not one list of prompts for each class.
    """

    def __init__(
        self,
        *,
        towers: Towers,
        class_names: list[str] | None,
        class_prompts: list[list[str]] | None,
        lr: float,
        weight_decay: float,
        schedule: ScheduleName,
        optim_options: OptimOptions | None,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, schedule=schedule, optim_options=optim_options)
        self.towers = towers
        self.input_options: InputOptions = {**towers.input_options}
        self.tasks = {LABEL_TASK: class_names} if class_names else {}
        self.class_prompts = class_prompts or []
        if len(self.class_prompts) != len(class_names or ()):
            raise UserError(f"class_prompts: {len(self.class_prompts)} for {len(class_names or ())} classes")
        self._class_embeddings: torch.Tensor | None = None
        self._text_memory: TextMemory | None = None

    @property
    def backbone(self) -> nn.Module:
        """Both towers without projections."""
        return nn.ModuleList(self.towers.backbone(side) for side in SIDES)

    @property
    def backbones(self) -> dict[str, nn.Module]:
        """The towers, each with parameter groups of its own."""
        return {f"{side}_backbone": self.towers.backbone(side) for side in SIDES}

    @property
    def embedding_dim(self) -> int:
        """Length of the embeddings."""
        return self.towers.embed_dim

    @property
    def ready_without_training(self) -> bool:
        """Whether everything was pretrained, so that zero-shot numbers mean something."""
        return self.towers.wholly_pretrained

    def loaded_origins(self) -> list[WeightsOrigin]:
        """See ``VisionTask``."""
        return self.towers.origins

    @property
    def pretrained_inputs(self) -> InputOptions | None:
        """See ``VisionTask``."""
        return self.towers.own_inputs

    def warn_of_other_inputs(self, options: InputOptions) -> None:
        """One warning line where pictures are made otherwise than those that the pretrained weights learned from."""
        self.towers.warn_of_other_inputs(options)

    def on_fit_start(self) -> None:
        """Fetch pretrained weights, and train a tokenizer where none came with them.

        Raises:
            UserError: if there are no texts to train one on.
        """
        super().on_fit_start()
        if self.towers.tokenizer is None:
            datamodule = getattr(self.trainer, "datamodule", None)
            texts = datamodule.training_texts() if isinstance(datamodule, GivesTexts) else []
            # The first process decides, so that all have the same.
            state = self.towers.train_tokenizer(texts).state if self.trainer.is_global_zero else None
            self.towers.tokenizer = TextTokenizer(checked_state(self.trainer.strategy.broadcast(state)))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See ``encode_image``."""
        return self.encode_image(image)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Embeddings of pictures.

        Args:
            image: uint8 ``(B, 3, H, W)``, RGB.

        Returns:
            float32 ``(B, D)``, of unit length.
        """
        return self._embed("image", self.image_features(image))

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """See ``VisionTask``."""
        return self.towers.image_features(image)

    @property
    def frozen_sides(self) -> list[str]:
        """Of image and text those whose backbones always give the same for the same input."""
        return [side for side in SIDES if stands_still(self.towers.backbone(side))]

    @torch.no_grad()
    def remember_texts(self, texts: Sequence[str]) -> None:
        """Compute what the frozen text backbone makes of these texts and of the class prompts, once.

        Args:
            texts: replace those that were remembered before; none to forget all.
        """
        prompts = [prompt for prompts in self.class_prompts for prompt in prompts] if texts else []
        # In a fixed order: how texts are put together to batches shows in the last digits.
        distinct = sorted({*texts, *prompts})
        self._text_memory = None
        if distinct:
            chunks = [distinct[start : start + _TEXTS_AT_A_TIME] for start in range(0, len(distinct), _TEXTS_AT_A_TIME)]
            features = torch.cat([self._text_features(*self._tokens(chunk)) for chunk in chunks])
            self._text_memory = TextMemory(distinct, features)

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """Embeddings of texts, as they are; wrap class names in prompts yourself.

        Returns:
            float32 ``(B, D)``, of unit length.

        Raises:
            UserError: if there is no tokenizer yet.
        """
        return torch.cat(
            [
                self._encode_texts(texts[start : start + _TEXTS_AT_A_TIME])
                for start in range(0, len(texts), _TEXTS_AT_A_TIME)
            ]
            or [torch.zeros(0, self.towers.embed_dim, device=self.device)]
        )

    def class_embeddings(self) -> torch.Tensor:
        """Embeddings of the classes: the mean of their prompts' embeddings, computed once an evaluation.

        Returns:
            float32 ``(C, D)``, of unit length.
        """
        if self._class_embeddings is None:
            flat = self.encode_text([prompt for prompts in self.class_prompts for prompt in prompts])
            parts = torch.split(flat, [len(prompts) for prompts in self.class_prompts])
            self._class_embeddings = F.normalize(torch.stack([part.mean(dim=0) for part in parts]), dim=-1)
        return self._class_embeddings

    def on_validation_epoch_start(self) -> None:
        """Forget the classes' embeddings, because the text encoder has learned since."""
        self._class_embeddings = None

    def on_test_epoch_start(self) -> None:
        """Forget the classes' embeddings, because another checkpoint may have been loaded."""
        self._class_embeddings = None

    def on_predict_epoch_start(self) -> None:
        """Forget the classes' embeddings, because another checkpoint may have been loaded."""
        self._class_embeddings = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add tokenizer and configurations, so that the checkpoint alone is enough."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "architectures": self.towers.architectures}
        if self.towers.tokenizer is not None:
            checkpoint["tokenizer"] = dict(self.towers.tokenizer.state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the tokenizer.

        Raises:
            UserError: if there is none.
        """
        super().on_load_checkpoint(checkpoint)
        self.towers.tokenizer = TextTokenizer(checked_state(checkpoint.get("tokenizer")))

    def _tokens(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.towers.tokenizer is None:
            raise UserError(
                "the text tower has no tokenizer yet; fit first, or load pretrained weights or a checkpoint"
            )
        tokens = self.towers.tokenizer(texts, self.device)
        return tokens["input_ids"], tokens["attention_mask"]

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        remembered = None if self._text_memory is None else self._text_memory.recall(texts)
        return self._encode_tokens(*self._tokens(texts)) if remembered is None else self._embed("text", remembered)

    def _encode_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self._embed("text", self._text_features(input_ids, attention_mask))

    def _text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.towers.text_features({"input_ids": input_ids, "attention_mask": attention_mask})

    def _embed(self, side: Side, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.towers.project(side, features).float(), dim=-1)
