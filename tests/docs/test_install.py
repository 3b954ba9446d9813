"""What is installed: the Dockerfile's files, the extra that each library belongs to, the sizes in the docs."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.docs.blocks import ROOT
from tests.docs.test_wheel import PACKAGES, SOURCES
from vitrail.errors import EXTRAS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SIZES = runpy.run_path(str(ROOT / "docs" / "sizes.py"))
WITH_MESSAGES_OF_THEIR_OWN = {"bitsandbytes", "open_clip", "pillow_heif", "umap"}
"""Libraries of extras whose absence is reported where they are imported."""

ENVIRONMENT_ONLY = {"IPython", "torchao", "sweeps"}
"""Imported only where they are there already: a notebook, an exported model, W&B's own sweeps."""


def imported() -> set[str]:
    """Top-level modules of other projects that our packages import, at their head or inside of a function."""
    found = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(PACKAGES) - set(sys.stdlib_module_names)


def modules_of(name: str) -> set[str]:
    """Top-level modules of an installed distribution."""
    found = distribution(name)
    if declared := found.read_text("top_level.txt"):
        return set(declared.split())
    return {file.parts[0].partition(".")[0] for file in found.files or [] if file.suffix in (".py", ".so")}


def test_libraries_that_the_base_does_not_bring_belong_to_an_extra_that_is_named_where_missing() -> None:
    base = SIZES["closure"](map(Requirement, PROJECT["dependencies"]))
    outside = imported() - {name for one in base for name in modules_of(one)}
    assert {"optuna", "lancedb", "gradio"} <= outside
    assert outside - WITH_MESSAGES_OF_THEIR_OWN - ENVIRONMENT_ONLY <= set(EXTRAS)
    assert set(EXTRAS.values()) <= set(PROJECT["optional-dependencies"])


def test_the_closure_has_what_is_needed_of_what_is_needed_and_no_extras() -> None:
    found = SIZES["closure"]([Requirement("lightning")])
    assert {"lightning", "torch", "pytorch-lightning", "torchmetrics"} <= set(found)
    assert "pytest" not in found
    with_extra = SIZES["closure"]([Requirement("jsonargparse[signatures]")])
    assert {"docstring-parser", "typeshed-client"} <= set(with_extra)
    assert "docstring-parser" not in SIZES["closure"]([Requirement("jsonargparse")])


def test_sizes_are_those_of_the_files() -> None:
    rich = distribution("rich")
    folder = Path(str(rich.locate_file("rich")))
    ours = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert ours <= SIZES["size"](rich) <= ours + 200_000


def test_the_table_counts_each_group() -> None:
    text = SIZES["table"]({"base": {"nvidia-a": 2_000_000, "triton": 1_000_000, "torch": 5_000_000}, "app": {"g": 7e6}})
    rows = [line.split(" | ")[1:] for line in text.splitlines()[2:]]
    assert rows == [["2", "3", "nvidia-a 2, triton 1 |"], ["1", "5", "torch 5 |"], ["1", "7", "g 7 |"]]


def test_the_docs_list_every_extra_and_their_sizes() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    for extra in PROJECT["optional-dependencies"]:
        assert re.search(rf"^\| .*`{extra}`", page, re.MULTILINE), extra
    assert re.search(r"<!-- sizes -->\n\| \|.*\n(\|.*\n){5,}<!-- /sizes -->", page)


def test_docker_copies_what_the_wheel_is_built_from() -> None:
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [name for line in lines if re.match("COPY (?!--from)", line) for name in line.split()[1:-1]]
    assert {*SOURCES, *PACKAGES, "constraints.txt"} == set(copied)
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == set(copied)
    assert all((ROOT / name).exists() for name in copied)
    stages = re.findall(r"^FROM \S+ AS (\w+)", "\n".join(lines), re.MULTILINE)
    assert stages == ["build", "cpu", "cuda"]
    last = lines[max(place for place, line in enumerate(lines) if line.startswith("FROM")) :]
    assert "USER vitrail" in last
    assert not any(line.startswith(("RUN", "COPY")) for line in last[last.index("USER vitrail") :])


def test_docker_installs_extras_that_exist_and_docs_name_its_arguments() -> None:
    text = (ROOT / "Dockerfile").read_text()
    defaults = dict(re.findall(r'^ARG (\w+)=(?:"")?(.*)$', text, re.MULTILINE))
    assert set(defaults["EXTRAS"].split(",")) <= set(PROJECT["optional-dependencies"])
    page = (ROOT / "docs" / "install.md").read_text()
    assert set(re.findall(r"--build-arg (\w+)=", page)) == set(defaults)
