"""A zero-shot model is a run: its checkpoint names the weights, and every command takes it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch

from app.state.startup import load
from evaluation.__main__ import main as evaluation
from experiments.__main__ import main as experiments
from lightning_modules.checkpoint import load_task, read_checkpoint
from retrieval.__main__ import main as retrieval
from retrieval.gallery import Gallery
from retrieval.search.searcher import load_encoder
from tests.experiments.conftest import only_run
from tests.support.data import write_products
from tests.support.models import write_whole_model
from vitrail import Run

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "products_clip_zeroshot.yaml"


class Place(NamedTuple):
    """Where a zero-shot model was tested."""

    run: Path
    clip: Path
    photo: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("zero_shot")
    write_products(root / "products")
    clip = write_whole_model(root / "clip", "clip")
    model = ["--model.init_args.towers.model", str(clip), "--data.init_args.image.size=32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRAIL_DATA", str(root))
        patch.setenv("WANDB_MODE", "disabled")
        assert experiments(["test", "--config", str(EXPERIMENT), "--runs", str(root / "runs"), *model]) == 0
        photo = next((root / "products").rglob("*.jpg"))
        yield Place(only_run(root / "runs"), clip, photo)


def test_its_checkpoint_names_the_weights_instead_of_holding_them(place: Place) -> None:
    path = place.run / "checkpoints" / "best.ckpt"
    content: dict[str, Any] = torch.load(path, weights_only=True)
    weights = place.clip / "model.safetensors"
    assert path.stat().st_size < weights.stat().st_size / 2
    (origin,) = content["pretrained"]
    assert origin["source"] == str(place.clip)
    assert list(origin["sha256"]) == ["model.safetensors"]
    assert not [name for name in content["state_dict"] if name.startswith("towers.model")]
    assert float(content["state_dict"]["objective.temperature.log_scale"]) == 3.0
    whole = read_checkpoint(path)
    assert whole.keys() == content.keys() - {"by_reference"}
    assert whole["state_dict"].keys() == load_task(path).state_dict().keys()


def test_it_is_tested_again_and_predicts(place: Place) -> None:
    predicted = place.run / "predictions" / "test.parquet"
    before = pd.read_parquet(predicted)
    assert experiments(["test", "--ckpt_path", str(place.run / "checkpoints" / "best.ckpt")]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(predicted), before)
    assert Run(place.run).predict(place.photo)[0].label in Run(place.run).model.tasks["class"]


@pytest.mark.slow
def test_every_command_takes_it(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, gallery = str(place.run), str(tmp_path / "gallery")
    assert retrieval(["index", "--run", run, "--gallery", gallery]) == 0
    capsys.readouterr()
    assert retrieval(["search", "a red bottle", "--gallery", gallery, "--json", "--top-k", "3"]) == 0
    assert '"score"' in capsys.readouterr().out
    assert experiments(["predict", run, str(place.photo), "--device", "cpu"]) == 0
    assert experiments(["evaluate", run, "--data", str(EXPERIMENT), "--device", "cpu"]) == 0
    assert evaluation(["explain", run, "--image", str(place.photo), "--to", str(tmp_path / "maps")]) == 0
    for name in ("onnx", "safetensors"):
        assert experiments(["export", run, "--format", name, "--to", str(tmp_path / "exports")]) == 0
    assert (
        Run(tmp_path / "exports" / "safetensors").predict(place.photo)[0].label
        == Run(run).predict(place.photo)[0].label
    )
    assert evaluation(["ensemble", run, "--tta", "hflip", "--to", str(tmp_path / "runs")]) == 0
    assert evaluation(["summary", run]) == 0
    context = load([place.run], [])
    assert list(context.runs) == [Run(run).name]
    assert load_task(place.run / "checkpoints" / "best.ckpt").weights_digest() == Run(run).model.weights_digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("changed", "has changed since the checkpoint was written (SHA-256 differs)"),
        ("gone", "is gone, which the checkpoint names"),
    ],
)
def test_weights_that_changed_or_vanished_end_in_one_line(
    place: Place, change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(place.run, tmp_path / "runs" / "copy" / "one")
    path = run / "checkpoints" / "best.ckpt"
    content: dict[str, Any] = torch.load(path, weights_only=True)
    other = write_whole_model(tmp_path / "other", "clip")
    content["pretrained"][0]["source"] = str(other)
    torch.save(content, path)
    weights = other / "model.safetensors"
    if change == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    for command in (["predict", str(run), str(place.photo)], ["test", "--ckpt_path", str(path)]):
        capsys.readouterr()
        assert experiments(command) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if message in line]
        assert str(weights) in line
        assert "put the former weights of" in line


def test_what_was_trained_is_never_left_out(place: Place, tmp_path: Path) -> None:
    """Weights that differ from those on the hub are saved, also where a training went on from a zero-shot run."""
    assert "verbose" not in Run(place.run).config  # an option of `test` alone
    tiny = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--test_best=true", "--from", str(place.run)]
    assert experiments(["fit", *tiny, "--runs", str(tmp_path)]) == 0
    state = read_checkpoint(only_run(tmp_path) / "checkpoints" / "best.ckpt")["state_dict"]
    start = read_checkpoint(place.run / "checkpoints" / "best.ckpt")["state_dict"]
    assert state.keys() == start.keys()
    assert any(not torch.equal(state[name], start[name]) for name in state if name.startswith("towers.model."))


def test_a_gallery_of_shorter_embeddings_is_searched_like_any_other(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, gallery = str(place.run), str(tmp_path / "gallery")
    assert retrieval(["index", "--run", run, "--gallery", gallery, "--dim", "8", "--splits", "test"]) == 0
    assert "trained for the lengths 16, not for --dim 8" in capsys.readouterr().err
    opened = Gallery.open(gallery)
    assert opened.identity.dim == 8
    encoder = load_encoder(opened)
    (vector,) = encoder.encode_texts(["a red bottle"])
    with torch.no_grad():
        whole = Run(place.run).load_model().encode_text(["a red bottle"])[0, :8]
    torch.testing.assert_close(torch.from_numpy(vector), torch.nn.functional.normalize(whole, dim=0))
    assert retrieval(["search", "a red bottle", "--gallery", gallery, "--top-k", "3"]) == 0
    assert retrieval(["index", "--run", run, "--gallery", str(tmp_path / "other"), "--dim", "17"]) == 2
    assert "--dim: must be between 1 and the model's 16; got 17" in capsys.readouterr().err
