"""Every experiment YAML: its true architecture takes a step, and a tiny version trains, tests and resumes.

The data sets are generated in their real directory formats, so nothing is needed but the repository.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from transformers import CLIPModel, Qwen2VLForConditionalGeneration

from datamodules import Wares
from datamodules.streaming.pack import pack
from evaluation.__main__ import main as compare
from evaluation.statistics.calibration import expected_calibration_error
from experiments.train.cli import main
from tests.experiments.conftest import only_run
from tests.support.data import (
    write_captions,
    write_fashion,
    write_flickr,
    write_flowers,
    write_image_folder,
    write_products,
)
from tests.support.models import write_bert, write_clip, write_qwen2_vl
from vitrail.predictions import read_predictions

FILES = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))
EXPERIMENTS = [path for path in FILES if path.stem != "results"]  # which lists runs of the others
OVERLAYS = EXPERIMENTS[0].parent / "overlays"

FAST = (
    "products_multitask_regnetx",
    "flowers_clip_lora",
    "flowers_regnetx_minilm",
    "flowers_qwen2vl_lora",
    "flowers_few_shot",
    "my_images",
    "quickstart_pairs",
    "streamed_images",
)
"""Experiments whose tiny version is in the fast tests: one of each kind of network, phases and data."""

RESUMED_FAST = ("products_multitask_regnetx", "flowers_clip_lora")
"""Of these also that a finished training goes on: one in phases, and one with low-rank adapters."""

TINY_BACKBONES = {"vit": "test_vit", "deit": "test_vit"}
"""Of the same kind as the true one, with a few hundred thousand parameters; convolutional where not named."""


def one_of_its_kind(path: Path, fast: Sequence[str] = FAST) -> Any:
    """The experiment; as a slow case where another one of its kind is among the fast ones."""
    return path if path.stem in fast else pytest.param(path, marks=pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def generated_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root = tmp_path_factory.mktemp("data")
    write_products(root / "products")
    write_fashion(root / "fashion")
    write_flowers(root / "flowers102")
    write_flickr(root / "flickr8k")
    write_image_folder(root / "photos", splits=(), objects=10)
    write_captions(root / "captions.parquet", root / "photos")
    write_clip(root / "clip")
    write_bert(root / "bert")
    write_qwen2_vl(root / "qwen2_vl")
    pack(Wares(n_samples=60, views=3, resolution=32), root / "wares_shards", shard_size=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRAIL_DATA", str(root))
        patch.setenv("VITRAIL_CACHE", str(root / "cache"))
        yield


def tiny_loader(experiment: dict[str, Any]) -> dict[str, int]:
    """A small batch, made of chunks where the true one is."""
    is_chunked = "contrastive_batch_size" in experiment["data"]["init_args"]["loader"]
    return {"batch_size": 4, "contrastive_batch_size": 8} if is_chunked else {"batch_size": 8}


def tiny_network(arguments: dict[str, Any]) -> dict[str, Any]:
    """A tiny network of the same kind."""
    folder = Path(os.environ["VITRAIL_DATA"])
    if "answers" in arguments:
        return {"model": str(folder / "qwen2_vl")}
    if "model" in (towers := arguments.get("towers", {})):
        return {"towers": {"model": str(folder / "clip")}}
    if towers:
        return {"towers": {**towers, "image": "test_resnet", "text": str(folder / "bert"), "max_length": 20}}
    return {"backbone": TINY_BACKBONES.get(arguments["backbone"].split("_")[0], "test_resnet")}


def own_data(experiment: dict[str, Any]) -> dict[str, str]:
    """Where the data of the experiments for one's own images are here."""
    arguments = experiment["data"]["init_args"]
    places = {"root": "photos", "path": "captions.parquet"}.items()
    return {key: str(Path(os.environ["VITRAIL_DATA"]) / name) for key, name in places if arguments.get(key) == name}


def tiny(experiment: dict[str, Any]) -> dict[str, Any]:
    """What makes an experiment small: a tiny backbone of the same kind, small images, few of them."""
    overlay: dict[str, Any] = {
        "data": {"init_args": {"image": {"size": 32}, "loader": tiny_loader(experiment)}},
        "model": {"init_args": {"pretrained": False, **tiny_network(experiment["model"]["init_args"])}},
        "trainer": {
            "max_epochs": 2,
            "check_val_every_n_epoch": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        },
        "wandb": {"mode": "disabled"},
    }
    if experiment["data"]["class_path"] == "datamodules.Wares":
        overlay["data"]["init_args"] |= {"n_samples": 60, "resolution": 32}
    overlay["data"]["init_args"] |= own_data(experiment)
    if callbacks := experiment["trainer"].get("callbacks"):
        for callback in callbacks:
            if "unfreeze_epoch" in callback.get("init_args", {}):
                callback["init_args"]["unfreeze_epoch"] = 1
        overlay["trainer"]["callbacks"] = callbacks
    return overlay


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[list[str], Path]]:
    """Train and test the tiny version of an experiment once; return the command and its run directory."""

    @functools.cache
    def train(path: Path) -> tuple[list[str], Path]:
        folder = tmp_path_factory.mktemp(path.stem)
        overlay = folder / "tiny.yaml"
        overlay.write_text(yaml.safe_dump(tiny(yaml.safe_load(path.read_text()))))
        command = ["fit", "--config", str(path), "--config", str(overlay), "--runs", str(folder / "runs")]
        assert main([*command, "--test_best=true"]) == 0
        return command, only_run(folder / "runs")

    return train


