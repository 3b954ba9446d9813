"""The project is written as its field writes: words that no one in the field uses are kept out of texts and names."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BANNED = re.compile(
    r"\bpictur(?:e|es|ed)\b|\banew\b|\bbesides?\b|\bwhoever\b|\bwhosoever\b|\bnobody\b|\bsomebody\b|\bso many\b"
    r"|\bways? out\b|\btells?\b|\btold\b|\bputs? out\b|\b(?:stands?|stood|stay|stays|held|holds?) still\b"
    r"|\bwritten whole\b|\b(?:is|are) none of\b|\bjudg(?:e[sd]?|ing)\b|\bcounted, not drawn\b|\bleaf(?:s|ed|ing)\b"
    r"|\blie(?:s)? beside\b|\bput(?:s)? down\b|\bas good as\b",
    re.IGNORECASE,
)
TEXT_FILES = {".md", ".yaml", ".yml", ".html", ".js", ".css", ".j2", ".toml", ".ipynb"}


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def python_texts(source: str) -> Iterator[tuple[int, str]]:
    """Comments, names, and the strings that are sentences (contain a space), with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string.replace("_", " ")
        elif token.type == tokenize.COMMENT or (token.type in STRINGS and " " in token.string):
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


STRINGS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


def banned_words(path: Path) -> Iterator[str]:
    source = path.read_text(encoding="utf-8")
    if not BANNED.search(source.replace("_", " ")):  # much quicker than reading its tokens
        return
    lines = python_texts(source) if path.suffix == ".py" else enumerate(source.splitlines(), 1)
    for number, line in lines:
        if found := BANNED.search(line):
            yield f"{path.relative_to(ROOT)}:{number}: {found.group()!r} in {line.strip()[:100]}"


def test_no_banned_words_are_used() -> None:
    files = [
        path
        for path in tracked_files()
        if path.suffix in {".py", *TEXT_FILES}
        and path != Path(__file__)
        and path.name != "CHANGELOG.md"
        and path.exists()
    ]
    found = [line for path in files for line in banned_words(path)]

    assert not found, "\n".join(found)


def test_a_banned_word_is_found_in_texts_comments_and_names(tmp_path: Path) -> None:
    source = 'a_picture = 1  # nobody knows\nprint("it tells you so")\nlabel = "picture"\n'

    found = [BANNED.search(line) for _, line in python_texts(source)]

    assert [match.group() for match in found if match] == ["picture", "nobody", "tells"]
