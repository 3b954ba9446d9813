from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

from lightning_modules.distributed import FullySharded, convert_batchnorm, shard
from tests.support.models import tiny_classifier, tiny_trainer
from vitrail.errors import UserError


class Mixed(nn.Module):
    """timm's BatchNorm with activation, plain BatchNorm at the top and one deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("test_efficientnet", num_classes=0)
        self.norm = nn.BatchNorm1d(256, momentum=0.3, eps=1e-3)
        self.head = nn.Sequential(nn.Linear(256, 8), nn.BatchNorm1d(8))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.norm(self.network(image)))
        return output


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def test_converted_batchnorm_has_the_same_outputs_and_statistics() -> None:
    torch.manual_seed(0)
    model, image = Mixed(), torch.randn(6, 3, 32, 32)
    converted = copy.deepcopy(model)
    convert_batchnorm(converted)
    assert len(norms(converted)) == len(norms(model)) > 2
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms(converted))
    # On one process it falls back to the same computation, statistics included.
    torch.testing.assert_close(converted(image), model(image))
    assert converted.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[key], value)
    torch.testing.assert_close(converted.eval()(image), model.eval()(image))
    # torch's own function, which Lightning would use, leaves the activations out.
    wrong = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))  # type: ignore[no-untyped-call]  # torch's
    assert not torch.allclose(wrong(image), model(image), atol=1e-2)


class Scaled(nn.Module):
    """A layer, which is sharded, and scalars, which are not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.fixed = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.scale.exp() * self.layer(features).square().sum() * self.fixed
        return output


def _one_step_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, features = Scaled(), torch.randn(2, 3, 4)
    shard(model, init_device_mesh("cpu", (2,)))
    model(features[rank]).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    torch.save(whole, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gradients_of_shared_weights_and_of_scalars_are_means_over_processes(tmp_path: Path) -> None:
    # Forked processes need not import everything again; where there is an accelerator they may not be forked.
    method = "spawn" if torch.accelerator.is_available() else "fork"
    start_processes(_one_step_of_two, args=(str(tmp_path),), nprocs=2, start_method=method)  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    model, features = Scaled(), torch.randn(2, 3, 4)
    (sum(model(one) for one in features) / 2).backward()
    expected = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert expected.keys() == {"layer.weight", "layer.bias", "scale"}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("fixed", [True, False])
def test_converted_batchnorm_that_is_frozen_or_fixed_keeps_its_statistics(fixed: bool) -> None:
    task = tiny_classifier()
    convert_batchnorm(task)
    if fixed:
        task.fix_batchnorm()
    else:
        task.freeze_backbone()
    task.train()
    assert norms(task.backbone)
    assert not any(norm.training for norm in norms(task.backbone))
    before = {key: value.clone() for key, value in task.backbone.state_dict().items()}
    task(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    for key, value in task.backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_batchnorm_over_processes_is_refused_on_cpus(tmp_path: Path) -> None:
    # Asked directly: a fit would leave a group of processes behind in this one.
    trainer = tiny_trainer(tmp_path, strategy="ddp", sync_batchnorm=True)
    with pytest.raises(UserError, match=r"trainer.sync_batchnorm: torch synchronises BatchNorm on GPUs only"):
        tiny_classifier_setup(trainer)


def test_value_clipping_of_sharded_weights_is_refused(tmp_path: Path) -> None:
    changes = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}
    trainer = tiny_trainer(tmp_path, strategy=FullySharded(), **changes)
    with pytest.raises(UserError, match=r"trainer.gradient_clip_algorithm: sharded weights are clipped by norm"):
        tiny_classifier_setup(trainer)


def tiny_classifier_setup(trainer: Trainer) -> None:
    """The hook that looks at the strategy before anything is done."""
    task = tiny_classifier()
    task.trainer = trainer
    task.setup("fit")
