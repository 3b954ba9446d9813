from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn

from experiments.train.cli import refuse_conflicting_checkpoint
from lightning_modules.base import VisionTask
from lightning_modules.checkpoint import (
    State,
    averaged_weights,
    differing_batchnorm,
    interpolated_weights,
    load_task,
    refresh_batchnorm,
)
from lightning_modules.classification import MultiTaskClassifier
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.encoders.image import ImageEncoder
from lightning_modules.options import OptimOptions
from tests.support.models import (
    BACKBONE,
    SIZE,
    TASKS,
    TEXTS,
    TinyData,
    make_batch,
    pair_batch,
    tiny_classifier,
    tiny_multitask,
    tiny_pair,
    tiny_trainer,
)
from vitrail.config import load_yaml, one_config, read_experiment
from vitrail.errors import UserError
from vitrail.types import TaskFacts


class LinkedData(TinyData):
    tasks = TASKS
    image_size = SIZE


class LinkedCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in ("tasks", "image_size"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")


def saved(folder: Path, task: VisionTask) -> Path:
    trainer = tiny_trainer(folder)
    trainer.fit(task, TinyData())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def assert_same_logits(a: VisionTask, b: VisionTask) -> None:
    image = make_batch([0, 1, 2])["image"]
    a.eval()
    with torch.no_grad():
        for task, logits in a(image).items():
            assert torch.equal(logits, b(image)[task])


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(encoder: ImageEncoder) -> None:
        raise AssertionError("pretrained weights were asked for")

    monkeypatch.setattr(ImageEncoder, "load_pretrained", refuse)


def test_a_checkpoint_alone_makes_the_task_and_names_what_it_predicts(tmp_path: Path) -> None:
    task = tiny_multitask(task_weights={"class": 1.0, "type": 0.5})
    loaded = load_task(saved(tmp_path, task))
    assert isinstance(loaded, MultiTaskClassifier)
    assert loaded.tasks == TASKS
    assert loaded.task_weights == {"class": 1.0, "type": 0.5}
    assert loaded.input_options == {"size": SIZE, "crop_fraction": 1.0, "interpolation": "bicubic"}
    assert not loaded.training
    assert_same_logits(task, loaded)


def test_pretrained_weights_are_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(ImageEncoder, "load_pretrained", lambda encoder: None)
        path = saved(tmp_path, tiny_classifier(pretrained=True))
    monkeypatch.setattr("lightning_modules.encoders.weights.hub_file", lambda source: pytest.fail("asked the hub"))
    loaded = load_task(path)
    tiny_trainer(tmp_path, fast_dev_run=True).fit(loaded, TinyData())


def test_a_checkpoint_of_the_command_line_loads_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    monkeypatch.setattr(sys, "argv", ["experiments"])
    cli = LinkedCLI(
        VisionTask,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        run=False,
        save_config_callback=None,
        seed_everything_default=1,
        args=[
            "--data=tests.lightning_modules.test_checkpoint.LinkedData",
            "--model=lightning_modules.MultiTaskClassifier",
            f"--model.backbone={BACKBONE}",
            "--model.task_weights={class: 1.0}",
            "--model.optim_options.warmup_epochs=0.5",
            "--model.optim_options.betas=[0.9, 0.98]",
        ],
    )
    assert isinstance(cli.model, VisionTask)
    cli.model.fetch_weights = list  # type: ignore[method-assign]
    path = saved(tmp_path, cli.model)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["_class_path"].startswith("lightning_modules.")
    loaded = load_task(path)
    assert loaded.tasks == {"class": TASKS["class"]}
    assert loaded.optim_options == OptimOptions(warmup_epochs=0.5, betas=(0.9, 0.98))
    assert_same_logits(cli.model, loaded)
    assert_same_logits(loaded, MultiTaskClassifier.load_from_checkpoint(path, weights_only=True).eval())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("trained"), tiny_classifier())


def changed(trained: Path, path: Path, **changes: Any) -> Path:
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["hyper_parameters"] |= changes
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize(
    "class_path",
    [
        "os.system",
        "lightning_modules.os.system",
        "lightning_modules.nothing.Here",
        "lightning_modules.Nothing",
        "lightning_modules.load_task",
        "lightning_modules.base.VisionTask",
        "lightning_modules_of_another.ImageClassifier",
        "lightning_modules.base.LightningModule",
        "",
    ],
)
def test_only_our_own_tasks_are_made(trained: Path, tmp_path: Path, class_path: str) -> None:
    path = changed(trained, tmp_path / "a.ckpt", _class_path=class_path)
    with pytest.raises(UserError, match="must be one of the tasks"):
        load_task(path)