Trained = Callable[[Path], tuple[list[str], Path]]


@pytest.mark.parametrize("path", [one_of_its_kind(path) for path in EXPERIMENTS], ids=lambda path: path.stem)
def test_tiny_version_trains_and_tests(path: Path, trained: Trained) -> None:
    _, run = trained(path)
    assert run.parent.name == path.stem
    record = json.loads((run / "run.json").read_text())
    if record["data"]["class_counts"]:
        predictions = pd.read_parquet(run / "predictions" / "test.parquet")
        assert len(predictions) == record["data"]["samples"]["test"]
    else:
        assert len(pd.read_csv(run / "reports" / "test_retrieval.csv")) > 0


# Few-shot classifiers are solved in one epoch.
@pytest.mark.parametrize(
    "path",
    [one_of_its_kind(path, RESUMED_FAST) for path in EXPERIMENTS if "few_shot" not in path.stem],
    ids=lambda path: path.stem,
)
def test_tiny_version_goes_on(path: Path, trained: Trained) -> None:
    command, first = trained(path)
    assert main([*command, "--ckpt_path=last", "--trainer.max_epochs=3"]) == 0
    (second,) = (run for run in first.parent.iterdir() if run != first)
    stage = json.loads((second / "run.json").read_text())["stages"][0]
    assert stage["exit"] == "finished"
    assert stage["epochs"] == 3


@pytest.mark.slow
# Two billion weights that all learn do not fit into a small memory; the other experiment with them has adapters.
@pytest.mark.parametrize("path", [p for p in EXPERIMENTS if p.stem != "flowers_qwen2vl_zeroshot"], ids=lambda p: p.stem)
def test_true_architecture_takes_a_step_under_the_overlay(path: Path, tmp_path: Path, run_quietly: Quietly) -> None:
    arguments = ["--config", str(path), "--config", str(OVERLAYS / "two_cores.yaml"), "--runs", str(tmp_path)]
    smallest = [
        "--trainer.fast_dev_run=1",
        "--data.init_args.loader.batch_size=2",
        "--data.init_args.loader.drop_last=false",
        "--model.init_args.pretrained=false",
    ]
    smallest += [f"--data.init_args.{key}={place}" for key, place in own_data(yaml.safe_load(path.read_text())).items()]
    assert run_quietly(["fit", *arguments, *smallest]) == 0


