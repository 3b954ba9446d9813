"""What happens when the page is opened: each tab reads its part of the address (``?tab=search&q=…``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gradio as gr
from gradio.context import Context


def on_page_load(handler: Callable[[gr.Request], object], outputs: Sequence[gr.components.Component]) -> None:
    """Let a handler set components when the page is opened.

    To be called while a page is laid out (inside ``with gr.Blocks()``).

    Args:
        handler: gets the request, whose ``query_params`` come from outside.
        outputs: what it gives values to.
    """
    if Context.root_block is None:
        raise RuntimeError("there is no page that is being laid out")
    Context.root_block.load(handler, None, list(outputs), show_progress="hidden")
