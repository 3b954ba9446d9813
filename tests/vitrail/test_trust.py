from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from lightning.pytorch import Callback

import callbacks
import datamodules
import lightning_modules
from datamodules.base import ImageDataModule
from lightning_modules.base import VisionTask
from vitrail.errors import UserError
from vitrail.runs import run_of_config
from vitrail.trust import PLUGINS, file_name, is_trusted, plain_name, refuse_foreign_code


@pytest.mark.parametrize(
    "name",
    [
        "../../x", "/tmp/x", "a/b", "a\\b", "..\\x", "", " ", ".", "..", ".hidden", "a\0b", "a\nb", "a\x1b[2J",
        "a\u2028b", "\ud800", " a", "a ", "nul", "CON.txt", "com1", "x" * 151, 3, None,
    ],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused_by_key(name: object) -> None:
    with pytest.raises(UserError, match=r"^--name: .*plain name") as refused:
        plain_name(name, "--name")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["tiny", "lr=0.1, 2", "Œuvre d'art", "a..b", "trial-0001", "console", "x" * 150])
def test_plain_names_are_kept(name: str) -> None:
    assert plain_name(name, "--name") == name


def test_file_names_are_plain() -> None:
    assert re.fullmatch("sub_category_type_[0-9a-f]{8}", file_name("sub category/type"))
    names = ["a b", "a_b", "a/b", "a?b", "a  b", "a-b", "a\u0301", "\xe1"]
    names += ["retrieval", "retrieval_", "class", "class_normalised"]
    assert len({file_name(name) for name in names}) == len(names)
    assert not {"retrieval", "class_normalised"} & {file_name(name) for name in names}
    assert file_name("colour") == "colour"
    assert "/" not in file_name("../../x")


@pytest.mark.parametrize(
    ("class_path", "trusted"),
    [
        ("datamodules.Products", True),
        ("datamodules.products.Products", True),
        ("lightning_modules.MultiTaskClassifier", True),
        ("evil.Products", False),
        ("datamodules_evil.Products", False),
        ("datamodules.base.torch.nn.Linear", False),
        ("datamodules", False),
        ("os.system", False),
        ("builtins.eval", False),
        ("lightning.pytorch.callbacks.LambdaCallback", False),
        ("LambdaCallback", False),
        ("", False),
        ("../datamodules.Products", False),
    ],
)
def test_only_classes_of_ours_are_trusted(class_path: str, trusted: bool) -> None:
    assert is_trusted(class_path) is trusted


def test_plugins_are_allowed_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_trusted("shop.data.Wares")
    monkeypatch.setenv(PLUGINS, "other, shop")
    assert is_trusted("shop.data.Wares")
    assert is_trusted("shop.Wares")
    assert not is_trusted("shopping.Wares")
    monkeypatch.setenv(PLUGINS, "shop.data")
    assert not is_trusted("shop.models.Wares")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"data": {"class_path": "evil.Data"}}, "data.class_path"),
        ({"data": "evil.Data"}, "data"),
        ({"model": "evil.yaml"}, "model"),
        (
            {"data": {"class_path": "datamodules.Wares", "init_args": {"x": [{"class_path": "evil.X"}]}}},
            "data.init_args.x",
        ),
        ({"data": {"class_path": "datamodules.Wares", "init_args": {"x": "{class_path: evil.X}"}}}, "data.init_args.x"),
        ({"data": {"class_path": ["evil.X"]}}, "data.class_path"),
        ({"trainer": {"strategy": {"class_path": "evil.Strategy"}}}, "trainer.strategy.class_path"),
    ],
)
def test_foreign_classes_are_refused_wherever_they_stand(content: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=r"^run/config.yaml: ") as refused:
        refuse_foreign_code(content, "run/config.yaml")
    assert key in str(refused.value)
    assert "evil" in str(refused.value)
    assert PLUGINS in str(refused.value)


def test_own_classes_and_plain_values_pass() -> None:
    refuse_foreign_code({"data": {"class_path": "datamodules.Wares", "init_args": {"n": 1, "x": ["a"]}}}, "c.yaml")


def test_what_is_allowed_further_goes_by_library_and_name() -> None:
    also = ("lightning.pytorch.callbacks.EarlyStopping",)
    for name in (
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
    ):
        refuse_foreign_code({"trainer": {"callbacks": [{"class_path": name}]}}, "c.yaml", also)
    for name in ("evil.EarlyStopping", "lightning.pytorch.callbacks.LambdaCallback"):
        with pytest.raises(UserError, match=name):
            refuse_foreign_code({"trainer": {"callbacks": [{"class_path": name}]}}, "c.yaml", also)


def test_the_configuration_of_a_run_differs_from_an_experiment_file(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "config.yaml").touch()
    assert run_of_config(run / "config.yaml") == run
    assert run_of_config(str(run / "config.yaml")) == run
    assert run_of_config(tmp_path / "config.yaml") is None
    assert run_of_config(run / "other.yaml") is None


def _parts(kind: Any) -> Iterator[Any]:
    if is_typeddict(kind) or is_dataclass(kind):
        for inner in get_type_hints(kind).values():
            yield from _parts(inner)
    elif get_origin(kind) is Literal or kind is ClassVar or get_origin(kind) is ClassVar:
        return
    elif get_origin(kind) in (Union, types.UnionType) or get_args(kind):
        origin = get_origin(kind)
        if origin not in (Union, types.UnionType):
            yield origin
        for inner in get_args(kind):
            yield from _parts(inner)
    elif hasattr(kind, "__value__"):
        yield from _parts(kind.__value__)
    elif isinstance(kind, type) and issubclass(kind, int | float):
        yield int  # one of jsonargparse's restricted numbers
    else:
        yield kind


# What Any may hold is a class only by a `class_path`, and that is refused wherever it stands.
_PLAIN = {str, int, float, bool, type(None), list, dict, tuple, ..., Sequence, Mapping, Any}
_BUILT = (Callback, ImageDataModule, VisionTask)


@pytest.mark.parametrize("package", [callbacks, datamodules, lightning_modules], ids=lambda package: package.__name__)
def test_no_argument_of_our_classes_can_name_code(package: types.ModuleType) -> None:
    """Trusting a class is trusting its arguments, too: none may be a function, a class or an instance of one."""
    exported = [getattr(package, name) for name in package.__all__]
    built = [one for one in exported if isinstance(one, type) and issubclass(one, _BUILT)]
    assert built
    for one in built:
        hints = {} if one.__init__ is object.__init__ else get_type_hints(one.__init__)
        for parameter, kind in hints.items():
            odd = [part for part in _parts(kind) if part not in _PLAIN]
            assert not odd, f"{one.__name__}.{parameter}: {odd}"
