from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from datamodules.captions import RANDOM, PromptOptions, Texts, class_prompts, composed_captions, templates
from datamodules.table import CaptionLists, SampleTable
from vitrail.errors import UserError

CAPTIONS = [["a", "b", "c"], ["d"], ["e", "f"], ["g"], ["h", "i"]]


def table(captions: Any, labels: list[str | None] | None = None) -> SampleTable:
    names = list("vwxyz")
    frame = pd.DataFrame({"name": names, "source": names, "split": "train", "group": ["v", "v", "x", "y", "z"]})
    frame["caption"] = captions
    if labels:
        frame["class"] = labels
    return SampleTable.from_frame(frame, ["class"] if labels else [])


LABELLED = ["cat", "dog", "cat", None, "dog"]


def test_lists_are_found_again() -> None:
    lists = CaptionLists.from_column(pd.Series([["a", "b"], [], "c", None, float("nan"), pd.NA], dtype=object))
    assert lists.of(range(6)) == [["a", "b"], [""], ["c"], [""], [""], [""]]
    assert lists.counts.tolist() == [2, 1, 1, 1, 1, 1]
    assert lists.first.to_pylist() == ["a", "", "c", "", "", ""]
    assert lists.pick([0, 2], [1, 0]) == ["b", "c"]


def test_all_makes_every_pair_once() -> None:
    texts = Texts(table(CAPTIONS), mode="all")
    rows, numbers = texts.pairs(np.array([0, 2, 3]))
    assert rows.tolist() == [0, 0, 0, 2, 2, 3]
    assert texts.training(rows.tolist(), numbers.tolist(), [0] * 6, [0] * 6) == ["a", "b", "c", "e", "f", "g"]


def test_first_is_always_the_first() -> None:
    texts = Texts(table(CAPTIONS), mode="first")
    rows, numbers = texts.pairs(np.arange(5))
    assert numbers.tolist() == [0] * 5
    assert texts.training(rows.tolist(), numbers.tolist(), [3] * 5, [0] * 5) == ["a", "d", "e", "g", "h"]


def test_random_draws_evenly_and_is_a_function_of_seed_epoch_sample_and_draw() -> None:
    texts, other = Texts(table(CAPTIONS), seed=1), Texts(table(CAPTIONS), seed=2)
    rows, numbers = texts.pairs(np.arange(5))
    assert numbers.tolist() == [RANDOM] * 5

    def drawn(texts: Texts, epoch: int, draw: int = 0) -> list[str]:
        return texts.training(rows.tolist(), numbers.tolist(), [epoch] * 5, [draw] * 5)

    epochs = [drawn(texts, epoch) for epoch in range(300)]
    assert epochs == [drawn(texts, epoch) for epoch in range(300)]
    counts = Counter(epoch[0] for epoch in epochs)
    assert min(counts[text] for text in "abc") > 70
    assert epochs != [drawn(other, epoch) for epoch in range(300)]
    assert epochs[:50] != [drawn(texts, epoch, draw=1) for epoch in range(50)]


def test_captions_of_their_own_are_used_unless_prompts_are_asked_for() -> None:
    data = table(CAPTIONS, LABELLED)
    assert Texts(data).own
    prompted = Texts(data, PromptOptions(templates=["a {}", "the {}"]))
    assert not prompted.own
    assert prompted.class_prompts == [["a cat", "the cat"], ["a dog", "the dog"]]
    assert prompted.evaluation([0, 3]) == [["a cat", "the cat"], [""]]
    seen = {prompted.training([1], [RANDOM], [epoch], [0])[0] for epoch in range(20)}
    assert seen == {"a dog", "the dog"}
    assert prompted.training([3], [RANDOM], [0], [0]) == [""]


def test_data_without_captions_are_described_by_their_classes() -> None:
    texts = Texts(table([""] * 5, LABELLED))
    assert not texts.own
    assert texts.training([0], [0], [0], [0]) == ["a photo of a cat."]


