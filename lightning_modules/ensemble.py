"""Ensembles of trained models, and test-time augmentation: the mean of their probabilities."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from contextvars import Context
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from lightning_modules.base import LoggedSplit, VisionTask, known_targets, real_outputs
from lightning_modules.checkpoint import read_checkpoint, task_from, untrained_task
from lightning_modules.classification import ScoredTask
from lightning_modules.encoders.weights import WeightsOrigin, described_misfits
from lightning_modules.heads import SingleLabelOutput, TaskOutput
from vitrail.errors import UserError
from vitrail.runs import Run
from vitrail.types import Batch, InputOptions, Outputs, TaskKind, kind_of, with_image_defaults


class Member(NamedTuple):
    """One model of an ensemble."""

    name: str  # run directory
    task: VisionTask
    hyper_parameters: dict[str, Any]  # arguments to build it again, with `_class_path`


def read_members(runs: Sequence[str]) -> list[Member]:
    """Load the best checkpoints of runs."""
    if not runs:
        raise UserError("members: there are none; name run directories such as runs/<name>/<time>")
    paths = [Path(run).resolve() for run in runs]
    if twice := [run for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1]:
        raise UserError(f"members: {twice[0]} is named twice; name each run once")
    _refuse_other_data(runs)
    found = []
    for run in runs:
        checkpoint = read_checkpoint(Path(run) / Run.BEST)
        # Lightning passes hyper-parameters by a context variable; these are of another model.
        task = Context().run(task_from, checkpoint, Path(run) / Run.BEST)
        saved = checkpoint["hyper_parameters"]
        # Without the further private entries that Lightning's command line adds.
        arguments = {name: value for name, value in saved.items() if not name.startswith("_")}
        found.append(Member(run, task, {**arguments, "_class_path": str(saved.get("_class_path", ""))}))
    return found


def built_members(runs: Sequence[str], hyper_parameters: Sequence[Mapping[str, Any]]) -> list[Member]:
    """Build members without weights, to be loaded from a checkpoint of the ensemble."""
    if len(runs) != len(hyper_parameters):
        raise UserError(
            f"architectures: {len(hyper_parameters)} for {len(runs)} members; leave them out, the runs have them"
        )
    return [
        Member(run, Context().run(untrained_task, given, run), dict(given))
        for run, given in zip(runs, hyper_parameters, strict=True)
    ]


def common_tasks(members: Sequence[Member]) -> dict[str, list[str]]:
    """Class names of the tasks that all members have."""
    first, *others = members
    kinds: list[dict[str, TaskKind]] = [getattr(member.task, "task_kinds", {}) for member in members]
    tasks: list[dict[str, list[str]]] = [getattr(member.task, "tasks", {}) for member in members]
    common = {task: list(names) for task, names in tasks[0].items() if all(task in of_other for of_other in tasks)}
    for task, names in common.items():
        for other, of_other, of_kind in zip(others, tasks[1:], kinds[1:], strict=True):
            if kind_of(of_kind, task) != kind_of(kinds[0], task):
                raise UserError(
                    f"members: {task!r} is {kind_of(kinds[0], task)} in {first.name} and {kind_of(of_kind, task)} in "
                    f"{other.name}; only runs with the same kinds of tasks can be averaged"
                )
            if list(of_other[task]) != names:
                raise UserError(
                    f"members: {other.name} has other classes of {task!r} than {first.name}, or another order of them; "
                    "only runs with the same classes can be averaged"
                )
    if not common:
        raise UserError(
            f"members: {', '.join(member.name for member in members)} have no task in common; only models with "
            "the same classes can be averaged"
        )
    return common


def refuse_other_images(members: Sequence[Member]) -> None:
    """Refuse members trained with different preprocessing."""
    first, *others = members
    for other in others:
        for key, value, found in differing_inputs(first.task.input_options, other.task.input_options):
            raise UserError(
                f"members: {first.name} was trained on images of {key} {value}, {other.name} of {found}; "
                "fit both with the same data.init_args.image"
            )


def differing_inputs(expected: InputOptions, given: InputOptions) -> list[tuple[str, Any, Any]]:
    """Names of the preprocessing options that differ, with the expected and the given values."""
    found = with_image_defaults(given)
    return [
        (key, value, found.get(key)) for key, value in with_image_defaults(expected).items() if found.get(key) != value
    ]


def _refuse_other_data(runs: Sequence[str]) -> None:
    """Test images of one member may be training images of another."""
    seen = []
    for run in runs:
        try:
            data = json.loads((Path(run) / Run.RECORD).read_text(encoding="utf-8")).get("data") or {}
        except (OSError, ValueError) as error:
            raise UserError(
                f"members: {run} has no readable run.json with its data; name directories that `fit` made"
            ) from error
        seen.append((data.get("fingerprint"), data.get("samples")))
        if seen[-1] != seen[0]:
            raise UserError(
                f"members: {run} was trained on other data than {runs[0]}, or on other splits, so one may know the "
                "other's test images; average runs of the same data and splits"
            )


View = Literal["identity", "hflip", "vflip", "zoom"]
VIEWS: tuple[View, ...] = get_args(View)

_ZOOM = 7 / 8
"""Side of the crop of ``zoom``: 224 of 256, the usual center crop."""


def view_of(image: torch.Tensor, view: View) -> torch.Tensor:
    """Transform uint8 images ``(B, 3, H, W)``: ``identity``, ``hflip``, ``vflip``, ``zoom`` (center crop)."""
    if view == "hflip":
        return image.flip(-1)
    if view == "vflip":
        return image.flip(-2)
    if view == "zoom":
        height, width = image.shape[-2:]
        rows, columns = max(1, round(height * _ZOOM)), max(1, round(width * _ZOOM))
        top, left = (height - rows) // 2, (width - columns) // 2
        middle = image[..., top : top + rows, left : left + columns].float()
        scaled = F.interpolate(middle, (height, width), mode="bicubic", align_corners=False)
        return scaled.round().clamp(0, 255).to(torch.uint8)
    return image


def checked_views(views: Sequence[str] | None) -> list[View]:
    """The views in canonical order, refused if unknown or repeated."""
    found = list(views) if views is not None else ["identity"]
    unknown = sorted(set(found) - set(VIEWS))
    if unknown or not found or len(set(found)) < len(found):
        problem = f"got {', '.join(unknown)}" if unknown else "name at least one, and each once"
        raise UserError(f"tta_views: must be one of {', '.join(VIEWS)}; {problem}")
    return [view for view in VIEWS if view in found]


_NOT_KEPT = {"state_dict", "hyper_parameters", "epoch_sums"}
"""Entries of a member's checkpoint that an ensemble's keeps elsewhere, or not at all."""


class Ensemble(ScoredTask):
    """Averages the probabilities of several runs' best checkpoints, and of views of the image.

    Its logits are the logarithms of that mean; of multi-label tasks the logits of the labels' mean probabilities, at
    the mean of the members' thresholds. Of regression tasks it predicts the mean, with the variance of the mixture
    where members predict one. Members may be any tasks that classify images; only the tasks that all of them have are
    predicted. One run with several views is test-time augmentation. Nothing is trained or selected.
    A checkpoint contains all members, so it does not need their run directories.

    Args:
        members: run directories; their best checkpoints are averaged with equal weight.
        tasks: class names of each task, linked from the data; they must be the members'.
        tta_views: views of the image, by default identity alone.
        architectures: arguments of the members from a checkpoint; not to be set by hand.

    Attributes:
        tasks: class names of the tasks that all members have.

    Raises:
        UserError: if a member cannot be read, or they do not fit together or the data.
    """

    def __init__(
        self,
        members: list[str],
        tasks: dict[str, list[str]] | None = None,
        *,
        tta_views: list[View] | None = None,
        architectures: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(lr=1.0, weight_decay=0.0, schedule="constant")
        self.save_hyperparameters()
        self.views = checked_views(tta_views)
        if len(members) == 1 and self.views == ["identity"]:
            raise UserError("members: one run as it is needs no ensemble; name another run, or further tta_views")
        found = read_members(members) if architectures is None else built_members(members, architectures)
        self._has_weights = architectures is None
        common = common_tasks(found)
        self.configure_metrics(common, outputs=_outputs_of(found, common))
        for task, names in self.tasks.items():
            if tasks and task in tasks and list(tasks[task]) != names:
                raise UserError(
                    f"members: they were trained on other classes of {task!r} than the data have, or another order of "
                    "them; use the members' own `data:`"
                )
        # A checkpoint is compared with the members' classes, not with further tasks of the data.
        self.hparams["tasks"] = self.tasks
        self._runs = found
        self._average_thresholds()
        self.members = nn.ModuleList(member.task for member in found).requires_grad_(False).eval()
        self._adopt_inputs()

    @property
    def architectures(self) -> list[dict[str, Any]]:
        """Arguments to build the members again, plain values."""
        return [member.hyper_parameters for member in self._runs]

    @property
    def backbone(self) -> nn.Module:
        """The members' backbones."""
        return nn.ModuleList(member.task.backbone for member in self._runs)

    @property
    def compilable_networks(self) -> list[nn.Module]:
        """The members' networks."""
        return [network for member in self._runs for network in member.task.compilable_networks]

    @property
    def ready_without_training(self) -> bool:
        """Whether the members have been read with their weights."""
        return self._has_weights

    @property
    def frozen_sides(self) -> list[str]:
        """None: members need the image."""
        return []

    @property
    def embedding_dim(self) -> int:
        """Length of ``image_embedding`` in the outputs, the sum of the members'."""
        return sum(cast("Any", member.task).embedding_dim for member in self._runs)

    def fetch_weights(self) -> list[WeightsOrigin]:
        """None: members have the weights of their checkpoints."""
        return []

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """The members' embeddings concatenated, each the mean over the views."""
        return self._predict(image)[1]

    @property
    def own_inputs(self) -> InputOptions | None:
        """The members' preprocessing."""
        return self.input_options

    def compare_inputs(self) -> None:
        """Defer the comparison to ``on_validation_epoch_start``, when a checkpoint may have replaced the members."""

    def setup(self, stage: str) -> None:
        """Refuse training."""
        super().setup(stage)
        if stage == "fit":
            raise UserError("fit: an ensemble has nothing to train; use `test` or `validate`")

    def on_validation_epoch_start(self) -> None:
        """Refuse other preprocessing than the members'; discard what members cached with other weights."""
        if (options := getattr(self._datamodule(), "image_options", None)) is not None:
            for key, value, found in differing_inputs(self.input_options, options):
                raise UserError(
                    f"data.init_args.image: the members were trained on images of {key} {value}, the data make them of "
                    f"{found}; use the members' own `data:`"
                )
        for member in self._runs:
            member.task.on_test_epoch_start()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logarithms of the mean probabilities by task, float32 ``(B, C)``, for uint8 RGB images ``(B, 3, H, W)``."""
        return self._predict(image)[0]

    def predict_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of a batch, whose targets may be unknown."""
        logits, embedding = self._predict(batch["image"])
        targets = known_targets(batch, self.tasks, self.task_kinds)
        return real_outputs(batch, logits, targets, embedding)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the members' own checkpoints contain, such as tokenizers, and their arguments."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "architectures": self.architectures}
        states = _by_member(checkpoint["state_dict"], len(self._runs))
        kept: list[dict[str, Any]] = []
        weights: dict[str, torch.Tensor] = {}
        for number, (member, state) in enumerate(zip(self._runs, states, strict=True)):
            own: dict[str, Any] = {"hyper_parameters": member.hyper_parameters, "state_dict": state}
            member.task.on_save_checkpoint(own)
            member.hyper_parameters.update(own["hyper_parameters"])
            weights |= {f"members.{number}.{name}": value for name, value in own["state_dict"].items()}
            kept.append({key: value for key, value in own.items() if key not in _NOT_KEPT})
        checkpoint["members"] = kept
        checkpoint["state_dict"] = weights

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore each member."""
        super().on_load_checkpoint(checkpoint)
        for member, kept in zip(self._runs, checkpoint.get("members", []), strict=True):
            member.task.on_load_checkpoint({**kept, "hyper_parameters": member.hyper_parameters})
        self._has_weights = True
        self._average_thresholds()
        self._adopt_inputs()

    @property
    def origins(self) -> list[WeightsOrigin]:
        """Those of all members, with the member's number in ``part``."""
        return [
            {**origin, "part": f"members.{number}.{origin['part']}"}
            for number, member in enumerate(self._runs)
            for origin in member.task.origins
        ]

    def misfits(self, state_dict: Mapping[str, Any]) -> str:
        """See ``VisionTask``; each member decides which weights may be missing."""
        states = _by_member(state_dict, len(self._runs))
        found = [
            f"member {number}: {wrong}"
            for number, (member, state) in enumerate(zip(self._runs, states, strict=True))
            if (wrong := member.task.misfits(state))
        ]
        begins = tuple(f"members.{number}." for number in range(len(states)))
        strange = described_misfits((), (name for name in state_dict if not name.startswith(begins)), {})
        return "; ".join([*found, *([strange] if strange else [])])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """See ``VisionTask``."""
        if strict and (wrong := self.misfits(state_dict)):
            raise UserError(f"the weights do not fit the ensemble: {wrong}")
        states = _by_member(state_dict, len(self._runs))
        for member, state in zip(self._runs, states, strict=True):
            member.task.load_state_dict(state, strict=strict, assign=assign)
        self.members.requires_grad_(False)
        return _IncompatibleKeys([], [])

    def _predict(self, image: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Logarithms of the mean probabilities by task, and embeddings ``(B, D)``."""
        logs: dict[str, list[torch.Tensor]] = {task: [] for task in self.tasks}
        embeddings = []
        views = [view_of(image, view) for view in self.views]
        for member in self._runs:
            vectors = []
            for view in views:
                batch: Batch = {"image": view, "sample_id": torch.arange(len(view), device=view.device)}
                outputs = cast("Outputs", member.task.predict_step(batch, 0))
                vectors.append(outputs["image_embedding"])
                for task, found in logs.items():
                    found.append(outputs["logits"][task].float())
            embeddings.append(F.normalize(torch.stack(vectors).mean(dim=0), dim=-1))
        logits = {task: _mean_of(torch.stack(found), kind_of(self.task_kinds, task)) for task, found in logs.items()}
        return logits, torch.cat(embeddings, dim=-1)

    def _shared_step(self, batch: Batch, split: LoggedSplit) -> tuple[torch.Tensor, Outputs]:
        targets = known_targets(batch, self.tasks, self.task_kinds)
        logits, embedding = self._predict(batch["image"])
        loss = self.evaluation_loss(split, logits, targets)
        return loss, real_outputs(batch, logits, targets, embedding if split == "test" else None)

    def _average_thresholds(self) -> None:
        for task in self.thresholds:
            of_members = [cast("ScoredTask", member.task).thresholds[task] for member in self._runs]
            self.thresholds[task] = torch.tensor(of_members, dtype=torch.float64).mean(dim=0).tolist()

    def _adopt_inputs(self) -> None:
        if self._has_weights:
            refuse_other_images(self._runs)
        self.input_options = {**self._runs[0].task.input_options}


def _outputs_of(members: Sequence[Member], tasks: Mapping[str, Sequence[str]]) -> list[TaskOutput]:
    """The outputs of the first member's tasks of every kind; other models classify by single labels."""
    first = members[0].task
    own = dict(zip(first.tasks, first.outputs, strict=True)) if isinstance(first, ScoredTask) else {}
    return [
        cast("TaskOutput", copy.deepcopy(own[task])) if task in own else SingleLabelOutput(task, len(names))
        for task, names in tasks.items()
    ]


def _mean_of(outputs: torch.Tensor, kind: TaskKind) -> torch.Tensor:
    """Average the outputs of M members in a task, float ``(M, B, C)``, as its kind wants it, to ``(B, C)``."""
    if kind == "regression":
        means, mean = outputs[..., :1], outputs[..., :1].mean(dim=0)
        if outputs.shape[-1] == 1:
            return mean
        variance = outputs[..., 1:].exp().mean(dim=0) + means.var(dim=0, correction=0)
        return torch.cat([mean, variance.log()], dim=-1)
    if kind == "multi_label":
        applies, absent = (torch.logsumexp(F.logsigmoid(sign * outputs), dim=0) for sign in (1, -1))
        return applies - absent
    logs = F.log_softmax(outputs, dim=-1)
    return torch.logsumexp(logs, dim=0) - math.log(len(logs))


def _by_member(state: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Split the weights by member, without the members' prefixes."""
    prefixes = [f"members.{number}." for number in range(count)]
    return [
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for prefix in prefixes
    ]
