"""Images of the galleries as inputs of Classify and Zero-shot: examples to begin with, and one that a link names."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr
import numpy as np

from app.logic.explore import Explorer
from app.state.context import AppContext
from app.state.galleries import ServedGallery
from app.state.runs import ServedRun
from app.widgets.cards import Card, card_grid
from app.widgets.page import image_upload, report_errors
from vitrail.errors import UserError
from vitrail.files import write_atomically

COUNT = 8
"""Examples of a tab."""


def example_gallery(context: AppContext, runs: Sequence[ServedRun]) -> ServedGallery | None:
    """Return the gallery whose images are examples for some runs: the first that one of them made, else any."""
    weights = {run.weights for run in runs}
    galleries = [gallery for gallery in context.galleries.values() if len(gallery)]
    return next((one for one in galleries if one.identity.weights in weights), next(iter(galleries), None))


def example_ids(gallery: ServedGallery, count: int = COUNT) -> list[str]:
    """Return images of a gallery that a model has not been trained on, where there are such, of several classes."""
    explorer = Explorer(gallery)
    split = next((one for one in ("test", "val") if one in explorer.splits), "")
    rows = explorer.find(explorer.filter(split))
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 20 * count)).astype(np.int64))]
    by_value: dict[str, list[int]] = {}
    for row in rows.tolist():
        by_value.setdefault(explorer.value_of(row, explorer.main) if explorer.main else "", []).append(row)
    # The first of each class, then the second of each.
    turns = max(map(len, by_value.values()), default=0)
    ordered = [rows[turn] for turn in range(turns) for rows in by_value.values() if turn < len(rows)]
    return [explorer.ids[row] for row in ordered[:count]]


def images_with_examples(context: AppContext, runs: Sequence[ServedRun], tab: str) -> tuple[gr.Gallery, Any]:
    """Lay out an upload and examples; the one that is pressed becomes the tab's image.

    Returns:
        the upload, and the event that sets the image, which others may follow (the upload reports only what users
        change); None where there are no examples.
    """
    images = image_upload(context, f"{tab}-images")
    gallery = example_gallery(context, runs)
    if gallery is None:
        return images, None
    explorer = Explorer(gallery)
    cards = [
        Card(
            gallery.name,
            sample_id,
            explorer.value_of(explorer.row_of(sample_id), explorer.main) if explorer.main else "",
        )
        for sample_id in example_ids(gallery)
    ]
    with gr.Column(elem_classes=["examples"]):
        gr.Markdown("Try an example:", elem_classes=["examples-title"])
        grid = card_grid(cards, COUNT, label="Example images", elem_id=f"{tab}-examples")

    @report_errors
    def use(event: gr.SelectData) -> list[str]:
        return [upload_of(gallery, str(event.value))]

    return images, grid.select(use, None, images)


def upload_of(gallery: ServedGallery, sample_id: str) -> str:
    """Return an image of a gallery as a file among the uploads; raise ``UserError`` where there is no such image."""
    found = gallery.image(sample_id)
    content = found if isinstance(found, bytes) else found.read_bytes()
    suffix = ".jpg" if isinstance(found, bytes) else found.suffix
    name = re.sub(r"[^\w.-]+", "_", Path(sample_id).stem)[-60:] or "image"
    folder = Path(os.environ["GRADIO_TEMP_DIR"]) / "examples" / hashlib.sha256(content).hexdigest()[:16]
    path = folder / f"{name}{suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as file:
            file.write_bytes(content)
    return str(path)


def linked_upload(context: AppContext, request: gr.Request, tab: str) -> Any:
    """Return the image that a link to a tab names (``?tab=classify&gallery=G&image=ID``), for its upload."""
    query = request.query_params
    if str(query.get("tab", "")).lower() != tab or not query.get("image"):
        return gr.skip()
    try:
        return [upload_of(context.gallery(query.get("gallery", "")), query["image"])]
    except UserError:
        return gr.skip()  # an old link: the tab is shown as it is


def links_html(gallery: str, sample_id: str, context: AppContext) -> str:
    """Return links by which an image is classified and compared with labels, as far as models for that are served."""
    tabs = [("classify", "Classify it")] if any(run.tasks for run in context.runs.values()) else []
    if any(run.kind == "dual encoder" for run in context.runs.values()):
        tabs.append(("zero-shot", "Compare it with labels"))
    links = [
        f'<a href="?{urlencode({"tab": tab, "gallery": gallery, "image": sample_id})}">{title}</a>'.replace(
            "&", "&amp;"
        )
        for tab, title in tabs
    ]
    return f'<p class="image-links">{" · ".join(links)}</p>' if links else ""
