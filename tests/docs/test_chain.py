"""The commands of README and docs that any machine can run, one page after another, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from datamodules.wares import ware_spec
from datamodules.wares.render import draw_ware
from tests.docs.blocks import ROOT, Block, blocks

SMALL = {
    "fit --data": "--backbone test_resnet --pretrained false --epochs 2",
    "fit --config experiments/quickstart.yaml": "--trainer.max_epochs 1 --data.init_args.n_samples 300",
    "fit --config experiments/quickstart_labels.yaml": "--trainer.max_epochs 1 --data.init_args.n_samples 300",
}
"""What commands that begin so are given too, so that they take seconds."""

FIRST = ("docs/quickstart.md", "README.md", "docs/guides/your_images.md")
"""Pages whose runs the others use, in this order."""


def write_images(folder: Path) -> None:
    """``photos/`` and ``other/`` with class folders, ``new_photos/`` without, ``labels.csv`` and ``photo.jpg``."""
    rows = ["file,class,kind,colour,object"]
    for name, seed, number in (("photos", 0, 150), ("other", 1, 30), ("new_photos", 2, 10)):
        for index in range(number):
            spec = ware_spec(seed, index)
            path = folder / name / (spec.kind if name != "new_photos" else "") / f"{index:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_ware(spec, index, 64)).save(path)
            if name == "photos":
                rows.append(f"{path.relative_to(folder)},{spec.kind},{spec.kind},{spec.colour},{index}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "photo.jpg").write_bytes((folder / "new_photos" / "0000.jpg").read_bytes())


def with_small_settings(line: str) -> str:
    command, comment, rest = line.partition(" #")
    added = [options for start, options in SMALL.items() if command.removeprefix("vitrail ").startswith(start)]
    return f"{command} {' '.join(added)}{comment}{rest}"


def script_of(block: Block, run: str) -> str:
    """What ``bash`` or Python is given: small settings, and the run in place of RUN."""
    code = block.code
    if block.language == "bash":
        code = "\n".join(map(with_small_settings, code.splitlines()))
        code = 'vitrail() { "$PYTHON" -m vitrail "$@"; }\npython() { "$PYTHON" "$@"; }\n' + code
    return re.sub(r"\bRUN\b", run, code)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_commands_of_the_docs_run_in_an_empty_folder(tmp_path: Path) -> None:
    write_images(tmp_path)
    environment = {
        **os.environ,
        **{"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "WANDB_MODE": "disabled"},
        **{"VITRAIL_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    }
    todo = [block for block in blocks("bash", "python") if not block.needs]
    todo.sort(key=lambda block: FIRST.index(block.page) if block.page in FIRST else len(FIRST))
    for block in todo:
        name = "quickstart" if block.page == "docs/quickstart.md" else "photos"
        # A page may begin with the command that makes its run, so RUN is looked up before each line.
        lines = re.split(r"(?<!\\)\n", block.code.strip()) if block.language == "bash" else [block.code]
        for line in lines:
            runs = sorted((tmp_path / "runs" / name).glob("*/"))
            run = str(runs[-1].relative_to(tmp_path)) if runs else "RUN"
            program = ["bash", "-e", "-c"] if block.language == "bash" else [sys.executable, "-c"]
            script = script_of(block._replace(code=line), run)
            done = subprocess.run(
                [*program, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            sys.stderr.write(f"{block.page}: {line.strip()}\n")
            assert done.returncode == 0, f"{block.page}: {line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert len(todo) > 15
