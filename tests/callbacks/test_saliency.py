from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks import PredictionWriter, SaliencyOfMistakes, saliency
from evaluation.saliency.overlays import Explained, explain_task, worst_mistakes
from tests.support.runs import TASKS, MadePhotos, tiny_classifier, tiny_task, tiny_trainer
from vitrail.errors import UserError
from vitrail.predictions import read_predictions


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> list[list[Explained]]:
    """What was explained, by call."""
    calls: list[list[Explained]] = []

    def keep(*arguments: object, **options: object) -> list[Explained]:
        calls.append(explain_task(*arguments, **options))  # type: ignore[arg-type]
        return calls[-1]

    monkeypatch.setattr(saliency, "explain_task", keep)
    return calls


@pytest.mark.parametrize(("task", "count"), [("class", 3), ("colour", 100)])
def test_the_worst_mistakes_of_the_test_are_drawn(
    tmp_path: Path, explained: list[list[Explained]], task: str, count: int
) -> None:
    watching = [SaliencyOfMistakes(count, task=task), PredictionWriter()]
    model, data = tiny_task().train(), MadePhotos()
    modes = [module.training for module in model.modules()]
    tiny_trainer(tmp_path, callbacks=watching).test(model, datamodule=data, verbose=False)
    written = read_predictions(tmp_path / "predictions" / "test.parquet")
    rows = worst_mistakes(written.logits[task], written.targets[task], count)
    assert 0 < len(rows) <= count
    [shown] = explained
    assert [one.name for one in shown] == written.names[rows].tolist()
    assert [one.target for one in shown] == [TASKS[task][index] for index in written.targets[task][rows]]
    for one, row in zip(shown, rows, strict=True):
        pixels = data.read_image(int(written.sample_id[row])).permute(1, 2, 0)
        np.testing.assert_array_equal(one.image, pixels.numpy())
        assert one.predicted == TASKS[task][written.logits[task][row].argmax()]
    with Image.open(tmp_path / "figures" / f"mistakes_test_{task}.png") as figure:
        assert min(figure.size) > 200
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_no_more_images_are_kept_than_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback, kept = SaliencyOfMistakes(2), list[int]()
    end = callback.on_test_batch_end

    def watch(*arguments: object) -> None:
        end(*arguments)  # type: ignore[arg-type]
        assert callback._kept is not None
        kept.append(len(callback._kept.image))

    monkeypatch.setattr(callback, "on_test_batch_end", watch)
    tiny_trainer(tmp_path, callbacks=[callback]).test(tiny_classifier(), datamodule=MadePhotos(3), verbose=False)
    assert len(kept) == 5
    assert max(kept) == 2
    assert callback._kept is None


def test_without_mistakes_there_is_no_figure_and_an_old_one_goes(tmp_path: Path) -> None:
    model, data = tiny_classifier(), MadePhotos()
    path = tmp_path / "figures" / "mistakes_test_class.png"
    callbacks = [SaliencyOfMistakes()]
    tiny_trainer(tmp_path, callbacks=callbacks).test(model, datamodule=data, verbose=False)
    assert path.is_file()
    data.table.targets["class"][:] = 1
    with torch.no_grad():
        head = model.get_submodule("head")
        head.get_parameter("weight").zero_()
        head.get_parameter("bias").copy_(torch.tensor([0.0, 1.0, 0.0]))
    tiny_trainer(tmp_path, callbacks=callbacks).test(model, datamodule=data, verbose=False)
    assert not path.exists()


def test_mistakes_in_the_settings_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="count"):
        SaliencyOfMistakes(0)
    with pytest.raises(UserError, match="choose gradcam or rollout"):
        SaliencyOfMistakes(method="lime")  # type: ignore[arg-type]
    model = tiny_task()
    for callback, says in (
        (SaliencyOfMistakes(task="size"), "class, colour"),
        (SaliencyOfMistakes(method="rollout"), "use gradcam"),
    ):
        with pytest.raises(UserError, match=says):
            callback.setup(tiny_trainer(tmp_path), model, "test")


def test_batches_of_features_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="features instead of images"):
        SaliencyOfMistakes().collect(tiny_trainer(tmp_path), tiny_task(), "test", {}, {"features": {}})
