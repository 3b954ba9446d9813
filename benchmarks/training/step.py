"""A training step of Vitrail, a hand-written loop, ``transformers.Trainer``, and a loop with ``open_clip``'s loss.

RegNetX-200MF on 32 images of 64 px, and the same with a small BERT and a contrastive loss, in float32 on the
processor, with the same data, batches, optimizer and schedule. Every loop trains one long epoch in a process of its
own with everything that comes with it; they take turns of eight steps.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness.data import LongEpoch, write_experiment
from benchmarks.harness.interleaved import Row, interleave, row
from benchmarks.harness.processes import Paced, Pacer, steps_for
from lightning_modules.base import VisionTask
from lightning_modules.classification import ImageClassifier
from lightning_modules.dual_encoder import DualEncoder
from vitrail.runtime import keep_freed_memory
from vitrail.types import Batch

WARM_UP, CHUNK, TURNS_OF_A_REPEAT = 8, 8, 8
OURS, BY_HAND = "Vitrail", "hand-written loop"


def run(repeats: int) -> list[Row]:
    """Steps per second of Vitrail by those of each peer, for both kinds of training."""
    rows: list[Row] = []
    for kind, contenders in CONTENDERS.items():
        rates = measure(kind, list(contenders), repeats * TURNS_OF_A_REPEAT)
        rows += [
            row(f"training step, {kind}", OURS, peer, rates, "steps/s", "≥ 0.98" if peer == BY_HAND else "> 1")
            for peer in contenders
            if peer != OURS
        ]
    return rows


def measure(kind: Kind, contenders: list[str], turns: int, chunk: int = CHUNK) -> dict[str, list[float]]:
    """Steps per second of each contender in every turn, the contenders in turn."""
    # As the command line sets it for itself, but for all alike.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "disabled"}
    steps = steps_for(WARM_UP, chunk, turns)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loops: dict[str, Paced] = {}
        for number, name in enumerate(contenders):
            own = folder / str(number)
            own.mkdir()
            loops[name] = Paced(
                f"{__name__}:train",
                kind,
                name,
                steps,
                str(own),
                log=folder / f"{number}.log",
                warm_up=WARM_UP,
                chunk=chunk,
                environment=environment,
            )
            stack.callback(loops[name].stop)
        for loop in loops.values():
            loop.wait_until_warm()
        seconds = interleave({name: loop.turn for name, loop in loops.items()}, turns)
        for loop in loops.values():
            loop.finish()
    return {name: [chunk / one for one in found] for name, found in seconds.items()}


def train(pacer: Pacer, kind: Kind, contender: str, steps: int, folder: str) -> None:
    """Train as one contender until the end."""
    keep_freed_memory()  # as the command line does
    LongEpoch.pacer = pacer
    CONTENDERS[kind][contender](Training(kind, steps, Path(folder)))


Kind = Literal["classification", "contrastive"]

LR, WEIGHT_DECAY, LOG_EVERY, SEED = 1e-3, 0.05, 10, 42


@dataclass(frozen=True)
class Training:
    """What all contenders are to do: one epoch of ``steps`` on a timm backbone and a two-layer text tower."""

    kind: Kind
    steps: int
    folder: Path
    batch_size: int = 32
    image_size: int = 64
    backbone: str = "regnetx_002"
    text_width: int = 128

    @property
    def data(self) -> dict[str, Any]:
        """Arguments of the data."""
        loader = {"batch_size": self.batch_size, "drop_last": True, "num_workers": 0}  # the pacer is in this process
        return {"steps": self.steps, "image": {"size": self.image_size}, "loader": loader}

    @property
    def model(self) -> dict[str, Any]:
        """Arguments of the task, without what is linked from the data. Nothing is dropped out, so that all compare."""
        common: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY, "schedule": "cosine"}
        if self.kind == "classification":
            return {"backbone": self.backbone, "pretrained": False, **common}
        towers = {
            "image": self.backbone,
            "image_pretrained": False,
            "text": str(self._text_tower()),
            "text_pretrained": False,
            "projection_dropout": 0.0,
        }
        return {"towers": towers, "loss": "info_nce", **common}

    def _text_tower(self) -> Path:
        """A folder with the configuration of a BERT of two layers."""
        from transformers import BertConfig

        folder = self.folder / "text_tower"
        BertConfig(
            hidden_size=self.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=4 * self.text_width,
            vocab_size=1000,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ).save_pretrained(folder)
        return folder


def fit(training: Training) -> nn.Module:
    """``python -m experiments fit`` with everything that comes with it, in this process."""
    from experiments.train.cli import VitrailCLI

    name = "DualEncoder" if training.kind == "contrastive" else "ImageClassifier"
    path = write_experiment(
        training.folder,
        {"class_path": "benchmarks.harness.data.LongEpoch", "init_args": training.data},
        {"class_path": f"lightning_modules.{name}", "init_args": training.model},
        SEED,
        num_sanity_val_steps=0,
        log_every_n_steps=LOG_EVERY,
    )
    return cast("nn.Module", VitrailCLI(["fit", "--config", str(path)]).model)


def by_hand(training: Training) -> nn.Module:
    """A plain loop: the same loader, AdamW, a cosine, and a line with the loss now and then."""
    network, data, fused = _network_and_data(training)
    return _plain_loop(training, network, data, network, fused=fused)


def open_clip(training: Training) -> nn.Module:
    """A plain loop whose loss is ``open_clip``'s, with the optimizer as its training script makes it."""
    from open_clip.loss import ClipLoss

    network, data, _ = _network_and_data(training)
    assert isinstance(network, _Pairs)
    criterion = ClipLoss()

    def loss_of(image: torch.Tensor, caption: list[str]) -> torch.Tensor:
        features = network.features(image, caption)
        return cast("torch.Tensor", criterion(*features, network.log_scale.exp()))

    return _plain_loop(training, network, data, loss_of, fused=False)


