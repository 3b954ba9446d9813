"""Where images are given: uploaded, pasted or taken, several at once."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from app.state.context import AppContext

Given = list[tuple[str, str | None]] | None
"""What the component hands to a handler: files with captions."""


def image_input(context: AppContext, elem_id: str) -> gr.Gallery:
    """The component. Handlers get file names only: ``app.logic.uploads`` looks at a file before anything decodes it."""
    return gr.Gallery(
        label=f"Images: drop, choose, paste or take up to {context.limits.images}",
        type="filepath",
        # Pasting only works with this name for all images; what is read of them is for ``app.logic.uploads`` to say.
        file_types=["image"],
        sources=["upload", "webcam", "clipboard"],
        interactive=True,
        columns=4,
        height=240,
        object_fit="contain",
        buttons=[],
        elem_id=elem_id,
    )


def paths_of(given: Given) -> list[Path]:
    """Files that were given, in order."""
    return [Path(path) for path, _ in given or []]
