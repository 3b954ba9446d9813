from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import pytest
import timm
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from transformers import DistilBertConfig, DistilBertModel

from callbacks import BackboneUnfreezing
from lightning_modules.base import VisionTask
from lightning_modules.classification import MultiTaskClassifier
from lightning_modules.optim import (
    TrainingPhase,
    blocks,
    current_phase,
    layer_depths,
    layer_scales,
    learning_rate,
    lr_factor,
    make_optimizer,
    parameter_groups,
    scaling_factor,
    seed_step,
    step_seed,
    steps_of_training,
)
from lightning_modules.options import OptimizerOptions, OptimOptions, PlateauOptions, ScheduleName
from tests.support.models import Recorder, TinyData, same_weights, tiny_classifier, tiny_trainer
from tests.support.runs import SPLIT_SIZES, TASKS, MadePhotos
from vitrail.errors import UserError


def two_phases() -> list[TrainingPhase]:
    return [
        TrainingPhase(first_epoch=0, lr={"backbone": 0.0, "head": 3e-4}, min_lr=1e-6),
        TrainingPhase(first_epoch=8, lr={"backbone": 1e-5, "head": 2e-4}, min_lr=1e-6, warmup_epochs=0.5),
    ]


def test_each_phase_has_its_own_cosine() -> None:
    def lr(part: str, step: int) -> float:
        return learning_rate(two_phases(), cast("Any", part), step, 10, 280)

    assert lr("head", 0) == pytest.approx(3e-4)
    assert lr("head", 40) == pytest.approx((3e-4 + 1e-6) / 2)
    assert lr("head", 79) < 1e-6 + 3e-4 * 0.001
    assert lr("backbone", 79) == 0
    assert lr("backbone", 80) == pytest.approx(1e-5 / 6)
    assert lr("head", 80) == pytest.approx(2e-4 / 6)
    assert lr("head", 85) == pytest.approx(2e-4)
    assert lr("backbone", 280) == pytest.approx(1e-6)


def test_a_single_phase_has_the_options_and_may_need_an_end() -> None:
    phase = TrainingPhase.of(1e-3, "step", OptimOptions(backbone_lr=1e-4, step_size=5, gamma=0.5))
    assert phase.lr == {"backbone": 1e-4, "head": 1e-3}
    assert learning_rate([phase], "backbone", 50, 10, 100) == pytest.approx(5e-5)
    phase = TrainingPhase.of(1e-3, "constant", OptimOptions())
    assert learning_rate([phase], "head", 10**9, 10, math.inf) == 1e-3
    with pytest.raises(UserError, match="max_epochs"):
        learning_rate(two_phases(), "head", 100, 10, math.inf)


@pytest.mark.parametrize("firsts", [[], [1], [0, 0], [0, 8, 4]])
def test_phases_out_of_order_are_refused(firsts: list[int]) -> None:
    phases = [TrainingPhase(first_epoch=first, lr={"backbone": 1, "head": 1}) for first in firsts]
    with pytest.raises(UserError, match="epoch 0"):
        current_phase(phases, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "linear"},
        {"warmup_epochs": -1},
        {"step_size": 0},
        {"gamma": 2.0},
        *(
            {"lr": lr}
            for lr in ({"head": 1e-3}, {"backbone": -1.0, "head": 1e-3}, {"backbone": math.nan, "head": 1e-3})
        ),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"first_epoch": 0, "lr": {"backbone": 1e-3, "head": 1e-3}}
    with pytest.raises(UserError):
        TrainingPhase(**{**arguments, **changes})


