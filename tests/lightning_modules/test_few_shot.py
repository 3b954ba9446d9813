from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.neighbors import NearestCentroid
from torch import nn

from datamodules import Wares
from datamodules.options import ImageOptions
from lightning_modules.checkpoint import load_task
from lightning_modules.classification import FewShotClassifier
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.few_shot import (
    ABSENT,
    LP_ALPHA,
    MAX_FOLDS,
    PENALTIES,
    TEXT_METHODS,
    ClassTexts,
    ContextTexts,
    Shots,
    TipAdapter,
    build_head,
    fit_task,
    held_out,
    lp_plus_plus,
    solve_head,
)
from lightning_modules.options import FewShotMethod, FewShotOptions, TowerOptions
from tests.support.models import CLASSES, same_weights, tiny_pair, tiny_trainer, write_bert, write_clip, write_siglip
from vitrail.errors import UserError
from vitrail.types import UNKNOWN

METHODS = get_args(FewShotMethod)


def made(classes: int = 4, shots: int = 6, dim: int = 8, *, seed: int = 0, noise: float = 1.0) -> Shots:
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    label = torch.arange(classes).repeat_interleave(shots)
    image = F.normalize(centres[label] + noise * torch.randn(len(label), dim, generator=rng), dim=-1)
    return Shots(image, label, torch.arange(len(label)))


