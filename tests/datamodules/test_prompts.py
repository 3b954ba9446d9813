from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.captions import TEMPLATES, class_prompts
from vitrail.errors import UserError


def test_by_default_a_class_is_a_photo_of_it() -> None:
    assert class_prompts(None, ["tableware_water_bottle"]) == [["a photo of a tableware water bottle."]]


def test_named_sets_are_those_of_the_papers() -> None:
    assert class_prompts({"name": "openai_flowers"}, ["iris"]) == [["a photo of a iris, a type of flower."]]
    assert class_prompts({"name": "reference_flowers"}, ["iris"]) == [["an image of the iris flower"]]
    assert all(template.count("{}") == 1 for templates in TEMPLATES.values() for template in templates)


def test_templates_and_descriptions_make_one_ensemble(tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"iris": ["it has a beard"], "rose": ["it has thorns", "a rose"]}))
    options: Any = {"templates": ["a {}"], "descriptions": str(path)}
    assert class_prompts(options, ["rose", "iris"]) == [
        ["a rose", "it has thorns"],
        ["a iris", "it has a beard"],
    ]
    assert class_prompts({"descriptions": str(path)}, ["iris"]) == [["it has a beard"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": ["a {}"]}, "unknown key 'template'"),
        ({"name": "imagenet"}, "openai_flowers"),
        ({"templates": ["a flower"]}, "'a flower' must have"),
        ({"templates": ["{} and {}"]}, "must have"),
        ({"descriptions": "/nowhere.json"}, "/nowhere.json"),
    ],
)
def test_wrong_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        class_prompts(options, ["iris"])


@pytest.mark.parametrize("content", ["[]", '{"iris": []}', '{"iris": "text"}', '{"iris": [" "]}', "no json"])
def test_descriptions_must_be_there_for_every_class(tmp_path: Path, content: str) -> None:
    path = tmp_path / "texts.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"texts\.json"):
        class_prompts({"descriptions": str(path)}, ["iris"])