def test_dropout_seeds_differ_between_batches_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    places = [(epoch, batch, rank) for epoch in range(3) for batch in range(3) for rank in range(3)]
    seeds = [step_seed(*place) for place in places]
    assert seeds == [step_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert not set(seeds) & {step_seed(*place) for place in places}


def test_a_step_is_seeded_as_by_torch() -> None:
    torch.manual_seed(2**62 + 5)
    expected = torch.rand(4)
    torch.manual_seed(0)
    seed_step(torch.device("cpu"), 2**62 + 5)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", False)])
def test_on_a_cpu_the_optimizer_is_fused_where_gradients_can_be_clipped(precision: str, fused: bool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    group = {"params": [parameter], "part": "head", "lr_scale": 1.0, "weight_decay": 0.0}
    optimizer = make_optimizer([group], TrainingPhase.of(0.1, "constant", OptimOptions()), OptimOptions(), precision)
    assert optimizer.defaults["fused"] is fused


TOTAL = 40
LR = 0.02


def lrs_of_torch(scheduler: LRScheduler, optimizer: torch.optim.Optimizer, steps: int = TOTAL) -> list[float]:
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize("warmup", [0, 8])
@pytest.mark.parametrize(("schedule", "power"), [("polynomial", 2.0), ("exponential", 1.0)])
def test_further_schedules_are_those_of_torch(schedule: ScheduleName, power: float, warmup: int) -> None:
    optimizer = sgd()
    then: LRScheduler = PolynomialLR(optimizer, total_iters=TOTAL - warmup, power=power)
    if schedule == "exponential":
        then = ExponentialLR(optimizer, gamma=0.1 ** (1 / 10))
    expected = lrs_of_torch(after_warmup(optimizer, then, warmup), optimizer)
    settings: dict[str, Any] = {"warmup_steps": warmup, "drop_steps": 10, "gamma": 0.1, "power": power}
    assert [LR * lr_factor(schedule, step, TOTAL, **settings) for step in range(TOTAL)] == pytest.approx(expected)


def test_the_last_steps_cool_down_at_the_end_of_a_shorter_schedule() -> None:
    cooled = [lr_factor("cosine", step, TOTAL, cooldown_steps=10, min_factor=0.1) for step in range(TOTAL)]
    assert cooled[:30] == [lr_factor("cosine", step, 30, min_factor=0.1) for step in range(30)]
    assert cooled[30:] == [0.1] * 10
    phase = TrainingPhase.of(1e-2, "constant", OptimOptions(cooldown_epochs=1.5, min_lr=1e-4))
    assert [learning_rate([phase], "head", step, 10, 40) for step in (0, 24, 25, 39)] == [1e-2, 1e-2, 1e-4, 1e-4]
    with pytest.raises(UserError, match="cooldown_epochs: nothing would be trained"):
        TrainingPhase.of(1e-2, "cosine", OptimOptions(cooldown_epochs=1))
    with pytest.raises(UserError, match="cooldown_epochs needs an end"):
        learning_rate([phase], "head", 0, 10, math.inf)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_plateau_lowers_the_learning_rate_as_torch_does(mode: Literal["min", "max"]) -> None:
    values = [3.0, 2.0, 2.0, 2.5, math.nan, 1.0, 1.5, 1.6, 1.7, 1.8, 1.9, 0.5, 4.0, 4.0, 4.0, 5.0]
    optimizer = sgd()
    scheduler = ReduceLROnPlateau(optimizer, mode=mode, factor=0.5, patience=2, threshold=0.0, min_lr=LR / 8)
    phase = TrainingPhase.of(
        LR, "plateau", OptimOptions(gamma=0.5, min_lr=LR / 8, plateau=PlateauOptions(mode=mode, patience=2))
    )
    for done in range(len(values)):
        monitored = [(10 * (number + 1), value) for number, value in enumerate(values[:done])]
        assert learning_rate([phase], "head", 10 * done, 10, math.inf, None, monitored) == pytest.approx(
            optimizer.param_groups[0]["lr"]
        ), done
        scheduler.step(values[done])


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)


def after_warmup(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, warmup: int) -> LRScheduler:
    if warmup == 0:
        return scheduler
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, scheduler], milestones=[warmup])


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_schedules_are_those_of_torch_behind_a_linear_warmup(schedule: ScheduleName, warmup: int) -> None:
    optimizer = sgd()
    peer: LRScheduler
    if schedule == "constant":
        peer = ConstantLR(optimizer, factor=1.0)
    elif schedule == "cosine":
        peer = CosineAnnealingLR(optimizer, T_max=TOTAL - warmup, eta_min=LR / 50)
    else:
        peer = StepLR(optimizer, step_size=9, gamma=0.3)
    expected = lrs_of_torch(after_warmup(optimizer, peer, warmup), optimizer)
    options = {"warmup_steps": warmup, "min_factor": 1 / 50, "drop_steps": 9, "gamma": 0.3}
    found = [LR * lr_factor(schedule, step, TOTAL, **options) for step in range(TOTAL)]  # type: ignore[arg-type]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("warmup", [0, 4, 20])
