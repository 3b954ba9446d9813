"""The result of a search as one HTML page with its pictures inside; no script, no address of another file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval.found import Found
from retrieval.results_table import Answer, said

SIDE = 256
"""Longest side of a picture on the sheet, in pixels."""

# The page may load nothing: all pictures are inside, whatever stands in the gallery.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --line: #d5d5d0; --soft: #62625c; --page: #fafaf8; --card: #fff; --ink: #1c1c1a;
  --bar: #3465a4; }
@media (prefers-color-scheme: dark) { :root { --line: #3c3c3a; --soft: #a5a59e; --page: #161615; --card: #212120;
  --ink: #ececea; --bar: #7aa6da; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 24px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
header { display: flex; flex-wrap: wrap; gap: 16px; align-items: center; }
header img { max-width: 120px; max-height: 120px; border: 1px solid var(--line); border-radius: 8px; }
h1 { margin: 0; font-size: 24px; font-weight: 600; overflow-wrap: anywhere; }
.about, .note { margin: 4px 0 0; color: var(--soft); overflow-wrap: anywhere; }
.note::before { content: "Note: "; font-weight: 600; }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 16px; margin: 20px 0 0;
  padding: 0; list-style: none; }
li { display: flex; flex-direction: column; overflow: hidden; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
li img, .missing { width: 100%; height: 210px; object-fit: contain; background: var(--page); }
.missing { display: flex; align-items: center; justify-content: center; padding: 12px; color: var(--soft);
  text-align: center; }
.text { padding: 10px 12px 12px; overflow-wrap: anywhere; }
.head { display: flex; justify-content: space-between; gap: 8px; font-variant-numeric: tabular-nums; }
.head b { font-size: 17px; } .id, .caption { margin: 4px 0 0; } .id { color: var(--soft); font-size: 13px; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 1px 10px; margin: 8px 0 0; font-size: 13px; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; }
""".strip()


def contact_sheet(answer: Answer, pictures: Sequence[bytes | None], example: bytes | None = None) -> str:
    """A page with a card for each picture or caption.

    Args:
        answer: the search and what it found.
        pictures: of each that was found a JPEG, or None where there is none to be seen.
        example: JPEG of the picture that was asked with, where it was one.

    Returns:
        The HTML of the page, whole.
    """
    cards = "\n".join(
        _card(rank, found, picture)
        for rank, (found, picture) in enumerate(zip(answer.found, pictures, strict=True), start=1)
    )
    filtered = f" · only {answer.where}" if answer.where else ""
    shown = f"{len(answer.found)} {answer.find}" if answer.found else f"no {answer.find}"
    about = f"{shown} · ranked by {answer.ranker}{filtered} · {answer.identity.task} · gallery {answer.gallery}"
    notes = "\n".join(f'<p class="note">{html.escape(note)}</p>' for note in answer.notes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(answer.asked)}</title>
<style>
{_STYLE}
</style>
</head>
<body>
<header>
{_image(example, "the picture that was asked with") if example else ""}
<div>
<h1>{html.escape(answer.asked)}</h1>
<p class="about">{html.escape(about)}</p>
{notes}
</div>
</header>
<ol>
{cards}
</ol>
</body>
</html>
"""


def small_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """A picture as JPEG, scaled down to ``SIDE`` where it is larger.

    Args:
        pixels: uint8 ``(H, W, 3)``, RGB.
    """
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=85)
    return content.getvalue()


def _card(rank: int, found: Found, picture: bytes | None) -> str:
    image = '<div class="missing">the picture cannot be read any more, or may not be shown</div>'
    if picture is not None:
        image = _image(picture, found.caption or found.id)
    caption = f'<p class="caption">{html.escape(found.caption)}</p>' if found.caption else ""
    answers = "".join(
        f"<dt>{html.escape(task)}</dt><dd>{html.escape(said(answer))}</dd>"
        for task, answer in found.predicted.items()
        if answer is not None
    )
    answers = f"<dl>{answers}</dl>" if answers else ""
    return f"""<li>
{image}
<div class="text">
<div class="head"><b>{rank}</b><span>{found.score:.4f}</span></div>
<p class="id">{html.escape(found.id)}</p>
{caption}
{answers}
</div>
</li>"""


def _image(jpeg: bytes, description: str) -> str:
    data = base64.b64encode(jpeg).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(description)}">'
