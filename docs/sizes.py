"""Write the table of installed sizes into ``docs/install.md``, from the packages of this environment.

``python docs/sizes.py`` reads each distribution's own list of files; nothing is downloaded. What the base dependencies
bring is not counted again with an extra.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "install.md"
EXTRAS = (
    "retrieval",
    "app",
    "export",
    "sweeps",
    "postgresql",
    "s3",
    "tensorboard",
    "mlflow",
    "heic",
    "open_clip",
    "quantized",
    "sentencepiece",
)
CUDA = re.compile(r"nvidia-|cuda-|triton$")
"""Libraries for NVIDIA GPUs, which PyTorch's wheels for CPUs do not need."""


def closure(requirements: Iterable[Requirement]) -> dict[str, Distribution]:
    """Return all installed distributions that requirements bring, by name."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(one, extra) for one in requirements for extra in (one.extras or {""})]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found[name] = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        for text in found[name].requires or []:
            one = Requirement(text)
            if one.marker is None or any(one.marker.evaluate({"extra": name}) for name in {"", extra}):
                todo += [(one, further) for further in ({""} | one.extras)]
    return found


def size(one: Distribution) -> int:
    """Return the bytes of a distribution's files, without byte code."""
    paths = [Path(str(file.locate())) for file in one.files or [] if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.is_file())


def groups(project: Mapping[str, object]) -> dict[str, dict[str, int]]:
    """Return the bytes of each package by group: ``base``, then what each extra adds to it.

    Args:
        project: the table ``[project]`` of ``pyproject.toml``.
    """
    dependencies, extras = project["dependencies"], project["optional-dependencies"]
    assert isinstance(dependencies, list)
    assert isinstance(extras, dict)
    base = closure(map(Requirement, dependencies))
    sizes = {"base": {name: size(one) for name, one in base.items()}}
    for extra in EXTRAS:
        own = [Requirement(text) for text in extras[extra]]
        nested = [
            Requirement(text)
            for one in own
            if one.name == project["name"]
            for name in one.extras
            for text in extras[name]
        ]
        added = closure([one for one in [*own, *nested] if one.name != project["name"]])
        sizes[extra] = {name: size(one) for name, one in added.items() if name not in base}
    return sizes


def table(sizes: Mapping[str, Mapping[str, int]], largest: int = 8) -> str:
    """Return the table as Markdown."""
    base = sizes["base"]
    cuda = {name: value for name, value in base.items() if CUDA.match(name)}
    rest = {name: value for name, value in base.items() if name not in cuda}
    rows = [
        ("CUDA's libraries and Triton, with the regular PyTorch wheel", cuda),
        ("all other base dependencies", rest),
    ]
    rows += [(f"extra `{name}`, in addition", values) for name, values in sizes.items() if name != "base"]
    lines = ["| | packages | MB | largest |", "| --- | --- | --- | --- |"]
    for title, values in rows:
        order = sorted(values, key=lambda name: -values[name])[: largest if values is rest else 3]
        named = ", ".join(f"{name} {_megabytes(values[name])}" for name in order)
        lines.append(f"| {title} | {len(values)} | {_megabytes(sum(values.values()))} | {named} |")
    return "\n".join(lines) + "\n"


def _megabytes(number: int) -> str:
    return f"{number / 1e6:,.0f}"


def main() -> None:
    """Write the table, or print it."""
    parser = argparse.ArgumentParser(description="Write the table of installed sizes into docs/install.md.")
    parser.add_argument("--print", action="store_true", help="print it instead")
    options = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = table(groups(project))
    if options.print:
        sys.stdout.write(text)
        return
    marked = re.compile(r"(<!-- sizes -->\n).*?(<!-- /sizes -->)", re.DOTALL)
    page = marked.sub(lambda found: f"{found[1]}{text}{found[2]}", PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