def test_onecycle_is_that_of_torch(warmup: int) -> None:
    optimizer = sgd()
    rise = warmup / TOTAL if warmup else 0.3
    peer = OneCycleLR(optimizer, max_lr=LR, total_steps=TOTAL, pct_start=rise, cycle_momentum=False)
    expected = [*lrs_of_torch(peer, optimizer, TOTAL - 1), optimizer.param_groups[0]["lr"]]
    found = [LR * lr_factor("onecycle", step, TOTAL, warmup_steps=warmup) for step in range(TOTAL)]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step", "onecycle"])
def test_trainings_of_a_few_steps_are_no_special_case(schedule: ScheduleName) -> None:
    for total, warmup in itertools.product([1, 2, 3], [0, 1, 5]):
        factors = [lr_factor(schedule, step, total, warmup_steps=warmup) for step in range(total + 2)]
        assert all(0 <= factor <= 1 for factor in factors)


def test_schedules_may_be_infinite_and_keep_their_final_learning_rate() -> None:
    assert lr_factor("cosine", TOTAL + 5, TOTAL, min_factor=0.1) == pytest.approx(0.1)
    assert lr_factor("onecycle", TOTAL + 5, TOTAL) == pytest.approx(1 / 25e4)
    assert lr_factor("constant", 10**6, math.inf) == 1
    assert lr_factor("step", 25, math.inf, drop_steps=10) == pytest.approx(0.01)


def test_steps_of_a_training() -> None:
    assert steps_of_training(10, 1, 3, -1) == (10, 30)
    assert steps_of_training(10, 4, 3, -1) == (3, 9)
    assert steps_of_training(10, 1, 3, 25) == (10, 25)
    assert steps_of_training(10, 1, None, 25) == (10, 25)
    assert steps_of_training(10, 1, -1, -1) == (10, math.inf)
    with pytest.raises(UserError, match="limit_train_batches"):
        steps_of_training(math.inf, 1, 3, -1)


BATCH = 4


def rates(folder: Path, options: dict[str, Any], **changes: Any) -> list[list[float]]:
    recorder = Recorder()
    task = tiny_classifier(class_names=TASKS["class"], lr=1e-3, optim_options={"backbone_lr": 1e-4, **options})
    tiny_trainer(folder, callbacks=[recorder], limit_val_batches=0, **changes).fit(task, MadePhotos(BATCH))
    return recorder.lrs