@pytest.mark.parametrize(
    "path",
    [one_of_its_kind(path) for path in EXPERIMENTS if "products_multitask" in path.stem],
    ids=lambda path: path.stem,
)
def test_training_from_scratch_has_one_phase(path: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "tiny.yaml"
    settings = tiny(yaml.safe_load(path.read_text()))
    del settings["trainer"]["callbacks"]
    overlay.write_text(yaml.safe_dump(settings))
    files = [path, OVERLAYS / "from_scratch.yaml", overlay]
    arguments = [argument for file in files for argument in ("--config", str(file))]
    assert main(["fit", *arguments, "--runs", str(tmp_path / "runs")]) == 0
    (run,) = (tmp_path / "runs").glob("*/*")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"] == []
    assert saved["model"]["init_args"]["optim_options"]["warmup_epochs"] == 2


Quietly = Callable[[list[str]], int]


@pytest.fixture
def run_quietly(monkeypatch: pytest.MonkeyPatch) -> Quietly:
    """The command line without W&B."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return main


@pytest.fixture(scope="module")
def zero_shot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of CLIP as it came."""
    towers = ["--model.init_args.towers.model", str(Path(os.environ["VITRAIL_DATA"]) / "clip")]
    return untrained("flowers_clip_zeroshot", towers, tmp_path_factory.mktemp("zero_shot"))


@pytest.fixture(scope="module")
def generative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of Qwen2-VL as it came."""
    model = ["--model.init_args.model", str(Path(os.environ["VITRAIL_DATA"]) / "qwen2_vl")]
    return untrained("flowers_qwen2vl_zeroshot", model, tmp_path_factory.mktemp("generative"))


def untrained(experiment: str, model: list[str], runs: Path) -> Path:
    path = OVERLAYS.parent / f"{experiment}.yaml"
    quiet = ["--data.init_args.image.size=32", "--wandb.mode=disabled"]
    assert main(["test", "--config", str(path), "--runs", str(runs), *model, *quiet]) == 0
    (run,) = runs.glob("*/*")
    return run


def test_zero_shot_is_evaluated_without_training(
    zero_shot: Path, tmp_path: Path, run_quietly: Quietly, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = pd.read_parquet(zero_shot / "predictions" / "test.parquet")
    assert len(predictions.loc[0, "logits_class"]) == 102  # type: ignore[arg-type]  # a list
    assert (zero_shot / "figures" / "confusion_test_class.png").exists()
    # Random towers predict nothing.
    towers = f"--model.init_args.towers.model={os.environ['VITRAIL_DATA']}/clip"
    arguments = ["--config", str(OVERLAYS.parent / "flowers_clip_zeroshot.yaml"), "--runs", str(tmp_path), towers]
    random = ["--model.init_args.pretrained=false", "--data.init_args.image.size=32"]
    assert run_quietly(["test", *arguments, *random]) == 2
    assert "has untrained parts" in capsys.readouterr().err


def test_a_generative_model_is_evaluated_without_training(generative: Path) -> None:
    predictions = pd.read_parquet(generative / "predictions" / "test.parquet")
    assert len(predictions.loc[0, "logits_class"]) == 102  # type: ignore[arg-type]  # a list
    assert (generative / "reports" / "test_class.csv").exists()


@pytest.mark.slow
def test_clip_before_and_after_training_and_a_generative_model_stand_side_by_side(
    zero_shot: Path, generative: Path, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tuned = trained(OVERLAYS.parent / "flowers_clip_ft.yaml")
    capsys.readouterr()
    runs = [zero_shot, tuned, generative]
    page = tmp_path / "compared.html"
    assert compare(["compare", *map(str, runs), "--markdown", "--html", str(page)]) == 0
    head, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    found = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["run"] for row in found] == ["flowers_clip_zeroshot", "flowers_clip_ft", "flowers_qwen2vl_zeroshot"]
    assert len({row["n"] for row in found}) == 1
    for row, run in zip(found, runs, strict=True):
        predictions = read_predictions(run / "predictions" / "test.parquet")
        right = predictions.predicted("class") == predictions.targets["class"]
        error = expected_calibration_error(predictions.probabilities("class").max(axis=1), right)
        assert row["accuracy [95 %]"].split()[0] == f"{right.mean():.3f}"
        assert row["ECE [95 %]"].split()[0] == f"{error:.3f}"
    folder = Path(os.environ["VITRAIL_DATA"])
    towers = CLIPModel.from_pretrained(folder / "clip")
    language = Qwen2VLForConditionalGeneration.from_pretrained(folder / "qwen2_vl")
    sizes = [sum(one.numel() for one in network.parameters()) for network in (towers, towers, language)]
    assert [row["parameters"] for row in found] == [f"{size:,}" for size in sizes]
    assert "Score against cost" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("experiment", "weights"),
    [
        pytest.param("flowers_clip_ft", "openai/clip-vit-base-patch32", marks=pytest.mark.slow),
        ("flowers_qwen2vl_lora", "Qwen/Qwen2-VL-2B-Instruct"),
    ],
)
def test_a_flagship_without_network_ends_in_one_line(
    experiment: str,
    weights: str,
    tmp_path: Path,
    run_quietly: Quietly,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    path = OVERLAYS.parent / f"{experiment}.yaml"
    assert run_quietly(["fit", "--config", str(path), "--runs", str(tmp_path)]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if weights in line]
    assert "local folder" in line
    assert "pretrained: false" in line


def trainer_below(overlay: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The trainer of an experiment with a callback of its own, below the overlay."""
    configs = ["--config", str(OVERLAYS.parent / "products_multitask_regnetx.yaml")]
    configs += ["--config", str(OVERLAYS.parent / "overlays" / f"{overlay}.yaml")]
    with pytest.raises(SystemExit) as end:
        main(["fit", *configs, "--print_config"])
    assert end.value.code in (0, None)
    found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)["trainer"]
    return found


@pytest.mark.parametrize(
    ("overlay", "changes", "callbacks"),
    [
        ("ddp", {"strategy": "ddp", "devices": "auto"}, ["BackboneUnfreezing"]),
        ("fsdp", {"strategy": "fsdp", "devices": "auto"}, []),
        ("bf16", {"precision": "bf16-mixed"}, ["BackboneUnfreezing"]),
        ("compile", {}, ["BackboneUnfreezing", "CompileModel"]),
        ("ensemble", {}, []),
    ],
)
def test_overlays_add_to_an_experiment(
    overlay: str, changes: dict[str, str], callbacks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_below(overlay, capsys)
    assert {key: trainer[key] for key in changes} == changes
    assert [callback["class_path"].rpartition(".")[2] for callback in trainer["callbacks"]] == callbacks


def test_the_loss_guard_is_set_by_keys(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--config", str(tiny), "--runs", str(tmp_path / "runs"), "--trainer.max_epochs", "1"]
    broken = ["--model.init_args.lr", "1.0e+30", "--model.init_args.schedule", "constant"]
    assert main(["fit", *runs, *broken]) == 2
    stopped = only_run(tmp_path / "runs") / "non_finite.json"
    error = capsys.readouterr().err
    assert str(stopped) in error.replace("\n", "")
    assert "Traceback" not in error
    assert main(["fit", *runs, "--non_finite.action", "ignore"]) == 2
    assert "ignore" in capsys.readouterr().err
