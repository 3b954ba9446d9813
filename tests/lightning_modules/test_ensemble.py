from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, log_loss
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T

from lightning_modules.base import VisionTask
from lightning_modules.checkpoint import load_task
from lightning_modules.classification import ClassificationTask
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.ensemble import Ensemble, View, checked_views, read_members, view_of
from lightning_modules.metrics import predicted_classes
from lightning_modules.options import TowerOptions
from tests.lightning_modules.generative.tiny_answers import tiny_answerer
from tests.support.models import (
    SIZE,
    TASKS,
    TinyData,
    make_batch,
    tiny_classifier,
    tiny_multitask,
    tiny_trainer,
    write_clip,
)
from vitrail.errors import UserError
from vitrail.types import UNKNOWN, Batch, InputOptions

CLASSES = TASKS["class"]
BATCH = make_batch([20, 21, 22, 23, 24])


def write_member(run: Path, task: VisionTask, *, data: str = "d", options: InputOptions | None = None) -> str:
    """A run directory with nothing but a best checkpoint and the record of its data."""
    (run / "checkpoints").mkdir(parents=True)
    task.input_options = options or {"size": SIZE, "crop_fraction": 1.0, "interpolation": "bicubic"}
    checkpoint = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, run / "checkpoints" / "best.ckpt")
    record = {"data": {"fingerprint": data, "samples": {"train": 10, "test": 7}}}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return str(run)


def dual_encoder(folder: Path) -> DualEncoder:
    prompts = [[f"a photo of a {name}"] for name in CLASSES]
    task = DualEncoder(TowerOptions(model=str(write_clip(folder))), CLASSES, prompts, image_size=SIZE)
    task.load_pretrained()
    return task


@torch.no_grad()
def decided(task: ClassificationTask) -> ClassificationTask:
    """A random network whose predictions depend on the image."""
    for layer in task.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.mul_(8.0)
    return task


@torch.no_grad()
def test_members_that_predict_nothing_decide_nothing(tmp_path: Path) -> None:
    silent, other = tiny_classifier(), decided(tiny_classifier()).eval()
    for parameter in silent.get_submodule("head").parameters():
        parameter.zero_()
    runs = [write_member(tmp_path / name, task) for name, task in (("a", silent), ("b", silent), ("c", other))]
    nothing = Ensemble(runs[:2], TASKS, tta_views=["identity", "hflip"])
    assert predicted_classes(nothing(BATCH["image"])["class"]).tolist() == [UNKNOWN] * 5
    both = Ensemble([runs[0], runs[2]], TASKS)
    assert (
        predicted_classes(both(BATCH["image"])["class"]).tolist() == other(BATCH["image"])["class"].argmax(1).tolist()
    )


def answerer(folder: Path) -> VisionTask:
    task = tiny_answerer(
        folder, tasks={"class": CLASSES}, answers={"questions": {"class": "What is it?"}}, lora={"rank": 2}
    )
    task.load_pretrained()
    with torch.no_grad():
        for name, weight in task.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.02)
    return task


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A member of each kind; all sort images into the same classes."""
    root = tmp_path_factory.mktemp("members")
    torch.manual_seed(0)
    tasks: dict[str, VisionTask] = {
        "multitask": decided(tiny_multitask()),
        "other": decided(tiny_multitask()),
        "classifier": decided(tiny_classifier()),
        "dual": dual_encoder(root / "clip"),
        "generative": answerer(root / "qwen"),
    }
    return {name: write_member(root / name, task) for name, task in tasks.items()}


def mean_of(paths: Sequence[str], task: str, views: Sequence[View] = ("identity",)) -> torch.Tensor:
    """Mean probabilities from each member's own checkpoint, added up in float64."""
    found = []
    for path in paths:
        member = load_task(Path(path) / "checkpoints" / "best.ckpt")
        if isinstance(member, DualEncoder):
            member.class_embeddings()
        for view in views:
            batch: Batch = {**BATCH, "image": view_of(BATCH["image"], view)}
            with torch.no_grad():
                found.append(F.softmax(member.predict_step(batch, 0)["logits"][task].double(), dim=-1))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize(
    ("names", "views", "tasks"),
    [
        (["multitask", "other"], ["identity"], ["class", "type"]),
        (["multitask"], ["identity", "hflip", "zoom"], ["class", "type"]),
        (["multitask", "classifier"], ["identity", "vflip"], ["class"]),
        (["classifier", "dual", "generative"], ["identity", "hflip"], ["class"]),
    ],
)
def test_probabilities_are_the_mean(
    runs: dict[str, str], names: list[str], views: list[View], tasks: list[str]
) -> None:
    members = [runs[name] for name in names]
    ensemble = Ensemble(members, TASKS, tta_views=views)
    assert ensemble.ready_without_training
    assert list(ensemble.tasks) == tasks
    with torch.no_grad():
        outputs = ensemble.predict_step(BATCH, 0)
        forward = ensemble(BATCH["image"])
    for task in tasks:
        expected = mean_of(members, task, views)
        assert float(expected.std(dim=0).max()) > 1e-3  # the images differ
        torch.testing.assert_close(outputs["logits"][task].double().exp(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(forward[task], outputs["logits"][task])
    assert outputs["image_embedding"].shape == (5, ensemble.embedding_dim)
    torch.testing.assert_close(outputs["image_embedding"].norm(dim=1), torch.ones(5))


def test_a_checkpoint_needs_no_members(runs: dict[str, str], tmp_path: Path) -> None:
    moved = [shutil.copytree(runs[name], tmp_path / name) for name in ("classifier", "dual", "generative")]
    ensemble = Ensemble([str(run) for run in moved], tta_views=["identity", "hflip"])
    checkpoint: dict[str, Any] = {"state_dict": ensemble.state_dict()}
    ensemble.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "ensemble.ckpt")
    # The generative model's own weights are found again by themselves: only its adapters are in the file.
    kept = [name for name in checkpoint["state_dict"] if name.startswith("members.2.")]
    assert kept
    assert all("lora_" in name for name in kept if ".vlm.model." in name)
    for run in moved:
        shutil.rmtree(run)
    again = load_task(tmp_path / "ensemble.ckpt")
    assert again.ready_without_training
    assert again.input_options == ensemble.input_options
    with torch.no_grad():
        assert torch.equal(again(BATCH["image"])["class"], ensemble(BATCH["image"])["class"])


def test_scores_are_those_of_the_mean(runs: dict[str, str], tmp_path: Path) -> None:
    ensemble = Ensemble([runs["multitask"], runs["other"]], TASKS)
    [scores] = tiny_trainer(tmp_path).test(ensemble, TinyData(), verbose=False)
    rows = make_batch(list(range(20, 27)))
    with torch.no_grad():
        logits = ensemble(rows["image"])
    for task, targets in {"class": rows["label"], "type": rows["attributes"]["type"]}.items():
        known = targets != UNKNOWN
        probabilities = logits[task].exp()[known].double().numpy()
        labels = list(range(probabilities.shape[1]))
        assert scores[f"test/{task}/loss"] == pytest.approx(
            log_loss(targets[known], probabilities / probabilities.sum(1, keepdims=True), labels=labels), rel=1e-5
        )
        assert scores[f"test/{task}/accuracy"] == pytest.approx(accuracy_score(targets[known], probabilities.argmax(1)))


def test_an_ensemble_is_not_trained(runs: dict[str, str], tmp_path: Path) -> None:
    ensemble = Ensemble([runs["multitask"], runs["other"]], TASKS)
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())
    with pytest.raises(UserError, match=r"fit: an ensemble has nothing to train; use `test`"):
        tiny_trainer(tmp_path).fit(ensemble, TinyData())


