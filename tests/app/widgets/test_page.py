"""Tests of what a user sees when a request fails."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator

import gradio as gr
import pytest

from app.widgets.page import LONGEST, report_errors
from vitrail.errors import UserError


def test_a_mistake_of_the_user_is_shown_as_it_is_but_never_as_markup() -> None:
    @report_errors
    def handler(text: str) -> str:
        raise UserError(f"labels: {text}\n is too long")

    with pytest.raises(gr.Error) as said:
        handler("<img src=x onerror=alert(1)>")
    assert said.value.message == "labels: &lt;img src=x onerror=alert(1)&gt; is too long"
    assert not said.value.print_exception


def test_a_long_message_is_cut() -> None:
    @report_errors
    def handler() -> None:
        raise UserError("x" * 10_000)

    with pytest.raises(gr.Error) as said:
        handler()
    assert len(said.value.message) == LONGEST + 1


def test_what_went_wrong_inside_is_in_the_log_and_not_in_the_browser(caplog: pytest.LogCaptureFixture) -> None:
    @report_errors
    def handler() -> None:
        raise FileNotFoundError("/home/me/secret.ckpt")

    with caplog.at_level(logging.ERROR), pytest.raises(gr.Error) as said:
        handler()
    assert "secret" not in said.value.message
    assert "secret" in caplog.text
    assert "handler failed" in caplog.text


def test_steps_are_handed_on_until_one_fails() -> None:
    @report_errors
    def handler(count: int) -> Iterator[int]:
        yield from range(count)
        raise UserError("no more")

    steps = handler(2)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(gr.Error, match="no more"):
        next(steps)


def test_a_handler_keeps_its_answer_its_name_and_what_it_asks_for() -> None:
    @report_errors
    def handler(value: int, event: gr.SelectData, *, request: gr.Request | None = None) -> int:
        """Doubles."""
        return 2 * value

    assert handler(2, None) == 4  # type: ignore[arg-type]
    assert handler.__name__ == "handler"
    assert list(inspect.signature(handler).parameters) == ["value", "event", "request"]


def test_what_a_handler_says_itself_is_kept() -> None:
    @report_errors
    def handler() -> None:
        raise gr.Error("said already")

    with pytest.raises(gr.Error, match="said already"):
        handler()
