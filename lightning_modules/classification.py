"""Image classifiers: one task per image (``ImageClassifier``) or several (``MultiTaskClassifier``), of every kind."""

# No postponed annotations: jsonargparse would lose the ranges of the arguments.

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_modules.base import LoggedSplit, VisionTask, known_targets, real_outputs, training_outputs
from lightning_modules.distillation import Distillation, load_teacher
from lightning_modules.encoders.image import ImageEncoder
from lightning_modules.encoders.weights import WeightsOrigin
from lightning_modules.few_shot import build_head, fit_task, refuse_without_texts
from lightning_modules.finetune import add_adapter, reset_magnitudes
from lightning_modules.heads import MultiLabelOutput, SingleLabelOutput, TaskOutput, task_outputs
from lightning_modules.heads.multi_label import DEFAULT_THRESHOLD, MultiLabelScores
from lightning_modules.metrics import MeanLoss, SplitMetrics, joined_losses
from lightning_modules.options import (
    BackboneOptions,
    FewShotOptions,
    LossOptions,
    NonNegative,
    OptimOptions,
    Rate,
    ScheduleName,
    checked,
    current_arguments,
)
from lightning_modules.precision import Float32Linear, Float32Sequential
from vitrail.errors import UserError
from vitrail.predictions import refuse_kinds
from vitrail.types import CLASS_KINDS, LABEL_TASK, Batch, InputOptions, Outputs, TaskFacts, TaskKind, kind_of

_DISTILLATION = "distillation."
FEATURE_DROP_RATE = 0.1
HEAD_DROP_RATE = 0.2


