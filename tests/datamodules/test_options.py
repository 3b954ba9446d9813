from __future__ import annotations

import io
from argparse import ArgumentError
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from datamodules.base import ImageDataModule
from datamodules.captions import PromptOptions
from datamodules.options import AugmentOptions, CheckOptions, ImageOptions, LoaderOptions, Options
from datamodules.splits import SplitOptions
from tests.support.data import from_yaml
from vitrail.errors import UserError, one_line

WRONG: list[tuple[type[Options], dict[str, Any], str]] = [
    (ImageOptions, {"size": 1}, r"data image.size: must be >=2; got 1"),
    (ImageOptions, {"size": "big"}, r"data image.size: must be >=2; got 'big'"),
    (ImageOptions, {"crop_fraction": 0.0}, r"data image.crop_fraction: must be >0 and <=1; got 0.0"),
    (ImageOptions, {"crop_fraction": 1.5}, r"data image.crop_fraction"),
    (ImageOptions, {"resize": "stretch"}, r"data image.resize: must be one of crop, squash, pad; got 'stretch'"),
    (ImageOptions, {"interpolation": "nearest"}, r"data image.interpolation"),
    (ImageOptions, {"crop_rounding": "up"}, r"data image.crop_rounding"),
    (ImageOptions, {"value_range": [3.0, 1.0]}, r"data image.value_range: must be auto, dtype, or \[lo, hi\]"),
    (ImageOptions, {"value_range": "all"}, r"data image.value_range: must be one of dtype, auto or a list"),
    (ImageOptions, {"sise": 3}, r"data image: unknown key 'sise'; known keys are size, resize"),
    (LoaderOptions, {"batch_size": 0}, r"data loader.batch_size: must be >0; got 0"),
    (LoaderOptions, {"batch_size": True}, r"data loader.batch_size"),
    (LoaderOptions, {"num_workers": -1}, r"data loader.num_workers: must be >=0 or one of auto; got -1"),
    (LoaderOptions, {"sampling": "some"}, r"data loader.sampling"),
    (LoaderOptions, {"contrastive_batch_size": 8}, r"contrastive_batch_size: must be 0 or at least .*32; got 8"),
    (LoaderOptions, {"cache_limit_gb": 0}, r"data loader.cache_limit_gb"),
    (LoaderOptions, {"cache": "on"}, r"data loader.cache: must be one of auto, always, never; got 'on'"),
    (LoaderOptions, {"predict": []}, r"data loader.predict: must be at least one of train, val, test"),
    (LoaderOptions, {"predict": ["all"]}, r"data loader.predict: must be a list, each one of train, val, test"),
    (LoaderOptions, {"drop_last": "yes"}, r"data loader.drop_last: must be of type bool"),
    (CheckOptions, {"on_bad_image": "blank"}, r"data checks.on_bad_image"),
    (CheckOptions, {"allow_leaks": ["all"]}, r"data checks.allow_leaks"),
    (AugmentOptions, {"preset": "heavy"}, r"data augment.preset: must be one of none, light, reference"),
    (AugmentOptions, {"hue": 0.7}, r"data augment.hue: must be >=0 and <=0.5; got 0.7"),
    (AugmentOptions, {"mixup": -1.0}, r"data augment.mixup: must be >=0; got -1.0"),
    (AugmentOptions, {"erasing_scale": []}, r"data augment.erasing_scale: must be \[smallest, largest\]"),
    (AugmentOptions, {"random_resized_crop": [1.0, 0.5]}, r"data augment.random_resized_crop"),
    (SplitOptions, {"by": "magic"}, r"data split.by: must be one of table, random"),
    (SplitOptions, {"val_fraction": 1.0}, r"data split.val_fraction: must be >=0 and <1; got 1.0"),
    (SplitOptions, {"val_fraction": 0.5, "test_fraction": 0.5}, r"leave nothing for train"),
    (SplitOptions, {"fold": 5}, r"data split.fold: must be below split.n_folds, 5; got 5"),
    (SplitOptions, {"n_folds": 2}, r"data split.n_folds: must be >=3; got 2"),
    (PromptOptions, {"name": "art"}, r"data prompts.name: must be one of photo, name"),
    (PromptOptions, {"templates": ["a photo"]}, r"data prompts.templates: 'a photo' must have \{\} once"),
]


@pytest.mark.parametrize(("kind", "values", "message"), WRONG)
def test_values_that_do_not_fit_are_refused_in_one_line(
    kind: type[Options], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        kind.of(values)
    assert "\n" not in str(error.value)


def test_presets_can_be_overridden_key_by_key() -> None:
    options = AugmentOptions(preset="reference", rotation=5.0).filled()
    assert (options.rotation, options.translate, options.erasing_scale) == (5.0, 0.1, [0.02, 0.33])
    assert options.filled() == options
    assert options.is_random
    assert not AugmentOptions(mixup=1.0).filled().is_random


def test_the_lists_of_a_caller_are_copied() -> None:
    mine: list[Any] = ["near"]
    options = CheckOptions(allow_leaks=mine)
    mine.append("exact")
    assert options.allow_leaks == ["near"]


def parse(*arguments: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    return parser.instantiate(parser.parse_args(["--data=datamodules.Wares", *arguments])).data


@pytest.mark.parametrize("below", ["data.init_args", "data"])
def test_flags_and_yaml_keys_of_version_0_1_work(below: str) -> None:
    data = parse(f"--{below}.image.size=32", f"--{below}.loader.batch_size", "7", f"--{below}.augment.preset=light")
    assert data.image_size == 32
    assert data.loader_options == LoaderOptions(batch_size=7)
    assert data.hparams["loader"] == asdict(LoaderOptions(batch_size=7))
    assert type(data.hparams["loader"]["batch_size"]) is int
    assert data.augment_options.random_resized_crop == [0.8, 1.0]
    assert parse(f"--{below}.prompts.name=name").prompts == PromptOptions("name")
    assert parse(f"--{below}.prompts=imagenet_80").prompts == PromptOptions("imagenet_80")
    written = from_yaml("""
class_path: datamodules.Wares
init_args:
  image: {size: 32, value_range: [0, 4095]}
  checks: {allow_leaks: [near], missing: [none]}
  prompts: {templates: ["one {}"]}
""")
    assert written.image_options["value_range"] == [0, 4095]
    assert written.check_options.missing == ["none"]
    assert written.prompts == PromptOptions(templates=["one {}"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("image.size=1", "data.image.size (datamodules.Wares): must be >=2; got 1"),
        ("augment.hue=0.7", "data.augment.hue (datamodules.Wares): must be >=0 and <=0.5; got 0.7"),
        ("loader.cache=on", "data.loader.cache (datamodules.Wares): must be one of auto, always, never; got on"),
        ("loader.shuffle=3", "data (datamodules.Wares): unrecognized arguments: --loader.shuffle=3"),
    ],
)
def test_the_command_line_refuses_them_by_key_with_the_range(flag: str, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        parse(f"--data.{flag}")
    assert one_line(str(error.value)).startswith(message)


def test_help_shows_defaults_and_ranges() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    shown = io.StringIO()
    with pytest.raises(SystemExit), redirect_stdout(shown):
        parser.parse_args(["--data.help=datamodules.Products"])
    text = " ".join(shown.getvalue().split())
    assert "side of the square image in pixels, at least 2. (type: int_ge2, default: 224)" in text
    assert "(type: PositiveInt, default: 32)" in text
    assert "Literal['error', 'skip'], default: error)" in text
