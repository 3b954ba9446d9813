"""What all tabs share: one-line messages where a request fails, links that are read on page load, image uploads."""

from __future__ import annotations

import functools
import html
import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr
from gradio.context import Context

from app.state.context import AppContext
from vitrail.errors import UserError

Params = ParamSpec("Params")
Output = TypeVar("Output")

LOGGER = logging.getLogger("vitrail.app")
LONGEST = 400
"""Characters of a message; an error can quote what it was given."""

Uploads = list[tuple[str, str | None]] | None
"""Value of an image upload: files with captions."""


def report_errors(handler: Callable[Params, Output]) -> Callable[Params, Output]:
    """Show errors of a handler, a function or generator, as one line in the browser.

    A ``UserError`` is shown as it is. Any other error is logged with its traceback, and the browser only shows that
    the request failed: internal messages can name files of this machine.
    """
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stepwise(*args: Params.args, **kwargs: Params.kwargs) -> object:
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                raise _shown(error, handler.__name__) from error

        return stepwise  # type: ignore[return-value]

    @functools.wraps(handler)
    def at_once(*args: Params.args, **kwargs: Params.kwargs) -> Output:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise _shown(error, handler.__name__) from error

    return at_once


def errors_in_place(handler: Callable[Params, str]) -> Callable[Params, str]:
    """Return a ``UserError`` of a handler as HTML instead of its result, so that no older result stays next to it."""

    @functools.wraps(handler)
    def in_place(*args: Params.args, **kwargs: Params.kwargs) -> str:
        try:
            return handler(*args, **kwargs)
        except UserError as error:
            return problem_html(str(error))

    return report_errors(in_place)


def problem_html(message: str) -> str:
    """Return a message about a request that cannot be answered."""
    return f'<div class="prediction"><p class="problem" role="alert">{html.escape(one_line(message))}</p></div>'


def _shown(error: Exception, request: str) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, UserError):
        # Gradio shows messages as HTML, and ours quote what the user typed.
        return gr.Error(html.escape(one_line(str(error))), 6, title="Not possible", print_exception=False)
    LOGGER.error("%s failed", request, exc_info=error)
    message = (
        "This request failed because of an internal error, which the server has logged. Other requests still work."
    )
    return gr.Error(message, title="Failed", print_exception=False)


def one_line(message: str) -> str:
    """Return the message without line breaks, cut where it is longer than a line or two."""
    line = " ".join(message.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def address_html(address: str, *, keeps_image: bool = False) -> str:
    """Return a link to what is shown, which ``static/address.js`` makes the page's address.

    Args:
        address: relative, ``?tab=…``.
        keeps_image: whether an image of a gallery that the page's address names stays in it.
    """
    link = html.escape(address + ("&keeps-image=1" if keeps_image else ""))
    return f'<a class="address" href="{link}" hidden></a>'


def on_page_load(handler: Callable[[gr.Request], object], outputs: Sequence[gr.components.Component]) -> Any:
    """Let a handler set components when the page is opened; its request's ``query_params`` are untrusted.

    Returns:
        the event, which others may follow.
    """
    if Context.root_block is None:
        raise RuntimeError("call it while a page is laid out (inside `with gr.Blocks()`)")
    return Context.root_block.load(handler, None, list(outputs), show_progress="hidden")


def image_upload(context: AppContext, elem_id: str) -> gr.Gallery:
    """Make a component for images. Handlers get file names only: ``app.logic.uploads`` checks a file and decodes it."""
    return gr.Gallery(
        label=f"Images: drop, choose, paste or take up to {context.limits.images}",
        type="filepath",
        # Pasting only works with this name for all images; which of them are read is up to ``app.logic.uploads``.
        file_types=["image"],
        sources=["upload", "webcam", "clipboard"],
        interactive=True,
        columns=4,
        height=240,
        object_fit="contain",
        buttons=[],
        elem_id=elem_id,
        elem_classes=["uploads"],
    )


def paths_of(uploads: Uploads) -> list[Path]:
    """Return the files of an image upload, in order."""
    return [Path(path) for path, _ in uploads or []]
