"""Pages that mkdocs generates: the command line, from its parsers; the experiments, from their comments; notebooks."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mkdocs.plugins
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LOG = logging.getLogger("mkdocs.hooks.vitrail")
STAGES = ("validate", "test")
"""Commands with the options of ``fit``, which are not repeated."""

EXPERIMENTS = {
    "Experiments": ("experiments", "Give one to `--config`."),
    "Overlays": ("experiments/overlays", "Further `--config` files that change an experiment."),
    "Recipes": (
        "experiments/recipes",
        "Published ways to train, over an experiment of your own: [which one](../guides/recipes.md).",
    ),
    "Sweeps": ("experiments/sweeps", "Search spaces for [`vitrail sweep`](cli.md#sweep)."),
    "Ablations": ("experiments/ablations", "Grids of variants for [`vitrail ablate`](cli.md#ablate)."),
}


@mkdocs.plugins.event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and the notebooks to the site."""
    notebooks = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        made = notebooks["executed"](path)
        if made is None:
            LOG.info("notebooks/%s is shown without outputs; `make notebooks` executes it", path.name)
        folder = str((made or path).parents[1])
        files.append(File(f"notebooks/{path.name}", folder, config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, "reference/cli.md", content=cli_page()))
    files.append(File.generated(config, "reference/experiments.md", content=experiments_page()))
    return files


def cli_page() -> str:
    """Return the reference of all commands."""
    sys.path.insert(0, str(ROOT))
    from vitrail.programs import PROGRAMS

    parts = [
        "# Command line",
        "Generated from the parsers. `vitrail COMMAND` and `python -m PROGRAM COMMAND` are the same; "
        "`vitrail COMMAND --help` prints what is below. `vitrail --version` prints the version.",
    ]
    for program, group in PROGRAMS.items():
        parts += [f"## python -m {program}", group.help]
        for name, command in group.commands.items():
            parts += [f"### {name} {{ #{name} }}", f"{command.help[0].upper()}{command.help[1:]}."]
            parts += [part for part in command_parts(name) if part]
    return "\n\n".join(parts) + "\n"


def command_parts(name: str) -> Iterator[str]:
    """Yield the parts of a command's section."""
    if name in STAGES:
        yield "Takes the options of [`fit`](#fit)."
        return
    text = help_text(name).strip()
    if name == "fit":
        text, heading, own = text.partition("your own images:")
        yield "Options of `--data FOLDER` and `--data TABLE` ([guide](../guides/your_images.md#train)):"
        yield f"```text\n{heading}{own}\n```"
    if text.count("\n") < 80:
        yield f"```text\n{text}\n```"
    else:
        indented = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
        yield f'??? note "All options of {name}"\n\n    ```text\n{indented}\n    ```'


def help_text(name: str) -> str:
    """Return what ``vitrail NAME --help`` prints, of ``fit`` all options."""
    from vitrail import programs

    before = sys.argv[0], os.environ.get("COLUMNS")
    sys.argv[0], os.environ["COLUMNS"] = "vitrail", "100"
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            programs.main("vitrail", [name, "--help=all" if name == "fit" else "--help"])
    finally:
        sys.argv[0] = before[0]
        os.environ.pop("COLUMNS")
        if before[1] is not None:
            os.environ["COLUMNS"] = before[1]
    return printed.getvalue()


def experiments_page() -> str:
    """Return the list of the experiment files with what their first comments say."""
    parts = ["# Experiments", "Generated from the comments at the head of each file."]
    for title, (folder, note) in EXPERIMENTS.items():
        parts += [f"## {title}", note]
        for path in sorted((ROOT / folder).glob("*.yaml")):
            parts += [f"### {path.stem}", f"`{path.relative_to(ROOT)}`", *paragraphs(path)]
    return "\n\n".join(parts) + "\n"


def paragraphs(path: Path) -> list[str]:
    """Return the comment at the head of a YAML as Markdown: prose, and indented lines as code."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" "))
    parts: list[str] = []
    block: list[str] = []
    code = False
    for line in [*lines, ""]:
        is_code = line.startswith("  ")
        if block and (is_code != code or not line):
            parts.append("```text\n" + "\n".join(one[2:] for one in block) + "\n```" if code else prose(block))
            block = []
        if line:
            block.append(line)
        code = is_code
    return parts


def prose(lines: list[str]) -> str:
    """Return lines of a comment as a paragraph, with options, variables and file names as code."""
    pieces = re.split(
        r"(?<![\w`])(--[\w.+-]*\w(?:=[\w.]*\w)?|\$\w+(?:/[\w./]*\w)?|[\w/]+\.(?:yaml|csv|md))", " ".join(lines)
    )
    return "".join(f"`{one}`" if place % 2 else re.sub(r"([<*_`])", r"\\\1", one) for place, one in enumerate(pieces))
