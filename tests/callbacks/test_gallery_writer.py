from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from numpy.typing import NDArray

from callbacks import EmbeddingExport
from experiments.train.loggers import build_loggers, finish_wandb
from lightning_modules import load_task
from retrieval.gallery import Gallery
from tests.callbacks.gallery_processes import SIZE, WORLDS
from tests.support.forks import run_program
from tests.support.galleries import rows_of
from tests.support.runs import MadePhotos, TinyDualEncoder, TinyPairs, tiny_task, tiny_trainer
from vitrail.errors import UserError

TRAIN_AND_VAL = 58


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    run_program("tests.callbacks.gallery_processes", str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_one_process_stores_each_sample_once(folder: Path, name: str) -> None:
    rows = rows_of(folder / "1" / name / "gallery")
    # What was tested first, then what only predict has seen; each in the order of sample_id.
    test = [f"photo {number}" for number in range(TRAIN_AND_VAL, TRAIN_AND_VAL + SIZE)]
    assert rows.column("id").to_pylist() == test + [f"photo {number}" for number in range(TRAIN_AND_VAL)]
    assert set(rows.column("split").to_pylist()) == {"train", "val", "test"}
    assert all(rows.column("thumbnail").to_pylist())
    assert ("predicted_class" in rows.column_names) == (name != "captioned")
    assert ("predicted_colour" in rows.column_names) == (name == "multitask")


@pytest.mark.parametrize(("name", "world"), WORLDS.items())
@pytest.mark.parametrize("table", ["images", "captions"])
def test_several_processes_store_the_same(folder: Path, name: str, world: int, table: str) -> None:
    if (name, table) == ("multitask", "captions"):
        assert not (folder / "1" / name / "gallery" / "captions.lance").exists()
        return
    alone = rows_of(folder / "1" / name / "gallery", table).to_pandas().drop(columns=["run"], errors="ignore")
    together = rows_of(folder / str(world) / name / "gallery", table).to_pandas().drop(columns=["run"], errors="ignore")
    assert len(alone) == {"captions": len(alone), "images": SIZE + TRAIN_AND_VAL}[table] > 0
    for column in alone.columns:
        mine, other = alone[column], together[column]
        if column == "vector":
            np.testing.assert_allclose(np.stack(mine), np.stack(other), atol=1e-5)
        elif column.startswith("confidence_"):
            np.testing.assert_allclose(mine, other, atol=1e-5)
        else:
            assert mine.to_list() == other.to_list(), column


def test_no_shard_is_left(folder: Path) -> None:
    for name, world in WORLDS.items():
        for count in (1, world):
            assert not list((folder / str(count) / name / "embeddings").iterdir())


def test_captions_are_of_their_images(folder: Path) -> None:
    captions = rows_of(folder / "1" / "captioned" / "gallery", "captions").to_pylist()
    # photo n has n % 3 + 1 captions, which name it.
    assert len(captions) == sum(number % 3 + 1 for number in range(SIZE + TRAIN_AND_VAL))
    assert all(entry["caption"].split()[1] == entry["image"].split()[1] for entry in captions)
    assert len({entry["id"] for entry in captions}) == len(captions)


def test_a_killed_test_leaves_whole_shards_that_the_next_one_removes(folder: Path) -> None:
    assert (folder / "was_killed").exists()
    assert (folder / "shards_of_the_killed").read_text() == "rank0-0.parquet"
    finished = rows_of(folder / "killed" / "gallery").drop_columns(["run"])
    assert finished.equals(rows_of(folder / "1" / "multitask" / "gallery").drop_columns(["run"]))
    assert not list((folder / "killed" / "embeddings").iterdir())


def test_gallery_holds_what_the_model_outputs_and_its_weights_are_kept_for_searches(tmp_path: Path) -> None:
    task, data = tiny_task(), MadePhotos()
    tiny_trainer(tmp_path, callbacks=[EmbeddingExport(chunk=5)]).test(task, datamodule=data, verbose=False)
    rows = rows_of(tmp_path / "gallery")
    assert rows.column("id").to_pylist() == [f"photo {number}" for number in range(34, 47)]
    task.eval()
    with torch.no_grad():
        features = torch.cat([task.encoder(batch["image"]) for batch in data.eval_dataloader("test")])
    np.testing.assert_allclose(rows.column("vector").to_pylist(), F.normalize(features, dim=1).numpy(), atol=1e-5)
    gallery = Gallery.open(str(tmp_path / "gallery"))
    assert gallery.identity.run == str(tmp_path.resolve())
    assert load_task(tmp_path / "checkpoints" / "best.ckpt").weights_digest() == gallery.identity.weights


def test_run_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    first = tiny_trainer(tmp_path / "first", limit_train_batches=1)
    first.fit(tiny_task(), datamodule=MadePhotos())
    checkpoint = tmp_path / "first" / "checkpoints" / "best.ckpt"
    first.save_checkpoint(checkpoint)
    second = tiny_trainer(tmp_path / "second", callbacks=[EmbeddingExport(str(tmp_path / "gallery"))])
    second.test(tiny_task(), datamodule=MadePhotos(), ckpt_path=checkpoint, weights_only=True, verbose=False)
    assert Gallery.open(str(tmp_path / "gallery")).identity.run == str((tmp_path / "first").resolve())
    assert not (tmp_path / "second" / "checkpoints").exists()


def test_another_model_is_refused_before_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export, data = EmbeddingExport(str(tmp_path / "gallery")), MadePhotos()
    tiny_trainer(tmp_path, callbacks=[export]).test(tiny_task(), datamodule=data, verbose=False)
    other = tiny_task()
    with torch.no_grad():
        next(other.heads.parameters()).add_(0.1)
    monkeypatch.setattr(other, "test_step", lambda *arguments: pytest.fail("it computes"))
    with pytest.raises(UserError, match="name a new gallery"):
        tiny_trainer(tmp_path / "other", callbacks=[export]).test(other, datamodule=data, verbose=False)


def test_stages_are_chosen(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[EmbeddingExport(splits=["predict"])])
    trainer.test(tiny_task(), datamodule=MadePhotos(), verbose=False)
    assert not (tmp_path / "gallery").exists()
    trainer.predict(tiny_task(), datamodule=MadePhotos(), return_predictions=False)
    assert len(Gallery.open(str(tmp_path / "gallery"))) == 13


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[EmbeddingExport()], fast_dev_run=True)
    trainer.test(tiny_task(), datamodule=MadePhotos(), verbose=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": ["exam"]}, "must be one of test, predict; got 'exam'"),
        ({"chunk": 0}, "chunk: must be at least 1, got 0"),
    ],
)
def test_unfit_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EmbeddingExport(**arguments)


