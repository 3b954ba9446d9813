"""Tests of zero-shot questions: how labels are read, and the probabilities compared with the model's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax

from app.logic.zero_shot import PROMPTS, Verdict, ZeroShot, ask, parse_labels, parse_templates, reading_notes
from app.state.context import AppContext, Limits
from lightning_modules.checkpoint import load_task
from lightning_modules.dual_encoder import DualEncoder
from vitrail.errors import UserError

LIMITS = Limits()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 255, (2, 50, 60, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("mug, cap,lamp", ["mug", "cap", "lamp"]),
        ("mug\ncap\r\n  red   lamp \n\n,,", ["mug", "cap", "red lamp"]),
        ("Mug, mug ,MUG, cap", ["Mug", "cap"]),
        ("Straße, STRASSE, 杯子", ["Straße", "杯子"]),
    ],
)
def test_labels_are_stripped_and_stand_once(text: str, names: list[str]) -> None:
    assert parse_labels(text, LIMITS).names == names


def test_repeated_labels_are_noted() -> None:
    notes = parse_labels("Mug, mug, cap, lamp, MUG, lamp", LIMITS).notes
    assert notes == ["“Mug” was given 3 times and counts once.", "“lamp” was given 2 times and counts once."]
    assert parse_labels("mug, cap", LIMITS).notes == []


def test_a_single_label_is_noted_as_uninformative() -> None:
    [note] = parse_labels("mug", LIMITS).notes
    assert "always has the probability 1" in note


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (" ,\n, ", "there are none"),
        ("", "there are none"),
        (",".join(f"l{number}" for number in range(201)), "201 are too many; leave 200"),
        ("x" * 301, "301 characters are too many"),
        ("x, " * 1000, "3000 characters are too many; leave 2000"),
    ],
)
def test_unusable_labels_are_refused(text: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        parse_labels(text, LIMITS)


def test_templates_are_lines() -> None:
    assert parse_templates(" a {}.\n\nthe {}\na {}.", LIMITS) == ["a {}.", "the {}"]
    for templates in PROMPTS.values():
        assert parse_templates("\n".join(templates), LIMITS) == list(templates)


@pytest.mark.parametrize("text", ["", "a photo", "a {} and a {}", "a {0}", "{}" + "x" * 300, "{__class__}"])
def test_unusable_templates_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="template"):
        parse_templates(text, LIMITS)


def test_probabilities_are_those_of_the_model(context: AppContext, pairs_run: Path, images: list[Image.Image]) -> None:
    run = context.run("pairs")
    labels, templates = ["mug", "red_cap", "lamp"], ["a photo of a {}.", "one {}"]
    answers = ask(run, images, labels, templates)
    task = load_task(pairs_run / "checkpoints" / "best.ckpt")
    assert isinstance(task, DualEncoder)
    task.class_prompts = [["a photo of a mug.", "one mug"], ["a photo of a red cap.", "one red cap"]]
    task.class_prompts.append(["a photo of a lamp.", "one lamp"])
    with torch.inference_mode():
        image = torch.from_numpy(run.encode_images(images))
        logits = (task.objective.logit_scale()[0] * image @ task.class_embeddings().T).double().numpy()
    said = np.stack([answer.probabilities for answer in answers])
    np.testing.assert_allclose(said, softmax(logits, axis=1), atol=1e-4)
    assert answers[0].prompts == task.class_prompts
    # Without others there is nothing that could fit better.
    assert answers[0].verdict == Verdict()


def test_a_temperature_divides_the_logits(context: AppContext, images: list[Image.Image]) -> None:
    run = context.run("pairs")
    [plain] = ask(run, images[:1], ["mug", "cap"], ["{}"])
    [hot] = ask(run, images[:1], ["mug", "cap"], ["{}"], temperature=4.0)
    np.testing.assert_allclose(hot.probabilities, softmax(np.log(plain.probabilities) / 4), atol=1e-6)
    np.testing.assert_array_equal(hot.similarities, plain.similarities)


def test_a_fitted_temperature_counts(
    context: AppContext, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = context.run("pairs")
    [plain] = ask(run, images[:1], ["mug", "cap"], ["{}"])
    monkeypatch.setattr(run, "temperatures", {"class": 2.0})
    [scaled] = ask(run, images[:1], ["mug", "cap"], ["{}"])
    np.testing.assert_allclose(scaled.probabilities, softmax(np.log(plain.probabilities) / 2), atol=1e-6)


def test_labels_are_ranked_by_similarity(images: list[Image.Image]) -> None:
    answer = ZeroShot(["a", "b", "c"], [["a"]] * 3, np.array([0.1, 0.3, 0.2]), np.array([0.2, 0.5, 0.3]), Verdict())
    assert answer.ranked() == [("b", 0.5, 0.3), ("c", 0.3, 0.2), ("a", 0.2, 0.1)]


@pytest.mark.parametrize("temperature", [0.0, -1.0, 11.0, float("nan"), float("inf")])
def test_other_temperatures_are_refused(
    context: AppContext, images: list[Image.Image], temperature: float
) -> None:  # fmt: skip
    with pytest.raises(UserError, match=r"must be between 0\.1 and 10"):
        ask(context.run("pairs"), images, ["mug"], ["{}"], temperature=temperature)


def test_too_many_texts_are_refused(context: AppContext, images: list[Image.Image]) -> None:
    labels, templates = [f"l{number}" for number in range(200)], [f"{number} {{}}" for number in range(11)]
    with pytest.raises(UserError, match="more than 2000 texts"):
        ask(context.run("pairs"), images, labels, templates)


def test_a_classifier_is_refused(context: AppContext, images: list[Image.Image]) -> None:
    with pytest.raises(UserError, match="choose a dual encoder"):
        ask(context.run("quickstart"), images, ["mug"], ["{}"])


def test_what_is_not_read_of_a_label_is_noted(context: AppContext) -> None:
    [note] = reading_notes(context.run("pairs"), ["mug", "mug " * 60])
    assert "only the beginning" in note
