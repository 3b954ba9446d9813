"""Experiment files mean the same in every command: merged key by key, with one seed, texts as they are written."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import get_loader

from datamodules.__main__ import main as datamodules_main
from datamodules.cli import data_parser, load_datamodule, parse_data
from datamodules.files.label_csv import VocabularyOptions
from datamodules.options import CheckOptions, ImageOptions
from datamodules.splits import SplitOptions
from datamodules.table_file import Table
from experiments.train.cli import main
from tests.support.data import write_image_folder, write_products
from vitrail.config import dump_yaml, load_yaml, merged, text_arguments
from vitrail.errors import UserError
from vitrail.types import DEFAULT_SEED

BASE = """
data:
  class_path: datamodules.Products
  init_args:
    image: {size: 32, crop_fraction: 0.8}
    split: {by: group, seed: 7}
    checks: {on_bad_image: skip}
    vocabulary: {aliases: {colour: {no: none, 1: 001}}}
model:
  class_path: lightning_modules.MultiTaskClassifier
  init_args: {backbone: test_resnet, pretrained: false, lr: 1e-2, optim_options: {layer_decay: 0.7}}
"""
OVERLAY = """
data:
  init_args:
    image: {size: 24}
    split: {val_fraction: 0.3}
    checks: {allow_leaks: [near]}
    vocabulary: null
