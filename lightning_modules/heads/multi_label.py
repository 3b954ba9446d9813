"""Multi-label tasks: any of C labels, each with a logit of its own."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_auroc, multilabel_average_precision
from torchmetrics.utilities.data import dim_zero_cat
from torchvision.ops import sigmoid_focal_loss

from lightning_modules.heads.base import TaskOutput
from lightning_modules.metrics import MeanLoss, masked_mean
from lightning_modules.options import LossOptions
from vitrail.types import UNKNOWN, Mix, TaskKind

DEFAULT_THRESHOLD = 0.5


class MultiLabelOutput(TaskOutput):
    """Independent logits of C labels, float ``(B, C)``.

    Training losses, each averaged over the known entries of the targets:

    - ``bce``: binary cross-entropy.
    - ``focal``: the same times (1 - probability of the target) to the power of ``gamma`` (Lin et al., ICCV 2017).
    - ``asymmetric``: powers of their own for labels that apply and those that do not, and probabilities of the latter
      lowered by ``margin`` (Ridnik et al., Asymmetric Loss for Multi-Label Classification, ICCV 2021).

    Args:
        num_labels: C.
        name: of the loss.
        options: of the loss.
    """

    kind: ClassVar[TaskKind] = "multi_label"

    def __init__(self, num_labels: int, name: str = "bce", options: LossOptions = LossOptions()) -> None:
        super().__init__()
        self.width, self.name = num_labels, name
        self.gamma, self.margin = options.gamma, options.margin
        self.gamma_positive, self.gamma_negative = options.gamma_positive, options.gamma_negative

    def loss(self, logits: torch.Tensor, target: torch.Tensor, mix: Mix | None = None) -> MeanLoss:
        """See ``TaskOutput``."""
        return self._mean(self.name, logits, target, mix)

    def evaluation_loss(self, logits: torch.Tensor, target: torch.Tensor) -> MeanLoss:
        """Binary cross-entropy."""
        return self._mean("bce", logits, target, None)

    def scores(self) -> Metric:
        """See ``TaskOutput``."""
        return MultiLabelScores(self.width)

    def _mean(self, name: str, logits: torch.Tensor, target: torch.Tensor, mix: Mix | None) -> MeanLoss:
        def losses_of(entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            known = (entries != UNKNOWN).to(logits.dtype)
            applies = entries.clamp(min=0).to(logits.dtype)
            if name == "focal":
                losses = sigmoid_focal_loss(logits, applies, alpha=-1, gamma=self.gamma)
            elif name == "asymmetric":
                losses = self._asymmetric(logits, applies)
            else:
                losses = F.binary_cross_entropy_with_logits(logits, applies, reduction="none")
            return losses * known, known

        return masked_mean(losses_of, target, mix)

    def _asymmetric(self, logits: torch.Tensor, applies: torch.Tensor) -> torch.Tensor:
        present = logits.sigmoid()
        absent = (1 - present + self.margin).clamp(max=1)
        of_present = F.logsigmoid(logits) * (1 - present).pow(self.gamma_positive)
        of_absent = absent.clamp(min=1e-8).log() * (1 - absent).pow(self.gamma_negative)
        return -torch.where(applies > 0, of_present, of_absent)


class MultiLabelScores(Metric):
    """Scores of one multi-label task, each in [0, 1], higher is better; unknown entries of the targets do not count.

    - ``mAP``: mean over the labels of the average precision, scikit-learn's ``average_precision_score``; labels that
      apply to no sample are left out.
    - ``auroc``: mean over the labels of the area under the ROC curve, ``roc_auc_score``; labels that apply to all
      samples are left out, too.
    - ``f1_micro``, ``f1_macro``: at the thresholds, as scikit-learn's with ``zero_division=0``.
    - ``exact_match``: share of the samples with all their known labels right at the thresholds.

    Attributes:
        thresholds: probability from which each label is predicted, float64 ``(C,)``.
        chooses: whether ``compute`` chooses the thresholds of the highest F1 of each label before it uses them.
        per_label: scores of each label after ``compute``: ``average_precision``, ``auroc``, ``precision``, ``recall``,
            ``f1``, ``support`` and ``threshold``, float64 ``(C,)``, NaN where they are not defined.
    """

    full_state_update = False
    logits: list[torch.Tensor]
    targets: list[torch.Tensor]

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.add_state("logits", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")
        self.thresholds = torch.full((num_labels,), DEFAULT_THRESHOLD, dtype=torch.float64)
        self.chooses = False
        self.per_label: dict[str, torch.Tensor] = {}

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Keep the outputs of a batch.

        Args:
            logits: float ``(B, C)``.
            targets: int8 ``(B, C)``, ``UNKNOWN`` where not known.
        """
        self.logits.append(logits.detach().float())
        self.targets.append(targets)

    def compute(self) -> dict[str, torch.Tensor]:
        """The scores by name, float32 scalars; those that are not defined are left out."""
        # On the processor: some accelerators lack float64.
        targets = dim_zero_cat(self.targets).cpu()
        seen = (targets != UNKNOWN).any(dim=1)
        targets = targets[seen].long()
        probabilities = dim_zero_cat(self.logits).cpu()[seen].double().sigmoid()
        # NaN would rank first, as if the model were sure: it counts against the model.
        probabilities = torch.where(probabilities.isnan(), (targets != 1).double(), probabilities)
        if self.chooses and len(targets):
            self.thresholds = best_thresholds(probabilities, targets)
        ranking, decided = ranking_scores(probabilities, targets), label_scores(probabilities, targets, self.thresholds)
        self.per_label = {**ranking, **decided, "threshold": self.thresholds}
        predicted = probabilities >= self.thresholds
        hits, marked = (predicted & (targets == 1)).sum(), (predicted & (targets != UNKNOWN)).sum()
        right = ((predicted == (targets == 1)) | (targets == UNKNOWN)).all(dim=1).double()
        values = {
            "mAP": ranking["average_precision"],
            "auroc": ranking["auroc"],
            "f1_micro": (2 * hits / (marked + (targets == 1).sum()).clamp(min=1))[None],
            "f1_macro": decided["f1"],
            "exact_match": right,
        }
        defined = {name: value[~value.isnan()] for name, value in values.items()}
        return {name: value.mean().float().to(self.device) for name, value in defined.items() if value.numel()}