def test_a_task_without_embeddings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task()
    step = task.test_step

    def without(batch: Any, batch_idx: int) -> Any:
        return {key: value for key, value in step(batch, batch_idx).items() if key != "image_embedding"}

    monkeypatch.setattr(task, "test_step", without)
    trainer = tiny_trainer(tmp_path, callbacks=[EmbeddingExport()])
    with pytest.raises(UserError, match="MultiTaskClassifier: its steps return no image_embedding"):
        trainer.test(task, datamodule=MadePhotos(), verbose=False)


def test_data_without_descriptions_and_tasks_without_embeddings_are_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[EmbeddingExport()])
    with pytest.raises(UserError, match="needs a DataModule that describes its images"):
        trainer.test(TinyDualEncoder(), datamodule=TinyPairs(), verbose=False)

    class Bare(LightningModule):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            """Returns nothing."""

    with pytest.raises(UserError, match="Bare yields no embeddings"):
        trainer.test(Bare(), datamodule=MadePhotos(), verbose=False)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose test is in all trackers."""
    folder = tmp_path_factory.mktemp("tracked")
    loggers = build_loggers(folder, {"mode": "offline"}, ["tensorboard", "mlflow"])
    trainer = tiny_trainer(folder, callbacks=[EmbeddingExport()], logger=loggers)
    trainer.test(tiny_task(), datamodule=MadePhotos(), verbose=False)
    finish_wandb()
    return folder


def embeddings(tracked: Path) -> tuple[list[str], NDArray[np.float32]]:
    gallery = Gallery.open(str(tracked / "gallery"))
    ids: list[str] = gallery.table(["id"])["id"].to_pylist()
    return ids, gallery.vectors(ids)


@pytest.mark.parametrize(
    "files", ["wandb/offline-run-*/files/media/table/embeddings/test*.json", "mlflow/**/test.json"]
)
def test_wandb_and_mlflow_get_the_embeddings_as_a_table(tracked: Path, files: str) -> None:
    [file] = tracked.glob(files)
    content = json.loads(file.read_text())
    ids, vectors = embeddings(tracked)
    assert {"id", "label_class", "predicted_class", "e0"} <= {*content["columns"]}
    assert [row[content["columns"].index("id")] for row in content["data"]] == ids
    place = content["columns"].index("e0")
    np.testing.assert_allclose([row[place:] for row in content["data"]], vectors, atol=1e-6)


def test_tensorboard_gets_the_embeddings_for_its_projector(tracked: Path) -> None:
    from google.protobuf import text_format  # type: ignore[import-untyped]  # it has no types
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    folder = tracked / "tensorboard"
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    [embedding] = config.embeddings
    ids, vectors = embeddings(tracked)
    assert embedding.tensor_name.startswith("embeddings/test")
    np.testing.assert_allclose(np.loadtxt(folder / embedding.tensor_path), vectors, atol=1e-6)
    described = pd.read_csv(folder / embedding.metadata_path, sep="\t")
    assert {"id", "label_class", "predicted_class"} <= {*described.columns}
    assert described["id"].tolist() == ids