@pytest.mark.parametrize(
    ("captions", "labels", "positives"),
    [
        ([""] * 5, LABELLED, {(0, 2), (1, 4)}),  # class prompts; unknown ones match nothing
        (["A Straße", " a STRASSE ", "a dog", "", " "], None, {(0, 1)}),  # the wording of single captions
        (CAPTIONS, None, {(0, 1)}),  # the group where there are several captions
    ],
)
def test_positives_share_the_class_the_wording_or_the_group(captions: Any, labels: Any, positives: Any) -> None:
    ids = Texts(table(captions, labels)).positive_ids
    assert {(i, j) for i in range(5) for j in range(i + 1, 5) if ids[i] == ids[j]} == positives


def test_a_tokenizer_is_trained_on_captions_and_prompts() -> None:
    texts = Texts(table(CAPTIONS, LABELLED))
    assert set(texts.training_texts(np.array([0, 3]))) == {"a", "b", "c", "g", "a photo of a cat.", "a photo of a dog."}


@pytest.mark.parametrize(
    ("labels", "prompts", "mode", "message"),
    [
        (None, None, "last", "data caption: must be one of first, random, all; got 'last'"),
        (LABELLED, PromptOptions(name="photo"), "all", "data caption: all is for captions of the data's own"),
        (None, PromptOptions(name="photo"), "first", "data prompts: .* has no classes that they could name"),
    ],
)
def test_modes_and_prompts_that_do_not_fit_are_refused(labels: Any, prompts: Any, mode: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Texts(table(CAPTIONS, labels), prompts, mode)


def test_named_templates() -> None:
    assert class_prompts(None, ["tableware_water_bottle"]) == [["a photo of a tableware water bottle."]]
    assert class_prompts(PromptOptions(name="openai_flowers"), ["iris"]) == [["a photo of a iris, a type of flower."]]
    assert class_prompts(PromptOptions(name="reference_flowers"), ["iris"]) == [["an image of the iris flower"]]


def test_templates_and_descriptions_make_one_ensemble(tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"iris": ["it has a beard"], "rose": ["it has thorns", "a rose"]}))
    options = PromptOptions(templates=["a {}"], descriptions=str(path))
    assert class_prompts(options, ["rose", "iris"]) == [
        ["a rose", "it has thorns"],
        ["a iris", "it has a beard"],
    ]
    assert class_prompts(PromptOptions(descriptions=str(path)), ["iris"]) == [["it has a beard"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": ["a flower"]}, "'a flower' must have"),
        ({"templates": ["{} and {}"]}, "must have"),
        ({"descriptions": "/nowhere.json"}, "/nowhere.json"),
    ],
)
def test_wrong_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        class_prompts(PromptOptions.of(options), ["iris"])


@pytest.mark.parametrize("content", ["[]", '{"iris": []}', '{"iris": "text"}', '{"iris": [" "]}', "no json"])
def test_descriptions_must_be_there_for_every_class(tmp_path: Path, content: str) -> None:
    path = tmp_path / "texts.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"texts\.json"):
        class_prompts(PromptOptions(descriptions=str(path)), ["iris"])


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

    once = composed_captions(["{noun}", "{colour} {noun}"], COLUMNS, "here")
    assert once == [["bottle", "blue bottle"], ["handbag"], [""]], "each text once, and one even where all is unknown"
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
def test_mistakes_are_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        composed_captions(["{class}", template], COLUMNS, "here")


def test_named_templates_are_those_of_clip() -> None:
    sets = templates()
    assert len(set(sets["imagenet_80"])) == 80
    assert set(sets["imagenet_7"]) < set(sets["imagenet_80"])
    assert {"a bad photo of a {}.", "a tattoo of the {}.", "itap of my {}."} <= set(sets["imagenet_80"])
    assert all(text.count("{}") == 1 for texts in sets.values() for text in texts)
    assert all(len(set(texts)) == len(texts) for texts in sets.values())
    named = {"flowers", "food", "pets", "textures", "satellite", "actions", "cars", "aircraft"}
    assert named < set(sets)
    (prompts,) = class_prompts(PromptOptions.of("textures"), ["polka_dotted"])
    assert prompts[:2] == ["a photo of a polka dotted texture.", "a photo of a polka dotted pattern."]
    assert len(prompts) == 8
