"""Tests of those who use the application in the load test, on a page of two buttons."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr
import httpx
import pytest

from app.logic.uploads import read_upload
from app.server import blocks_of, build_app
from app.state.context import AppContext
from app.widgets.page import report_errors
from benchmarks.app.load import User, a_photo, load_times
from tests.app.running import Served, serving
from vitrail.errors import UserError


def small_tab(_: AppContext) -> None:
    """Shows how large an image is, together with a text; and refuses one text."""
    images = gr.Gallery(label="Images: some", type="filepath")
    text = gr.Textbox("nothing", label="Look for")
    button = gr.Button("Go", elem_id="go")
    output = gr.Textbox()

    def answer(given: list[tuple[str, None]] | None, words: str) -> str:
        if words == "refused":
            raise UserError("refused: choose another")
        return f"{words} {[read_upload(path).size for path, _ in given or []]}"

    button.click(report_errors(answer), [images, text], output)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    context = AppContext({}, {})
    with serving(
        build_app(context, blocks=lambda served: blocks_of(served, [("Small", small_tab)])), context
    ) as served:
        yield served


def test_a_user_presses_uploads_and_looks(server: Served) -> None:
    with User(server.url) as user:
        assert user.press("go", {}) == ["nothing []"]
        assert user.press("go", {"Look for": "mugs"}) == ["mugs []"]
        given = user.upload("a.jpg", a_photo(64))
        assert user.press("go", {"Images": given, "Look for": "mugs"}) == ["mugs [(64, 64)]"]
        assert user.look("/theme.css") > 1000


def test_a_user_notices_what_fails(server: Served) -> None:
    with User(server.url) as user:
        with pytest.raises(RuntimeError, match="refused: choose another"):
            user.press("go", {"Look for": "refused"})
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            user.look("/images?gallery=none&id=1&side=256")
        with pytest.raises(RuntimeError, match="missing: the page has no such button"):
            user.press("missing", {})


def test_an_error_of_any_user_fails_the_load_test(server: Served) -> None:
    with pytest.raises(RuntimeError, match="2 of 2 users met an error"):
        load_times(server.url, users=2, turns=1)
