"""Every notebook runs from top to bottom, on generated data, and is committed without outputs."""

from __future__ import annotations

import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.forks import run_program

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {
    "01_products": {"SAMPLES": 60, "EPOCHS": 2},
    "02_dual_encoders": {"SAMPLES": 96, "EPOCHS": 1},
    "03_retrieval": {"SAMPLES": 90, "EPOCHS": 1},
    "04_evidence": {"SAMPLES": 60, "EPOCHS": 1, "LOOKED_AT": 12},
    "05_generative_and_export": {"SAMPLES": 60, "EPOCHS": 1, "CLASSIFIER_EPOCHS": 1},
}
"""Values of each notebook's cell of parameters with which it takes seconds."""


def test_every_notebook_has_a_small_version() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(SMALL)
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        [parameters] = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        names, _ = parameters.source.split(" = ")
        assert names.split(", ") == list(SMALL[path.stem])


@pytest.mark.parametrize(
    "path",
    [path if path.stem.startswith("03") else pytest.param(path, marks=pytest.mark.slow) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_small_notebook_runs(path: Path, tmp_path: Path) -> None:
    parameters = "\n".join(f"{name} = {value}" for name, value in SMALL[path.stem].items())
    environment = {"VITRAIL_DATA": str(tmp_path / "nothing"), "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    run_program("tests.notebooks.in_process", str(path), str(tmp_path), parameters, environment=environment)
    assert (tmp_path / "done").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in printed)


def test_the_site_shows_an_executed_notebook_only_while_it_is_that_of_its_source(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))
    source = tmp_path / "sum.ipynb"
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell("import sys; print('note', file=sys.stderr)\n1 + 1")]
        ),
        source,
    )
    assert script["executed"](source, tmp_path / "cache") is None
    made = script["execute"](source, tmp_path / "cache")
    assert made == script["executed"](source, tmp_path / "cache")
    [cell] = nbformat.read(made, as_version=4).cells
    [output] = cell.outputs
    assert output["data"]["text/plain"] == "2"
    assert not nbformat.read(source, as_version=4).cells[0].outputs
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 2")]), source)
    assert script["executed"](source, tmp_path / "cache") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
