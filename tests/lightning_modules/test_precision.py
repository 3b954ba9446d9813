from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_modules.checkpoint import load_task
from lightning_modules.encoders.image import Normalize
from lightning_modules.heads import SingleLabelOutput
from lightning_modules.metrics import MeanOverSamples
from lightning_modules.precision import Float32Linear
from tests.support.models import (
    SIZE,
    TinyData,
    TinyPairs,
    pair_batch,
    tiny_classifier,
    tiny_multitask,
    tiny_pair,
    tiny_trainer,
    write_clip,
)
from vitrail.errors import UserError


def fitted_pair(folder: Path, precision: Any, **changes: Any) -> Any:
    """A pretrained CLIP, fetched when the trainer has already cast the model."""
    (folder / "clip").mkdir()
    write_clip(folder / "clip", image_size=SIZE, scale=math.log(80.0))
    task = tiny_pair(folder / "clip", towers={"model": str(folder / "clip")}, **changes)
    trainer = tiny_trainer(folder, max_epochs=2, precision=precision)
    trainer.fit(task, datamodule=TinyPairs())
    trainer.save_checkpoint(folder / "some.ckpt", weights_only=True)
    return task


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_logit_scale_and_bias_move_in_steps_that_half_precision_has_not(precision: str, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "whole").mkdir()
    options: Any = {"loss": "sigmoid", "logit_scale": {"bias": -9.7, "lr": 1e-4}}
    with pytest.warns(UserWarning, match=f"{precision} keeps weights in half precision"):
        half = fitted_pair(tmp_path / "half", precision, **options).objective.logit_scale
    whole = fitted_pair(tmp_path / "whole", "32-true", **options).objective.logit_scale
    start = {"log_scale": math.log(80.0), "bias": -9.7}
    loaded: Any = load_task(tmp_path / "half" / "some.ckpt")
    saved = loaded.objective.logit_scale
    for name, before in start.items():
        value = getattr(half, name).detach()
        assert value.dtype == torch.float32
        # Four steps of at most 1e-4 each; what half precision holds there is 0.03 (log_scale) or 0.06 (bias) apart.
        assert 1e-5 < abs(float(value) - before) < 5e-4
        assert float(value) == pytest.approx(float(getattr(whole, name).detach()), abs=1.5e-4)
        assert torch.equal(getattr(saved, name), value)


def test_a_pretrained_scale_is_taken_over_as_it_is(tmp_path: Path) -> None:
    task = fitted_pair(tmp_path, "bf16-true", logit_scale={"trainable": False})
    assert float(task.objective.logit_scale()[0]) == pytest.approx(80.0, rel=1e-6)
    assert {one.dtype for one in task.towers.backbone("image").parameters()} == {torch.bfloat16}


def test_statistics_last_layers_and_metrics_stay_float32(tmp_path: Path) -> None:
    task = tiny_multitask()
    trainer = tiny_trainer(tmp_path, max_epochs=1, precision="bf16-true")
    with pytest.warns(UserWarning, match="bf16-mixed keeps float32 weights"):
        trainer.fit(task, datamodule=TinyData())
    norms = [one for one in task.modules() if isinstance(one, nn.BatchNorm2d)]
    assert norms
    exact: list[torch.Tensor] = [tensor for norm in norms for tensor in norm.state_dict().values()]
    exact += [*task.heads.state_dict().values(), task.encoder.normalize.mean]
    assert {tensor.dtype for tensor in exact if tensor.is_floating_point()} == {torch.float32}
    convolutions = {one.weight.dtype for one in task.modules() if isinstance(one, nn.Conv2d)}
    assert convolutions == {torch.bfloat16}
    assert trainer.callback_metrics["val/loss"].isfinite()


def test_adapters_stay_float32_with_base_weights_in_half_precision(tmp_path: Path) -> None:
    towers: Any = {"model": str(write_clip(tmp_path, image_size=SIZE))}
    task = tiny_pair(tmp_path, towers=towers, lora={"rank": 2})
    task.fetch_weights()
    task.to(torch.bfloat16).train()
    adapters = {name: value for name, value in task.named_parameters() if "lora_" in name}
    assert len(adapters) == 32
    task._training_loss(pair_batch([0, 1, 2])).backward()  # type: ignore[no-untyped-call]  # torch's
    for name, value in adapters.items():
        assert value.dtype == torch.float32, name
        assert value.grad is not None
        assert value.grad.dtype == torch.float32
    assert {value.dtype for name, value in task.towers.named_parameters() if "lora_" not in name} == {torch.bfloat16}


def test_pixels_are_normalised_exactly_and_given_in_the_networks_type() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    plain, half = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    half.to(torch.bfloat16).to("cpu")
    assert half.mean.dtype == torch.float32
    assert torch.equal(half(image), plain(image).to(torch.bfloat16))
    assert torch.equal(half.float()(image), plain(image))


def test_sums_of_an_epoch_go_on_beyond_what_half_precision_counts() -> None:
    mean = MeanOverSamples().to(torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does around each step
    try:
        for _ in range(300):
            mean.update(torch.tensor(1.0), 1)
        value = mean.compute()
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(mean.weight.compute()) == 300
    assert float(value if value is not None else 0) == 1


def test_logits_and_class_weights_are_not_rounded() -> None:
    with torch.device("meta"):  # for counting FLOPs
        assert Float32Linear(4, 2)(torch.zeros(3, 4)).shape == (3, 2)
    head = Float32Linear(4, 3).to(torch.bfloat16)
    features = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features)
    assert torch.equal(logits, nn.functional.linear(features, head.weight, head.bias))
    assert (head.weight.dtype, logits.dtype) == (torch.float32, torch.float32)
    weights = SingleLabelOutput("class", 2, class_weights=torch.tensor([0.123456, 1.0])).half().class_weights
    assert weights is not None
    assert torch.equal(weights, torch.tensor([0.123456, 1.0]))


def test_an_average_of_weights_in_half_precision_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_epochs=1, precision="bf16-true", callbacks=[EMAWeightAveraging()])
    with pytest.raises(UserError, match="bf16-mixed, or leave the averaging out"):
        trainer.fit(tiny_classifier(), datamodule=TinyData())
