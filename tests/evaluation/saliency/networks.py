"""Images with objects in known places, and tiny networks that learned to name them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_modules.classification import MultiTaskClassifier

SIZE, CELL = 128, 32
TASKS = {"square": ["red", "blue"], "disc": ["green", "yellow"]}
_COLOURS = {"square": [(255, 0, 0), (0, 0, 255)], "disc": [(0, 200, 0), (255, 230, 0)]}


@dataclass(frozen=True)
class Scenes:
    """N images, each of a square and a disc in different cells of a 4 × 4 grid on grey noise.

    Attributes:
        images: uint8 ``(N, 3, 128, 128)``.
        targets: for each task int64 ``(N,)``, the colour.
        inside: for each task bool ``(N, 128, 128)``, the object's cell.
    """

    images: torch.Tensor
    targets: dict[str, torch.Tensor]
    inside: dict[str, torch.Tensor]


def draw_scenes(count: int, seed: int) -> Scenes:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(90, 160, (count, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8)
    targets = {task: torch.randint(0, 2, (count,), generator=draw) for task in TASKS}
    inside = {task: torch.zeros(count, SIZE, SIZE, dtype=torch.bool) for task in TASKS}
    axis = torch.arange(CELL) - (CELL - 1) / 2
    shapes = {
        "square": torch.ones(CELL, CELL, dtype=torch.bool),
        "disc": axis[:, None] ** 2 + axis[None] ** 2 <= (CELL / 2) ** 2,
    }
    for row in range(count):
        cells = torch.randperm(16, generator=draw)[:2].tolist()
        for task, cell in zip(TASKS, cells, strict=True):
            top, left = cell // 4 * CELL, cell % 4 * CELL
            inside[task][row, top : top + CELL, left : left + CELL] = True
            colour = torch.tensor(_COLOURS[task][int(targets[task][row])], dtype=torch.uint8)
            images[row, :, top : top + CELL, left : left + CELL][:, shapes[task]] = colour[:, None]
    return Scenes(images, targets, inside)


def fresh(backbone: str, seed: int = 0) -> MultiTaskClassifier:
    """With random weights, in evaluation mode."""
    torch.manual_seed(seed)
    task = MultiTaskClassifier(backbone, TASKS, pretrained=False, image_size=SIZE)
    return task.eval()


def trained(backbone: str, steps: int, lr: float) -> MultiTaskClassifier:
    """After a few steps on images of its own."""
    task = fresh(backbone).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr)
    for step in range(steps):
        scenes = draw_scenes(8, 1000 + step)
        logits = task(scenes.images)
        loss = sum(torch.nn.functional.cross_entropy(logits[name], scenes.targets[name]) for name in TASKS)
        optimizer.zero_grad()
        assert isinstance(loss, torch.Tensor)
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        optimizer.step()
    optimizer.zero_grad()
    return task.eval()
