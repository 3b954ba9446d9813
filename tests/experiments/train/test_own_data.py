from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from experiments.train.options import add_column_arguments, own_data, own_data_section
from tests.support.data import write_captions, write_csv, write_image_folder
from tests.support.models import write_clip
from vitrail.errors import UserError
from vitrail.programs import main
from vitrail.runs import Run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    write_image_folder(tmp_path / "photos", splits=(), objects=10)
    return tmp_path


def write_table(folder: Path) -> Path:
    files = sorted((folder / "photos").rglob("[!.]*.png"))
    rows = [
        [str(file.relative_to(folder)), file.stem.split("_")[0], "odd" if number % 2 else "even", file.stem[:-2]]
        for number, file in enumerate(files)
    ]
    write_csv(folder / "table.csv", [["Datei", "Art", "Art2", "Exemplar"], *rows])
    return folder / "table.csv"


def experiment(*args: str) -> dict[str, Any]:
    arguments, text = own_data(["fit", *args])
    found: dict[str, Any] = yaml.safe_load(text)
    assert yaml.safe_load(arguments[arguments.index("--config") + 1]) == found
    return found


SMALL = [
    "--epochs=2",
    "--data.init_args.image.size=32",
    "--data.init_args.loader.num_workers=0",
    "--wandb.mode=disabled",
]
UNTRAINED = ["--backbone=test_resnet", "--pretrained=false", *SMALL]


def test_a_folder_is_trained_tested_and_its_experiment_can_be_run_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("vitrail", ["fit", "--data", "photos", *UNTRAINED]) == 0

    run = Run.latest("photos")
    printed = capsys.readouterr()
    assert f"Experiment: {run.path}/experiment.yaml" in printed.out
    assert "epoch 2/2: train/loss" in printed.out + printed.err
    assert run.predictions("test") is not None
    [trained] = [line for line in printed.out.splitlines() if line.startswith("ImageClassifier (")]
    assert trained.endswith("images of ImageFolder and tested on 9 others.")
    assert f"predict {run.path} YOUR_IMAGES/" in printed.out
    assert f"app --run {run.path}" in printed.out
    assert "always predicting the most frequent class gives 0.333" in printed.out
    assert run.config["data"]["init_args"]["image"]["size"] == 32
    again = ["fit", "--config", str(run.path / "experiment.yaml"), "--trainer.fast_dev_run=true", *SMALL[1:]]
    assert main("vitrail", again) == 0


def test_several_columns_are_several_tasks(folder: Path) -> None:
    write_table(folder)
    columns = ["--image", "Datei", "--labels", "Art", "Art2", "--group", "Exemplar"]

    assert main("vitrail", ["fit", "--data", "table.csv", *columns, *UNTRAINED]) == 0

    run = Run.latest("table")
    predictions = run.predictions("test")
    assert predictions is not None
    assert predictions.tasks == {"class": ["bag", "bottle", "cap"], "Art2": ["even", "odd"]}


def write_kinds(folder: Path, name: str, *, every: int = 1) -> None:
    files = sorted((folder / "photos").rglob("[!.]*.png"))[::every]
    kinds = [file.stem.split("_")[0] for file in files]
    rows = [
        [str(file.relative_to(folder)), f"{number * 7 % 25 / 4}", f"{kind};{'odd' if number % 2 else 'even'}"]
        for number, (file, kind) in enumerate(zip(files, kinds, strict=True))
    ]
    write_csv(folder / name, [["image", "label", "tags"], *rows])