model: {init_args: {optim_options: {warmup_epochs: 1}}}
trainer.max_epochs: 3
"""


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """``--config`` of an experiment and of an overlay."""
    write_products(tmp_path / "data")
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "over.yaml").write_text(OVERLAY)
    return ["--config", str(tmp_path / "base.yaml"), "--config", str(tmp_path / "over.yaml")]


def fit_config(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What ``fit`` makes of its arguments."""
    with contextlib.suppress(SystemExit):
        assert main(["fit", *args, "--print_config"]) == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def test_a_second_file_is_merged_key_by_key_in_fit_and_in_audit(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fit = fit_config(files, capsys)
    data = fit["data"]["init_args"]
    assert ImageOptions.of(data["image"]) == ImageOptions(size=24, crop_fraction=0.8)
    assert SplitOptions.of(data["split"]) == SplitOptions(by="group", seed=7, val_fraction=0.3)
    assert CheckOptions.of(data["checks"]) == CheckOptions(on_bad_image="skip", allow_leaks=["near"])
    assert VocabularyOptions.of(data["vocabulary"]) == VocabularyOptions(), "null resets it"
    optim = fit["model"]["init_args"]["optim_options"]
    assert (optim["layer_decay"], optim["warmup_epochs"]) == (0.7, 1)
    assert fit["trainer"]["max_epochs"] == 3
    _, audit = parse_data(data_parser("test"), files)
    for key in ("image", "split", "checks", "vocabulary"):
        assert vars(audit.data.init_args[key]) == data[key]


def test_flags_have_the_last_word_wherever_they_stand(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flag = ["--data.init_args.image.size", "40"]
    first, last = (fit_config(args, capsys)["data"]["init_args"]["image"] for args in (flag + files, files + flag))
    assert ImageOptions.of(first) == ImageOptions.of(last) == ImageOptions(size=40, crop_fraction=0.8)
    datamodule, _ = parse_data(data_parser("test"), flag + files)
    assert datamodule.image_options["size"] == 40


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": [1, 2]}, {"a+": 3}, {"a": [1, 2, 3]}),
        ({"a+": [1]}, {"a+": [2, 3]}, {"a+": [1, 2, 3]}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": None}}, {"a": {"b": None, "c": 2}}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"init_args": {"a": {"b": 1, "c": 2}}}, {"init_args": {"a": {"b": None}}}, {"init_args": {"a": {"c": 2}}}),
        ({"init_args": {"a": 1}}, {"init_args": {"a": None}}, {"init_args": {"a": None}}),
        (
            {"class_path": "datamodules.Wares", "init_args": {"x": 1}},
            {"class_path": "Wares", "init_args": {"y": 2}},
            {"class_path": "Wares", "init_args": {"x": 1, "y": 2}},
        ),
        (
            {"class_path": "datamodules.Wares", "init_args": {"x": 1}},
            {"class_path": "datamodules.Products", "init_args": {"y": 2}},
            {"class_path": "datamodules.Products", "init_args": {"y": 2}},
        ),
    ],
)
def test_merging(first: dict[str, Any], second: dict[str, Any], both: dict[str, Any]) -> None:
    assert merged(first, second) == both


@pytest.mark.parametrize(
    ("args", "seed"), [([], DEFAULT_SEED), (["--seed_everything", "7"], 7), (["--config", "seed_everything: 9"], 9)]
)
def test_one_seed_for_fit_and_audit(
    args: list[str], seed: int, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_config(files + args, capsys)["seed_everything"] == seed
    datamodule, _ = parse_data(data_parser("test"), files + args)
    assert datamodule.seed == seed


@pytest.mark.parametrize("args", [["--data.init_args.seed", "3"], ["--config", "data: {init_args: {seed: 3}}"]])
def test_a_seed_of_the_data_alone_is_refused(
    args: list[str], files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In ``fit`` it would silently be that of the run."""
    assert main(["fit", *files, *args]) == 2
    assert "set seed_everything instead" in capsys.readouterr().err
    with pytest.raises(UserError, match="set seed_everything instead"):
        parse_data(data_parser("test"), files + args)


def test_texts_arrive_as_written(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    base = files[:2]
    aliases = {"colour": {"no": "none", "1": "001"}}
    assert fit_config(base, capsys)["data"]["init_args"]["vocabulary"]["aliases"] == aliases
    assert parse_data(data_parser("test"), base)[1].data.init_args.vocabulary.aliases == aliases
    flag = ["--data.init_args.vocabulary", "{aliases: {lamp: {off: 1e3, on: True, 2: 2020-01-01}}}"]
    as_flag = {"lamp": {"off": "1e3", "on": "True", "2": "2020-01-01"}}
    assert fit_config(base + flag, capsys)["data"]["init_args"]["vocabulary"]["aliases"] == as_flag
    assert parse_data(data_parser("test"), [*base, "=".join(flag)])[1].data.init_args.vocabulary.aliases == as_flag
    short = ["--data.attributes", "[off, 007, null]"]
    assert fit_config(base + short, capsys)["data"]["init_args"]["attributes"] == ["off", "007", "null"]


def test_yaml_is_read_as_the_newer_standard_has_it() -> None:
    values = load_yaml("{a: off, b: true, c: 1e-4, d: 12, e: ~, f: 001, g: 1.5, h: .inf, 3: 2020-01-01, on: yes}")
    wanted = {"a": "off", "b": True, "c": 1e-4, "d": 12, "e": None, "f": "001", "g": 1.5, "h": float("inf")}
    assert values == {**wanted, "3": "2020-01-01", "on": "yes"}
    assert load_yaml(dump_yaml(values)) == values
    assert load_yaml("&x {a: 1, b: &y {c: 1}, d: {<<: *y, e: 2}}")["d"] == {"c": 1, "e": 2}
    with pytest.raises(yaml.YAMLError, match="'a' occurs twice"):
        load_yaml("{a: 1, a: 2}")


def test_text_arguments() -> None:
    assert {"vocabulary", "columns", "splits", "attributes", "prompts", "root", "labels"} <= text_arguments()
    assert not {"image", "split", "loader", "augment", "seed", "rare"} & text_arguments()


def test_a_section_without_values_stays_a_section() -> None:
    """jsonargparse reads back what it has written: nulls alone are no text in braces."""
    assert get_loader("yaml")("{root: null, rare: null}") == {"root": None, "rare": None}
    assert get_loader("yaml")("root: null\n") == {"root": None}
    assert get_loader("yaml")("{name}") == "{name}"


def test_the_seed_of_a_fit_is_known_to_commands_that_read_data(files: list[str], tmp_path: Path) -> None:
    from evaluation.__main__ import main as evaluation

    command = ["explore", *files, "--seed_everything", "7", "--to", str(tmp_path / "page"), "--images", "0"]
    assert evaluation(command) == 2, "a later check refuses the zero"
    parser = data_parser("test")
    assert parse_data(parser, [*files, "--seed_everything=7"])[0].seed == 7


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VITRAIL_DEBUG", raising=False)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def wares(tmp_path: Path) -> str:
    text = (
        "seed_everything: 3\nmodel: {class_path: no.such.Model}\ntrainer: {max_epochs: 5}\n"
        "data:\n  class_path: datamodules.Wares\n  init_args: {n_samples: 90, views: 3, image: {size: 32}}\n"
    )
    return write(tmp_path / "wares.yaml", text)


@pytest.fixture
def products(tmp_path: Path) -> str:
    """Products whose first image is in the test split as well."""
    root = write_products(tmp_path / "products")
    images = sorted((root / "images").iterdir())
    shutil.copy(images[0], images[-1])
    data = f"{{class_path: datamodules.Products, init_args: {{root: {root}}}}}"
    return write(tmp_path / "products.yaml", f"data: {data}\n")


def test_a_clean_data_set(wares: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert datamodules_main(["audit", "--config", wares]) == 0
    printed = capsys.readouterr()
    assert "samples" in printed.out
    assert "soap dispenser" in printed.out
    assert "groups in several splits: none" in printed.out
    assert printed.err == ""


def test_later_files_and_flags_change_single_values(wares: str, tmp_path: Path) -> None:
    overlay = write(tmp_path / "overlay.yaml", "data: {init_args: {n_samples: 60, image: {crop_fraction: 0.9}}}\n")
    report = tmp_path / "report.json"
    arguments = ["--config", overlay, "--data.val_fraction", "0.4", "--json", str(report)]
    assert datamodules_main(["audit", f"--config={wares}", *arguments]) == 0
    assert json.loads(report.read_text(encoding="utf-8"))["samples"] == {"train": 24, "val": 24, "test": 12}


def test_another_class_does_not_inherit_arguments(wares: str, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "folder")
    other = write(
        tmp_path / "other.yaml",
        f"data: {{class_path: datamodules.ImageFolder, init_args: {{root: {root}}}}}\n",
    )
    assert datamodules_main(["audit", "--config", wares, "--config", other]) == 0


def test_the_seed_of_the_run_divides_as_in_the_run(tmp_path: Path) -> None:
    root = write_products(tmp_path / "products", instances=8)
    part = f"data: {{class_path: datamodules.Products, init_args: {{root: {root}, split: {{by: group}}}}}}\n"
    fingerprints = []
    for seed in ("", "seed_everything: 1\n", "seed_everything: 2\n"):
        config = write(tmp_path / "config.yaml", seed + part)
        assert datamodules_main(["audit", "--config", config, "--json", str(tmp_path / "report.json")]) == 0
        report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        fingerprints.append(report["fingerprint"])
    assert len(set(fingerprints)) == 3


def test_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert datamodules_main(["audit", "--data", "datamodules.Wares", "--data.n_samples", "60"]) == 0
    assert datamodules_main(["audit"]) == 2
    assert "data" in capsys.readouterr().err


def test_leaks_are_printed_and_then_refused(products: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "deep" / "report.json"
    assert datamodules_main(["audit", "--config", products, "--json", str(report)]) == 2
    printed = capsys.readouterr()
    assert "identical images across splits: 1 (not allowed)" in printed.out
    assert printed.err.startswith("error: ")
    assert "allow_leaks: [exact]" in printed.err
    assert len(json.loads(report.read_text(encoding="utf-8"))["leaks"]["exact"]) == 1
    assert datamodules_main(["audit", "--config", products, "--data.checks", "{allow_leaks: [exact]}"]) == 0
    assert "identical images across splits: 1 (allowed)" in capsys.readouterr().out


def test_unreadable_images_are_printed_and_then_refused(
    products: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted((tmp_path / "products" / "images").iterdir())[-25:]:
        path.write_bytes(b"")
    assert datamodules_main(["audit", "--config", products]) == 2
    printed = capsys.readouterr()
    assert "unreadable images: 25 (not allowed)" in printed.out
    assert "and 5 more" in printed.out
    assert "on_bad_image: skip" in printed.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {}\n", "has no data: part"),
        ("just text\n", "holds no keys"),
        ("data: [1, 2\n", "not a YAML file"),
        ("data: {class_path: datamodules.Wares, init_args: {n_samples: 0}}\n", "data n_samples: is 0"),
        ("data: {class_path: datamodules.Wares, init_args: {sizes: 3}}\n", "sizes"),
        ("data: {class_path: datamodules.Nothing}\n", "datamodules.Nothing"),
        ("data: {class_path: datamodules.Products, init_args: {root: /no/such/folder}}\n", "no folder /no/such/folder"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert datamodules_main(["audit", "--config", write(tmp_path / "wrong.yaml", text)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_files_that_cannot_be_read_or_written(wares: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert datamodules_main(["audit", "--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: --config nowhere.yaml: No such file or directory; give an")
    assert datamodules_main(["audit", "--config", wares, "--json", f"{wares}/report.json"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_table_is_a_source_of_data_like_a_folder() -> None:
    assert isinstance(load_datamodule("photos/LABELS.CSV"), Table)
