from __future__ import annotations

import inspect

import pytest

import lightning_modules
from lightning_modules.base import VisionTask


def test_all_names_can_be_had() -> None:
    for name in lightning_modules.__all__:
        assert getattr(lightning_modules, name).__name__ == name
    assert dir(lightning_modules) == sorted(lightning_modules.__all__)


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = lightning_modules.nothing


def test_tasks_take_no_more_than_twelve_arguments_and_none_unnamed() -> None:
    for name in ("ImageClassifier", "MultiTaskClassifier"):
        task = getattr(lightning_modules, name)
        assert issubclass(task, VisionTask)
        parameters = inspect.signature(task).parameters.values()
        assert len(parameters) <= 12
        assert not any(p.kind in {p.VAR_POSITIONAL, p.VAR_KEYWORD} for p in parameters)
