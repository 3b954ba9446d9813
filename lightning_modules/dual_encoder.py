"""Images and texts in one space: contrastive training, zero-shot classes, and embeddings for retrieval."""

# No postponed annotations: jsonargparse would lose the ranges of the arguments.

from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_modules.base import LoggedSplit, VisionTask, known_targets, real_outputs, real_rows, training_outputs
from lightning_modules.contrastive import ContrastiveObjective, Pairs, encode_in_chunks
from lightning_modules.encoders.captioning import Captioner
from lightning_modules.encoders.dual import SIDES, Architectures, Side, Towers, build_towers, random_towers
from lightning_modules.encoders.text import TextCache
from lightning_modules.encoders.tokenizer import TextTokenizer, checked_state
from lightning_modules.encoders.weights import WeightsOrigin
from lightning_modules.few_shot import ClassTexts, ContextTexts, FewShotHead, build_head, fit_task, token_width
from lightning_modules.finetune import add_lora, freeze, freeze_unused
from lightning_modules.heads.single_label import masked_cross_entropy
from lightning_modules.metrics import MeanLoss, MeanOverSamples, SplitMetrics, joined_losses
from lightning_modules.optim import is_frozen
from lightning_modules.options import (
    ContrastiveLoss,
    ContrastiveOptions,
    FewShotOptions,
    Freeze,
    LogitScaleOptions,
    LoraOptions,
    NonNegative,
    OptimOptions,
    ScheduleName,
    TowerOptions,
    checked,
)
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK, Batch, InputOptions, Outputs

_TEXT_BATCH = 256


