"""The result of a search as a table for a terminal, as JSON, and as one HTML page with its images inside.

The page has no script and loads nothing.
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

from retrieval.schema import LABEL, ModelIdentity, Predicted, Value, prediction_columns, prediction_of, value_text
from vitrail.console import Table

if TYPE_CHECKING:
    from retrieval.gallery import Gallery
    from retrieval.search.searcher import Query


@dataclass(frozen=True)
class Found:
    """An image that was found.

    Attributes:
        id: in the gallery.
        score: by which it was ranked.
        path: of its file, empty where it has none.
        caption: of the image, or the one that was found.
        labels: true label of each task, or a list of labels, or a number; None where unknown.
        predicted: prediction of each task; None where there is none.
        thumbnail: JPEG, where the gallery keeps one.
    """

    id: str
    score: float
    path: str
    caption: str
    labels: dict[str, Value | None]
    predicted: dict[str, Predicted | None]
    thumbnail: bytes | None

    def as_dict(self, rank: int) -> dict[str, Any]:
        """Return the image's entry in the JSON, with its rank from 1."""
        predicted = {task: None if one is None else one.as_dict() for task, one in self.predicted.items()}
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
    """Return everything that is shown of images.

    Args:
        gallery: that they are in.
        ids: of the images, in the order of the result; one may occur several times.
        scores: of each.
        captions: to show instead of the images' own.
    """
    if not ids:
        return []
    labels, predicts = gallery.identity.labels, list(gallery.identity.predicts)
    predicted = [name for task in predicts for name in prediction_columns(gallery.identity, task)]
    columns = ["id", "path", "caption", *(f"{LABEL}{task}" for task in labels), *predicted, "thumbnail"]
    distinct = list(dict.fromkeys(ids))
    rows = dict(zip(distinct, gallery.rows(distinct, columns).to_pylist(), strict=True))

    found = []
    for place, (identifier, score) in enumerate(zip(ids, scores, strict=True)):
        row = rows[identifier]
        caption = captions[place] if captions is not None else row["caption"] or ""
        true = {task: row[f"{LABEL}{task}"] for task in labels}
        predictions = {task: prediction_of(row, task) for task in predicts}
        found.append(Found(identifier, float(score), row["path"] or "", caption, true, predictions, row["thumbnail"]))
    return found


@dataclass(frozen=True)
class SearchOutput:
    """A search and what it found, ready to be shown.

    Attributes:
        query: of the search.
        gallery: path or address.
        identity: the model that made the gallery.
        ranker: by which the results are ranked.
        find: ``images`` or ``captions``.
        where: filter, empty for none.
        found: best first.
        notes: for the user, one line each.
        example: the image of the query, where it has one.
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
    def title(self) -> str:
        """The query as text."""
        if self.query.text is not None:
            return f"“{self.query.text}”"
        return f"image {self.image_name}" if self.query.image is not None else f"like {self.query.like}"

    @property
    def image_name(self) -> str | None:
        """File name of the query's image; bytes that are not UTF-8 are replaced, so it can be printed."""
        return None if self.query.image is None else str(self.query.image).encode(errors="replace").decode()


def as_json(output: SearchOutput) -> str:
    """Return one JSON object with query, notes, and what was found, in order."""
    query = {"text": output.query.text, "like": output.query.like, "image": output.image_name}
    content = {
        "gallery": output.gallery,
        "model": output.identity.task,
        "run": output.identity.run,
        "query": query,
        "where": output.where,
        "find": output.find,
        "ranker": output.ranker,
        "notes": output.notes,
        "found": [found.as_dict(rank) for rank, found in enumerate(output.found, start=1)],
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def result_table(output: SearchOutput) -> Table:
    """Return a table with a row for each image or caption; empty columns are left out."""
    title = f"{output.title} · {output.ranker} · {output.gallery}"
    rows = [[str(rank), f"{found.score:.4f}"] for rank, found in enumerate(output.found, start=1)]
    if output.find == "captions":
        columns = ["#", "score", "caption", "of image"]
        rows = [[*row, found.caption, found.id] for row, found in zip(rows, output.found, strict=True)]
        return Table(columns, rows, columns[2:], title)
    predicted = [", ".join(str(value) for value in found.predicted.values() if value) for found in output.found]
    true = [", ".join(filter(None, map(value_text, found.labels.values()))) for found in output.found]
    captions = [found.caption for found in output.found]
    shown = {"id": [found.id for found in output.found], "predicted": predicted, "labels": true, "caption": captions}
    shown = {name: values for name, values in shown.items() if name == "id" or any(values)}
    rows = [[*row, *(values[place] for values in shown.values())] for place, row in enumerate(rows)]
    return Table(["#", "score", *shown], rows, list(shown), title)


SIDE = 256
"""Longest side of an image on the sheet, in pixels."""

# The page may load nothing: all images are inside, whatever the gallery contains.
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


def contact_sheet(output: SearchOutput, images: Sequence[bytes | None], example: bytes | None = None) -> str:
    """Return an HTML page with a card for each image or caption.

    Args:
        output: the search and what it found.
        images: a JPEG of each result, or None where there is none to show.
        example: JPEG of the query's image, where it has one.
    """
    cards = "\n".join(
        _card(rank, found, image) for rank, (found, image) in enumerate(zip(output.found, images, strict=True), start=1)
    )
    filtered = f" · only {output.where}" if output.where else ""
    shown = f"{len(output.found)} {output.find}" if output.found else f"no {output.find}"
    about = f"{shown} · ranked by {output.ranker}{filtered} · {output.identity.task} · gallery {output.gallery}"
    notes = "\n".join(f'<p class="note">{html.escape(note)}</p>' for note in output.notes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(output.title)}</title>
<style>
{_STYLE}
</style>
</head>
<body>
<header>
{_image(example, "the image of the query") if example else ""}
<div>
<h1>{html.escape(output.title)}</h1>
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
    """Return an image, uint8 ``(H, W, 3)``, RGB, as JPEG, scaled down to ``SIDE`` where it is larger."""
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
    predictions = "".join(
        f"<dt>{html.escape(task)}</dt><dd>{html.escape(str(prediction))}</dd>"
        for task, prediction in found.predicted.items()
        if prediction is not None
    )
    predictions = f"<dl>{predictions}</dl>" if predictions else ""
    return f"""<li>
{image}
<div class="text">
<div class="head"><b>{rank}</b><span>{found.score:.4f}</span></div>
<p class="id">{html.escape(found.id)}</p>
{caption}
{predictions}
</div>
</li>"""


def _image(jpeg: bytes, description: str) -> str:
    data = base64.b64encode(jpeg).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(description)}">'
