"""Execute the notebooks for the documentation, into ``.cache/notebooks``; those in git have no outputs.

``python docs/notebooks.py`` runs those that changed since, minutes each, on generated images; ``make docs`` shows
what is there. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "notebooks"
CACHE = ROOT / ".cache" / "notebooks"
KEY = "vitrail_source"
"""Metadata of an executed notebook: the digest of the one it was made from."""


def executed(source: Path, cache: Path = CACHE) -> Path | None:
    """Return the executed version of a notebook, where it is that of its present content."""
    made = cache / source.name
    if not made.is_file():
        return None
    return made if nbformat.read(made, as_version=4).metadata.get(KEY) == digest(source) else None


def digest(source: Path) -> str:
    """Return the digest of a notebook's content."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def execute(source: Path, cache: Path = CACHE) -> Path:
    """Run a notebook in an empty folder and keep it with its outputs.

    Args:
        source: the notebook.
        cache: where the executed one goes.
    """
    from nbclient import NotebookClient

    notebook: Any = nbformat.read(source, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PYTHONPATH": str(ROOT), "VITRAIL_DATA": f"{folder}/none", "WANDB_MODE": "disabled"}
        resources = {"metadata": {"path": folder}}
        client: Any = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources)
        client.execute(env={**os.environ, **environment})
    for cell in notebook.cells:
        # Progress bars, notes of libraries, and this machine's folders.
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata[KEY] = digest(source)
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f".{source.name}.part"
    nbformat.write(notebook, partial)
    return partial.replace(cache / source.name)


def main() -> None:
    """Execute the notebooks that changed."""
    parser = argparse.ArgumentParser(description="Execute the notebooks for the documentation.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01_products (default: those that changed)")
    options = parser.parse_args()
    for source in sorted(SOURCE.glob("*.ipynb")):
        wanted = source.stem in options.names if options.names else executed(source) is None
        if wanted:
            print(f"{execute(source)}: executed")


if __name__ == "__main__":
    main()