def test_images_that_members_do_not_know_are_refused(runs: dict[str, str], tmp_path: Path) -> None:
    ensemble = Ensemble([runs["multitask"], runs["other"]], TASKS)
    data = TinyData({"size": SIZE, "crop_fraction": 0.9, "interpolation": "bicubic"})
    with pytest.raises(UserError, match=r"data.init_args.image: .* of crop_fraction 1.0, the data make them of 0.9"):
        tiny_trainer(tmp_path).test(ensemble, data, verbose=False)
    small: InputOptions = {"size": 16, "crop_fraction": 1.0, "interpolation": "bicubic"}
    other = write_member(tmp_path / "small", tiny_classifier(image_size=16), options=small)
    with pytest.raises(
        UserError, match=r"members: .*classifier was trained on images of size 32, .*small of 16; fit both"
    ):
        Ensemble([runs["classifier"], other])


def test_members_that_do_not_belong_together_are_refused(runs: dict[str, str], tmp_path: Path) -> None:
    good = runs["multitask"]
    turned = write_member(tmp_path / "turned", tiny_classifier(class_names=CLASSES[::-1]))
    strange = write_member(tmp_path / "strange", tiny_multitask(tasks={"size": ["small", "large"]}))
    elsewhere = write_member(tmp_path / "elsewhere", tiny_classifier(), data="e")
    for members, message in (
        ([], "members: there are none"),
        ([good], "members: one run as it is needs no ensemble"),
        ([good, f"{good}/../multitask"], "is named twice"),
        ([good, turned], r"turned has other classes of 'class' than .*multitask, or another order"),
        ([good, strange], "have no task in common"),
        ([good, elsewhere], r"elsewhere was trained on other data than .*multitask, or on other splits"),
        ([good, str(tmp_path / "nothing")], r"nothing has no readable run\.json"),
    ):
        with pytest.raises(UserError, match=message) as refusal:
            Ensemble(members)
        assert "\n" not in str(refusal.value)
    (tmp_path / "elsewhere" / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(UserError, match=r"best\.ckpt: there is no such checkpoint"):
        read_members([elsewhere])
    with pytest.raises(UserError, match=r"members: they were trained on other classes of 'class' than the data have"):
        Ensemble([good, runs["other"]], {"class": ["a", "b"]})
    with pytest.raises(UserError, match=r"architectures: 1 for 2 members"):
        Ensemble([good, runs["other"]], architectures=[{}])


IMAGE = torch.randint(0, 256, (2, 3, 16, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_views_are_those_of_torchvision() -> None:
    assert view_of(IMAGE, "identity") is IMAGE
    assert torch.equal(view_of(IMAGE, "hflip"), T.hflip(IMAGE))
    assert torch.equal(view_of(IMAGE, "vflip"), T.vflip(IMAGE))
    cropped = T.center_crop(IMAGE, [14, 28])
    expected = T.resize(cropped.float(), [16, 32], InterpolationMode.BICUBIC, antialias=False)
    seen = view_of(IMAGE, "zoom")
    assert seen.dtype == torch.uint8
    assert seen.shape == IMAGE.shape
    assert torch.equal(seen, expected.round().clamp(0, 255).to(torch.uint8))


def test_names_are_checked_and_put_in_order() -> None:
    assert checked_views(None) == ["identity"]
    assert checked_views(["zoom", "identity"]) == ["identity", "zoom"]
    assert checked_views(["hflip"]) == ["hflip"]
    for views, message in ((["sideways", "hflip"], "got sideways"), ([], "at least one"), (["hflip"] * 2, "each once")):
        with pytest.raises(UserError, match=f"tta_views: must be one of identity, hflip, .*{message}"):
            checked_views(views)
