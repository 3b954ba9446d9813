"""The wheel alone, as a newcomer has it: an empty folder, images and tables of one's own, the commands of the docs."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from tests.docs.blocks import ROOT
from tests.docs.test_chain import write_images
from tests.support.models import write_clip

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
PACKAGES = (
    *("app", "callbacks", "datamodules", "evaluation", "experiments", "lightning_modules", "retrieval"),
    "vitrail",
)
SMALL = "--backbone test_resnet --pretrained false --epochs 2 --data.init_args.image.size 32"
PATIENCE = 600
"""Seconds until the application is served."""


def build(folder: Path) -> Path:
    """A wheel, built from a copy of the sources, so that nothing of an earlier build is in it."""
    copy = folder / "source"
    copy.mkdir()
    for name in SOURCES:
        shutil.copyfile(ROOT / name, copy / name)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    found = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--absolute-git-dir"], capture_output=True, text=True, check=False
    )
    if found.returncode == 0:
        (copy / ".git").write_text(f"gitdir: {found.stdout}")
    command = "-m pip wheel --quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check -w"
    subprocess.run([sys.executable, *command.split(), str(folder), str(copy)], check=True, env=OFFLINE)
    [wheel] = folder.glob("*.whl")
    return wheel


OFFLINE = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VITRAIL_DATA")} | {
    "WANDB_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


class Shell:
    """Command lines in a folder, with the wheel's packages before those that the tests run with."""

    def __init__(self, folder: Path, packages: Path) -> None:
        self.folder = folder
        self.environment = {**OFFLINE, "PYTHONPATH": str(packages), "VITRAIL_CACHE": str(folder / "cache")}

    def __call__(self, line: str, expected: int = 0) -> str:
        words = ["python", "-m", *shlex.split(line)] if line.startswith("vitrail ") else shlex.split(line)
        sys.stderr.write(f"$ {line}\n")
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == expected, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def shell(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    folder, packages = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    for name in ("app", "callbacks", "experiments"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('a folder of the user, not the package')\n")
    write_images(folder)
    return Shell(folder, packages)


def run_of(shell: Shell, name: str) -> str:
    [run] = (shell.folder / "runs" / name).iterdir()
    return f"runs/{name}/{run.name}"


@pytest.mark.slow
def test_the_wheel_has_all_packages_files_and_the_revision(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        revision = json.loads(archive.read("vitrail/build.json"))["revision"]
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", *PACKAGES], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {path for path in tracked if (ROOT / path).exists() and not path.endswith(".md")} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert revision == head.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_folder_is_trained_predicted_evaluated_indexed_searched_exported_and_served(shell: Shell) -> None:
    assert str(ROOT) not in shell("python -c 'import vitrail; print(vitrail.__file__)'")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert shell("vitrail --version").strip() == f"vitrail {version}"
    assert "Next:" in shell(f"vitrail fit --data photos/ {SMALL}")
    run = run_of(shell, "photos")
    assert "new_photos/0000.jpg" in shell(f"vitrail predict {run} new_photos/ --top 3")
    shell(f"vitrail predict {run} 'new_photos/*.jpg' labels.csv --top 3 --to predictions.csv")
    assert len(pd.read_csv(shell.folder / "predictions.csv")) == 160
    assert f"{run}/evaluations/other" in shell(f"vitrail evaluate {run} --data other/")
    assert "150 added" in shell(f"vitrail index --run {run}")
    shell(f'vitrail search --gallery {run}/gallery "mug" --words label --top-k 5 --html sheet.html')
    assert (shell.folder / "sheet.html").stat().st_size > 1000
    shell(f"vitrail export {run}")
    assert "class:" in shell(f"python {run}/export/onnx/predict.py photo.jpg --top 3")
    recorded = json.loads((shell.folder / run / "run.json").read_text())
    assert recorded["git"]["revision"], "the wheel's revision"
    with served(shell, run) as page:
        assert '"og:title" content="Vitrail"' in page


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_table_with_odd_columns_is_trained_predicted_and_evaluated(shell: Shell) -> None:
    table = pd.read_csv(shell.folder / "labels.csv").head(90)
    odd = {"file": "Datei Name", "kind": "Was (deutsch)", "colour": "Farbe", "object": "Nr."}
    table.rename(columns=odd)[list(odd.values())].to_csv(shell.folder / "odd.csv", sep=";", index=False)
    refused = shell("vitrail fit --data odd.csv", expected=2)
    assert refused.strip().count("\n") == 0
    assert "--image COLUMN" in refused
    columns = "--image 'Datei Name' --label 'Was (deutsch)'"
    shell(f"vitrail fit --data odd.csv {columns} --labels Farbe --group Nr. {SMALL}")
    run = run_of(shell, "odd")
    shell(f"vitrail predict {run} odd.csv --image 'Datei Name' --to odd.parquet")
    assert {"class", "Farbe"} <= set(pd.read_parquet(shell.folder / "odd.parquet"))
    assert "training split" in shell(f"vitrail evaluate {run} --data odd.csv {columns}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_captions_are_trained_evaluated_indexed_searched_and_exported(shell: Shell) -> None:
    write_clip(shell.folder / "tiny_clip")
    table = pd.read_csv(shell.folder / "labels.csv").head(60)
    texts = [[f"a {one.colour} {one.kind}", f"number {number}"] for number, one in enumerate(table.itertuples())]
    pd.DataFrame({"photo": table["file"], "sentences": texts}).to_parquet(shell.folder / "captions.parquet")
    columns = "--image photo --caption sentences"
    shell(
        f"vitrail fit --data captions.parquet {columns} --backbone tiny_clip --epochs 1 --data.init_args.image.size 32"
    )
    run = run_of(shell, "captions")
    assert "vitrail index" in shell(f"vitrail predict {run} new_photos/", expected=2)
    assert "R@10" in shell(f"vitrail evaluate {run} --data captions.parquet {columns}")
    assert "60 added" in shell(f"vitrail index --run {run}")
    assert "vector" in shell(f'vitrail search --gallery {run}/gallery "a blue mug" --top-k 3')
    shell(f"vitrail search --gallery {run}/gallery --image photo.jpg --find captions --top-k 2")
    shell(f"vitrail export {run}")
    assert "a blue mug" in shell(f'python {run}/export/onnx/predict.py photo.jpg --text "a blue mug"')
    assert "--text" in shell(f"python {run}/export/onnx/predict.py photo.jpg", expected=2)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def served(shell: Shell, run: str) -> Iterator[str]:
    """The page of ``vitrail app --run RUN``, while it is served."""
    port, log = _free_port(), shell.folder / "app.log"
    command = [sys.executable, "-m", "vitrail", "app", "--run", run, "--port", str(port)]
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=shell.folder, env=shell.environment, stdout=output, stderr=output) as server,
    ):
        try:
            yield _page(f"http://127.0.0.1:{port}", server, log)
        finally:
            server.terminate()


def _page(url: str, server: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(PATIENCE):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError("the application is not served")
