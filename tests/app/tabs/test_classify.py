"""Tests of how answers look: everything is escaped, bars say their share, and pressed bars are not trusted."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from app.logic.classify import Classified, Saliency
from app.logic.uploads import Upload
from app.logic.zero_shot import Verdict, ZeroShot
from app.tabs.classify import (
    classified_html,
    data_address,
    notes_html,
    pressed_bar,
    saliency_html,
    zero_shot_html,
)
from tests.app.running import HtmlPage
from vitrail.errors import UserError
from vitrail.predictions import ImagePrediction, TaskPrediction

EVIL = '"><script>alert(1)</script><img src=x onerror="alert(2)">'
IMAGE = Image.new("RGB", (40, 30), (10, 200, 30))


def classified(classes: list[str], probabilities: list[float], name: str = "a.png", run: str = "run") -> Classified:
    answer = TaskPrediction(classes, np.array(probabilities), calibrated=True)
    return Classified(Upload(name, IMAGE), {run: ImagePrediction("x", {"class": answer})})


def test_bars_say_class_and_share_best_first() -> None:
    page = HtmlPage(classified_html([classified(["cap", "wrist_watch"], [0.125, 0.875])]))
    best, other = page.all("button", "bar")
    assert best["aria-label"] == "wrist watch, 87.5 %; show where"
    assert best["style"] == "--share: 87.50%"
    assert [best[f"data-{key}"] for key in ("place", "run", "task", "label")] == ["0", "run", "class", "wrist_watch"]
    assert other["data-label"] == "cap"
    assert "not calibrated" not in page.text


def test_confidences_that_are_not_calibrated_say_so() -> None:
    answer = ImagePrediction("x", {"class": TaskPrediction(["a", "b"], np.array([0.5, 0.5]), calibrated=False)})
    assert "not calibrated" in classified_html([Classified(Upload("x", IMAGE), {"run": answer})])


def test_equally_likely_classes_are_no_prediction() -> None:
    page = HtmlPage(classified_html([classified(["a", "b", "c"], [0.4, 0.4, 0.2])]))
    assert "class: (no prediction)" in page.text
    assert len(page.all("button", "bar")) == 3


def test_many_classes_are_folded_and_all_there() -> None:
    page = HtmlPage(classified_html([classified([f"c{n}" for n in range(9)], [1 / 9] * 9)]))
    assert len(page.all("button", "bar")) == 9
    assert len(page.all("details")) == 1
    assert "4 more" in page.text


def test_two_models_stand_in_two_sections() -> None:
    both = classified(["a", "b"], [0.1, 0.9]).predictions | classified(["a", "b"], [0.6, 0.4], run="other").predictions
    page = HtmlPage(classified_html([Classified(Upload("x", IMAGE), both)]))
    assert len(page.all("section")) == 2
    assert len(page.all("article")) == 1


def test_a_broken_file_is_reported_in_its_place() -> None:
    page = HtmlPage(
        classified_html([Classified(Upload("b.jpg", None, "b.jpg: cut short"), {}), classified(["a"], [1.0])])
    )
    assert page.all("p", "problem") == [{"class": "problem", "role": "alert"}]
    assert [bar["data-place"] for bar in page.all("button", "bar")] == ["1"]


def test_nothing_from_outside_becomes_part_of_the_page() -> None:
    verdict = Verdict(True, EVIL, 0.5)
    zero_shot = ZeroShot([EVIL], [[EVIL]], np.array([0.2]), np.array([1.0]), verdict)
    pages = [
        classified_html([classified([EVIL, "b"], [0.9, 0.1], EVIL, EVIL)], [EVIL]),
        classified_html([Classified(Upload(EVIL, None, EVIL), {})]),
        zero_shot_html(EVIL, [Upload(EVIL, IMAGE), Upload(EVIL, None, EVIL)], [zero_shot], [EVIL]),
        saliency_html(Saliency(EVIL, np.array(IMAGE), np.array(IMAGE)), EVIL),
    ]
    for html in pages:
        page = HtmlPage(html)
        assert not page.all("script")
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in page.all("img"))
        assert EVIL in page.text + "".join(str(value) for _, found in page.elements for value in found.values())


def test_none_of_these_is_shown_only_where_something_else_fits_better() -> None:
    def verdicts_of(verdict: Verdict) -> str:
        answer = ZeroShot(["mug"], [["a mug"]], np.array([0.2]), np.array([1.0]), verdict)
        page = HtmlPage(zero_shot_html("run", [Upload("x", IMAGE)], [answer], []))
        [bar] = page.all("button", "bar")
        assert (bar["data-task"], bar["data-label"]) == ("", "a mug")
        assert len(page.all("p", "verdict")) == verdict.none_of_these
        return page.text

    assert "None of these: more like “<b>” (75%)" in verdicts_of(Verdict(True, "<b>", 0.75))
    assert "None of these" not in verdicts_of(Verdict(False, "cap", 0.1))


def test_notes_stand_once() -> None:
    assert notes_html([]) == ""
    assert notes_html(["a", "a", "b"]).count("<li>") == 2


@pytest.mark.parametrize(("size", "shown"), [((900, 300), (320, 107)), ((64, 48), (320, 240)), ((300, 10), (300, 10))])
def test_images_are_scaled(size: tuple[int, int], shown: tuple[int, int]) -> None:
    address = data_address(Image.new("RGB", size, (250, 0, 0)), 320)
    image = Image.open(io.BytesIO(base64.b64decode(re.sub("^.*,", "", address))))
    assert image.size == shown
    assert np.abs(np.array(image).reshape(-1, 3).mean(axis=0) - [250, 0, 0]).max() < 5


def pressed(index: object, value: object) -> gr.SelectData:
    return cast("gr.SelectData", SimpleNamespace(index=index, value=value))


def test_a_pressed_bar_is_what_the_page_says() -> None:
    assert pressed_bar(pressed(1, ["run", "class", "mug"]), 2) == (1, "run", "class", "mug")


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (2, ["run", "class", "mug"]), (-1, ["run", "class", "mug"]), (True, ["run", "class", "mug"]),
        ("0", ["run", "class", "mug"]), (None, ["run", "class", "mug"]), ([0], ["run", "class", "mug"]),
        (0, ["run", "class"]), (0, ["run", "class", None]), (0, "run"), (0, {"run": "class"}), (0, None),
    ],
)  # fmt: skip
def test_what_cannot_have_been_pressed_is_refused(index: Any, value: Any) -> None:
    with pytest.raises(UserError, match="ask again"):
        pressed_bar(pressed(index, value), 2)


def test_every_kind_has_its_own_form() -> None:
    tags = TaskPrediction(
        ["cat", "dog", "owl"], np.array([0.3, 0.75, 0.2]), kind="multi_label", thresholds=[0.25, 0.5, 0.5]
    )
    price = TaskPrediction((), np.zeros(0), kind="regression", value=12.5, deviation=2.0)
    grade = TaskPrediction(["poor", "fair", "good"], np.array([0.1, 0.2, 0.7]), kind="ordinal")
    plain = TaskPrediction((), np.zeros(0), kind="regression", value=3.0)
    tasks = {"tags": tags, "price": price, "grade": grade, "plain": plain}
    upload = Upload("one.png", IMAGE)
    page = classified_html([Classified(upload, {"run": ImagePrediction("one.png", tasks)})])
    found = HtmlPage(page)
    assert "tags: dog, cat" in found.text
    assert "price: 12.5 ± 2" in found.text
    assert "10.5 to 14.5 within one standard deviation" in found.text
    assert "plain: 3" in found.text
    bars = [attributes for _, attributes in found.elements if str(attributes.get("class")).startswith("bar")]
    of_numbers = ["bar"] * 2  # what raises and what lowers it
    labels, scale = ["bar predicted", "bar predicted", "bar"], ["bar", "bar", "bar predicted"]
    assert [bar["class"] for bar in bars] == [*labels, *of_numbers, *scale, *of_numbers]
    # The best label first, classes of a scale in their order.
    assert [bar["style"] for bar in bars] == [
        f"--share: {share}%" for share in ("75.00", "30.00", "20.00", 0, 0, "10.00", "20.00", "70.00", 0, 0)
    ]
    marks = [attributes["style"] for _, attributes in found.elements if attributes.get("class") == "threshold"]
    assert marks == ["left: 50.00%", "left: 25.00%", "left: 50.00%"]
    pressed = [
        (attributes["data-task"], attributes["data-label"]) for name, attributes in found.elements if name == "button"
    ]
    directions = [[(task, label) for label in ("higher", "lower")] for task in ("price", "plain")]
    assert pressed[:5] == [("tags", "dog"), ("tags", "cat"), ("tags", "owl"), *directions[0]]
    assert pressed[5:] == [*(("grade", name) for name in grade.classes), *directions[1]]


def test_an_unknown_image_is_marked_before_its_classes() -> None:
    known = classified(["cap", "mug"], [0.125, 0.875])
    [prediction] = known.predictions.values()
    marked = Classified(known.upload, {"run": replace(prediction, unknown=True)})

    assert "Unknown: unlike the images" in HtmlPage(classified_html([marked])).text
    assert "Unknown" not in classified_html(
        [known, Classified(known.upload, {"run": replace(prediction, unknown=False)})]
    )
