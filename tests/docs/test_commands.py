"""Commands in README and docs name programs, commands, options and files that exist."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import tomllib
from collections.abc import Iterator

import pytest
import yaml

from experiments.train import options
from tests.docs.blocks import HOOKS, PAGES, ROOT, Block, blocks
from vitrail.programs import PROGRAMS

STAGES = ("fit", "validate", "test", "lightning-predict")
OTHER_PROGRAMS = {
    *("source", "export", "pip", "docker", "sbatch", "srun", "for", "done", "[", "#!/bin/bash", "git", "gpg"),
    *("curl", "openssl", "sudo", "trtexec"),
    *(".venv/bin/pip", ".venv/bin/pre-commit", "code=$?"),
}
OF_PREDICT_PY = {"--top", "--text"}
PREFIXES = ("data", "model", "trainer", "checkpoint", "last", "features", "predictions", "non_finite", "ema", "wandb")


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a block, each as its words."""
    text = block.code.replace("\\\n", " ").replace("…", "")
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            continue
        words = shlex.split(line.replace("$(", "").replace("&&", " ; ").replace("||", " ; "), comments=True)
        while words:
            end = words.index(";") if ";" in words else len(words)
            first = words[:end]
            if first[:1] == ["do"]:
                first = first[1:]
            if first:
                yield first
            words = words[end + 1 :]


@functools.cache
def options_of(command: str) -> frozenset[str]:
    """All options of a command, as its ``--help`` lists them."""
    name = "fit" if command == "lightning-predict" else command
    own = frozenset({"--plugins"})
    if command == "fit":
        own |= frozenset(options._parser()._option_string_actions)
    return own | frozenset(re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", str(HOOKS["help_text"](name))))


def check(words: list[str]) -> str:
    """What is wrong with a command, or nothing."""
    program, *rest = words
    if re.match(r"[A-Z_]+=", program):  # VARIABLE=value command
        return check(rest) if rest else ""
    if program in ("srun", "torchrun"):
        return check_python(rest[rest.index("-m") :]) if "-m" in rest else ""
    checks = {"make": check_make, "python": check_python, ".venv/bin/python": check_python, "vitrail": check_vitrail}
    if program in checks:
        return checks[program](rest)
    return "" if program in OTHER_PROGRAMS else f"unknown program {program!r}"


def check_make(words: list[str]) -> str:
    targets = [word for word in words if "=" not in word]
    return "" if all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets) else "no such target"


def check_python(words: list[str]) -> str:
    match words:
        case ["-m", program, *rest] if program in PROGRAMS:
            return check_vitrail(["app", *rest] if program == "app" else rest)
        case ["-m", "benchmarks", *rest]:
            return check_benchmark(rest)
        case ["docs/results.py", *rest]:
            return missing(rest, frozenset(re.findall(r"\"(--[\w-]+)\"", (ROOT / "docs" / "results.py").read_text())))
        case [script, *rest] if script.endswith("/predict.py"):
            return missing(rest, frozenset(OF_PREDICT_PY))
        case ["-m" | "-c", *_]:
            return ""
    return f"unknown script {words[0]}"


def check_vitrail(words: list[str]) -> str:
    name, *rest = words
    if name in ("--help", "--version", "COMMAND"):
        return ""
    entries = {key: command for group in PROGRAMS.values() for key, command in group.commands.items()}
    if name not in entries:
        return f"unknown command {name!r}"
    if name == "predict" and rest and rest[0].startswith("-"):
        name = "lightning-predict"
    own = rest[: rest.index("--")] if entries[words[0]].passes_on and "--" in rest else rest
    prefixes = PREFIXES if name in STAGES else ("data",)
    return missing(own, options_of(name), prefixes)


def check_benchmark(words: list[str]) -> str:
    if words and not words[0].startswith("-"):
        path = ROOT / "benchmarks" / (words[0].replace(".", "/") + ".py")
        if not path.exists() and words[0] != "NAME":
            return f"unknown benchmark {words[0]!r}"
    source = (ROOT / "benchmarks" / "__main__.py").read_text()
    return missing(words, frozenset(re.findall(r"\"(--[\w-]+)\"", source)))


def missing(words: list[str], known: frozenset[str], prefixes: tuple[str, ...] = ()) -> str:
    for word in words:
        option = word.split("=")[0].rstrip("+")
        if not word.startswith("--") or option in known:
            continue
        alike = {one.replace("-", "_") for one in known}
        dotted = "." in option and option[2:].split(".")[0] in prefixes
        if option.replace("-", "_") not in alike and not dotted:
            return f"unknown option {option}"
    return ""


MAKEFILE = (ROOT / "Makefile").read_text()
SHELL = list(blocks("bash", "console", "sh"))


@pytest.mark.parametrize("page", sorted({block.page for block in SHELL}))
def test_commands_and_options_exist(page: str) -> None:
    wrong = [
        f"{' '.join(words)}: {problem}"
        for block in SHELL
        if block.page == page
        for words in commands(block)
        if (problem := check(words))
    ]
    assert not wrong, "\n".join(wrong)


def test_mistakes_are_found() -> None:
    texts = {
        "vitrail fitt --config x.yaml": "unknown command 'fitt'",
        "vitrail predict RUN photos/ --topp 3": "unknown option --topp",
        "vitrail fit --datta photos/": "unknown option --datta",
        "vitrail summary RUN --model.lr 1": "unknown option --model.lr",
        "python -m evaluation summry RUN": "unknown command 'summry'",
        "python -m benchmarks training.stepp": "unknown benchmark 'training.stepp'",
        "make tests": "no such target",
        "rm -r runs": "unknown program 'rm'",
    }
    for text, problem in texts.items():
        [words] = commands(Block("page", "bash", text, ""))
        assert check(words) == problem


def test_commands_in_running_text_exist() -> None:
    names = {name for group in PROGRAMS.values() for name in group.commands} | {"COMMAND", "--help", "--version"}
    for page in PAGES:
        for found in re.findall(
            r"`(?:vitrail|python -m (?:experiments|evaluation|retrieval|datamodules)) ([\w-]+)", page.read_text()
        ):
            assert found in names, f"{page}: {found}"
        for found in re.findall(r"`python -m benchmarks ([\w.]+)", page.read_text()):
            assert check_benchmark([found]) == "", f"{page}: {found}"


def test_files_that_are_named_exist() -> None:
    named = re.compile(
        r"(?<![\w/.])(?:experiments|tests|docs|benchmarks|notebooks)/[\w/.-]*\w\.(?:yaml|py|md|ipynb|json)\b"
    )
    absent = [
        f"{page.relative_to(ROOT)}: {path}"
        for page in PAGES
        for path in named.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / path).exists() and not (path.startswith("tests/") and page.parent == ROOT)
    ]
    assert not absent, "\n".join(absent)


def test_every_fence_has_a_language_and_python_compiles() -> None:
    assert not [block.page for block in blocks("") if block.page.startswith(("docs/", "README"))]
    for block in blocks("python"):
        ast.parse(block.code, block.page)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_images_are_small() -> None:
    large = [path.name for path in (ROOT / "docs" / "images").iterdir() if path.stat().st_size > 200_000]
    assert not large


def test_the_citation_has_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