def ranking_scores(probabilities: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """``average_precision`` and area under the ROC curve (``auroc``) of each label, float64 ``(C,)``.

    NaN where they are not defined: without a sample that the label applies to, ``auroc`` also without another one.

    Args:
        probabilities: float64 ``(N, C)``.
        targets: int64 ``(N, C)``, ``UNKNOWN`` where not known.
    """
    applies = (targets == 1).any(dim=0)
    both = applies & (targets == 0).any(dim=0)
    values = {}
    functions = {"average_precision": (multilabel_average_precision, applies), "auroc": (multilabel_auroc, both)}
    for name, (score, defined) in functions.items():
        values[name] = torch.full((targets.shape[1],), torch.nan, dtype=torch.float64)
        if defined.any():
            columns = probabilities[:, defined], targets[:, defined]
            of_labels = score(
                *columns, num_labels=int(defined.sum()), average=None, ignore_index=UNKNOWN, validate_args=False
            )
            values[name][defined] = of_labels.double()
    return values


def label_scores(
    probabilities: torch.Tensor, targets: torch.Tensor, thresholds: torch.Tensor
) -> dict[str, torch.Tensor]:
    """``precision``, ``recall`` and ``f1`` of each label at its threshold, 0 where undefined, and its ``support``.

    Args:
        probabilities: float64 ``(N, C)``.
        targets: int64 ``(N, C)``, ``UNKNOWN`` where not known.
        thresholds: float64 ``(C,)``.

    Returns:
        Each float64 ``(C,)``.
    """
    predicted = (probabilities >= thresholds) & (targets != UNKNOWN)
    hits = (predicted & (targets == 1)).sum(dim=0).double()
    marked, support = predicted.sum(dim=0), (targets == 1).sum(dim=0)
    return {
        "precision": hits / marked.clamp(min=1),
        "recall": hits / support.clamp(min=1),
        "f1": 2 * hits / (marked + support).clamp(min=1),
        "support": support.double(),
    }


def best_thresholds(probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Threshold of the highest F1 of each label, float64 ``(C,)``, halfway to the next lower probability.

    A label that applies to no sample keeps 0.5; of several thresholds with the same F1 the highest is taken.

    Args:
        probabilities: float64 ``(N, C)``, N at least 1.
        targets: int64 ``(N, C)``, ``UNKNOWN`` where not known.
    """
    ordered, order = probabilities.masked_fill(targets == UNKNOWN, -1.0).sort(dim=0, descending=True, stable=True)
    hits = (targets == 1).gather(0, order).cumsum(dim=0)
    positives = (targets == 1).sum(dim=0)
    places = torch.arange(1, len(ordered) + 1)[:, None]
    f1 = 2 * hits / (places + positives)
    following = torch.cat([ordered[1:], torch.zeros_like(ordered[:1])]).clamp(min=0)
    best = f1.masked_fill(ordered <= following, -1.0).argmax(dim=0)[None]
    halfway = (ordered.gather(0, best) + following.gather(0, best))[0] / 2
    return torch.where(positives > 0, halfway, torch.full_like(halfway, DEFAULT_THRESHOLD))