@pytest.mark.parametrize(("rule", "power"), [("linear", 1.0), ("sqrt", 0.5)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_rate_of_every_step_is_scaled(tmp_path: Path, rule: str, power: float, accumulate: int) -> None:
    plain = rates(tmp_path, {}, accumulate_grad_batches=accumulate)
    scaled = rates(tmp_path, {"lr_scaling": rule, "lr_base_batch": 32}, accumulate_grad_batches=accumulate)
    assert len(plain) == SPLIT_SIZES["train"] / BATCH / accumulate
    factor = (BATCH * accumulate / 32) ** power
    for before, after in zip(plain, scaled, strict=True):
        assert after == pytest.approx([lr * factor for lr in before])


def test_one_line_reports_the_rates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        rates(tmp_path, {"lr_scaling": "linear", "lr_base_batch": 8})
        assert [line for line in caplog.messages if "lr_scaling" in line] == [
            "lr_scaling linear: 4 samples a step, rates are for 8; learning rates x 0.5, at most backbone 5e-05, head "
            "0.0005"
        ]
        caplog.clear()
        rates(tmp_path, {})
        assert not [line for line in caplog.messages if "lr_scaling" in line]


def test_processes_count() -> None:
    # 8 GPUs with 256 images have 8 times the learning rate of one (Goyal et al., 2017).
    assert scaling_factor(OptimOptions(lr_scaling="linear"), 8 * 256) == 8
    assert scaling_factor(OptimOptions(lr_scaling="sqrt", lr_base_batch=512), 8 * 256) == 2
    assert scaling_factor(OptimOptions(lr_scaling="sqrt"), 128) == pytest.approx(math.sqrt(0.5))
    assert scaling_factor(OptimOptions(), None) == 1


def test_data_without_batch_size_are_refused(tmp_path: Path) -> None:
    task = tiny_classifier(optim_options={"lr_scaling": "linear"})
    with pytest.raises(UserError, match=r"optim_options.lr_scaling: the data have no batch size"):
        tiny_trainer(tmp_path).fit(task, TinyData())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scaling": "cubic"}, "lr_scaling: must be one of none, linear, sqrt; got 'cubic'"),
        ({"lr_scaling": "sqrt", "lr_base_batch": 0}, "lr_base_batch: must be greater than or equal to 1; got 0"),
        ({"lr_base_batch": 64}, "does nothing without lr_scaling"),
        ({"learning_rate": 1}, "optim_options: unknown key 'learning_rate'"),
        ({"layer_decay": 0.0}, "optim_options.layer_decay: must be greater than 0; got 0.0"),
        ({"betas": [0.9]}, "optim_options.betas"),
        ({"betas": [0.9, 1]}, "optim_options.betas"),
    ],
)
def test_invalid_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_classifier(optim_options=options)


def vit() -> Any:
    return timm.create_model("test_vit", num_classes=0)


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_every_parameter_is_in_one_group_and_only_matrices_are_decayed(layer_decay: float) -> None:
    backbone, heads = vit(), nn.Linear(64, 3)
    groups = parameter_groups(
        nn.Sequential(backbone, heads), {"backbone": backbone}, weight_decay=0.1, layer_decay=layer_decay
    )
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for module in (backbone, heads) for p in module.parameters())
    assert len({group["name"] for group in groups}) == len(groups)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in (*backbone.named_parameters(), *heads.named_parameters()):
        exempt = parameter.ndim < 2 or name in {"pos_embed", "cls_token", "reg_token"}
        assert decay[id(parameter)] == (0.0 if exempt else 0.1), name


def test_layer_decay_slows_the_lower_layers_of_the_backbone_only() -> None:
    backbone, heads = vit(), nn.Linear(64, 3)
    groups = parameter_groups(nn.Sequential(backbone, heads), {"backbone": backbone}, weight_decay=0.1, layer_decay=0.5)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    blocks = [scale[id(block.attn.qkv.weight)] for block in backbone.blocks]
    assert blocks == [blocks[-1] * 0.5**depth for depth in reversed(range(len(blocks)))]
    assert scale[id(backbone.patch_embed.proj.weight)] == blocks[0] / 2
    assert scale[id(backbone.norm.weight)] == 1
    assert scale[id(heads.weight)] == 1
    phase = TrainingPhase(first_epoch=0, lr={"backbone": 1e-4, "head": 1e-3})
    optimizer = make_optimizer(groups, phase, OptimOptions(betas=(0.8, 0.9), eps=1e-6))
    lr = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert lr[id(backbone.blocks[-1].attn.qkv.weight)] == pytest.approx(1e-4 * blocks[-1])
    assert lr[id(heads.weight)] == 1e-3
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-6


def test_frozen_parameters_have_a_group_and_do_not_move_and_fixed_ones_have_none() -> None:
    backbone, heads = vit(), nn.Linear(64, 3)
    fixed, frozen = backbone.pos_embed, list(backbone.blocks.parameters())
    for parameter in (fixed, *frozen):
        parameter.requires_grad_(False)
    groups = parameter_groups(nn.Sequential(backbone, heads), {"backbone": backbone}, weight_decay=0.1, frozen=frozen)
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    assert {id(parameter) for parameter in frozen} <= grouped
    assert id(fixed) not in grouped
    assert not any(parameter.requires_grad for parameter in frozen)
    optimizer = make_optimizer(groups, TrainingPhase(first_epoch=0, lr={"backbone": 1.0, "head": 1.0}), OptimOptions())
    before = [parameter.clone() for parameter in frozen]
    heads(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))


