"""Runs a notebook with other parameters, in a process that has imported what costs time; see ``test_notebooks.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from IPython.core.interactiveshell import InteractiveShell

from tests.support.plain_figures import plain_figures

if __name__ == "__main__":
    path, folder, parameters = sys.argv[1:]
    os.chdir(folder)
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    shell: Any = InteractiveShell.instance()
    with plain_figures():
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type != "code":
                continue
            shell.run_cell(cell.source).raise_error()
            if "parameters" in cell.metadata.get("tags", []):
                # As papermill does: what is set here follows the notebook's own values.
                shell.run_cell(parameters).raise_error()
    assert plt.get_fignums(), "the notebook has shown no figure"
    Path(folder, "done").touch()