def trainer(training: Training) -> nn.Module:
    """``transformers.Trainer`` with its own loader over the same data set, sampler and collation.

    It makes a fused AdamW by itself; here it gets one, so that the same parameters are decayed.
    """
    from transformers import Trainer, TrainingArguments

    network, data, _ = _network_and_data(training)
    loader = data.train_dataloader()
    collate = cast("Callable[[Any], Batch]", loader.collate_fn)

    class SameOrder(Trainer):
        """Samples in the order of our loader."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return loader.sampler

    arguments = TrainingArguments(
        output_dir=str(training.folder / "trainer"),
        per_device_train_batch_size=training.batch_size,
        num_train_epochs=1,
        max_grad_norm=0.0,  # the others clip nothing
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
    )
    optimizer = _optimizer(network, True)
    SameOrder(
        model=_ForTrainer(network),
        args=arguments,
        train_dataset=loader.dataset,
        data_collator=lambda samples: _inputs(network, collate(samples)),
        optimizers=(optimizer, _schedule(optimizer, training.steps)),
    ).train()
    return network


CONTENDERS: Mapping[Kind, Mapping[str, Callable[[Training], nn.Module]]] = {
    "classification": {OURS: fit, BY_HAND: by_hand, "transformers.Trainer": trainer},
    "contrastive": {
        OURS: fit,
        BY_HAND: by_hand,
        "transformers.Trainer": trainer,
        "open_clip loss, plain loop": open_clip,
    },
}


def _network_and_data(training: Training) -> tuple[nn.Module, LongEpoch, bool]:
    """Network with the weights that ``fit`` begins with, the data, and whether ours has a fused optimizer."""
    from lightning.pytorch import seed_everything

    seed_everything(SEED, verbose=False)
    data = LongEpoch(**training.data, seed=SEED)
    if training.kind == "classification":
        classifier = ImageClassifier(class_names=data.class_names, image_size=training.image_size, **training.model)
        return _Classified(classifier.encoder, classifier.head), data, _has_fused(classifier)
    task = DualEncoder(image_size=training.image_size, **training.model)
    task.towers.tokenizer = task.towers.train_tokenizer(data.training_texts())
    return _Pairs(task), data, _has_fused(task)


def _has_fused(task: VisionTask) -> bool:
    """A plain loop that is to show what everything around the step costs gets the same optimizer."""
    return bool(task.configure_optimizers().defaults["fused"])


class _Classified(nn.Module):
    """Images and labels to a loss."""

    inputs = ("image", "label")

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.encoder(image)), label)


class _Pairs(nn.Module):
    """Images and captions to a loss; texts become tokens inside, as in ours."""

    inputs = ("image", "caption")

    def __init__(self, task: DualEncoder) -> None:
        super().__init__()
        self.towers, self.log_scale = task.towers, task.objective.logit_scale.log_scale

    def features(self, image: torch.Tensor, caption: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.towers.tokenizer is not None
        tokens = self.towers.tokenizer(caption)
        image_features = F.normalize(self.towers.encode_image(image), dim=-1)
        return image_features, F.normalize(self.towers.encode_text(tokens), dim=-1)

    def forward(self, image: torch.Tensor, caption: list[str]) -> torch.Tensor:
        image_features, text_features = self.features(image, caption)
        target = torch.arange(len(image))
        to_text = F.cross_entropy(self.log_scale.exp() * image_features @ text_features.T, target)
        to_image = F.cross_entropy(self.log_scale.exp() * text_features @ image_features.T, target)
        return (to_text + to_image) / 2


class _ForTrainer(nn.Module):
    """What ``Trainer`` asks of a model: named inputs, a loss by its name, and a logit scale that stays in bounds."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, image: torch.Tensor, label: torch.Tensor | None = None, caption: list[str] | None = None
    ) -> dict[str, torch.Tensor]:
        _clamp(self.network)
        return {"loss": self.network(image, label if caption is None else caption)}


def _inputs(network: nn.Module, batch: Batch) -> dict[str, Any]:
    return {key: cast("dict[str, Any]", batch)[key] for key in cast("Any", network).inputs}


def _clamp(network: nn.Module) -> None:
    if isinstance(network, _Pairs):
        with torch.no_grad():
            network.log_scale.clamp_(max=math.log(100))


def _plain_loop(
    training: Training, network: nn.Module, data: LongEpoch, loss_of: Callable[..., torch.Tensor], *, fused: bool
) -> nn.Module:
    loader = data.train_dataloader()
    optimizer = _optimizer(network, fused)
    schedule = _schedule(optimizer, training.steps)
    network.train()
    total = 0.0
    with (training.folder / "losses.csv").open("w", encoding="utf-8") as log:
        for step, batch in enumerate(loader):
            optimizer.zero_grad()
            loss = loss_of(**_inputs(network, batch))
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
            schedule.step()
            _clamp(network)
            total += loss.item()
            if step % LOG_EVERY == LOG_EVERY - 1:
                log.write(f"{step},{total / (step + 1)}\n")
    return network


def _optimizer(network: nn.Module, fused: bool) -> torch.optim.AdamW:
    """AdamW that leaves biases, norms and the logit scale undecayed."""
    decayed = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, fused=fused)


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
