"""Tests of what is served, and of how requests name it."""

from __future__ import annotations

import pytest

from app.state.context import AppContext
from vitrail.errors import UserError


@pytest.mark.parametrize(
    "name", ["", "other", "../quickstart", None, 3, ["quickstart"], {"name": "quickstart"}, "x" * 999]
)
def test_only_served_names_are_known(context: AppContext, name: object) -> None:
    with pytest.raises(UserError, match="choose one of: quickstart, pairs") as said:
        context.run(name)
    assert len(str(said.value)) < 200
    with pytest.raises(UserError, match=r"gallery .* not served"):
        context.gallery(name)


def test_what_is_served_is_found_by_its_name(context: AppContext) -> None:
    assert context.run("quickstart").kind == "classifier"
    assert context.run("pairs").kind == "dual encoder"
    assert len(context.gallery("quickstart")) == 300