def described(classes: int = 4, dim: int = 8, scale: float = 10.0) -> ClassTexts:
    """Texts that say something, not all, of the classes of ``made``."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    other = torch.randn(classes, dim, generator=torch.Generator().manual_seed(5))
    return ClassTexts(F.normalize(centres + other, dim=-1), scale)


def head_of(method: FewShotMethod, classes: int = 4, dim: int = 8, **options: Any) -> Any:
    return build_head(FewShotOptions(method=method, **options), classes, dim, 32)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_probe_is_scikit_learns_with_the_penalty_of_its_cross_validation(classes: int) -> None:
    shots = made(classes, noise=1.5)
    head = head_of("linear_probe", classes)
    chosen = solve_head(head, shots)
    image, label = shots.image.numpy(), shots.label.numpy()
    folds = np.tile(np.arange(6) % MAX_FOLDS, classes)
    scores = {
        penalty: cross_val_score(LogisticRegression(C=penalty, max_iter=2_000), image, label, cv=PredefinedSplit(folds))
        for penalty in PENALTIES
    }
    assert scores[chosen["C"]].mean() == max(one.mean() for one in scores.values())
    oracle = LogisticRegression(C=chosen["C"], max_iter=2_000).fit(image, label)
    other = made(classes, seed=1)
    with torch.no_grad():
        ours = head(other.image).softmax(dim=1).numpy()
    np.testing.assert_allclose(ours, oracle.predict_proba(other.image.numpy()), atol=1e-4)


def test_prototypes_are_the_nearest_centroids_and_a_class_without_shots_is_not_predicted() -> None:
    shots = made(noise=1.5)
    head = head_of("prototypes", 5)
    assert solve_head(head, shots) == {}
    other = made(seed=1, noise=1.5)
    logits = head(other.image)
    oracle = NearestCentroid().fit(shots.image.numpy(), shots.label.numpy())
    assert logits.argmax(dim=1).tolist() == oracle.predict(other.image.numpy()).tolist()
    assert (logits[:, 4] < ABSENT / 2).all()
    distance = torch.cdist(other.image, torch.from_numpy(oracle.centroids_).float()).square()
    torch.testing.assert_close(logits[:, :4].softmax(dim=1), (-distance).softmax(dim=1), atol=1e-5, rtol=0)


def test_tip_adapter_by_hand() -> None:
    """Two shots, one of each class; what is asked for is at 60 degrees to the first and at 30 to the second."""
    shots = Shots(torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 1]))
    texts = ClassTexts(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), 2.0)
    head = head_of("tip_adapter", 2, 2)
    assert solve_head(head, shots, texts=texts) == {"alpha": 1.0, "beta": 5.5}
    cos = 3**0.5 / 2
    zero_shot = [2.0 * 0.5, 2.0 * (0.6 * 0.5 + 0.8 * cos)]
    cache = [np.exp(-5.5 * (1 - 0.5)), np.exp(-5.5 * (1 - cos))]
    logits = head(torch.tensor([[0.5, cos]]))[0].tolist()
    assert logits == pytest.approx([a + b for a, b in zip(zero_shot, cache, strict=True)], rel=1e-5)


def test_tip_adapter_chooses_weight_and_sharpness_on_what_is_held_out() -> None:
    shots, texts = made(noise=1.2), described()
    # Texts that contradict the images: only a heavy cache is right.
    wrong = ClassTexts(texts.embedding.roll(1, dims=0), texts.scale)
    light, heavy = (solve_head(head_of("tip_adapter"), shots, texts=one)["alpha"] for one in (texts, wrong))
    assert heavy > light
    head = head_of("tip_adapter", select="val")
    assert held_out(shots, made(seed=3))[1] == "the validation split"
    chosen = solve_head(head, shots, made(seed=3), wrong)
    right = (head(made(seed=3).image).argmax(dim=1) == made(seed=3).label).float().mean()
    assert chosen["alpha"] > 1
    assert right > 0.6


def test_lp_plus_plus_begins_with_class_means_and_its_loss_never_rises() -> None:
    shots, texts = made(noise=1.5), described()
    weight, alpha = lp_plus_plus(shots, texts.embedding, steps=0)
    means = torch.stack([shots.image[shots.label == one].mean(dim=0) for one in range(4)])
    torch.testing.assert_close(weight, means)
    expected = LP_ALPHA * sum(float(means[one] @ texts.embedding[one]) for one in range(4)) / 4
    torch.testing.assert_close(alpha, torch.full((4,), expected))

    def loss(steps: int) -> float:
        weight, alpha = lp_plus_plus(shots, texts.embedding, steps)
        logits = shots.image @ weight.T + alpha * (shots.image @ texts.embedding.T)
        return float(F.cross_entropy(logits, shots.label))

    losses = [loss(steps) for steps in (0, 1, 2, 5, 20, 100, 300)]
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0] / 2


def test_lp_plus_plus_leaves_classes_without_shots_to_their_texts() -> None:
    shots, texts = made(), described(5)
    weight, alpha = lp_plus_plus(shots, texts.embedding)
    assert not weight[4].any()
    torch.testing.assert_close(alpha[4], alpha[:4].mean())


def test_clip_adapter_without_a_share_is_zero_shot() -> None:
    texts, shots = described(), made()
    head = head_of("clip_adapter", steps=8)
    chosen = solve_head(head, shots, texts=texts)
    assert chosen["ratio"] in (0.2, 0.4, 0.6, 0.8)
    head.ratio.fill_(0.0)
    torch.testing.assert_close(head(shots.image), texts.scale * shots.image @ texts.embedding.T)


@pytest.mark.parametrize("method", [one for one in METHODS if one not in ("coop", "cocoop")])
def test_every_method_is_better_than_its_texts_alone(method: FewShotMethod) -> None:
    shots, test, texts = made(noise=0.8), made(seed=7, shots=40, noise=0.8), described()
    wrong = ClassTexts(F.normalize(texts.embedding + 2 * texts.embedding.roll(1, dims=0), dim=-1), texts.scale)
    head = head_of(method)
    solve_head(head, shots, texts=wrong if method in TEXT_METHODS else None)
    zero_shot = ((test.image @ wrong.embedding.T).argmax(dim=1) == test.label).float().mean()
    right = (head(test.image).argmax(dim=1) == test.label).float().mean()
    # Of eight dimensions CLIP-Adapter's bottleneck leaves two.
    assert right > max(float(zero_shot) + 0.1, 0.0 if method == "clip_adapter" else 0.7)


def test_groups_are_held_out_whole_and_one_shot_leaves_none() -> None:
    shots = made(shots=6)._replace(group=torch.arange(24) // 2)
    pairs, by = held_out(shots)
    assert by == "3 folds of the shots"
    assert sum(len(test.label) for _, test in pairs) == 24
    for own, test in pairs:
        assert not set(own.group.tolist()) & set(test.group.tolist())
        assert set(own.label.tolist()) == set(test.label.tolist()) == {0, 1, 2, 3}
    single = shots._replace(group=shots.label)  # one object of each class
    assert held_out(single)[0] == held_out(made(shots=1))[0] == []
    assert "one shot of each class" in held_out(made(shots=1))[1]


def towers_of(kind: str, folder: Path) -> DualEncoder:
    if kind == "bert":
        options: Any = {"image": "test_efficientnet", "image_pretrained": False, "text": str(write_bert(folder))}
        return DualEncoder(towers=TowerOptions(**options, pooling="mean", embed_dim=16), image_size=32)
    write = {"clip": write_clip, "siglip": write_siglip}[kind]
    return DualEncoder(towers=TowerOptions(model=str(write(folder))), image_size=32)


@pytest.mark.parametrize("kind", ["clip", "siglip", "bert"])
def test_the_words_of_a_template_as_context_vectors_give_its_texts(kind: str, tmp_path: Path) -> None:
    task = towers_of(kind, tmp_path / "model").eval()
    task.load_pretrained()
    tokenizer = task.towers.tokenizer
    assert tokenizer is not None
    # A word of one token.
    count = {one: int(tokenizer([f"{one} {one} cup."])["attention_mask"].sum()) for one in ("a", "image", "cup")}
    word = min(count, key=lambda one: count[one])
    start = int(tokenizer.starts_specially)
    tokens = tokenizer([f"{word} {word} cup."])["input_ids"][0, start : start + 2]
    assert tokens[0] == tokens[1]
    embedding = max(
        (one for one in task.towers.backbone("text").modules() if isinstance(one, nn.Embedding)),
        key=lambda layer: layer.num_embeddings,
    )
    context = embedding.weight[tokens].detach()
    names = ["cup", "red_cup"]
    texts = ContextTexts(task.towers, tokenizer, names, 2, torch.device("cpu"))
    with torch.no_grad():
        ours = texts(context[None])[0]
        expected = task.encode_text([f"{word} {word} cup.", f"{word} {word} red cup."])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"few_shot.context: 38 vectors .* lower it"):
        ContextTexts(task.towers, tokenizer, names, 38, torch.device("cpu"))


def few_wares(**options: Any) -> Wares:
    data = Wares(n_samples=120, views=1, resolution=32, shots=2, image=ImageOptions(size=32), **options)
    data.prepare_data()
    return data


def wares_pair(folder: Path, data: Wares, **changes: Any) -> DualEncoder:
    write_clip(folder)
    names = data.class_names
    return DualEncoder(
        TowerOptions(model=str(folder)), names, [[f"a photo of a {one}"] for one in names], image_size=32, **changes
    )


# One of each kind of head: a probe without texts, one over texts, and prompts that depend on the image.
@pytest.mark.parametrize("method", ["linear_probe", "clip_adapter", "cocoop"])
def test_a_fit_solves_the_head_in_one_epoch_and_its_checkpoint_predicts_the_same(
    method: FewShotMethod, tmp_path: Path
) -> None:
    data = few_wares()
    task = wares_pair(tmp_path / "clip", data, few_shot=FewShotOptions(method=method, steps=4), lr=0.1)
    task.load_pretrained()
    assert not task.ready_without_training  # the towers are, the classifier is not
    before = {name: value.clone() for name, value in task.towers.state_dict().items()}
    trainer = tiny_trainer(tmp_path, max_epochs=5)
    trainer.fit(task, data)
    assert trainer.current_epoch == 1
    assert all(torch.equal(value, before[name]) for name, value in task.towers.state_dict().items())
    assert {"val/class/accuracy", "val/loss", "train/loss"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("towers.model.") for name in saved)  # named by their origin
    again = load_task(tmp_path / "best.ckpt")
    assert same_weights(task, again)
    batch = next(iter(data.eval_dataloader("test")))
    with torch.no_grad():
        ours, theirs = task.eval().predict_step(batch, 0), again.predict_step(batch, 0)
    torch.testing.assert_close(ours["logits"]["class"], theirs["logits"]["class"])
    torch.testing.assert_close(ours["image_embedding"], task.encode_image(batch["image"]))


@pytest.mark.parametrize("method", ["prototypes"])
def test_an_encoder_without_texts_is_solved_on_its_features(method: FewShotMethod, tmp_path: Path) -> None:
    data = few_wares()
    task = FewShotClassifier(
        "test_resnet", data.class_names, image_size=32, pretrained=False, few_shot=FewShotOptions(method=method)
    )
    trainer = tiny_trainer(tmp_path, max_epochs=5)
    trainer.fit(task, data)
    assert trainer.current_epoch == 1
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    again = load_task(tmp_path / "best.ckpt")
    (batch,) = data.view_dataloader("train", None)
    with torch.no_grad():
        image = F.normalize(task.eval().encoder(batch["image"]), dim=-1)
        head = build_head(FewShotOptions(method=method), len(data.class_names), image.shape[1])
        solve_head(head, Shots(image, batch["label"], batch["group_id"]))
        outputs = again.predict_step(batch, 0)
    torch.testing.assert_close(outputs["logits"]["class"], head(image), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs["image_embedding"], image)
    with pytest.raises(UserError, match=r"few_shot\.method: tip_adapter needs a text tower"):
        FewShotClassifier("test_resnet", ["a", "b"], few_shot=FewShotOptions("tip_adapter"))


def test_the_fitted_head_is_that_of_the_features(tmp_path: Path) -> None:
    data = few_wares()
    task = wares_pair(tmp_path / "clip", data, few_shot={"method": "tip_adapter"})
    tiny_trainer(tmp_path).fit(task, data)
    (batch,) = data.view_dataloader("train", None)
    head = task.few_shot
    assert isinstance(head, TipAdapter)
    with torch.no_grad():
        torch.testing.assert_close(head.keys, task.eval().encode_image(batch["image"]))
    assert head.values.tolist() == batch["label"].tolist()


@pytest.mark.parametrize("unknown", [[], [UNKNOWN, UNKNOWN]])
def test_a_validation_split_without_known_classes_chooses_nothing(unknown: list[int]) -> None:
    shots = made()
    batch = {"image": shots.image, "label": shots.label, "group_id": shots.group}
    number = len(unknown)
    empty = {"image": shots.image[:number], "label": torch.tensor(unknown), "group_id": shots.group[:number]}
    splits = {"train": [batch], "val": [empty] if unknown else []}
    trainer = SimpleNamespace(
        world_size=1,
        datamodule=SimpleNamespace(view_dataloader=lambda split, view: splits[split]),
        strategy=SimpleNamespace(batch_to_device=lambda loaded: loaded),
    )
    task = SimpleNamespace(trainer=trainer, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"few_shot\.select: val, but the validation split has no image with a known"):
        fit_task(task, head_of("linear_probe", select="val"), lambda image: image, None)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"few_shot\.method: coop needs a text tower"):
        solve_head(head_of("coop"), made())
    with pytest.raises(UserError, match="at least two classes"):
        solve_head(head_of("linear_probe"), made(1))
    with pytest.raises(UserError, match="few_shot: freezes both towers"):
        tiny_pair(tmp_path / "clip", few_shot={"method": "coop"}, freeze="towers")
    with pytest.raises(UserError, match="few_shot: is for data with classes"):
        tiny_pair(tmp_path / "clip", few_shot={"method": "coop"}, class_names=None)
    with pytest.raises(UserError, match=r"few_shot\.method: must be one of"):
        tiny_pair(tmp_path / "clip", few_shot={"method": "maple"})
    assert len(CLASSES) == 4
