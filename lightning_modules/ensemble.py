"""Several trained models as one: the mean of their probabilities, also over views of the image."""

from __future__ import annotations

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

from lightning_modules.base import LoggedSplit, VisionTask, known_targets, real_outputs, with_embedding
from lightning_modules.checkpoint import read_checkpoint, task_from, untrained_task
from lightning_modules.classification import ScoredTask
from lightning_modules.encoders.weights import WeightsOrigin, described_misfits
from vitrail.errors import UserError
from vitrail.runs import Run
from vitrail.types import Batch, InputOptions, Outputs, with_image_defaults


class Member(NamedTuple):
    """One model of an ensemble."""

    name: str  # its run directory
    task: VisionTask  # the model
    hyper_parameters: dict[str, Any]  # what it can be built of again, `_class_path` among them


def read_members(runs: Sequence[str]) -> list[Member]:
    """The best checkpoints of runs, with their weights."""
    if not runs:
        raise UserError("members: there are none; name run directories such as runs/<name>/<time>")
    twice = [run for run in runs if [Path(other).resolve() for other in runs].count(Path(run).resolve()) > 1]
    if twice:
        raise UserError(f"members: {twice[0]} is named twice; name each run once")
    _refuse_other_data(runs)
    found = []
    for run in runs:
        checkpoint = read_checkpoint(Path(run) / Run.BEST)
        # Lightning passes hyper-parameters by a context variable; these are of another model.
        task = Context().run(task_from, checkpoint, Path(run) / Run.BEST)
        found.append(Member(run, task, _without_private(checkpoint["hyper_parameters"])))
    return found


def built_members(runs: Sequence[str], hyper_parameters: Sequence[Mapping[str, Any]]) -> list[Member]:
    """Members without weights, which a checkpoint of the ensemble will bring."""
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
    tasks = _tasks_of(first)
    common = {task: list(names) for task, names in tasks.items() if all(task in _tasks_of(one) for one in others)}
    for task, names in common.items():
        for other in others:
            if list(_tasks_of(other)[task]) != names:
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
    """Refuse members that were trained on images made in another way."""
    first, *others = members
    wanted = with_image_defaults(first.task.input_options)
    for other in others:
        made = with_image_defaults(other.task.input_options)
        for key, value in wanted.items():
            if made.get(key) != value:
                raise UserError(
                    f"members: {first.name} was trained on images of {key} {value}, {other.name} of "
                    f"{made.get(key)}; fit both with the same data.init_args.image"
                )


def _tasks_of(member: Member) -> dict[str, list[str]]:
    found: dict[str, list[str]] = getattr(member.task, "tasks", {})
    return found


