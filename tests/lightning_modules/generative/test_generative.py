from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from evaluation.efficiency import count
from lightning_modules.checkpoint import load_task
from lightning_modules.generative import GenerativeClassifier
from lightning_modules.metrics import predicted_classes
from tests.lightning_modules.generative.tiny_answers import LABELS, QUESTIONS, SIZE, TEXTS, images, tiny_answerer
from tests.support.models import tiny_trainer, write_qwen2_vl
from vitrail.errors import UserError
from vitrail.types import UNKNOWN, Batch

IMAGE = images(5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2_vl(tmp_path_factory.mktemp("model"), texts=TEXTS, scale=8.0)


@pytest.fixture(scope="module")
def task(folder: Path) -> GenerativeClassifier:
    task = tiny_answerer(folder)
    task.load_pretrained()
    return task.eval()


def answer_batch(rows: int = 5, padding: int = 0) -> Batch:
    label = torch.arange(rows) % 6
    return {
        "image": IMAGE[:rows],
        "label": label,
        "attributes": {"colour": torch.where(label == 2, UNKNOWN, label % 2), "other": label},
        "sample_id": torch.arange(rows),
        "is_padding": torch.arange(rows) >= rows - padding,
    }


@contextmanager
def encoded_images(task: GenerativeClassifier) -> Iterator[list[int]]:
    """Numbers of images that the vision tower encodes at a time."""
    counts: list[int] = []

    def hook(module: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        counts.append(len(named["grid_thw"]))

    handle = task.vlm.model.model.visual.register_forward_hook(hook, with_kwargs=True)
    yield counts
    handle.remove()


@pytest.mark.parametrize("answers", [{}, {"how": "constrained"}, {"how": "free"}], ids=str)
@torch.no_grad()
def test_each_image_is_encoded_once_for_all_tasks_and_labels(folder: Path, answers: Any) -> None:
    task = tiny_answerer(folder, answers=answers).eval()
    task.load_pretrained()
    with encoded_images(task) as encoded:
        logits = task(IMAGE)
        assert sum(encoded) == len(IMAGE)
        task(IMAGE[:2])
        assert sum(encoded) == len(IMAGE) + 2
    assert {name: one.shape for name, one in logits.items()} == {"class": (5, 6), "colour": (5, 2)}


@torch.no_grad()
def test_answers_depend_neither_on_the_batch_nor_on_other_tasks(folder: Path, task: GenerativeClassifier) -> None:
    logits = task(IMAGE)
    alone = torch.cat([task(one[None])["class"] for one in IMAGE])
    torch.testing.assert_close(alone, logits["class"], atol=1e-5, rtol=1e-5)
    only = tiny_answerer(folder, answers={"questions": {"colour": QUESTIONS["colour"]}}).eval()
    only.load_pretrained()
    torch.testing.assert_close(only(IMAGE)["colour"], logits["colour"], atol=1e-5, rtol=1e-5)
    assert only.tasks == {"colour": LABELS["colour"]}


@torch.no_grad()
def test_the_scores_of_a_gray_image_are_subtracted(folder: Path, task: GenerativeClassifier) -> None:
    calibrated = tiny_answerer(folder, answers={"content_free": "grey"}).eval()
    calibrated.load_pretrained()
    # The folder's mean, to whole steps of a pixel.
    grey = torch.tensor([102, 128, 153], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE)
    with encoded_images(calibrated) as encoded:
        logits = calibrated(IMAGE)
        calibrated(IMAGE)
        assert sum(encoded) == 2 * len(IMAGE) + 1
    for name, plain in task(IMAGE).items():
        torch.testing.assert_close(logits[name], plain - task(grey)[name], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(calibrated(grey)["class"], torch.zeros(1, 6), atol=1e-4, rtol=0)
    # Nothing is kept that training may change.
    calibrated.train().eval()
    with encoded_images(calibrated) as encoded:
        calibrated(IMAGE)
        assert sum(encoded) == len(IMAGE) + 1


def test_the_training_loss_is_the_score_of_the_right_label(task: GenerativeClassifier) -> None:
    batch = answer_batch(padding=1)
    loss, _ = task._shared_step(batch, "train")
    scores = task(batch["image"])
    known = {"class": [0, 1, 2, 3], "colour": [0, 1, 3]}
    targets = {"class": batch["label"], "colour": batch["attributes"]["colour"]}
    expected = sum(-scores[name][rows, targets[name][rows]].mean() for name, rows in known.items())
    torch.testing.assert_close(loss, expected)
    with pytest.raises(UserError, match="an answer is one label"):
        task._shared_step({**batch, "mix": {"partner": batch["label"], "lam": torch.ones(5)}}, "train")


def test_outputs_are_those_of_every_classifier(task: GenerativeClassifier) -> None:
    with torch.no_grad():
        outputs = task.predict_step(answer_batch(padding=2), 0)
    assert outputs["sample_id"].tolist() == [0, 1, 2]
    assert outputs["logits"]["class"].shape == (3, 6)
    assert outputs["targets"]["colour"].tolist() == [0, 1, UNKNOWN]
    assert outputs["image_embedding"].shape == (3, task.embedding_dim)
    torch.testing.assert_close(outputs["image_embedding"].norm(dim=1), torch.ones(3))


@torch.no_grad()
def test_free_answers_that_name_no_label_are_wrong_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"how": "free", "synonyms": {"daisy": ["bellis"]}}
    task = tiny_answerer(folder, answers={**answers, "questions": {"class": "What?"}}).eval()
    task.load_pretrained()
    generated = iter(["A yellow iris.", "Bellis", "some flower", "primrose", "iris"])
    monkeypatch.setattr(task.vlm.prompts, "text", lambda ids: next(generated))
    # Whatever the image and the target: an answer that names nothing is never right.
    batch = answer_batch()
    batch["label"] = torch.tensor([3, 2, 0, 5, 4])
    _, outputs = task._shared_step(batch, "test")
    assert predicted_classes(outputs["logits"]["class"]).tolist() == [3, 2, UNKNOWN, UNKNOWN, 4]
    torch.testing.assert_close(outputs["logits"]["class"][2:4].softmax(dim=1), torch.full((2, 6), 1 / 6))
    monkeypatch.setattr(task, "log_dict", lambda values, sync_dist: seen.update(values))
    seen: dict[str, torch.Tensor] = {}
    task.log_epoch("test")
    assert float(seen["test/class/named"]) == pytest.approx(3 / 5)
    assert float(seen["test/class/accuracy"]) == pytest.approx(3 / 5)
    assert float(seen["test/class/mean_per_class"]) == pytest.approx(3 / 5)


@pytest.fixture(scope="module")
def adapted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[GenerativeClassifier, Path]:
    """A task with adapters that are not zero, and its checkpoint."""
    task = tiny_answerer(folder, lora={"rank": 2, "parts": "both"})
    root = tmp_path_factory.mktemp("adapted")
    trainer = tiny_trainer(root, max_epochs=1)
    loader: Any = torch.utils.data.DataLoader([answer_batch()], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(task, loader)
    for name, parameter in task.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    trainer.save_checkpoint(root / "adapters.ckpt", weights_only=True)
    return task.eval(), root / "adapters.ckpt"


@torch.no_grad()
def test_a_checkpoint_holds_the_adapters_alone(adapted: tuple[GenerativeClassifier, Path]) -> None:
    task, path = adapted
    state = torch.load(path, weights_only=True)["state_dict"]
    assert {name for name in state if name.startswith("vlm.model.")} == {
        n for n, _ in task.named_parameters() if "lora_" in n
    }
    trainable = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert {("visual" if "visual" in name else "language") for name in trainable} == {"visual", "language"}
    again = load_task(path)
    torch.testing.assert_close(again(IMAGE), task(IMAGE))
    plain = tiny_answerer(Path(task.vlm.name)).eval()
    plain.load_pretrained()
    assert (plain(IMAGE)["class"] - task(IMAGE)["class"]).abs().max() > 1e-3


def test_adapters_of_other_weights_are_refused(
    adapted: tuple[GenerativeClassifier, Path], folder: Path, tmp_path: Path
) -> None:
    other = write_qwen2_vl(tmp_path / "other", texts=TEXTS, seed=1)
    saved = torch.load(adapted[1], weights_only=True)
    saved["hyper_parameters"]["model"] = str(other)
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="has other weights than those that the checkpoint's adapters were trained on"):
        load_task(tmp_path / "other.ckpt")
    # The same weights at another place are the same weights.
    shutil.copytree(folder, tmp_path / "same")
    saved["hyper_parameters"]["model"] = str(tmp_path / "same")
    torch.save(saved, tmp_path / "same.ckpt")
    load_task(tmp_path / "same.ckpt")


@torch.no_grad()
def test_costs_are_counted_where_only_shapes_are_known(folder: Path) -> None:
    task = tiny_answerer(folder, pretrained=False).eval()
    with FlopCounterMode(display=False) as counter:
        task(IMAGE[:1])
    counts = count(task.to("meta"), SIZE)
    assert counts.parameters == sum(parameter.numel() for parameter in task.parameters())
    assert counts.image_flops == counter.get_total_flops() > 0


def test_four_bit_weights_cannot_be_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_modules.generative.weights.find_spec", lambda name: object())
    task = tiny_answerer(folder, memory={"four_bit": True})
    with pytest.raises(UserError, match="such weights cannot be trained; add lora"):
        task.on_fit_start()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": {"questions": {"size": "How large?"}}}, "the data have no size; they have class, colour"),
        ({"answers": {"questions": {}}}, "no task"),
        ({"tasks": {"class": ["one"]}, "answers": {"questions": None}}, "fewer than two classes"),
        ({"lora": {"rank": 0}}, "lora.rank: must be greater than or equal to 1"),
        ({"lora": {"towers": "both"}}, "unknown key 'towers'"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_answerer(folder, **changes)
