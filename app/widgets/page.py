"""What a user is told when a request fails: one line, and the application lives on.

What happens when the page is opened: each tab reads its part of the address (``?tab=search&q=…``).
"""

from __future__ import annotations

import functools
import html
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import gradio as gr
from gradio.context import Context

from vitrail.errors import UserError

Given = ParamSpec("Given")
Answer = TypeVar("Answer")

LOGGER = logging.getLogger("vitrail.app")
LONGEST = 400
"""Characters of a message; an error can quote what it was given."""


def told(handler: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Lets a handler's errors be told in the browser.

    A ``UserError`` is shown as it is. Any other error is logged with its traceback, and the browser only says that the
    request failed: what went wrong inside can name files of this machine. For functions and generators.

    Raises:
        gr.Error: in place of whatever the handler raises.
    """
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stepwise(*args: Given.args, **kwargs: Given.kwargs) -> object:
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                raise said_of(error, handler.__name__) from error

        return stepwise  # type: ignore[return-value]

    @functools.wraps(handler)
    def at_once(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise said_of(error, handler.__name__) from error

    return at_once


def said_of(error: Exception, request: str) -> gr.Error:
    """The error that the browser shows.

    Args:
        error: what happened.
        request: what was asked for, for the log.
    """
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, UserError):
        # Gradio shows messages as HTML, and ours quote what the user typed.
        return gr.Error(html.escape(one_line(str(error))), title="Not possible", print_exception=False)
    LOGGER.error("%s failed", request, exc_info=error)
    message = "This request failed for a reason that is not yours; the server's log has it. Other requests still work."
    return gr.Error(message, title="Failed", print_exception=False)


def one_line(message: str) -> str:
    """The message without line breaks, cut where it is longer than a line or two."""
    line = " ".join(message.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


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
