from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import RetrievalMetrics
from retrieval.metrics import rank_queries
from tests.support.forks import run_program
from tests.support.runs import (
    IMAGES,
    MadePhotos,
    TinyDualEncoder,
    TinyPairs,
    embeddings,
    evaluate,
    tiny_classifier,
    tiny_trainer,
)
from vitrail.errors import UserError

DIRECTIONS = ("image_to_text", "text_to_image")
METRICS = ("R@1", "R@5", "R@10", "median_rank", "mAP")


def expected() -> dict[str, float]:
    """Of all images and texts at once."""
    images, texts, owner = embeddings()
    ids = torch.arange(IMAGES)
    ranked = (rank_queries(images, texts, ids, owner), rank_queries(texts, images, owner, ids))
    values = {
        f"{name}/{metric}": float(value)
        for name, found in zip(DIRECTIONS, ranked, strict=True)
        for metric, value in found.metrics().items()
    }
    recalls = [values[f"{name}/R@{k}"] for name in DIRECTIONS for k in (1, 5, 10)]
    return {**values, "retrieval/mean_recall": sum(recalls) / 6}


def test_both_directions_are_logged_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(tmp_path)
    values = expected()
    for split in ("val", "test"):
        logged = json.loads((tmp_path / f"{split}_0.json").read_text(encoding="utf-8"))
        assert logged == pytest.approx({f"{split}/{name}": value for name, value in values.items()})
    assert 0.1 < values["retrieval/mean_recall"] < 0.9
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == ["test_retrieval.csv", "val_retrieval.csv"]
    report = pd.read_csv(tmp_path / "reports" / "test_retrieval.csv")
    assert list(report.columns) == ["direction", "metric", "value", "low", "high", "n"]
    rows = {(row[0], row[1]): row[2:] for row in report.to_numpy().tolist()}
    for direction, n in zip(DIRECTIONS, (IMAGES, len(embeddings()[1])), strict=True):
        assert [metric for name, metric in rows if name == direction] == list(METRICS)
        for metric in METRICS:
            value, low, high, count = rows[direction, metric]
            assert value == pytest.approx(values[f"{direction}/{metric}"])
            assert low <= value <= high
            assert low < high
            assert count == n
    assert rows["both", "mean_recall"][0] == pytest.approx(values["retrieval/mean_recall"])
    assert rows["both", "mean_recall"][3] == IMAGES
    printed = capsys.readouterr().out
    assert "test: retrieval" in printed
    assert all(name in printed for name in (*METRICS, *DIRECTIONS))


def test_recalls_of_shorter_embeddings_are_logged_by_their_length(tmp_path: Path) -> None:
    task: Any = TinyDualEncoder()
    trainer = tiny_trainer(tmp_path, callbacks=[RetrievalMetrics()])
    task.shorter_lengths = [3]
    trainer.test(task, datamodule=TinyPairs(), verbose=False)
    images, texts, owner = embeddings()
    short = [F.normalize(rows[:, :3], dim=1) for rows in (images, texts)]
    ids = torch.arange(len(images))
    ranked = {
        "image_to_text": rank_queries(short[0], short[1], ids, owner),
        "text_to_image": rank_queries(short[1], short[0], owner, ids),
    }
    for direction, expected_ranks in ranked.items():
        for k in (1, 5, 10):
            logged = float(trainer.callback_metrics[f"test/{direction}/R@{k}/3d"])
            assert logged == pytest.approx(float(expected_ranks.recall_at(k)))