def test_several_backbones_and_a_logit_scale_have_groups_of_their_own() -> None:
    model = nn.ModuleDict({"image": nn.Linear(4, 3), "text": nn.Linear(5, 3), "head": nn.Linear(3, 3)})
    scale = nn.Parameter(torch.tensor(2.6))
    model.register_parameter("scale", scale)
    backbones: dict[str, nn.Module] = {"image_backbone": model["image"], "text_backbone": model["text"]}
    groups = parameter_groups(model, backbones, weight_decay=0.1, logit_scale=[scale], logit_scale_lr=1e-2)
    names = {group["name"]: group for group in groups}
    assert {"image_backbone_decay", "text_backbone_no_decay", "head_decay", "logit_scale"} <= names.keys()
    assert names["logit_scale"]["weight_decay"] == 0.0
    optimizer = make_optimizer(
        groups, TrainingPhase(first_epoch=0, lr={"backbone": 1e-5, "head": 1e-3}), OptimOptions()
    )
    lr = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert (lr["image_backbone_decay"], lr["head_decay"], lr["logit_scale"]) == (1e-5, 1e-3, 1e-2)


def test_layer_decay_of_a_transformers_model_slows_its_lower_layers() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=30)
    backbone: Any = BertModel(config, add_pooling_layer=False)
    groups = parameter_groups(backbone, {"text": backbone}, weight_decay=0.1, layer_decay=0.5)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    layers = [scale[id(layer.attention.self.query.weight)] for layer in backbone.encoder.layer]
    assert layers == [0.125, 0.25, 0.5]
    assert scale[id(backbone.embeddings.word_embeddings.weight)] == 0.0625
    assert len(scale) == len(list(backbone.parameters()))


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [("vit_tiny_patch16_224", 12, "Block"), ("resnet18", 2, "BasicBlock"), ("regnetx_002", 7, "Bottleneck")],
)
def test_blocks_are_those_that_a_network_is_mainly_made_of(name: str, count: int, kind: str) -> None:
    found = blocks(timm.create_model(name), name)
    assert [type(block).__name__ for block in found] == [kind] * count


def test_depths_rise_from_the_embedding_to_what_follows_the_blocks() -> None:
    config = DistilBertConfig(dim=8, n_layers=3, n_heads=2, hidden_dim=16, vocab_size=20, max_position_embeddings=10)
    network = nn.Sequential()
    network.add_module("model", DistilBertModel(config))
    network.add_module("norm", nn.LayerNorm(8))
    depths = layer_depths(network, "the network")
    assert depths["model.embeddings.word_embeddings.weight"] == 0
    assert depths["model.transformer.layer.0.attention.q_lin.weight"] == 1
    assert depths["model.transformer.layer.2.ffn.lin1.bias"] == 3
    assert depths["norm.weight"] == 4
    scales = layer_scales(network, "the network", 0.5)
    assert scales["norm.weight"] == 1.0
    assert scales["model.embeddings.word_embeddings.weight"] == 0.5**4


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="the text tower has no blocks"):
        blocks(nn.Linear(2, 2), "the text tower")


NAMES = ["sgd", "lamb", "lion", "muon", "lookahead_adamw"]


def made_task(**changes: Any) -> MultiTaskClassifier:
    return MultiTaskClassifier("test_efficientnet", TASKS, pretrained=False, image_size=32, **changes)


def settings(name: str, **options: Any) -> OptimOptions:
    return OptimOptions(optimizer=OptimizerOptions(name, options), layer_decay=0.5)