class DualEncoder(VisionTask):
    """An image encoder and a text encoder trained by a contrastive loss.

    Training compares each image with the captions of its batch on all processes. Evaluation classifies images by the
    embeddings of the class prompts (Radford et al., 2021) if there are classes, and embeds the captions for retrieval
    if the data set has its own.

    ``val/loss`` is the contrastive loss within batches if the captions are the data set's own. If they are class
    prompts, it is the cross-entropy of the classes, because repeated classes make the former meaningless.

    Args:
        towers: the two encoders.
        class_names: linked from the data.
        class_prompts: prompts of each class, linked from the data; their embeddings are averaged.
        image_size: height and width in pixels, linked from the data.
        chunk_size: samples of a training batch that are encoded at a time, with cached gradients; 0 for all at once;
            linked from the data.
        pretrained: false for random weights in both towers, whatever ``towers`` asks for.
        loss: ``label_aware`` InfoNCE, plain ``info_nce``, or ``sigmoid``.
        loss_options: variants of it, and a captioning loss.
        logit_scale: the scale of the similarities.
        freeze: the frozen part.
        lora: low-rank adapters; the weights of both towers are frozen then.
        few_shot: a classifier that is solved on the embeddings of the frozen towers, in one epoch; its logits take the
            place of the zero-shot ones, embeddings stay as they are.
        lr: peak learning rate; ``optim_options.backbone_lr`` sets another one for the towers without projections.
        weight_decay: weight decay of AdamW; not applied to biases, norms and logit scale.
        schedule: learning-rate schedule.
        optim_options: further settings of the optimizer.
        architectures: configurations of the towers from a checkpoint; not to be set by hand.

    Attributes:
        tasks: class names of the data's main task, if it has one.
        shorter_lengths: lengths below that of the embeddings which are trained, too.
    """

    def __init__(
        self,
        towers: TowerOptions,
        class_names: list[str] | None = None,
        class_prompts: list[list[str]] | None = None,
        *,
        image_size: int = 224,
        chunk_size: int = 0,
        pretrained: bool = True,
        loss: ContrastiveLoss = "label_aware",
        loss_options: ContrastiveOptions = ContrastiveOptions(),
        logit_scale: LogitScaleOptions = LogitScaleOptions(),
        freeze: Freeze = "none",
        lora: LoraOptions | None = None,
        few_shot: FewShotOptions | None = None,
        lr: NonNegative = 1e-5,
        weight_decay: NonNegative = 0.1,
        schedule: ScheduleName = "cosine",
        optim_options: OptimOptions = OptimOptions(),
        architectures: Architectures | None = None,
    ) -> None:
        # What is solved is not changed by the epoch that follows, which measures it.
        rate = lr if few_shot is None else 0.0
        super().__init__(lr=rate, weight_decay=weight_decay, schedule=schedule, optim_options=optim_options)
        which = checked(TowerOptions, towers, "towers")
        self.towers = build_towers(which if pretrained else random_towers(which), image_size, architectures)
        self.input_options: InputOptions = {**self.towers.input_options}
        self.tasks = {LABEL_TASK: class_names} if class_names else {}
        self.class_prompts = class_prompts or []
        if len(self.class_prompts) != len(class_names or ()):
            raise UserError(f"class_prompts: {len(self.class_prompts)} for {len(class_names or ())} classes")
        _warn_of_equal_prompts(class_names or [], self.class_prompts)
        self._class_embeddings: torch.Tensor | None = None
        self._text_cache: TextCache | None = None
        self.save_hyperparameters()
        self.chunk_size = chunk_size
        scale = checked(LogitScaleOptions, logit_scale, "logit_scale")
        variants = checked(ContrastiveOptions, loss_options, "loss_options")
        self.objective = ContrastiveObjective(loss, scale, variants, self.towers.embed_dim)
        self.shorter_lengths = sorted(variants.matryoshka)
        self.captioner: Captioner | None = None
        if variants.captioning is not None:
            if few_shot is not None:
                raise UserError("loss_options.captioning: does not go with few_shot; leave one of them out")
            self.captioner = Captioner(variants.captioning, *self.towers.caption_sizes)
        self.logit_scale_lr = scale.lr
        adapters = None if lora is None else checked(LoraOptions, lora, "lora")
        self.has_adapters = adapters is not None
        self._frozen_modules = _freeze(self.towers, freeze, adapters, image_size)
        self.few_shot: FewShotHead | None = None
        self._contexts: ContextTexts | None = None
        if few_shot is not None:
            self._add_few_shot(checked(FewShotOptions, few_shot, "few_shot"), freeze, lora)
        if adapters is not None:
            # The statistics belong to weights that are frozen.
            self.fix_batchnorm()
        # Lightning keeps the mode of each module: frozen ones must be in evaluation mode from the beginning.
        self.train(self.training)
        names = [f"{split}_loss" for split in ("train", "val", "test")]
        names += [] if self.captioner is None else ["val_captioning_loss", "test_captioning_loss"]
        self.contrastive = nn.ModuleDict({name: MeanOverSamples() for name in names})
        weights = dict.fromkeys(self.tasks, 1.0)
        self.scores = nn.ModuleDict(
            {f"{s}_scores": SplitMetrics(self.tasks, weights) for s in ("val", "test") if weights}
        )

    def _add_few_shot(self, options: FewShotOptions, freeze: Freeze, lora: LoraOptions | None) -> None:
        if freeze != "none" or lora is not None:
            raise UserError("few_shot: freezes both towers; leave freeze and lora out")
        if not self.tasks:
            raise UserError("few_shot: is for data with classes; leave it out")
        width = token_width(self.towers) if options.method in ("coop", "cocoop") else 0
        self.few_shot = build_head(options, len(self.tasks[LABEL_TASK]), self.towers.embed_dim, width)
        self.towers.requires_grad_(False)
        self.objective.requires_grad_(False)
        self._frozen_modules = [self.towers]

    def on_train_start(self) -> None:
        """See ``VisionTask``; solve the few-shot classifier."""
        if self.few_shot is not None and self.current_epoch == 0:
            self.on_validation_epoch_start()
            texts = self.texts_of(self.tasks[LABEL_TASK], self.class_prompts, self._context)
            fit_task(self, self.few_shot, self.encode_image, texts)
        super().on_train_start()

    def on_train_epoch_end(self) -> None:
        """See ``VisionTask``; one epoch is enough for what is solved."""
        super().on_train_epoch_end()
        if self.few_shot is not None:
            self.trainer.should_stop = True

    @torch.no_grad()
    def texts_of(self, names: Sequence[str], prompts: Sequence[Sequence[str]], context: int = 4) -> ClassTexts:
        """Return what the text tower knows of some classes, for few-shot classifiers.

        Args:
            names: of the classes.
            prompts: of each class; their embeddings are averaged.
            context: number of context vectors; 0 where the names are not needed behind any.
        """
        contexts = None
        if context and self.towers.tokenizer is not None:
            contexts = ContextTexts(self.towers, self.towers.tokenizer, names, context, self.device)
        return ClassTexts(self._embeddings_of(prompts), float(self.objective.logit_scale()[0]), contexts)

    @property
    def _context(self) -> int:
        """Number of context vectors."""
        needs = self.few_shot is not None and self.few_shot.options.method in ("coop", "cocoop")
        return self.few_shot.options.context if needs and self.few_shot is not None else 0

    def classify(self, image: torch.Tensor) -> torch.Tensor:
        """Logits of the classes, float32 ``(B, C)``, of unit-length image embeddings, float ``(B, D)``."""
        if self.few_shot is not None:
            if self.few_shot.options.method == "cocoop" and self._contexts is None:
                self._contexts = self.texts_of(self.tasks[LABEL_TASK], [], self._context).context
            return cast("torch.Tensor", self.few_shot(image, self._contexts))
        logits: torch.Tensor = self.objective.logit_scale()[0] * image @ self.class_embeddings().T
        return logits

    @property
    def needs_images(self) -> str:
        """See ``VisionTask``."""
        if self.captioner is not None:
            return "captions are written from an image's tokens"
        return "a few-shot classifier needs one epoch" if self.few_shot is not None else ""

    def misfits(self, state_dict: Mapping[str, Any]) -> str:
        """See ``VisionTask``; the cache of a few-shot classifier has the size of the checkpoint's."""
        if self.few_shot is not None:
            self.few_shot.resize(state_dict, "few_shot.")
        return super().misfits(state_dict)

    def fitting_state(self, checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """See ``VisionTask``; a few-shot classifier starts again."""
        state, notes = super().fitting_state(checkpoint)
        if self.few_shot is None:
            return state, notes
        state = {name: value for name, value in state.items() if not name.startswith("few_shot.")}
        own = {name: value for name, value in self.state_dict().items() if name.startswith("few_shot.")}
        return {**state, **own}, [*notes, "the few-shot classifier starts again"]

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """See ``VisionTask``."""
        if self.is_logged(batch_idx):
            self.log("train/logit_scale", self.objective.logit_scale()[0])
        loss = super().training_step(batch, batch_idx)
        if self.captioner is not None and self.is_logged(batch_idx):
            self.log("train/captioning_loss", self._captioning)
        return loss

    def _shared_step(self, batch: Batch, split: LoggedSplit) -> tuple[torch.Tensor, Outputs]:
        counter = cast("MeanOverSamples", self.contrastive[f"{split}_loss"])
        if split == "train":
            loss = self._training_loss(batch)
            counter.update(loss, len(batch["sample_id"]))
            return loss, training_outputs(batch)
        outputs = self._evaluated(batch, self._evaluated_captions(batch, split))
        loss = torch.zeros((), device=self.device)
        if "text_embedding" in outputs:
            pairs = _first_captions(outputs, batch["positive_id"][real_rows(batch)])
            if samples := len(pairs.image):
                loss = self.objective(pairs, joined=False)
            # Even if all rows are padding: at the end all processes exchange their sums, or none does.
            counter.update(loss, samples)
        if self.tasks:
            targets = outputs["targets"][LABEL_TASK]
            scores = cast("SplitMetrics", self.scores[f"{split}_scores"])
            scores.update_losses({LABEL_TASK: masked_cross_entropy(outputs["logits"][LABEL_TASK], targets)})
            scores.update_scores(outputs["logits"], {LABEL_TASK: targets})
        return loss, outputs

    def _training_loss(self, batch: Batch) -> torch.Tensor:
        if self.captioner is not None:
            return self._captioning_loss(self.captioner, batch)
        image = self._image_embeddings(batch)
        if self.few_shot is not None:
            return masked_cross_entropy(self.classify(image), batch["label"]).value
        captions = batch["caption"]
        if self._text_cache is not None and (features := self._text_cache.get(captions)) is not None:
            text = self._embed("text", features)
        else:
            text = encode_in_chunks(self._encode_tokens, self._tokens(captions), self.chunk_size, self.towers)
        loss: torch.Tensor = self.objective(Pairs(image, text, batch["positive_id"]), joined=True)
        return loss

    def _captioning_loss(self, captioner: Captioner, batch: Batch) -> torch.Tensor:
        """The contrastive loss plus the weighted captioning loss, the mean over the tokens of all processes."""
        ids, attended = self._tokens(batch["caption"])
        rows = encode_in_chunks(self._described, [batch["image"], ids, attended], self.chunk_size, self.towers)
        text = encode_in_chunks(self._encode_tokens, [ids, attended], self.chunk_size, self.towers)
        captioning = MeanLoss(rows[:, -1].sum() / attended.sum(), attended.sum())
        self._captioning = captioning.value.detach()
        joined = joined_losses({"captions": captioning})["captions"].value
        pairs = Pairs(rows[:, :-1], text, batch["positive_id"])
        loss: torch.Tensor = self.objective(pairs, joined=True) + captioner.weight * joined
        return loss

    def _described(self, image: torch.Tensor, ids: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Embeddings of images with the losses of their captions behind them, float32 ``(B, D + 1)``."""
        assert self.captioner is not None
        features, image_tokens = self.towers.with_image_tokens(image)
        losses = self.captioner(image_tokens, ids, attended)
        return torch.cat([self._embed("image", features), losses[:, None]], dim=1)

    def _evaluated_captions(self, batch: Batch, split: LoggedSplit) -> torch.Tensor | None:
        """Update the captioning loss by each image's first caption; return the image embeddings computed with it."""
        if self.captioner is None or "captions" not in batch:
            return None
        ids, attended = self._tokens([texts[0] if texts else "" for texts in batch["captions"]])
        has_any = torch.tensor([bool(texts) for texts in batch["captions"]], device=self.device)
        rows, real = self._described(batch["image"], ids, attended), real_rows(batch) & has_any
        count = (attended * real[:, None]).sum()
        counter = cast("MeanOverSamples", self.contrastive[f"{split}_captioning_loss"])
        counter.update((rows[:, -1] * real).sum() / count.clamp(min=1), count)
        return rows[:, :-1]

    @torch.no_grad()
    def captions_of(self, image: torch.Tensor) -> list[str]:
        """Write a caption for each of the uint8 RGB images ``(B, 3, H, W)``, greedily; none without a captioner."""
        tokenizer = self.towers.tokenizer
        if self.captioner is None or tokenizer is None:
            return []
        _, image_tokens = self.towers.with_image_tokens(image)
        return [tokenizer.text(ids) for ids in self.captioner.generate(image_tokens, tokenizer.end_id)]

    def _image_embeddings(self, batch: Batch) -> torch.Tensor:
        if "features" in batch:
            return self._embed("image", batch["features"]["image"])
        chunk_size = self.chunk_size if self.training else 0
        return encode_in_chunks(self.encode_image, [batch["image"]], chunk_size, self.towers)

    def _evaluated(self, batch: Batch, image: torch.Tensor | None = None) -> Outputs:
        """Embeddings, of images by default computed here, and, if there are classes, zero-shot logits."""
        image = self._image_embeddings(batch) if image is None else image
        logits = {}
        if self.tasks:
            # Half precision would often make the largest logits equal.
            with torch.autocast(self.device.type, enabled=False):
                logits = {LABEL_TASK: self.classify(image)}
        outputs = real_outputs(batch, logits, known_targets(batch, self.tasks))
        real = real_rows(batch)
        outputs["image_embedding"] = image[real]
        if "captions" in batch:
            captions = [texts for texts, is_real in zip(batch["captions"], real.tolist(), strict=True) if is_real]
            counts = torch.tensor([len(texts) for texts in captions], device=self.device, dtype=torch.int64)
            outputs["text_embedding"] = self.encode_text([text for texts in captions for text in texts])
            outputs["text_image"] = outputs["sample_id"].repeat_interleave(counts)
        return outputs

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Clamp the logit scale and set the learning rates of the next step."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.objective.logit_scale.clamp()

    def predict_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Embeddings and, if there are classes, zero-shot logits of a batch."""
        return self._evaluated(batch)

    def log_epoch(self, split: LoggedSplit) -> None:
        """See ``VisionTask``."""
        values: dict[str, torch.Tensor] = {}
        if f"{split}_scores" in self.scores:
            scores = cast("SplitMetrics", self.scores[f"{split}_scores"])
            values |= scores.compute()
            scores.reset()
        for name in ("loss", "captioning_loss"):
            if f"{split}_{name}" in self.contrastive:
                counter = cast("MeanOverSamples", self.contrastive[f"{split}_{name}"])
                if (mean := counter.compute()) is not None:
                    values[name] = mean
                counter.reset()
        self.log_dict({f"{split}/{name}": value for name, value in values.items()}, sync_dist=True)

    @property
    def train_sums(self) -> nn.Module:
        """See ``VisionTask``."""
        return self.contrastive["train_loss"]

    @property
    def logit_scale_parameters(self) -> list[nn.Parameter]:  # type: ignore[override]  # computed here, constant elsewhere
        """Scale and bias, where they are trained."""
        return list(self.objective.logit_scale.parameters()) if self.few_shot is None else []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See ``encode_image``."""
        return self.encode_image(image)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Unit-length embeddings, float32 ``(B, D)``, of uint8 RGB images ``(B, 3, H, W)``."""
        return self._embed("image", self.image_features(image))

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """See ``VisionTask``."""
        return self.towers.image_features(image)

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """Unit-length embeddings, float32 ``(B, D)``, of texts without any prompt template around them.

        Raises:
            UserError: if there is no tokenizer yet.
        """
        chunks = [self._encode_texts(texts[start : start + _TEXT_BATCH]) for start in range(0, len(texts), _TEXT_BATCH)]
        return torch.cat(chunks or [torch.zeros(0, self.towers.embed_dim, device=self.device)])

    def class_embeddings(self) -> torch.Tensor:
        """Unit-length means of the prompts' embeddings, float32 ``(C, D)``; computed once per evaluation."""
        if self._class_embeddings is None:
            self._class_embeddings = self._embeddings_of(self.class_prompts)
        return self._class_embeddings

    def _embeddings_of(self, prompts: Sequence[Sequence[str]]) -> torch.Tensor:
        if not prompts:
            return torch.zeros(0, self.towers.embed_dim, device=self.device)
        flat = self.encode_text([prompt for own in prompts for prompt in own])
        parts = torch.split(flat, [len(own) for own in prompts])
        return F.normalize(torch.stack([part.mean(dim=0) for part in parts]), dim=-1)

    def _tokens(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.towers.tokenizer is None:
            raise UserError(
                "the text tower has no tokenizer yet; fit first, or load pretrained weights or a checkpoint"
            )
        tokens = self.towers.tokenizer(texts, self.device)
        return tokens["input_ids"], tokens["attention_mask"]

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        cached = None if self._text_cache is None else self._text_cache.get(texts)
        return self._encode_tokens(*self._tokens(texts)) if cached is None else self._embed("text", cached)

    def _encode_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self._embed("text", self._text_features(input_ids, attention_mask))

    def _text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.towers.text_features({"input_ids": input_ids, "attention_mask": attention_mask})

    def _embed(self, side: Side, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.towers.project(side, features).float(), dim=-1)

    @property
    def backbone(self) -> nn.Module:
        """Both towers without their projections."""
        return nn.ModuleList(self.towers.backbone(side) for side in SIDES)

    @property
    def backbones(self) -> dict[str, nn.Module]:
        """See ``VisionTask``."""
        return {f"{side}_backbone": self.towers.backbone(side) for side in SIDES}

    @property
    def embedding_dim(self) -> int:
        """Length of the embeddings."""
        return self.towers.embed_dim

    @property
    def frozen_sides(self) -> list[str]:
        """See ``VisionTask``."""
        return [side for side in SIDES if is_frozen(self.towers.backbone(side))]

    @torch.no_grad()
    def remember_texts(self, texts: Sequence[str]) -> None:
        """Cache the frozen text backbone's features of these texts and the class prompts; no texts clear the cache."""
        prompts = [prompt for prompts in self.class_prompts for prompt in prompts] if texts else []
        # Sorted, because the composition of batches changes the last digits.
        distinct = sorted({*texts, *prompts})
        self._text_cache = None
        if distinct:
            chunks = [distinct[start : start + _TEXT_BATCH] for start in range(0, len(distinct), _TEXT_BATCH)]
            features = torch.cat([self._text_features(*self._tokens(chunk)) for chunk in chunks])
            self._text_cache = TextCache(distinct, features)

    def train(self, mode: bool = True) -> Self:
        """As torch's, but frozen modules stay in evaluation mode."""
        super().train(mode)
        for module in getattr(self, "_frozen_modules", []):
            module.eval()
        return self

    def fetch_weights(self) -> list[WeightsOrigin]:
        """Load the towers' pretrained weights, tokenizer and logit scale."""
        self.towers.load_pretrained()
        self.input_options = {**self.towers.input_options}
        self.objective.logit_scale.load_pretrained(*self.towers.pretrained_logit_scale())
        return self.towers.origins

    @property
    def ready_without_training(self) -> bool:
        """Whether all weights are pretrained, so that zero-shot predictions make sense."""
        return self.towers.wholly_pretrained and self.few_shot is None and self.captioner is None

    @property
    def referenced(self) -> str:
        """See ``VisionTask``."""
        return "towers.model." if self.towers.wholly_pretrained and not self.has_adapters else ""

    def load_referenced(self, place: str) -> None:
        """See ``VisionTask``."""
        self.towers.load_pretrained(place)

    @property
    def pretrained_inputs(self) -> InputOptions | None:
        """See ``VisionTask``."""
        return self.towers.own_inputs

    @property
    def weights_name(self) -> str:
        """See ``VisionTask``."""
        return self.towers.name

    def on_fit_start(self) -> None:
        """Fetch pretrained weights; train a tokenizer if none came with them."""
        super().on_fit_start()
        # A few-shot classifier leaves the towers as they were fetched, so checkpoints need not hold them.
        self._as_fetched = self.few_shot is not None and self._fetched
        without_caption = getattr(getattr(self.trainer, "datamodule", None), "without_caption", None)
        if self.few_shot is None and without_caption is not None and (count := without_caption("train")):
            rank_zero_warn(
                f"data: {count} images of the train split have no caption, so they are trained with an empty one; "
                "write captions, or leave these images out"
            )
        if self.towers.tokenizer is None:
            training_texts = getattr(getattr(self.trainer, "datamodule", None), "training_texts", list)
            # The first process decides, so that all have the same.
            state = self.towers.train_tokenizer(training_texts()).state if self.trainer.is_global_zero else None
            self.towers.tokenizer = TextTokenizer(checked_state(self.trainer.strategy.broadcast(state)))

    def on_validation_epoch_start(self) -> None:
        """Discard the class embeddings, because the text encoder has been trained since."""
        self._class_embeddings = self._contexts = None

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the tokenizer, the configurations of the towers and the maximum scale."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "architectures": self.towers.architectures}
        if self.towers.tokenizer is not None:
            checkpoint["tokenizer"] = dict(self.towers.tokenizer.state)
        checkpoint["max_log_scale"] = self.objective.logit_scale.max_log_scale

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the tokenizer and the maximum scale."""
        super().on_load_checkpoint(checkpoint)
        self.towers.tokenizer = TextTokenizer(checked_state(checkpoint.get("tokenizer")))
        scale = self.objective.logit_scale
        scale.max_log_scale = float(checkpoint.get("max_log_scale", scale.max_log_scale))


def _warn_of_equal_prompts(names: Sequence[str], prompts: Sequence[Sequence[str]]) -> None:
    """Warn of classes that texts do not distinguish: the first of them would always be predicted."""
    first: dict[tuple[str, ...], str] = {}
    for name, own in zip(names, prompts, strict=True):
        if own and (other := first.setdefault(tuple(sorted(own)), name)) != name:
            rank_zero_warn(
                f"data prompts: classes {other!r} and {name!r} have the same prompts ({own[0]!r}, …), so texts do not "
                "distinguish them; make them one class, or give prompts.descriptions that differ"
            )
            return


def _first_captions(outputs: Outputs, positive_id: torch.Tensor) -> Pairs:
    """Each image that has captions with its first one."""
    owner = outputs["text_image"]
    has_any = torch.isin(outputs["sample_id"], owner)
    is_first = torch.ones_like(owner, dtype=torch.bool)
    is_first[1:] = owner[1:] != owner[:-1]
    image = outputs["image_embedding"][has_any]
    return Pairs(image, outputs["text_embedding"][is_first], positive_id[has_any])


def _freeze(towers: Towers, mode: Freeze, lora: LoraOptions | None, image_size: int) -> list[nn.Module]:
    """Apply ``freeze`` and ``lora``; return the modules to keep in evaluation mode."""
    freeze_unused(towers)
    frozen = freeze(towers, mode)
    if lora is None:
        return frozen
    if mode not in {"none", "towers"}:
        raise UserError(f"freeze: {mode} does not go with lora, which freezes both towers; leave it out")
    add_lora(towers, lora, image_size)
    return []