def test_checkpoint_is_chosen_by_mean_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second of three epochs is the best one; fitting reports nothing."""
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val/retrieval/mean_recall", mode="max")
    # The callback that is asked first must not be the one that saves.
    trainer = tiny_trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[saver, RetrievalMetrics()])
    trainer.fit(TinyDualEncoder(noise=(3.0, 0.0, 5.0)), datamodule=TinyPairs())
    assert Path(saver.best_model_path).name == "epoch=1.ckpt"
    assert float(saver.best_model_score or 0) == pytest.approx(expected()["retrieval/mean_recall"])
    assert not (tmp_path / "reports").exists()
    assert "retrieval" not in capsys.readouterr().out


def test_sanity_checking_does_not_count(tmp_path: Path) -> None:
    class Watched(RetrievalMetrics):
        seen: tuple[str, ...] = ()

        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            self.seen = tuple(name for name in trainer.callback_metrics if "retrieval" in name)
            assert not self._batches

    watched = Watched()
    trainer = tiny_trainer(tmp_path, num_sanity_val_steps=2, callbacks=[watched])
    trainer.fit(TinyDualEncoder(), datamodule=TinyPairs())
    assert watched.seen == ()
    mean_recall = float(trainer.callback_metrics["val/retrieval/mean_recall"])
    assert mean_recall == pytest.approx(expected()["retrieval/mean_recall"])


@pytest.mark.parametrize(
    ("task", "data"),
    [
        (tiny_classifier, MadePhotos),
        # A dual encoder on class prompts has embeddings of images only.
        (lambda: TinyDualEncoder(keys=("sample_id", "logits", "targets", "image_embedding")), TinyPairs),
    ],
)
def test_tasks_without_texts_are_left_alone(tmp_path: Path, task: Any, data: Any) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[RetrievalMetrics()])
    trainer.test(task(), datamodule=data(), verbose=False)
    assert not [name for name in trainer.callback_metrics if "image_to_text" in name or "retrieval" in name]
    assert not (tmp_path / "reports").exists()


def test_image_without_a_text_is_found_but_does_not_ask(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[RetrievalMetrics()])
    trainer.test(TinyDualEncoder(images_alone=5), datamodule=TinyPairs(), verbose=False)
    images, texts, owner = embeddings()
    texts, owner, ids = texts[owner >= 5], owner[owner >= 5], torch.arange(IMAGES)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name, value in rank_queries(images[5:], texts, ids[5:], owner).metrics().items():
        assert logged[f"test/image_to_text/{name}"] == pytest.approx(float(value))
    for name, value in rank_queries(texts, images, owner, ids).metrics().items():
        assert logged[f"test/text_to_image/{name}"] == pytest.approx(float(value))
    report = pd.read_csv(tmp_path / "reports" / "test_retrieval.csv")
    assert report.loc[report["direction"] == "image_to_text", "n"].tolist() == [IMAGES - 5] * 5


def test_same_caption_of_another_image_stands_before_its_own(tmp_path: Path) -> None:
    """All texts are one: each image's own is last of all."""

    class SameTexts(TinyDualEncoder):
        def test_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            outputs = super().test_step(batch, batch_idx)
            text = embeddings()[1][:1]
            return {**outputs, "text_embedding": text.repeat(len(batch), 1), "text_image": batch}

    trainer = tiny_trainer(tmp_path, callbacks=[RetrievalMetrics()])
    trainer.test(SameTexts(), datamodule=TinyPairs(), verbose=False)
    assert float(trainer.callback_metrics["test/image_to_text/median_rank"]) == IMAGES
    assert float(trainer.callback_metrics["test/image_to_text/R@10"]) == 0


def test_image_that_comes_twice_is_counted_once(tmp_path: Path) -> None:
    """In another batch and in the same one."""

    class Again(TinyPairs):
        def test_dataloader(self) -> Any:
            order = [0, 1, 1, 2, 0, *range(3, IMAGES), 4, 4, 22]
            return torch.utils.data.DataLoader(order, batch_size=3)  # type: ignore[arg-type]  # a list will do

    trainer = tiny_trainer(tmp_path, callbacks=[RetrievalMetrics()])
    trainer.test(TinyDualEncoder(), datamodule=Again(), verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged == pytest.approx({f"test/{name}": value for name, value in expected().items()})


class Strayed(TinyDualEncoder):
    def test_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        outputs = super().test_step(batch, batch_idx)
        return {**outputs, "text_image": outputs["text_image"] + 1}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            TinyDualEncoder(keys=("sample_id", "text_embedding")),
            "TinyDualEncoder return text_embedding without image_embedding, text_image",
        ),
        (Strayed(), "text_image names samples that are not in sample_id"),
    ],
)
def test_wrong_outputs_are_refused(tmp_path: Path, task: TinyDualEncoder, message: str) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[RetrievalMetrics()])
    with pytest.raises(UserError, match=message):
        trainer.test(task, datamodule=TinyPairs(), verbose=False)


def test_fast_dev_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = tiny_trainer(tmp_path, fast_dev_run=True, callbacks=[RetrievalMetrics()])
    trainer.test(TinyDualEncoder(), datamodule=TinyPairs(), verbose=False)
    assert not (tmp_path / "reports").exists()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    run_program("tests.support.runs", str(folder))
    return folder


@pytest.mark.parametrize("dealing", ["dealt", "padded"])
def test_two_processes_count_like_one(both: Path, tmp_path: Path, dealing: str) -> None:
    """Unequal shares, and shares that are filled up with images dealt before."""
    evaluate(tmp_path)
    for split in ("val", "test"):
        alone = json.loads((tmp_path / f"{split}_0.json").read_text(encoding="utf-8"))
        assert alone
        for rank in (0, 1):
            together = json.loads((both / dealing / f"{split}_{rank}.json").read_text(encoding="utf-8"))
            assert together == pytest.approx(alone)
        reports = [pd.read_csv(folder / "reports" / f"{split}_retrieval.csv") for folder in (tmp_path, both / dealing)]
        pd.testing.assert_frame_equal(reports[0], reports[1])