class Leaves(pl.Callback):
    """Saves in the middle of an epoch of either phase."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in (2, 8):
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("muon", "lookahead_adamw") else [pytest.mark.slow]) for name in NAMES
    ],  # those with two rules for their weights, and with two copies of them
)
def test_a_run_with_any_optimizer_has_both_phases_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    def run(seed: int, checkpoint: Path | None = None) -> tuple[VisionTask, pl.Trainer]:
        pl.seed_everything(3)
        torch.manual_seed(seed)
        task = made_task(optim_options=settings(name))
        unfreezing = BackboneUnfreezing(1, lr=1e-2, backbone_lr=1e-3, head_lr=5e-3)
        trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[unfreezing, Leaves(tmp_path)])
        trainer.fit(task, datamodule=MadePhotos(), ckpt_path=checkpoint)
        return task, trainer

    whole, trainer = run(3)
    optimizer = trainer.optimizers[0]
    kinds = {group["name"] for group in optimizer.param_groups}
    assert {"head_decay", "head_no_decay"} < kinds
    assert type(optimizer).__name__.lower() == {"lookahead_adamw": "lookahead"}.get(name, name)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    if name == "muon":
        assert {group["use_fallback"] for group in optimizer.param_groups if group["part"] == "head"} == {True}
    for step in (2, 8):
        checkpoint = tmp_path / f"{step}.ckpt"
        saved = torch.load(checkpoint, weights_only=True)
        pl.seed_everything(3)
        before = made_task().state_dict()
        moved = {
            key.partition(".")[0] for key, value in saved["state_dict"].items() if not torch.equal(value, before[key])
        }
        assert ("encoder" in moved) is (step == 8)
        assert "heads" in moved
    assert same_weights(run(9, tmp_path / "2.ckpt")[0], whole)


def test_the_default_is_the_fused_adamw_of_torch(tmp_path: Path) -> None:
    task = tiny_classifier()
    assert type(task.configure_optimizers()) is torch.optim.AdamW
    saved = {"betas": (0.9, 0.98), "warmup_epochs": 0.5}  # of a checkpoint of an earlier version
    old = tiny_classifier(optim_options=saved)
    assert old.optim_options.optimizer == OptimizerOptions()
    assert task.configure_optimizers().defaults["fused"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": {"name": "lambda"}}, r"no 'lambda' in timm; such as lamb"),
        ({"optimizer": {"name": "sgd", "options": {"beta": 1}}}, "sgd with .* unexpected keyword argument 'beta'"),
        ({"optimizer": {"options": {"amsgrads": True}}}, "adamw with .* unexpected keyword argument 'amsgrads'"),
        ({"optimizer": {"name": "lion", "options": {"betas": [2.0, 0.1]}}}, "lion with .*[Ii]nvalid beta"),
        ({"optimizer": {"name": "adahessian"}}, "second derivatives"),
        ({"optimizer": {"nam": "sgd"}}, "optim_options.optimizer: unknown key 'nam'; must be one of name, options"),
        ({"optimizer": {"name": "lamb"}, "betas": (0.9, 0.98)}, "betas: is for adamw; set optimizer.options"),
        ({"plateau": {"monitor": "test/loss"}}, "must be a metric of the validation"),
    ],
)
def test_unknown_optimizers_and_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        tiny_classifier(optim_options=options)
    assert "\n" not in str(refusal.value)


def test_the_plateau_of_a_run_is_resumed_exactly(tmp_path: Path) -> None:
    def run(seed: int, checkpoint: Path | None = None, monitor: str = "val/loss") -> Recorder:
        pl.seed_everything(seed)
        options = OptimOptions(gamma=0.5, plateau=PlateauOptions(monitor, "max", patience=0))
        recorder = Recorder()
        trainer = tiny_trainer(tmp_path, max_epochs=4, callbacks=[recorder, Leaves(tmp_path)])
        trainer.fit(
            made_task(lr=1e-2, schedule="plateau", optim_options=options),
            datamodule=MadePhotos(),
            ckpt_path=checkpoint,
        )
        return recorder

    whole = run(3).lrs
    assert whole[-1][0] < whole[0][0] == 1e-2  # the loss falls, which is no new best value here
    assert run(9, tmp_path / "8.ckpt").lrs == whole[8:]
    with pytest.raises(UserError, match=r"no 'val/acc'; must be one of val/class/accuracy, .*val/loss"):
        run(3, monitor="val/acc")
