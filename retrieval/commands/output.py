"""What a person wants to see of the images that a search found.

The result of a search as a table for a terminal, and as JSON.

The result of a search as one HTML page with its images inside; no script, no address of another file.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from retrieval.schema import CONFIDENCE, LABEL, PREDICTED, ModelIdentity
from vitrail.console import Table

if TYPE_CHECKING:
    from retrieval.gallery import Gallery
    from retrieval.search.searcher import Query


@dataclass(frozen=True)
class Found:
    """An image that was found.

    Attributes:
        id: in the gallery.
        score: of the ranker.
        path: of its file, empty where it is none.
        caption: of the image, or the one that was found.
        labels: true value of each task, None where unknown.
        predicted: value of each task that the model predicts, and how sure it is (0 to 1); None where it says nothing.
        thumbnail: JPEG, where the gallery keeps one.
    """

    id: str
    score: float
    path: str
    caption: str
    labels: dict[str, str | None]
    predicted: dict[str, tuple[str, float] | None]
    thumbnail: bytes | None

    def as_dict(self, rank: int) -> dict[str, Any]:
        """As JSON has it, with its rank from 1."""
        predicted = {
            task: None if answer is None else {"value": answer[0], "confidence": round(answer[1], 6)}
            for task, answer in self.predicted.items()
        }
        return {
            "rank": rank,
            "id": self.id,
            "score": round(self.score, 6),
            "path": self.path,
            "caption": self.caption,
            "labels": self.labels,
            "predicted": predicted,
        }


def look_up(
    gallery: Gallery, ids: Sequence[str], scores: Sequence[float], captions: Sequence[str] | None = None
) -> list[Found]:
    """Everything that is shown of images.

    Args:
        gallery: that they are in.
        ids: of the images, in the order of the result; one may come again.
        scores: of each.
        captions: to show instead of the images' own.
    """
    if not ids:
        return []
    identity = gallery.identity
    predicted = [f"{prefix}{task}" for task in identity.predicts for prefix in (PREDICTED, CONFIDENCE)]
    columns = ["id", "path", "caption", *(f"{LABEL}{task}" for task in identity.labels), *predicted, "thumbnail"]
    shown: Sequence[str | None] = captions or [None] * len(ids)
    distinct = list(dict.fromkeys(ids))
    rows = dict(zip(distinct, gallery.rows(distinct, columns).to_pylist(), strict=True))
    return [
        _found(rows[identifier], score, identity.labels, list(identity.predicts), own)
        for identifier, score, own in zip(ids, scores, shown, strict=True)
    ]


def _found(row: dict[str, Any], score: float, labels: list[str], predicts: list[str], caption: str | None) -> Found:
    answers = {task: (row[f"{PREDICTED}{task}"], row[f"{CONFIDENCE}{task}"]) for task in predicts}
    return Found(
        id=row["id"],
        score=float(score),
        path=row["path"] or "",
        caption=(row["caption"] or "") if caption is None else caption,
        labels={task: row[f"{LABEL}{task}"] for task in labels},
        predicted={
            task: None if value is None else (value, float(confidence or 0))
            for task, (value, confidence) in answers.items()
        },
        thumbnail=row["thumbnail"],
    )


@dataclass(frozen=True)
class Answer:
    """A search and what it found, ready to be shown.

    Attributes:
        query: what was asked.
        gallery: path or address.
        identity: the model that made the gallery.
        ranker: who ranked.
        find: ``images`` or ``captions``.
        where: filter, empty for none.
        found: best first.
        notes: what a person should know, one line each.
        example: the image that was asked with, where it was one.
    """

    query: Query
    gallery: str
    identity: ModelIdentity
    ranker: str
    find: str
    where: str
    found: list[Found]
    notes: list[str]
    example: Found | None = None

    @property
    def asked(self) -> str:
        """The query in words."""
        if self.query.text is not None:
            return f"“{self.query.text}”"
        return f"image {self.image_name}" if self.query.image is not None else f"like {self.query.like}"

    @property
    def image_name(self) -> str | None:
        """File of the image that was asked with; what is no UTF-8 in its name is replaced, so it can be printed."""
        return None if self.query.image is None else str(self.query.image).encode(errors="replace").decode()


def as_json(answer: Answer) -> str:
    """One JSON object with query, notes, and what was found, in order."""
    query = {"text": answer.query.text, "like": answer.query.like, "image": answer.image_name}
    content = {
        "gallery": answer.gallery,
        "model": answer.identity.task,
        "run": answer.identity.run,
        "query": query,
        "where": answer.where,
        "find": answer.find,
        "ranker": answer.ranker,
        "notes": answer.notes,
        "found": [found.as_dict(rank) for rank, found in enumerate(answer.found, start=1)],
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def result_table(answer: Answer) -> Table:
    """A row for each image or caption; columns that nothing is known of are left out."""
    title = f"{answer.asked} · {answer.ranker} · {answer.gallery}"
    rows = [[str(rank), f"{found.score:.4f}"] for rank, found in enumerate(answer.found, start=1)]
    if answer.find == "captions":
        columns = ["#", "score", "caption", "of image"]
        rows = [[*row, found.caption, found.id] for row, found in zip(rows, answer.found, strict=True)]
        return Table(columns, rows, columns[2:], title)
    told = [", ".join(said(value) for value in found.predicted.values() if value) for found in answer.found]
    true = [", ".join(value for value in found.labels.values() if value) for found in answer.found]
    captions = [found.caption for found in answer.found]
    shown = {"id": [found.id for found in answer.found], "the model says": told, "labels": true, "caption": captions}
    shown = {name: values for name, values in shown.items() if name == "id" or any(values)}
    rows = [[*row, *(values[place] for values in shown.values())] for place, row in enumerate(rows)]
    return Table(["#", "score", *shown], rows, list(shown), title)


def said(answer: tuple[str, float] | None) -> str:
    """A predicted value with how sure the model is, such as ``blue 0.93``."""
    return "" if answer is None else f"{answer[0]} {answer[1]:.2f}"


SIDE = 256
"""Longest side of an image on the sheet, in pixels."""

# The page may load nothing: all images are inside, whatever stands in the gallery.
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


def contact_sheet(answer: Answer, images: Sequence[bytes | None], example: bytes | None = None) -> str:
    """A page with a card for each image or caption.

    Args:
        answer: the search and what it found.
        images: of each that was found a JPEG, or None where there is none to be seen.
        example: JPEG of the image that was asked with, where it was one.

    Returns:
        The HTML of the page, whole.
    """
    cards = "\n".join(
        _card(rank, found, image) for rank, (found, image) in enumerate(zip(answer.found, images, strict=True), start=1)
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
{_image(example, "the image that was asked with") if example else ""}
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
    """An image as JPEG, scaled down to ``SIDE`` where it is larger.

    Args:
        pixels: uint8 ``(H, W, 3)``, RGB.
    """
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=85)
    return content.getvalue()


def _card(rank: int, found: Found, jpeg: bytes | None) -> str:
    image = '<div class="missing">the image cannot be read any more, or may not be shown</div>'
    if jpeg is not None:
        image = _image(jpeg, found.caption or found.id)
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
