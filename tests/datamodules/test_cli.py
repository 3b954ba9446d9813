"""Experiment files mean the same in every command: merged key by key, with one seed, texts as they are written."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import get_loader

from datamodules.cli import data_parser, parse_data
from datamodules.files.label_csv import VocabularyOptions
from datamodules.options import CheckOptions, ImageOptions
from datamodules.splits import SplitOptions
from experiments.train.cli import main
from tests.support.data import write_products
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
