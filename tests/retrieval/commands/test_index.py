from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from experiments.train.cli import main as experiments
from retrieval.__main__ import main
from tests.support.data import PRODUCTS_YAML, draw_image, write_csv, write_products
from tests.support.galleries import rows_of
from tests.support.plain_figures import plain_figures

IMAGES = 36


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a run of one epoch."""
    place = tmp_path_factory.mktemp("index")
    write_products(place / "products", grey=False)
    (place / "tiny.yaml").write_text(PRODUCTS_YAML.format(root=place / "products"), encoding="utf-8")
    fit = ["fit", "--config", str(place / "tiny.yaml"), "--runs", str(place / "runs"), "--name", "tiny1"]
    with plain_figures():
        assert experiments(fit) == 0
    return place


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    (run,) = (place / "runs" / "tiny1").iterdir()
    return run


@pytest.fixture(scope="module")
def other_run(run: Path, place: Path) -> Path:
    """One with other weights."""
    other = Path(shutil.copytree(run, place / "runs" / "tiny2" / run.name))
    path = other / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {
        name: value * 1.5 if value.is_floating_point() else value for name, value in content["state_dict"].items()
    }
    torch.save(content, path)
    return other


def index(run: Path, *arguments: object) -> int:
    return main(["index", "--run", str(run), "--device", "cpu", *map(str, arguments)])


def test_a_run_alone_is_enough(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert index(run) == 0
    said = capsys.readouterr().out
    assert f"Gallery {run / 'gallery'}: {IMAGES} added, 0 replaced, 0 renewed" in said
    rows = rows_of(run / "gallery")
    assert rows.num_rows == IMAGES
    assert rows.column("run").to_pylist() == [str(run.resolve())] * IMAGES
    identity = json.loads(rows.schema.metadata[b"vitrail.gallery"])
    # Images are made as the checkpoint says.
    assert {"size": 16, "crop_fraction": 0.9, "interpolation": "bilinear"}.items() <= identity["input_options"].items()
    assert list(identity["predicts"]) == ["class", "colour", "material"]
    assert index(run) == 0
    assert f"0 added, 0 replaced, 0 renewed (labels or captions only), {IMAGES} unchanged" in capsys.readouterr().out


def test_same_vectors_as_the_callback_makes(run: Path, place: Path, tmp_path: Path) -> None:
    callback = ["--trainer.callbacks+=callbacks.EmbeddingExport", f"--trainer.callbacks.gallery={tmp_path / 'g'}"]
    everything = ["--data.init_args.loader.predict", "[train, val, test]"]
    checkpoint = ["--ckpt_path", str(run / "checkpoints" / "best.ckpt"), "--runs", str(place / "runs")]
    config = ["--config", str(run / "config.yaml")]
    assert experiments(["predict", *config, *checkpoint, *everything, *callback]) == 0
    # Only other splits to predict: it is the run's own still.
    assert (run / "predictions" / "predict.parquet").exists()
    assert index(run, "--gallery", tmp_path / "index") == 0
    assert rows_of(tmp_path / "g").equals(rows_of(tmp_path / "index"))


def test_a_folder_of_images_joins(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = tmp_path / "gallery"
    assert index(run, "--gallery", uri, "--splits", "test") == 0
    folder = tmp_path / "holiday"
    for name, look in (("beach.jpg", 1), ("day2/hill.png", 2)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(0, "red", look=look, size=(40, 30)).save(folder / name)
    assert index(run, "--gallery", uri, "--data", folder) == 0
    assert "2 added" in capsys.readouterr().out
    (first, second) = rows_of(uri).to_pylist()[-2:]
    assert (first["id"], second["id"]) == ("holiday/beach.jpg", "holiday/day2/hill.png")
    assert first["path"] == str(folder / "beach.jpg")
    assert first["label_class"] is None
    assert first["predicted_class"]


def test_another_table_by_its_experiment(
    run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = write_products(tmp_path / "more", views=1, grey=False)
    data = ["--data", place / "tiny.yaml", "--data.init_args.root", more, "--data.init_args.image.size", "64"]
    assert index(run, "--gallery", tmp_path / "gallery", *data) == 0
    assert "12 added" in capsys.readouterr().out


def test_another_model_is_refused(
    run: Path, other_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = tmp_path / "gallery"
    assert index(run, "--gallery", uri) == 0
    before = rows_of(uri)
    assert index(other_run, "--gallery", uri) == 2
    error = capsys.readouterr().err
    assert "name a new gallery" in error
    assert len(error.splitlines()) == 1
    assert rows_of(uri).equals(before)
    # The latest weights are others than the best ones only if training went on; by name they are a checkpoint too.
    assert index(run, "--gallery", uri, "--checkpoint", run / "checkpoints" / "best.ckpt") == 0


def test_corrupt_image_stops_or_is_listed(
    run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = write_products(tmp_path / "broken", views=1, grey=False)
    bad = sorted((broken / "images").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:200])
    data = ["--gallery", tmp_path / "gallery", "--data", place / "tiny.yaml", "--data.init_args.root", broken]
    assert index(run, *data) == 2
    error = capsys.readouterr().err
    assert bad.name in error
    assert "--on-bad-image skip" in error
    assert index(run, *data, "--on-bad-image", "skip") == 0
    said = capsys.readouterr().out
    assert "11 added" in said
    assert "cannot be read: 1" in said
    assert bad.name in said
    write_products(tmp_path / "broken", views=1, grey=False)
    assert index(run, *data) == 0
    assert "1 added, 0 replaced, 0 renewed (labels or captions only), 11 unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such/folder"], "no such folder or experiment file"),
        (["--data", "Warez"], "Warez"),
        (["--checkpoint", "no.ckpt"], "no such checkpoint"),
        (["--device", "abacus"], "--device abacus"),
        (["--chunk", "0"], "--chunk: must be at least 1; got 0"),
        (["--data", "missing.yaml"], "missing.yaml"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert index(run, "--gallery", tmp_path / "gallery", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "gallery").exists()


def test_a_run_without_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "empty" / "x.csv", [["a"]])
    assert index(tmp_path / "nowhere") == 2
    assert "no such directory" in capsys.readouterr().err
    assert index(tmp_path / "empty", "--data", "Wares") == 2
    assert "not a run directory" in capsys.readouterr().err
    (tmp_path / "empty" / "config.yaml").write_text("seed_everything: 1")
    assert index(tmp_path / "empty", "--data", "Wares") == 2
    assert "has no checkpoints/best.ckpt" in capsys.readouterr().err


def test_a_folder_without_images_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert index(run, "--data", tmp_path) == 2
    assert "has no images (.jpg" in capsys.readouterr().err
