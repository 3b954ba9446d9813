"""Tiny models that are asked about tiny images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

from lightning_modules.generative import GenerativeClassifier
from lightning_modules.generative.model import VisionLanguageModel
from tests.support.models import write_qwen2_vl

LABELS = {"class": ["rose", "tulip", "daisy", "yellow_iris", "iris", "yellow rose"], "colour": ["red", "dark red"]}
QUESTIONS = {"class": "What kind of flower is it?", "colour": "What colour is it?"}
SIZE = 32
TEXTS = [*QUESTIONS.values(), *LABELS["colour"], "rose", "tulip", "daisy", "yellow iris"]


def tiny_model(folder: Path, kind: str = "qwen2_vl") -> VisionLanguageModel:
    """A tiny model with "pretrained" weights; weights large enough that its answers differ from image to image."""
    if not (folder / "config.json").exists():
        write_qwen2_vl(folder, texts=TEXTS, kind=kind, scale=8.0)
    model = VisionLanguageModel(str(folder), image_size=SIZE, texts=TEXTS)
    model.load()
    return model.eval()


def tiny_answerer(folder: Path, **changes: Any) -> GenerativeClassifier:
    """A task with random weights; the same every time."""
    if not (folder / "config.json").exists():
        write_qwen2_vl(folder, texts=TEXTS, scale=8.0)
    pl.seed_everything(3)
    answers = {"questions": QUESTIONS, **changes.pop("answers", {})}
    arguments: dict[str, Any] = {"model": str(folder), "tasks": LABELS, "image_size": SIZE, "answers": answers}
    return GenerativeClassifier(**{**arguments, **changes})


def images(count: int, size: int = SIZE) -> torch.Tensor:
    """uint8 ``(count, 3, size, size)``, each different."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def plain_likelihoods(
    model: VisionLanguageModel, image: torch.Tensor, ids: list[int], answer: list[int]
) -> torch.Tensor:
    """Log-likelihoods of an answer's tokens by the library's own forward pass over the whole text, ``(B, tokens)``."""
    tokens = torch.tensor([[*ids, *answer]]).expand(len(image), -1)
    rows = model.side // model.patch
    logits = model.model(
        input_ids=tokens,
        pixel_values=model.patches(image),
        image_grid_thw=torch.tensor([[1, rows, rows]]).expand(len(image), -1),
        mm_token_type_ids=(tokens == model.configuration.image_token_id).int(),
        use_cache=False,
    ).logits
    behind = logits[:, len(ids) - 1 : -1].transpose(1, 2)
    return -F.cross_entropy(behind, tokens[:, len(ids) :], reduction="none")
