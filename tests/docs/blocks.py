"""The fenced code blocks of README and docs."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
HOOKS = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
INCLUDED = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "experiments/CLUSTER.md")
PAGES = [ROOT / name for name in INCLUDED] + sorted((ROOT / "docs").rglob("*.md"))

_RESULTS = re.compile(r"<!-- results: (\w+) -->.*?<!-- /results: \1 -->", re.DOTALL)
_FENCE = re.compile(
    r"(?:^<!-- needs: (?P<needs>[^\n]+) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```", re.S | re.M
)


class Block(NamedTuple):
    """A fenced block: its page, language and code, and what it needs, empty where any machine can run it."""

    page: str
    language: str
    code: str
    needs: str


def blocks(*languages: str) -> Iterator[Block]:
    """Yield the blocks of all pages in these languages; those of generated tables need what ``results.yaml`` lists."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        generated = [match.span() for match in _RESULTS.finditer(text)]
        for match in _FENCE.finditer(text):
            of_table = any(begin < match.start() < end for begin, end in generated)
            needs = "results.yaml" if of_table else match["needs"] or ""
            if match["language"] in languages:
                yield Block(str(page.relative_to(ROOT)), match["language"], match["code"], needs)