class ScoredTask(VisionTask):
    """Base class of tasks whose outputs are logits over named classes, or numbers.

    A subclass calls ``configure_metrics``.

    Attributes:
        tasks: class names of each task, none for regression.
        task_kinds: kinds of the tasks that are not single-label.
        task_weights: weight of each task's loss in the sum.
        thresholds: of each multi-label task the probabilities from which its labels are predicted. Each validation of a
            fit chooses those of the highest F1, and checkpoints keep them.
        chooses_thresholds: whether any other validation does so, too, as weights need that no fit has validated.
        label_scores: of each multi-label task the scores of its labels in the latest evaluation, see
            ``heads.multi_label.MultiLabelScores.per_label``.
    """

    def configure_metrics(
        self,
        tasks: dict[str, list[str]],
        task_weights: Mapping[str, float] | None = None,
        outputs: Sequence[TaskOutput] | None = None,
    ) -> None:
        """Build the metrics of all splits.

        Args:
            tasks: class names of each task.
            task_weights: a task without one has weight 1.
            outputs: of each task, by default single-label.
        """
        for task, names in tasks.items():
            if len(names or ()) < 2 and outputs is None:
                raise _too_few(task, 2)
        given = outputs or [SingleLabelOutput(task, len(names)) for task, names in tasks.items()]
        self.tasks = tasks
        self.outputs = nn.ModuleList(given)
        self.task_kinds: dict[str, TaskKind] = {
            task: output.kind for task, output in zip(tasks, given, strict=True) if output.kind != "single_label"
        }
        self.thresholds = {
            task: [DEFAULT_THRESHOLD] * output.width
            for task, output in zip(tasks, given, strict=True)
            if isinstance(output, MultiLabelOutput)
        }
        self.chooses_thresholds = False
        self.label_scores: dict[str, dict[str, torch.Tensor]] = {}
        self.task_weights = {**dict.fromkeys(tasks, 1.0), **(task_weights or {})}
        self.train_metrics = SplitMetrics(tasks, self.task_weights, losses_only=True)
        self.val_metrics, self.test_metrics = (
            SplitMetrics(tasks, self.task_weights, scores=[output.scores() for output in given]) for _ in range(2)
        )

    def setup(self, stage: str) -> None:
        """See ``VisionTask``; refuse a precision that would round targets."""
        super().setup(stage)
        if "regression" in self.task_kinds.values() and str(self.trainer.precision) in ("bf16-true", "16-true"):
            kind = str(self.trainer.precision).removesuffix("-true")
            raise UserError(
                f"trainer.precision: {self.trainer.precision} would round the targets of regression tasks; "
                f"use {kind}-mixed"
            )

    @property
    def train_sums(self) -> nn.Module:
        """See ``VisionTask``."""
        return self.train_metrics

    def log_epoch(self, split: LoggedSplit) -> None:
        """See ``VisionTask``."""
        values = {f"{split}/{name}": value for name, value in self.epoch_values(split).items()}
        # The values are the same on all processes already; without sync_dist Lightning would warn.
        self.log_dict(values, sync_dist=True)

    def epoch_values(self, split: LoggedSplit) -> dict[str, Any]:
        """Averages and scores of the epoch; resets the metrics, and chooses the thresholds in a fit's validation."""
        metrics = self._metrics_of(split)
        fits = self._trainer is not None and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        multi_label: dict[str, MultiLabelScores] = {}
        for task, scores in zip(self.tasks, metrics.scores, strict=False):
            if isinstance(scores, MultiLabelScores):
                multi_label[task] = scores
                scores.thresholds = torch.tensor(self.thresholds[task], dtype=torch.float64)
                scores.chooses = split == "val" and (fits or self.chooses_thresholds)
        values = dict(metrics.compute())
        self.thresholds |= {task: scores.thresholds.tolist() for task, scores in multi_label.items()}
        self.label_scores = {task: dict(scores.per_label) for task, scores in multi_label.items()}
        metrics.reset()
        return values

    def evaluation_loss(
        self, split: LoggedSplit, logits: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Update the metrics; return a plain loss, by which runs with other training losses compare."""
        self._metrics_of(split).update_scores(logits, targets)
        losses = {task: output.evaluation_loss(logits[task], targets[task]) for task, output in self._outputs.items()}
        return self.sum_losses(split, losses)

    @property
    def _outputs(self) -> dict[str, TaskOutput]:
        return {task: cast("TaskOutput", output) for task, output in zip(self.tasks, self.outputs, strict=True)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See ``VisionTask``; adds the thresholds of multi-label tasks."""
        super().on_save_checkpoint(checkpoint)
        if self.thresholds:
            # Not a buffer: averaged weights would not have those of their own validation.
            checkpoint["thresholds"] = {task: list(values) for task, values in self.thresholds.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See ``VisionTask``."""
        super().on_load_checkpoint(checkpoint)
        self.thresholds |= checkpoint.get("thresholds", {})

    def sum_losses(self, split: LoggedSplit, losses: Mapping[str, MeanLoss]) -> torch.Tensor:
        """Update the metrics with the loss of each task; return the weighted sum."""
        self._metrics_of(split).update_losses(losses)
        return self._weighted({task: mean.value for task, mean in losses.items()})

    def training_loss(self, losses: Mapping[str, MeanLoss]) -> torch.Tensor:
        """Update the metrics; return the weighted sum, with the gradient of the joined batch of all processes."""
        self.train_metrics.update_losses(losses)
        losses = joined_losses(losses)
        if len(losses) == 1:
            self.step_weight = next(iter(losses.values())).weight
        return self._weighted(self.balanced(losses))

    def balanced(self, losses: Mapping[str, MeanLoss]) -> dict[str, torch.Tensor]:
        """The terms of the training loss, by task."""
        return {task: mean.value for task, mean in losses.items()}

    def _weighted(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([self.task_weights[task] * term for task, term in terms.items()]).sum()

    def _metrics_of(self, split: LoggedSplit) -> SplitMetrics:
        return {"train": self.train_metrics, "val": self.val_metrics, "test": self.test_metrics}[split]


class ClassificationTask(ScoredTask):
    """Base class of classifiers with an image encoder.

    A subclass calls ``configure_encoder``, then ``configure_tasks``, then adds its heads.

    Attributes:
        log_variances: of the tasks' noise, float ``(T,)``, with ``balance: uncertainty``.
        distillation: the loss with respect to a teacher, in training only.
    """

    def configure_encoder(
        self,
        backbone: str,
        image_size: int,
        pretrained: bool | str,
        options: BackboneOptions | None = None,
    ) -> None:
        """Build the image encoder."""
        given = checked(BackboneOptions, options, "backbone_options")
        self.encoder = ImageEncoder(backbone, image_size, pretrained, given.timm)
        self.input_options: InputOptions = {**self.encoder.input_options}
        self._recomputes = given.gradient_checkpointing
        if given.gradient_checkpointing:
            self.encoder.checkpoint_activations()
            self.encoder.keep_activations()
        if given.adapter is not None:
            add_adapter(self.encoder, given.adapter)
            # The statistics belong to weights that are frozen.
            self.fix_batchnorm()

    def on_fit_start(self) -> None:
        """See ``VisionTask``; only training recomputes activations, so graphs and predictions are as without."""
        super().on_fit_start()
        if self._recomputes:
            self.encoder.checkpoint_activations()
        if self.distillation is not None:
            self._origins = self.distillation.recorded(self._origins)

    def configure_tasks(
        self,
        tasks: dict[str, list[str]],
        facts: TaskFacts | None,
        options: LossOptions,
        *,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        """Build outputs, losses and metrics of all tasks; a teacher is loaded when training begins."""
        facts, options = checked(TaskFacts, facts, "task_facts"), checked(LossOptions, options, "loss_options")
        kinds = facts.task_kinds
        self._distill, self.distillation = options.distill, cast("Distillation | None", None)
        if self._distill is not None and self._distill.kind != "features" and self.encoder.has_distillation_token:
            self.encoder.output_two_tokens()
        for task, names in tasks.items():
            least = {"regression": 0, "multi_label": 1}.get(kind_of(kinds, task), 2)
            if len(names or ()) < least:
                raise _too_few(task, least)
        outputs = task_outputs(tasks, facts, options)
        self.configure_metrics(tasks, task_weights, outputs)
        weighting = options.class_weighting
        if weighting != "none" and (other := [t for t in tasks if kind_of(kinds, t) not in CLASS_KINDS]):
            rank_zero_info(
                f"loss_options.class_weighting: {weighting} is for tasks of classes; not for {', '.join(other)}."
            )
        self.log_variances = None
        if options.balance == "uncertainty":
            if len(tasks) < 2:
                raise UserError("loss_options.balance: uncertainty is for several tasks, there is one; use fixed")
            self.log_variances = nn.Parameter(torch.zeros(len(tasks)))

    def balanced(self, losses: Mapping[str, MeanLoss]) -> dict[str, torch.Tensor]:
        """See ``ScoredTask``; as ``loss_options.balance`` wants."""
        if self.log_variances is None:
            return super().balanced(losses)
        # Where no target of a task is known, its noise is not trained either.
        return {
            task: mean.value * torch.exp(-noise) + noise / 2 * (mean.weight > 0)
            for (task, mean), noise in zip(losses.items(), self.log_variances, strict=True)
        }

    def setup(self, stage: str) -> None:
        """See ``VisionTask``; loads the teacher."""
        super().setup(stage)
        if stage == "fit" and self._distill is not None and self.distillation is None:
            teacher = load_teacher(self._distill)
            self.distillation = Distillation(
                teacher, self._distill, self.tasks, self.task_kinds, self.encoder.num_features
            )

    @property
    def needs_images(self) -> str:
        """See ``VisionTask``."""
        return "the teacher (loss_options.distill) takes images" if self.distillation is not None else ""

    @abstractmethod
    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs of each task (``vitrail.types.Outputs``) from the encoder's features, float ``(B, D)``."""

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs of each task (``vitrail.types.Outputs``) for uint8 RGB images ``(B, 3, H, W)``."""
        return self.classify(self.encoder(image))

    def fitting_state(self, checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """See ``VisionTask``; a head of another kind or of other classes starts again."""
        state, own = checkpoint["state_dict"], self.state_dict()
        theirs, ours = (
            _heads(current_arguments(type(self), given)) for given in (checkpoint["hyper_parameters"], self.hparams)
        )
        found = {name: value for name, value in state.items() if not name.startswith(_OF_TASKS)}
        found |= {name: value for name, value in own.items() if name.startswith(_OF_TASKS)}
        if theirs == ours and "log_variances" in own and "log_variances" in state:
            found["log_variances"] = state["log_variances"]
        notes = [f"the head of {task} is left out: it is not trained here" for task in theirs if task not in ours]
        for task, (prefixes, *meaning) in ours.items():
            former, *before = theirs.get(task, (prefixes, None))
            names = {
                name: old + name.removeprefix(new)
                for old, new in zip(former, prefixes, strict=True)
                for name in own
                if name.startswith(new)
            }
            if meaning != before:
                what = "it is new" if before == [None] else "it has other classes"
                notes.append(f"the head of {task} starts again: {what}")
            elif any(old not in state or state[old].shape != own[name].shape for name, old in names.items()):
                notes.append(f"the head of {task} starts again: it has other layers")
            else:
                found |= {name: state[old] for name, old in names.items()}
        return found, notes

    def _shared_step(self, batch: Batch, split: LoggedSplit) -> tuple[torch.Tensor, Outputs]:
        features, targets = self._features(batch), known_targets(batch, self.tasks, self.task_kinds)
        logits = self._logits(features)
        if split == "train":
            mix = batch.get("mix")
            own, taught = self._logits_of_tokens(features) if self.encoder.has_two_tokens else (logits, logits)
            losses = {task: output.loss(own[task], targets[task], mix) for task, output in self._outputs.items()}
            loss = self._with_teacher(batch, features, taught, self.training_loss(losses))
            return loss, training_outputs(batch)
        loss = self.evaluation_loss(split, logits, targets)
        return loss, real_outputs(batch, logits, targets, features if split == "test" else None)

    def _with_teacher(
        self, batch: Batch, features: torch.Tensor, logits: Mapping[str, torch.Tensor], loss: torch.Tensor
    ) -> torch.Tensor:
        if self.distillation is None or self._distill is None:
            return loss
        taught: torch.Tensor = self.distillation(batch, features, logits, self.task_weights)
        self._teacher_loss, self.step_weight = taught.detach(), None
        return (1 - self._distill.weight) * loss + self._distill.weight * taught

    def _logits_of_tokens(self, features: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Logits from the class token, which learns from labels, and from the other one, from the teacher."""
        heads = [module for module in self.modules() if isinstance(module, TokenHeads)]
        found = []
        for index in (0, 1):
            for head in heads:
                head.only = index
            found.append(self._logits(features))
        for head in heads:
            head.only = None
        return found[0], found[1]

    def make_head(self, build: Callable[[int], nn.Module]) -> nn.Module:
        """Build a head from the number of features, or one for each token."""
        size = self.encoder.num_features
        return TokenHeads(build(size // 2), build(size // 2)) if self.encoder.has_two_tokens else build(size)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """See ``VisionTask``."""
        loss = super().training_step(batch, batch_idx)
        if self.distillation is not None and self.is_logged(batch_idx):
            self.log("train/teacher_loss_step", self._teacher_loss, on_step=True, on_epoch=False)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See ``VisionTask``; the projection to the teacher's features is not part of the model."""
        super().on_save_checkpoint(checkpoint)
        state = checkpoint.get("state_dict", {})
        if self.distillation is not None:
            names = [name for name in state if name.startswith(_DISTILLATION)]
            checkpoint["distillation"] = {name: state.pop(name) for name in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See ``VisionTask``."""
        super().on_load_checkpoint(checkpoint)
        if self.distillation is not None:
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **checkpoint.get("distillation", {})}

    def predict_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of a batch, whose targets may be unknown."""
        features = self._features(batch)
        targets = known_targets(batch, self.tasks, self.task_kinds)
        return real_outputs(batch, self._logits(features), targets, features)

    def _features(self, batch: Batch) -> torch.Tensor:
        features: torch.Tensor = batch["features"]["image"] if "features" in batch else self.encoder(batch["image"])
        return features

    def _logits(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """float32 also where the network computes in half precision."""
        return {task: logits.float() for task, logits in self.classify(features).items()}

    @property
    def backbone(self) -> nn.Module:
        """The encoder's network."""
        return self.encoder.backbone

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """See ``VisionTask``."""
        return cast("torch.Tensor", self.encoder(image))

    @property
    def embedding_dim(self) -> int:
        """Length of ``image_embedding`` in the outputs."""
        return self.encoder.num_features

    def fetch_weights(self) -> list[WeightsOrigin]:
        """See ``VisionTask``."""
        self.encoder.load_pretrained()
        reset_magnitudes(self.encoder)
        return [self.encoder.origin] if self.encoder.origin else []

    @property
    def pretrained_inputs(self) -> InputOptions | None:
        """See ``VisionTask``."""
        return self.encoder.own_inputs

    @property
    def weights_name(self) -> str:
        """See ``VisionTask``."""
        return self.encoder.name


class TokenHeads(nn.Module):
    """Heads of class and distillation token, whose mean is the prediction (DeiT: Touvron et al., ICML 2021)."""

    only: int | None = None
    """Index of the head to use alone."""

    def __init__(self, own: nn.Module, taught: nn.Module) -> None:
        super().__init__()
        self.own, self.taught = own, taught

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Outputs, float ``(B, C)``, from the features of both tokens, float ``(B, 2 D)``."""
        tokens = zip((self.own, self.taught), features.chunk(2, dim=-1), strict=True)
        outputs = [head(token) for head, token in tokens]
        return torch.stack(outputs).mean(dim=0) if self.only is None else outputs[self.only]


class ImageClassifier(ClassificationTask):
    """Predicts the main task of the data: a class, labels, a step on a scale or a number.

    Args:
        backbone: name in timm.
        class_names: linked from the data.
        task_facts: kinds and statistics of the targets, linked from the data.
        image_size: height and width in pixels, linked from the data.
        pretrained: true for the weights on the hub, false for random ones, or the path of a weights file.
        backbone_options: further settings of the backbone, adapters included.
        drop_rate: dropout before the head.
        loss_options: training loss, label smoothing, class weights, and a teacher to learn from.
        lr: peak learning rate; ``optim_options.backbone_lr`` sets another one for the backbone.
        weight_decay: weight decay of AdamW; not applied to biases and norms.
        schedule: learning-rate schedule.
        optim_options: further settings of the optimizer.
    """

    def __init__(
        self,
        backbone: str,
        class_names: list[str],
        *,
        task_facts: TaskFacts | None = None,
        image_size: int = 224,
        pretrained: bool | str = True,
        backbone_options: BackboneOptions = BackboneOptions(),
        drop_rate: Rate = 0.0,
        loss_options: LossOptions = LossOptions(),
        lr: NonNegative = 1e-3,
        weight_decay: NonNegative = 0.05,
        schedule: ScheduleName = "cosine",
        optim_options: OptimOptions = OptimOptions(),
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, schedule=schedule, optim_options=optim_options)
        self.save_hyperparameters()
        self.configure_encoder(backbone, image_size, pretrained, backbone_options)
        self.configure_tasks(
            {LABEL_TASK: class_names},
            task_facts,
            loss_options,
        )
        self.drop = nn.Dropout(drop_rate)
        self.head = self.make_head(lambda size: Float32Linear(size, self._outputs[LABEL_TASK].width))

    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """See ``ClassificationTask``."""
        return {LABEL_TASK: self.outputs[0](self.head(self.drop(features)))}


class FewShotClassifier(ClassificationTask):
    """Predicts a class by a linear classifier that is solved on the features of a frozen encoder, in one epoch.

    For a few images of each class (``data.shots``), or a linear probe with a tuned penalty on all of them. The features
    are of unit length, as galleries have them. What is chosen, and on what, is reported and logged as ``few_shot/…``.

    Args:
        backbone: name in timm.
        class_names: linked from the data.
        task_facts: kinds and statistics of the targets, linked from the data.
        image_size: height and width in pixels, linked from the data.
        pretrained: true for the weights on the hub, false for random ones, or the path of a weights file.
        backbone_options: further settings of the backbone.
        few_shot: the method, one that needs no texts.
    """

    def __init__(
        self,
        backbone: str,
        class_names: list[str],
        *,
        task_facts: TaskFacts | None = None,
        image_size: int = 224,
        pretrained: bool | str = True,
        backbone_options: BackboneOptions = BackboneOptions(),
        few_shot: FewShotOptions = FewShotOptions(),
    ) -> None:
        # What is solved is not changed by the epoch that follows, which measures it.
        super().__init__(lr=0.0, weight_decay=0.0, schedule="constant")
        self.save_hyperparameters()
        options = checked(FewShotOptions, few_shot, "few_shot")
        refuse_without_texts(options)
        self.configure_encoder(backbone, image_size, pretrained, backbone_options)
        self.configure_tasks({LABEL_TASK: class_names}, task_facts, LossOptions())
        refuse_kinds(self.task_kinds, "few_shot", fix="use lightning_modules.ImageClassifier")
        self.head = build_head(options, len(class_names), self.encoder.num_features)
        self.encoder.requires_grad_(False)

    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """See ``ClassificationTask``."""
        return {LABEL_TASK: self.outputs[0](self.head(F.normalize(features.float(), dim=-1)))}

    def on_train_start(self) -> None:
        """See ``VisionTask``; solve the classifier."""
        if self.current_epoch == 0:
            fit_task(self, self.head, self.encoder, None)
        super().on_train_start()

    def on_train_epoch_end(self) -> None:
        """See ``VisionTask``; one epoch is enough for what is solved."""
        super().on_train_epoch_end()
        self.trainer.should_stop = True

    def train(self, mode: bool = True) -> Self:
        """As torch's, but the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @property
    def needs_images(self) -> str:
        """See ``VisionTask``."""
        return "a few-shot classifier needs one epoch"


class MultiTaskClassifier(ClassificationTask):
    """Predicts several tasks at once, each a class, labels, a step on a scale or a number.

    The heads are those of the reference: dropout 0.1 on the features, then for each task
    ``Linear(d, d // 2), ReLU, Dropout(0.2), Linear(d // 2, n)``.

    Args:
        backbone: name in timm.
        tasks: class names of each task, linked from the data.
        task_facts: kinds and statistics of the targets, linked from the data.
        image_size: height and width in pixels, linked from the data.
        pretrained: true for the weights on the hub, false for random ones, or the path of a weights file.
        backbone_options: further settings of the backbone, adapters included.
        task_weights: the tasks to train, with the weights of their losses; by default all with weight 1.
        loss_options: training losses, how they are added, label smoothing, class weights, and a teacher to learn from.
        lr: peak learning rate; ``optim_options.backbone_lr`` sets another one for the backbone.
        weight_decay: weight decay of AdamW; not applied to biases and norms.
        schedule: learning-rate schedule.
        optim_options: further settings of the optimizer.
    """

    def __init__(
        self,
        backbone: str,
        tasks: dict[str, list[str]],
        *,
        task_facts: TaskFacts | None = None,
        image_size: int = 224,
        pretrained: bool | str = True,
        backbone_options: BackboneOptions = BackboneOptions(),
        task_weights: dict[str, float] | None = None,
        loss_options: LossOptions = LossOptions(),
        lr: NonNegative = 1e-3,
        weight_decay: NonNegative = 0.05,
        schedule: ScheduleName = "cosine",
        optim_options: OptimOptions = OptimOptions(),
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, schedule=schedule, optim_options=optim_options)
        self.save_hyperparameters()
        weights = _checked_weights(tasks, task_weights)
        self.configure_encoder(backbone, image_size, pretrained, backbone_options)
        self.configure_tasks(
            {task: names for task, names in tasks.items() if task in weights},
            task_facts,
            loss_options,
            task_weights=weights,
        )
        self.drop = nn.Dropout(FEATURE_DROP_RATE)
        # A list, because the name of a task need not be a legal name of a module.
        self.heads = nn.ModuleList(
            self.make_head(partial(_head, num_classes=one.width)) for one in self._outputs.values()
        )

    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """See ``ClassificationTask``."""
        features = self.drop(features)
        outputs = zip(self.tasks, self.heads, self.outputs, strict=True)
        return {task: output(head(features)) for task, head, output in outputs}


def _too_few(task: str, least: int) -> UserError:
    number = {1: "no class", 2: "fewer than two classes"}[least]
    return UserError(f"tasks: {task!r} has {number}; leave it out, or fix the data's class names")


_OF_TASKS = ("head.", "heads.", "outputs.", "log_variances")
"""Weights that belong to tasks and not to the network."""


def _heads(hyper_parameters: Mapping[str, Any]) -> dict[str, tuple[tuple[str, str], list[str], str]]:
    """Prefixes of the weights of head and output, class names, and kind of each task that is trained."""
    kinds = (hyper_parameters.get("task_facts") or {}).get("task_kinds")
    if "tasks" not in hyper_parameters:
        names = list(hyper_parameters["class_names"] or ())
        return {LABEL_TASK: (("head.", "outputs.0."), names, kind_of(kinds, LABEL_TASK))}
    weights = hyper_parameters.get("task_weights")
    trained = [task for task in hyper_parameters["tasks"] if weights is None or task in weights]
    return {
        task: (
            (f"heads.{place}.", f"outputs.{place}."),
            list(hyper_parameters["tasks"][task] or ()),
            kind_of(kinds, task),
        )
        for place, task in enumerate(trained)
    }


def _head(num_features: int, num_classes: int) -> nn.Module:
    hidden = num_features // 2
    return Float32Sequential(
        nn.Linear(num_features, hidden), nn.ReLU(), nn.Dropout(HEAD_DROP_RATE), nn.Linear(hidden, num_classes)
    )


def _checked_weights(tasks: dict[str, list[str]], task_weights: dict[str, float] | None) -> dict[str, float]:
    if not tasks:
        raise UserError("tasks: there are none; use a DataModule that has tasks")
    if task_weights is None:
        return dict.fromkeys(tasks, 1.0)
    unknown = sorted(set(task_weights) - set(tasks))
    if unknown or not task_weights:
        raise UserError(f"task_weights: the data have no {', '.join(unknown) or 'task'}; they have {', '.join(tasks)}")
    if not all(weight > 0 for weight in task_weights.values()):
        raise UserError(f"task_weights: must be above 0; got {task_weights}; a task that is not named is not trained")
    return task_weights