def test_numbers_and_labels_are_trained_tested_elsewhere_and_predicted(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_kinds(folder, "table.csv")
    write_kinds(folder, "few.csv", every=10)

    options = ["--labels", "label", "tags", "--model.loss_options.regression=gaussian_nll"]
    assert main("vitrail", ["fit", "--data", "table.csv", *options, *UNTRAINED, "--epochs=1"]) == 0

    run = Run.latest("table")
    columns = run.config["data"]["init_args"]["columns"]
    assert columns["kinds"] == {"label": "regression", "tags": "multi_label"}
    assert run.config["checkpoint"]["monitor"] == "val/class/rmse"
    printed = capsys.readouterr()
    assert "'label' has 25 different numbers, some with fractions, so it is taken as regression" in caplog.text
    assert "  class: MAE " in printed.out
    assert "  tags: mAP " in printed.out
    assert main("vitrail", ["evaluate", str(run.path), "--data", "few.csv"]) == 0, "by the run's columns"
    tested = Run(run.path / "evaluations" / "few").predictions("test")
    assert tested is not None
    assert dict(tested.kinds) == {"class": "regression", "tags": "multi_label"}
    assert len(tested.known("class")) == len(tested.known("tags")) == len(tested)
    assert main("vitrail", ["predict", str(run.path), "photos", "--to", "found.csv"]) == 0
    found = pd.read_csv("found.csv")
    assert list(found.columns) == ["image", "class", "class_deviation", "tags", "tags_confidence", "error"]
    assert found["class"].between(-20, 30).all()
    assert main("vitrail", ["predict", str(run.path), "photos"]) == 0


def test_the_best_epoch_is_chosen_by_what_the_kind_needs_no_threshold_for(folder: Path) -> None:
    write_kinds(folder, "table.csv")
    _, text = own_data(["fit", "--data", "table.csv", "--label", "tags"])
    assert yaml.safe_load(text)["checkpoint"] == {"monitor": "val/class/mAP", "mode": "max"}


def test_captions_alone_train_a_dual_encoder(folder: Path) -> None:
    write_captions(folder / "captions.parquet", folder / "photos")
    write_clip(folder / "clip")

    options = ["--backbone", "clip", *SMALL, "--data.init_args.loader.batch_size=8"]
    assert main("vitrail", ["fit", "--data", "captions.parquet", *options]) == 0

    assert (Run.latest("captions").path / "reports" / "test_retrieval.csv").exists()


def test_what_is_filled_in(folder: Path) -> None:
    table = write_table(folder)

    found = experiment("--data", str(table), "--label", "Art", "--image", "Datei", "--epochs", "8")

    data = found["data"]["init_args"]
    assert data["columns"] == {"image": "Datei", "label": "Art", "group": "", "split": "", "caption": ""}
    assert data["image"]["size"] == 224
    assert data["split"] == {"val_fraction": 0.15, "test_fraction": 0.15}
    assert found["trainer"]["max_epochs"] == 8
    assert found["trainer"]["callbacks"][0]["init_args"]["unfreeze_epoch"] == 2
    assert found["model"]["class_path"] == "lightning_modules.ImageClassifier"


def test_a_recipe_is_part_of_the_experiment_and_its_phases_keep_their_shares(folder: Path) -> None:
    recipe = Path(__file__).parents[3] / "experiments" / "recipes" / "few_shot.yaml"
    found = experiment("--data", "photos", "--config", str(recipe), "--epochs", "4")

    assert found["data"]["init_args"]["augment"]["policy"] == "trivialaugment"
    assert found["ema"] == {"decay": 0.99}
    assert found["trainer"]["max_epochs"] == 4
    [unfreezing] = found["trainer"]["callbacks"]
    assert unfreezing["init_args"]["phases"][0]["epochs"] == 3


def test_one_epoch_has_one_phase_and_the_size_is_that_of_the_weights(folder: Path) -> None:
    found = experiment("--data", "photos", "--epochs", "1", "--backbone", "fastvit_t8")

    assert found["trainer"]["callbacks"] == []
    assert found["data"]["init_args"]["image"]["size"] == 256


def test_the_aspect_ratio_has_a_short_option(folder: Path) -> None:
    found = experiment("--data", "photos", "--fit", "pad")

    assert found["data"]["init_args"]["image"] == {"size": 224, "resize": "pad"}
    assert experiment("--data", "photos")["data"]["init_args"]["image"]["resize"] == "crop"
    with pytest.raises(UserError, match=r"fit --data: argument --fit: invalid choice: 'stretch'"):
        own_data(["fit", "--data", "photos", "--fit", "stretch"])


def test_the_aspect_ratio_is_kept_with_checkpoint_and_export(folder: Path) -> None:
    options = [*UNTRAINED[:2], "--epochs=1", "--fit=pad", *SMALL[1:]]
    assert main("vitrail", ["fit", "--data", "photos", *options]) == 0

    run = Run.latest("photos")

    assert run.model.input_options["resize"] == "pad"
    assert main("vitrail", ["export", str(run.path), "--format", "safetensors"]) == 0
    assert Run(run.path / "export" / "safetensors").model.input_options["resize"] == "pad"


def test_help_lists_the_options_of_own_data_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("vitrail", ["fit", "--help"]) == 0

    _, _, own = capsys.readouterr().out.partition("\nyour own images:\n")
    assert "--trainer" not in own
    for option in ("--data", "--backbone", "--pretrained", "--epochs", "--fit", "--label", "--labels", "--sep"):
        assert f"\n  {option}" in f"\n{own}"


def test_without_arguments_fit_shows_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("vitrail", ["fit"]) == 2

    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "`vitrail fit --data FOLDER_OR_TABLE`" in error
    assert "`vitrail fit --config quickstart`" in error


@pytest.mark.parametrize(
    "args", [["fit", "--data", "Wares"], ["fit", "--config", "x.yaml"], ["test", "--data", "photos"], []]
)
def test_other_commands_are_left_alone(folder: Path, args: list[str]) -> None:
    assert own_data(args) == (args, "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "photos", "--label", "Art"], r"--label: is about the columns of a table, and photos is a folder"),
        (["--data", "table.csv", "--image", "Datei"], r"no column has a usual name of labels or captions"),
        (["--data", "table.csv", "--image", "Datei", "--label", "Arten"], r"has no column 'Arten'"),
        (["--data", "absent.csv"], r"--data absent\.csv: no such folder or file"),
        (["--data", "some/folder"], r"--data some/folder: no such folder or file"),
        (["--data", "photos", "--epochs", "0"], r"--epochs: must be at least 1; got 0"),
        (["--data", "photos", "--from", "runs/a/b", "--backbone", "resnet18"], r"--backbone: .* are those of --from"),
        (["--data", "texts.csv", "--pretrained", "false"], r"--pretrained false: is about a classifier's backbone"),
    ],
)
def test_mistakes_are_one_clear_error(folder: Path, args: list[str], message: str) -> None:
    write_table(folder)
    write_csv(folder / "texts.csv", [["image", "caption"], ["a.png", "a mug"]])

    with pytest.raises(UserError, match=message):
        own_data(["fit", *args])


def test_the_columns_of_a_run_are_meant_where_a_table_has_them(folder: Path) -> None:
    write_csv(folder / "new.csv", [["image", "label", "breed", "age", "tags"], ["a.png", "0", "1", "3", "a/b"]])
    write_csv(folder / "other.csv", [["image", "label", "age"], ["a.png", "0", "3"]])
    of_run = {"image": "image", "label": "breed", "labels": ["age", "tags", "size"], "label_sep": "/", "group": "cat"}

    def columns(data: str, *args: str) -> dict[str, Any]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--data")
        add_column_arguments(parser, with_split=False)
        section, _ = own_data_section(parser.parse_args(["--data", data, *args]), of_run)
        found: dict[str, Any] = section["init_args"]["columns"]
        return {role: found.get(role) for role in ("label", "labels", "group", "label_sep")}

    of_breed = {"label": "breed", "labels": ["age", "tags"], "group": "", "label_sep": "/"}
    assert columns("new.csv") == of_breed, "not label, whose usual name comes first"
    assert columns("new.csv", "--label", "label") == {"label": "label", "labels": None, "group": "", "label_sep": None}
    assert columns("other.csv")["labels"] is None, "another task's column never becomes the main one"
