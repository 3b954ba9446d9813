"""The examples in the docstrings of the core, and what importing it costs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vitrail
from tests.support.runs import products_run

MODULES = ["vitrail", *(f"vitrail.{module.name}" for module in pkgutil.iter_modules(vitrail.__path__))]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Names that the examples use: a directory of runs with a finished one, and an image."""
    runs = tmp_path_factory.mktemp("runs")
    run = runs / "tiny" / "20260101-120000"
    shutil.copytree(products_run(), run)
    (run / "checkpoints" / "calibration.json").unlink()
    photo = next(path for path in (products_run().parents[2]).rglob("*.jpg"))
    return {"runs": runs, "photo": photo}


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name: str, example: dict[str, Any]) -> None:
    failures, _ = doctest.testmod(importlib.import_module(name), extraglobs=example)
    assert failures == 0


def test_the_core_is_quick_to_import() -> None:
    program = (
        "import sys, vitrail, vitrail.runs, vitrail.files, vitrail.errors, vitrail.types, vitrail.console; "
        "print([name for name in ('torch', 'pandas', 'pyarrow', 'scipy', 'lightning', 'datamodules') "
        "if name in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert found.stdout.strip() == "[]"


def test_the_api_is_found_lazily() -> None:
    assert vitrail.Run is importlib.import_module("vitrail.runs").Run
    assert vitrail.Gallery is importlib.import_module("retrieval.gallery").Gallery
    assert vitrail.__version__
    assert {"Gallery", "Run"} <= set(dir(vitrail))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = vitrail.Nothing