def _without_private(hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Without what Lightning's command line adds."""
    kept = {name: value for name, value in hyper_parameters.items() if not name.startswith("_")}
    return {**kept, "_class_path": str(hyper_parameters.get("_class_path", ""))}


def _refuse_other_data(runs: Sequence[str]) -> None:
    """One member's test images may be training images of another."""
    seen = {run: _data_of(Path(run)) for run in runs}
    first = runs[0]
    for run, data in seen.items():
        if data != seen[first]:
            raise UserError(
                f"members: {run} was trained on other data than {first}, or on other splits, so one may know the "
                "other's test images; average runs of the same data and splits"
            )


def _data_of(run: Path) -> tuple[Any, Any]:
    """What identifies data and their splits."""
    try:
        data = json.loads((run / Run.RECORD).read_text(encoding="utf-8")).get("data") or {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"members: {run} has no readable run.json with its data; name directories that `fit` made"
        ) from error
    return data.get("fingerprint"), data.get("samples")


View = Literal["identity", "hflip", "vflip", "zoom"]
VIEWS: tuple[View, ...] = get_args(View)

_ZOOM = 7 / 8
"""Share of each side that ``zoom`` keeps: 224 of 256, the usual centre crop."""


def view_of(image: torch.Tensor, view: View) -> torch.Tensor:
    """A view of images.

    - ``identity``: as they are.
    - ``hflip``: mirrored, left and right exchanged.
    - ``vflip``: upside down; only where images have no up and down, as from above or through a microscope.
    - ``zoom``: the middle, 7/8 of each side, scaled to the whole size.

    Returns:
        uint8 ``(B, 3, H, W)``.
    """
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
    """Views that can be had, each once."""
    found = list(views) if views is not None else ["identity"]
    unknown = sorted(set(found) - set(VIEWS))
    if unknown or not found or len(set(found)) < len(found):
        problem = f"got {', '.join(unknown)}" if unknown else "name at least one, and each once"
        raise UserError(f"tta_views: must be one of {', '.join(VIEWS)}; {problem}")
    return [view for view in VIEWS if view in found]


_NOT_KEPT = {"state_dict", "hyper_parameters", "epoch_sums"}
"""What an ensemble's checkpoint keeps of its members elsewhere, or not at all."""


class Ensemble(ScoredTask):
    """The mean of the probabilities of several runs' best checkpoints, and of views of the image.

    Its logits are the logarithms of that mean, so their softmax is the mean itself, and metrics, predictions and
    reports are those of every classifier. Members may be of any kind that classifies images: classifiers, multi-task
    models, dual encoders, generative ones. Tasks that not all of them have are left out. Nothing is trained or
    selected, so no split is used up. One run with several views is test-time augmentation.

    A checkpoint contains all members, so it does not need their run directories.

    Args:
        members: run directories; their best checkpoints are averaged with equal weight.
        tasks: class names of each task, linked from the data; they must be the members'.
        tta_views: views of the image, by default identity alone.
        architectures: what the members are built of, as a checkpoint keeps it; not to be set by hand.

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
        self.keep_scores(common_tasks(found))
        _refuse_other_classes(self.tasks, tasks)
        # A checkpoint is compared with the members' classes, whatever else its data know.
        self.hparams["tasks"] = self.tasks
        self._runs = found
        self.members = nn.ModuleList(member.task for member in found).requires_grad_(False).eval()
        self._adopt_inputs()

    @property
    def architectures(self) -> list[dict[str, Any]]:
        """What the members can be built of again, plain values."""
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

    def fetch_weights(self) -> None:
        """Nothing: members have their weights from their checkpoints."""

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """See ``VisionTask``; the members' embeddings side by side, each the mean over the views."""
        return self._predict(image)[1]

    def warn_of_other_inputs(self, options: InputOptions) -> None:
        """Refuse images that are made otherwise than those that the members were trained on."""
        made, wanted = with_image_defaults(options), with_image_defaults(self.input_options)
        for key, value in wanted.items():
            if made.get(key) != value:
                raise UserError(
                    f"data.init_args.image: the members were trained on images of {key} {value}, the data make them of "
                    f"{made.get(key)}; use the members' own `data:`"
                )

    @property
    def own_inputs(self) -> InputOptions | None:
        """How the members' images were made."""
        return self.input_options

    def compare_inputs(self) -> None:
        """Nothing: every epoch begins with a comparison (``on_validation_epoch_start``)."""

    def setup(self, stage: str) -> None:
        """Refuse training."""
        super().setup(stage)
        if stage == "fit":
            raise UserError("fit: an ensemble has nothing to train; use `test` or `validate`")

    def on_validation_epoch_start(self) -> None:
        """Refuse images that the members do not know; let members forget what they computed with other weights.

        Only now, because a checkpoint may have brought the members.
        """
        if (options := getattr(self._datamodule(), "image_options", None)) is not None:
            self.warn_of_other_inputs(options)
        for member in self._runs:
            member.task.on_test_epoch_start()

    def on_test_epoch_start(self) -> None:
        """As before validation."""
        self.on_validation_epoch_start()

    def on_predict_epoch_start(self) -> None:
        """As before validation."""
        self.on_validation_epoch_start()

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logarithms of the mean probabilities.

        Args:
            image: uint8 ``(B, 3, H, W)``, RGB.

        Returns:
            For each task float32 ``(B, C)``.
        """
        return self._predict(image)[0]

    def predict_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of a batch, whose targets may be unknown."""
        logits, embedding = self._predict(batch["image"])
        return with_embedding(real_outputs(batch, logits, known_targets(batch, self.tasks)), batch, embedding)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what members keep in checkpoints of their own, such as tokenizers, and how they are built."""
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
        """Give each member what it has kept."""
        super().on_load_checkpoint(checkpoint)
        for member, kept in zip(self._runs, checkpoint.get("members", []), strict=True):
            member.task.on_load_checkpoint({**kept, "hyper_parameters": member.hyper_parameters})
        self._has_weights = True
        self._adopt_inputs()

    @property
    def origins(self) -> list[WeightsOrigin]:
        """Of all members, each named by its number."""
        return [
            {**origin, "part": f"members.{number}.{origin['part']}"}
            for number, member in enumerate(self._runs)
            for origin in member.task.origins
        ]

    def misfits(self, state_dict: Mapping[str, Any]) -> str:
        """As ``VisionTask``'s; each member decides which weights may be missing."""
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
        """As ``VisionTask``'s, member by member."""
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
                outputs = _outputs_of(member, view)
                vectors.append(outputs["image_embedding"])
                for task, found in logs.items():
                    found.append(F.log_softmax(outputs["logits"][task].float(), dim=-1))
            embeddings.append(F.normalize(torch.stack(vectors).mean(dim=0), dim=-1))
        logits = {
            task: torch.logsumexp(torch.stack(found), dim=0) - math.log(len(found)) for task, found in logs.items()
        }
        return logits, torch.cat(embeddings, dim=-1)

    def _shared_step(self, batch: Batch, split: LoggedSplit) -> tuple[torch.Tensor, Outputs]:
        """Cross-entropy of the mean probabilities, and what callbacks may want."""
        targets = known_targets(batch, self.tasks)
        logits, embedding = self._predict(batch["image"])
        loss = self.count(split, self.plain_losses(logits, targets), logits, targets)
        outputs = real_outputs(batch, logits, targets)
        return loss, with_embedding(outputs, batch, embedding) if split == "test" else outputs

    def _adopt_inputs(self) -> None:
        """How images must be made: as all members want them."""
        if self._has_weights:
            refuse_other_images(self._runs)
        self.input_options = {**self._runs[0].task.input_options}


def _outputs_of(member: Member, image: torch.Tensor) -> Outputs:
    """Outputs of a member for images without targets."""
    batch: Batch = {"image": image, "sample_id": torch.arange(len(image), device=image.device)}
    return cast("Outputs", member.task.predict_step(batch, 0))


def _by_member(state: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Weights of each member, by their names in the member."""
    prefixes = [f"members.{number}." for number in range(count)]
    return [
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for prefix in prefixes
    ]


def _refuse_other_classes(members: Mapping[str, list[str]], data: Mapping[str, list[str]] | None) -> None:
    for task, names in members.items():
        if data and task in data and list(data[task]) != names:
            raise UserError(
                f"members: they were trained on other classes of {task!r} than the data have, or another order of "
                "them; use the members' own `data:`"
            )
