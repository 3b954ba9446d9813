from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from datamodules.checks.verify import content_of
from datamodules.loading.decode import read_image
from datamodules.options import ImageOptions, LoaderOptions
from datamodules.wares import Wares
from lightning_modules.options import TowerOptions
from retrieval.fill import Chunk, FillReport, fill
from retrieval.gallery import Gallery
from retrieval.schema import identity_of, image_schema
from tests.support.galleries import (
    SIDE,
    TASKS,
    Photos,
    classifier,
    dual_encoder,
    gallery_of,
    identity,
    photos,
    row,
    rows_of,
    write_image,
    write_photos,
    write_table,
)
from tests.support.models import write_clip
from tests.support.runs import kinds_run
from vitrail.errors import UserError
from vitrail.runs import Run

COUNT = 14
CHUNK = 8


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"), image_size=SIDE)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "data", COUNT)


def filled(root: Path, uri: Path, task: Any = None, captions: bool = False, **options: Any) -> FillReport:
    task, data = task or classifier(), photos(root, captions=captions)
    return fill(task, data, gallery_of(task, data, uri), chunk=CHUNK, **options)


class Looking:
    """Counts the images that a model is shown."""

    def __init__(self, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[int] = []
        step = task.predict_step

        def watched(batch: Any, batch_idx: int) -> Any:
            self.seen += batch["sample_id"].tolist()
            return step(batch, batch_idx)

        monkeypatch.setattr(task, "predict_step", watched)


def test_rows_hold_data_and_predictions(root: Path, tmp_path: Path) -> None:
    task = classifier()
    report = filled(root, tmp_path / "gallery", task, run="runs/tiny")
    assert report == FillReport(added=COUNT)
    rows = rows_of(tmp_path / "gallery").to_pylist()
    assert [entry["id"] for entry in rows] == [f"photo {number}" for number in range(COUNT)]
    pixels = torch.stack([photos(root).dataset("train")[0]["image"]])  # the evaluation transform
    assert rows[0]["split"] == "train"
    with torch.no_grad():
        features = task.encoder(pixels)
        logits = task.classify(features)
    np.testing.assert_allclose(rows[0]["vector"], F.normalize(features, dim=1)[0].numpy(), atol=1e-5)
    for number, entry in enumerate(rows):
        truth = row(number)
        path = root / f"photo {number}.png"
        assert entry["path"] == str(path.absolute())
        assert entry["content"] == content_of(read_image(path).permute(1, 2, 0).contiguous().numpy()).hex()
        assert (entry["caption"], entry["group"], entry["split"]) == (
            truth["caption"][0],
            truth["group"],
            truth["split"],
        )
        assert (entry["label_class"], entry["label_colour"]) == (truth["class"], truth["colour"])
        assert entry["text"] == f"{entry['predicted_class']} {entry['predicted_colour']}"
        assert entry["run"] == "runs/tiny"
        assert entry["weights"] == task.weights_digest()
        assert entry["thumbnail"] is None
    for name, values in logits.items():
        assert rows[0][f"predicted_{name}"] == TASKS[name][int(values.argmax())]
        assert rows[0][f"confidence_{name}"] == pytest.approx(float(values.softmax(dim=1).max()), abs=1e-5)


def test_what_is_there_is_neither_encoded_nor_read_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(root, tmp_path / "gallery")
    before = rows_of(tmp_path / "gallery")
    task = classifier()
    looking = Looking(task, monkeypatch)
    monkeypatch.setattr(Photos, "read_image", lambda self, index: pytest.fail(f"image {index} was read"))
    monkeypatch.setattr(Photos, "image_files", True)
    assert filled(root, tmp_path / "gallery", task) == FillReport(unchanged=COUNT)
    assert looking.seen == []
    assert rows_of(tmp_path / "gallery").equals(before)


def test_new_images_are_appended(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(root, tmp_path / "gallery")
    before = rows_of(tmp_path / "gallery")
    write_image(root, "photo 99", 99)
    write_table(root, [row(99), *(row(number) for number in range(COUNT))])  # in front of the others
    task = classifier()
    looking = Looking(task, monkeypatch)
    assert filled(root, tmp_path / "gallery", task) == FillReport(added=1, unchanged=COUNT)
    assert looking.seen == [0]
    after = rows_of(tmp_path / "gallery")
    assert after.slice(0, COUNT).equals(before)
    assert after.column("id").to_pylist()[COUNT:] == ["photo 99"]


def test_other_content_is_encoded_and_other_labels_are_not(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(root, tmp_path / "gallery")
    before = {entry["id"]: entry for entry in rows_of(tmp_path / "gallery").to_pylist()}
    write_image(root, "photo 3", 333)
    changed = [row(number) for number in range(COUNT)]
    changed[5]["colour"] = None
    changed[6]["split"] = "val"
    changed[7]["caption"][0] = "another caption"
    write_table(root, changed)
    task = classifier()
    looking = Looking(task, monkeypatch)
    assert filled(root, tmp_path / "gallery", task) == FillReport(replaced=1, renewed=3, unchanged=COUNT - 4)
    assert looking.seen == [3]
    after = {entry["id"]: entry for entry in rows_of(tmp_path / "gallery").to_pylist()}
    assert len(after) == COUNT
    different = {name: {key for key in entry if entry[key] != before[name][key]} for name, entry in after.items()}
    assert different.pop("photo 3") >= {"content", "vector"}
    assert {name: keys for name, keys in different.items() if keys} == {
        "photo 5": {"label_colour"},
        "photo 6": {"split"},
        "photo 7": {"caption"},
    }


def test_a_further_split_joins(root: Path, tmp_path: Path) -> None:
    assert filled(root, tmp_path / "gallery", splits=["test"]).added == 4
    assert filled(root, tmp_path / "gallery", splits=["test", "train"]) == FillReport(added=5, unchanged=4)


def test_captions_have_vectors_of_their_own(root: Path, tmp_path: Path, clip: Path) -> None:
    task = dual_encoder(clip)
    filled(root, tmp_path / "gallery", task, captions=True)
    captions = rows_of(tmp_path / "gallery", "captions").to_pylist()
    said = [(f"photo {n}#{k}", f"photo {n}", row(n)["caption"][k]) for n in range(COUNT) for k in range(2)]
    assert [(entry["id"], entry["image"], entry["caption"]) for entry in captions] == said
    with torch.no_grad():
        expected = task.encode_text([text for _, _, text in said])
    np.testing.assert_allclose([entry["vector"] for entry in captions], expected.numpy(), atol=1e-5)
    (hit, *_) = Gallery.open(str(tmp_path / "gallery")).nearest_captions(expected[5:6].numpy(), 1)[0]
    assert hit.score == pytest.approx(1, abs=1e-5)


def test_another_caption_is_encoded(root: Path, tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(root, tmp_path / "gallery", dual_encoder(clip), captions=True)
    changed = [row(number) for number in range(COUNT)]
    changed[4]["caption"][1] = "a second caption"
    write_table(root, changed)
    task = dual_encoder(clip)
    looking = Looking(task, monkeypatch)
    report = filled(root, tmp_path / "gallery", task, captions=True)
    assert report == FillReport(renewed=1, unchanged=COUNT - 1)
    assert looking.seen == [4]
    captions = {entry["id"]: entry["caption"] for entry in rows_of(tmp_path / "gallery", "captions").to_pylist()}
    assert len(captions) == 2 * COUNT
    assert captions["photo 4#1"] == "a second caption"


def test_zero_shot_predictions_are_stored(root: Path, tmp_path: Path, clip: Path) -> None:
    from lightning_modules import DualEncoder

    names = TASKS["class"]
    task = DualEncoder(TowerOptions(model=str(clip)), names, [[f"a {name}"] for name in names], image_size=SIDE)
    task.load_pretrained()
    filled(root, tmp_path / "gallery", task)
    rows = rows_of(tmp_path / "gallery")
    vectors = torch.tensor(rows.column("vector").to_pylist())
    with torch.no_grad():
        logits = task.objective.logit_scale()[0] * vectors @ task.class_embeddings().T
    assert rows.column("predicted_class").to_pylist() == [names[index] for index in logits.argmax(dim=1).tolist()]
    assert rows.column("text").to_pylist() == rows.column("predicted_class").to_pylist()


def test_generated_images_get_thumbnails_and_hashes(tmp_path: Path) -> None:
    data = Wares(
        n_samples=20, views=2, resolution=32, image=ImageOptions(size=SIDE), loader=LoaderOptions(batch_size=4)
    )
    data.setup("predict")
    task = classifier()
    gallery = Gallery.create(str(tmp_path / "gallery"), identity_of(task, "run", data.image_options, list(data.tasks)))
    fill(task, data, gallery)
    rows = rows_of(tmp_path / "gallery").to_pylist()
    assert {entry["path"] for entry in rows} == {""}
    first = data.read_image(0).permute(1, 2, 0).contiguous().numpy()
    assert rows[0]["content"] == content_of(first).hex()
    with Image.open(io.BytesIO(rows[0]["thumbnail"])) as image:
        assert (image.format, image.size) == ("JPEG", (SIDE, SIDE))
    again = fill(task, data, Gallery.open(str(tmp_path / "gallery")))
    assert again == FillReport(unchanged=20)


@pytest.mark.parametrize(("wish", "there"), [("always", True), ("never", False)])
def test_thumbnails_on_request(root: Path, tmp_path: Path, wish: Any, there: bool) -> None:
    filled(root, tmp_path / "gallery", thumbnails=wish)
    assert [bool(entry) for entry in rows_of(tmp_path / "gallery").column("thumbnail").to_pylist()] == [there] * COUNT


def test_each_chunk_is_a_commit_and_batches_are_whole(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrieval.gallery import GalleryWriter

    sizes: list[int] = []
    add = GalleryWriter.add

    def watched(self: GalleryWriter, rows: Any, captions: Any = None) -> None:
        sizes.append(len(rows))
        add(self, rows, captions)

    monkeypatch.setattr(GalleryWriter, "add", watched)
    task, data = classifier(), photos(root)
    fill(task, data, gallery_of(task, data, tmp_path / "gallery"), chunk=6)
    assert sizes == [4, 4, 4, 2]


def test_an_error_while_writing_is_raised(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrieval.gallery import GalleryWriter

    def full(*arguments: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(GalleryWriter, "add", full)
    with pytest.raises(UserError, match="the disk is full"):
        filled(root, tmp_path / "gallery")
    monkeypatch.undo()
    assert filled(root, tmp_path / "gallery").added == COUNT


def test_diverged_model_is_refused(root: Path, tmp_path: Path) -> None:
    task = classifier()
    with torch.no_grad():
        next(task.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite, first of sample 0"):
        filled(root, tmp_path / "gallery", task)


def test_empty_splits_are_refused(root: Path, tmp_path: Path) -> None:
    write_table(root, [{**row(number), "split": "train"} for number in range(COUNT)])
    with pytest.raises(UserError, match="no image in val, test"):
        filled(root, tmp_path / "gallery", splits=["val", "test"])


def test_predictions_and_labels_of_every_kind(tmp_path: Path) -> None:
    """The test split of a run: labels are the data's, predictions those of ``Run.predictions``."""
    run = Run(kinds_run())
    task, data = run.load_model(), run.datamodule
    data.prepare_data()
    data.setup("test")
    made_by = identity_of(task, "run", data.image_options, data.tasks, data.task_kinds)
    gallery = Gallery.create(str(tmp_path / "gallery"), made_by)
    fill(task, data, gallery, splits=["test"])
    predictions = run.predictions("test")
    assert predictions is not None
    rows = Gallery.open(str(tmp_path / "gallery")).table(image_schema(made_by).names).to_pylist()
    assert [found["id"] for found in rows] == predictions.names.tolist()
    marked, shares = predictions.predicted_labels("tags"), predictions.label_probabilities("tags")
    spreads, grades = predictions.deviations("price"), predictions.predicted("condition")
    assert spreads is not None
    assert 0 < marked.sum() < marked.size
    for place, found in enumerate(rows):
        best = [number for number in np.argsort(-shares[place], kind="stable").tolist() if marked[place, number]]
        assert found["predicted_tags"] == [predictions.tasks["tags"][number] for number in best]
        np.testing.assert_allclose(found["confidence_tags"], shares[place, best], atol=1e-5)
        true = predictions.targets["tags"][place]
        assert found["label_tags"] == [name for name, one in zip(data.tasks["tags"], true, strict=True) if one]
        assert found["label_price"] == predictions.targets["price"][place]
        assert found["predicted_condition"] == predictions.tasks["condition"][grades[place]]
        words = [found[f"predicted_{name}"] for name in task.tasks if name not in ("tags", "price")]
        assert sorted(found["text"].split()) == sorted(" ".join([*words, *found["predicted_tags"]]).split())
    np.testing.assert_allclose([found["predicted_price"] for found in rows], predictions.values("price"), rtol=1e-5)
    np.testing.assert_allclose([found["deviation_price"] for found in rows], spreads, rtol=1e-4)
    # Again: nothing is new, nothing has changed.
    assert fill(task, data, gallery, splits=["test"]) == FillReport(unchanged=len(rows))


def test_what_the_model_does_not_predict_is_null() -> None:
    chunk = Chunk(identity(predicts={"class": ["mug", "cap", "bag"]}), thumbnails=False)
    logits = torch.tensor([[0.0, 3, 1], [2, 2, 0], [1, 1, 1]])
    outputs = {
        # Rows come in the order of their ids, whatever the order of the batch.
        "sample_id": torch.tensor([7, 3, 5]),
        "image_embedding": F.normalize(torch.ones(3, 4), dim=1),
        "logits": {"class": logits},
    }
    chunk.add(outputs, {}, "model")
    images = chunk.encoded().images
    assert images.column("sample_id").to_pylist() == [3, 5, 7]
    assert images.column("predicted_class").to_pylist() == [None, None, "cap"]
    expected = logits.softmax(dim=1).amax(dim=1)[[1, 2, 0]]
    torch.testing.assert_close(torch.tensor(images.column("confidence_class").to_pylist()), expected)
