from __future__ import annotations

import pytest

from datamodules.captions import composed_captions
from vitrail.errors import UserError

COLUMNS = {
    "class": ["tableware_water_bottle", "travel_handbag", ""],
    "colour": ["blue", "", ""],
    "material": ["plastic", "leather", ""],
    "caption": ["bottle with  lid", "", "on a table"],
}


def test_fields_are_filled_and_what_is_unknown_is_left_out() -> None:
    templates = ["a photo of a {colour} {material} {class}", "{colour} {noun}", "{caption}"]
    assert composed_captions(templates, COLUMNS, "here") == [
        ["a photo of a blue plastic tableware water bottle", "blue bottle", "bottle with lid"],
        ["a photo of a leather travel handbag", "handbag"],
        ["on a table"],
    ]


def test_each_text_once_and_one_even_where_nothing_is_known() -> None:
    assert composed_captions(["{noun}", "{colour} {noun}"], COLUMNS, "here") == [
        ["bottle", "blue bottle"],
        ["handbag"],
        [""],
    ]


def test_a_template_without_fields_is_a_caption() -> None:
    assert composed_captions(["a thing"], COLUMNS, "here") == [["a thing"]] * 3


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (" ", "here: a template is empty"),
        ("a {color} thing", "has no such field as 'color'; there are class, colour, material, caption, noun"),
        ("a {colour thing", "has a brace that belongs to no field"),
        ("a {colour}} thing", "has a brace that belongs to no field"),
    ],
)
def test_mistakes_are_told(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        composed_captions(["{class}", template], COLUMNS, "here")