def test_files_that_are_no_intact_checkpoints_are_user_errors(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such checkpoint"):
        load_task(tmp_path / "best.ckpt")
    (tmp_path / "a.ckpt").write_text("metrics")
    with pytest.raises(UserError, match="read safely"):
        load_task(tmp_path / "a.ckpt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of a run"):
        load_task(tmp_path / "b.ckpt")
    content = bytearray(trained.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "best.ckpt").write_bytes(content)
    torch.load(tmp_path / "best.ckpt", weights_only=True)  # PyTorch does not notice
    with pytest.raises(UserError, match=r"best\.ckpt: is damaged, the checksum of .* does not match"):
        load_task(tmp_path / "best.ckpt")


def test_a_checkpoint_of_version_0_1_loads(tmp_path: Path) -> None:
    task = tiny_pair(tmp_path, logit_scale={"scale": 5.0, "trainable": False}, optim_options={"warmup_epochs": 0.5})
    task.towers.tokenizer = task.towers.train_tokenizer(list(TEXTS))
    checkpoint: dict[str, Any] = {"pytorch-lightning_version": "2.6.6", "state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    # Options were plain dictionaries without their defaults, and the logit scale was called temperature.
    old = {key: value for key, value in checkpoint["hyper_parameters"].items() if key != "logit_scale"}
    old |= {"temperature": {"scale": 5.0, "learned": False}, "optim_options": {"warmup_epochs": 0.5}}
    old["towers"] = {"model": str(tmp_path), "pretrained": False}
    torch.save({**checkpoint, "hyper_parameters": old}, tmp_path / "old.ckpt")
    loaded = load_task(tmp_path / "old.ckpt")
    assert isinstance(loaded, DualEncoder)
    assert not loaded.logit_scale_parameters
    assert float(loaded.objective.logit_scale()[0]) == pytest.approx(5.0)
    assert loaded.optim_options == OptimOptions(warmup_epochs=0.5)
    refuse_conflicting_checkpoint(task, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match="optim_options: the checkpoint has"):
        refuse_conflicting_checkpoint(tiny_pair(tmp_path, logit_scale={"scale": 5.0}), tmp_path / "old.ckpt")


def test_arguments_that_are_options_now_are_found_there(tmp_path: Path) -> None:
    facts = TaskFacts(class_counts={"class": [4, 2, 1, 1], "type": [1, 1]})
    backbone = {"timm": {"drop_path_rate": 0.1}, "adapter": {"kind": "bitfit"}}
    losses = {"class_weighting": "inverse", "label_smoothing": 0.1, "multi_label": "asymmetric"}
    task = tiny_multitask(task_facts=facts, loss_options=losses, backbone_options=backbone)
    checkpoint: Any = torch.load(saved(tmp_path, task), weights_only=True)
    arguments = checkpoint["hyper_parameters"]
    arguments["class_counts"] = arguments.pop("task_facts")["class_counts"]
    arguments["adapter"] = arguments["backbone_options"].pop("adapter")
    former = {name: arguments["loss_options"].pop(name) for name in ("label_smoothing", "class_weighting")}
    checkpoint["hyper_parameters"] = arguments = {**former, **arguments}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    loaded = load_task(tmp_path / "old.ckpt")
    assert isinstance(loaded, MultiTaskClassifier)
    assert_same_logits(task, loaded)
    assert losses.items() <= loaded.hparams["loss_options"].items()
    refuse_conflicting_checkpoint(task, tmp_path / "old.ckpt")
    arguments["backbone_options"] = {"drop_path_rate": 0.1}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(
        UserError, match=r"backbone_options: unknown key 'drop_path_rate'; must be one of timm, "
    ) as error:
        load_task(tmp_path / "old.ckpt")
    assert "\n" not in str(error.value)


def test_arguments_of_an_experiment_file_of_version_0_1_have_their_present_names(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(
        "model:\n  class_path: lightning_modules.DualEncoder\n"
        "  init_args: {temperature: {scale: 5.0, learned: false}, optim_options: null, lora: null}\n"
    )
    expected = {"logit_scale": {"scale": 5.0, "trainable": False}, "lora": None}
    assert read_experiment(path)["model"]["init_args"] == expected
    path.write_text("model: {class_path: my_models.Own, init_args: {temperature: null, label_smoothing: 0.1}}\n")
    assert read_experiment(path)["model"]["init_args"] == {"temperature": None, "label_smoothing": 0.1}


def test_arguments_of_classifiers_that_are_options_now_are_accepted_in_files_and_as_flags(tmp_path: Path) -> None:
    experiment, overlay = tmp_path / "experiment.yaml", tmp_path / "overlay.yaml"
    experiment.write_text(
        "model:\n  class_path: lightning_modules.ImageClassifier\n"
        "  init_args: {label_smoothing: 0.1, loss_options: {gamma: 1.0}}\n"
    )
    overlay.write_text("model: {init_args: {class_weighting: inverse}}\n")
    flags = ["--model.class_weighting", "none", "--model.init_args.label_smoothing=0.2", "--model.lr", "1"]
    args, _ = one_config(["fit", "--config", str(experiment), "--config", str(overlay), *flags])
    options = {"label_smoothing": 0.1, "gamma": 1.0, "class_weighting": "inverse"}
    assert load_yaml(args[2])["model"]["init_args"] == {"loss_options": options}
    moved = ["--model.loss_options.class_weighting", "none", "--model.init_args.loss_options.label_smoothing=0.2"]
    assert args[3:] == [*moved, "--model.lr", "1"]
    experiment.write_text(
        'model: {class_path: lightning_modules.GenerativeClassifier, init_args: {questions: {class: "What?"}}}\n'
    )
    assert read_experiment(experiment)["model"]["init_args"] == {"answers": {"questions": {"class": "What?"}}}
    experiment.write_text("model: {class_path: my_models.Own}\n")
    assert one_config(["fit", "--config", str(experiment), *flags])[0][3:] == flags


def state(*values: float) -> State:
    return {"w": torch.tensor(values), "count": torch.tensor(len(values))}


def test_the_mean_is_computed_weight_by_weight() -> None:
    mean = averaged_weights([state(1.0, 2.0), state(3.0, 6.0), state(5.0, 1.0)])
    assert torch.equal(mean["w"], torch.tensor([3.0, 3.0]))
    assert mean["count"] == 2
    half = averaged_weights([{"w": torch.tensor([1.0]).half()}, {"w": torch.tensor([2.0]).half()}])
    assert half["w"].dtype == torch.float16
    # In float32 the sum of these would lose the small one.
    large = averaged_weights(
        [{"w": torch.tensor([2.0**25])}, {"w": torch.tensor([1.0])}, {"w": torch.tensor([-(2.0**25)])}]
    )
    assert large["w"].item() == pytest.approx(1 / 3)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.moving = nn.BatchNorm2d(4)
        self.fixed = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.dropout(self.fixed(self.moving(self.conv(image.float()))))
        return features


def test_batchnorm_is_recomputed_where_members_differ() -> None:
    torch.manual_seed(0)
    network = Network()
    states = [{name: value.clone() for name, value in network.state_dict().items()} for _ in range(2)]
    assert differing_batchnorm(network, states) == []
    states[1]["moving.running_mean"] += 1
    layers = differing_batchnorm(network, states)
    assert layers == [network.moving]
    batches = [torch.randint(0, 255, (8, 3, 6, 6), dtype=torch.uint8) for _ in range(3)]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    refresh_batchnorm(network, layers, network, [*batches, batches[0][:1]])
    after = network.state_dict()
    with torch.no_grad():
        features = [network.conv(batch.float()) for batch in batches]
    mean = torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0)
    variance = torch.stack([f.var((0, 2, 3)) for f in features]).mean(0)
    torch.testing.assert_close(after["moving.running_mean"], mean)
    torch.testing.assert_close(after["moving.running_var"], variance)
    for name in before.keys() - {"moving.running_mean", "moving.running_var", "moving.num_batches_tracked"}:
        assert torch.equal(before[name], after[name]), name
    assert network.moving.momentum == 0.1
    assert not network.moving.training
    with pytest.raises(UserError, match="cannot be recomputed"):
        refresh_batchnorm(network, layers, lambda images: network.conv(images.float()), batches)


def test_the_ends_are_the_models_and_the_middle_is_between() -> None:
    start, end = (
        {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(3)},
        {"w": torch.tensor([1.0, 4.0]), "n": torch.tensor(5)},
    )
    assert torch.equal(interpolated_weights(start, end, 0.0)["w"], start["w"])
    assert torch.equal(interpolated_weights(start, end, 1.0)["w"], end["w"])
    assert torch.equal(interpolated_weights(start, end, 0.25)["w"], torch.tensor([0.25, 2.5]))
    assert interpolated_weights(start, end, 0.25)["n"] == 5


@torch.no_grad()
def test_an_adapter_is_scaled_as_its_product(tmp_path: Path) -> None:
    task = tiny_pair(tmp_path, lora={"rank": 2, "alpha": 2}).eval()
    start = {name: value.clone() for name, value in task.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    end = {
        name: torch.randn(value.shape, generator=generator) if "lora_" in name else value
        for name, value in start.items()
    }
    key = next(name for name in start if name.endswith("lora_B.default.weight"))
    adapter = key.removesuffix("lora_B.default.weight") + "lora_A.default.weight"
    half = interpolated_weights(start, end, 0.5)
    torch.testing.assert_close(half[key] @ half[adapter], 0.5 * end[key] @ end[adapter])
    task.load_state_dict(interpolated_weights(start, end, 0.0))
    plain = tiny_pair(tmp_path).eval()
    image = pair_batch([1, 2])["image"]
    torch.testing.assert_close(task.encode_image(image), plain.encode_image(image))


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match=r"1 of another shape \(a is "):
        interpolated_weights({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, 0.5)
