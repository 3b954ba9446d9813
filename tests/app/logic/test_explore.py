"""Tests of filters, counts and mistakes against pandas, and of pages, random orders and steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from app.logic.explore import Explorer, Filter, page_of, shuffled, step
from app.state.galleries import NOT_KNOWN, ServedGallery
from retrieval.gallery import Gallery
from tests.app.explored_gallery import CLASSES, COLOURS, N
from tests.support.galleries import gallery_of_every_kind, identity, image_rows, small_gallery, vectors
from vitrail.errors import UserError

HOSTILE = [["bowl"], {"a": 1}, 3, 2.5, True, "../../etc/passwd", "bowl' OR 1=1", "x" * 9999, "\0", b"bowl", "BOWL"]


@pytest.fixture(scope="module")
def frame(served: ServedGallery) -> pd.DataFrame:
    return pd.DataFrame(served.metadata.to_pandas())


def test_the_class_comes_first_and_labels_before_answers(explorer: Explorer) -> None:
    assert (explorer.main, [*explorer.facets]) == ("class", ["class", "colour", "size"])
    assert explorer.classes == tuple(sorted(CLASSES))
    assert [explorer.facets[task].labelled for task in explorer.facets] == [True, True, False]
    assert explorer.facets["colour"].values == (*sorted(COLOURS), NOT_KNOWN)
    assert explorer.attribute_options == [
        *(f"colour: {value}" for value in (*sorted(COLOURS), NOT_KNOWN)), "size: l", "size: s",
    ]  # fmt: skip
    assert explorer.splits == ["train", "val", "test"]
    assert explorer.evaluated_tasks() == ["class", "colour"]


@pytest.mark.parametrize("seed", range(40))
def test_filters_leave_what_pandas_leaves(explorer: Explorer, frame: pd.DataFrame, seed: int) -> None:
    rng = np.random.default_rng(seed)
    split = str(rng.choice(["", "train", "val", "test"]))
    class_name = str(rng.choice(["", *CLASSES]))
    attributes = rng.choice(explorer.attribute_options, rng.integers(0, 4), replace=False).tolist()
    expected = pd.Series(data=True, index=frame.index)
    if split:
        expected &= frame["split"] == split
    if class_name:
        expected &= frame["label_class"] == class_name
    for task, column in (("colour", "label_colour"), ("size", "predicted_size")):
        wanted = [option.removeprefix(f"{task}: ") for option in attributes if option.startswith(f"{task}: ")]
        if wanted:
            expected &= frame[column].fillna(NOT_KNOWN).isin(wanted)
    found = explorer.find(explorer.filter(split, class_name, attributes))
    assert found.dtype == np.int64
    assert found.tolist() == np.flatnonzero(expected).tolist()


def test_the_same_choice_in_another_order_is_the_same_filter(explorer: Explorer) -> None:
    one = explorer.filter("test", "mug", ["size: s", "colour: red", "colour: blue", "size: s"])
    other = explorer.filter("test", "mug", ("colour: blue", "size: s", "colour: red"))
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("place", ["split", "class_name", "attributes", "attribute"])
def test_what_the_gallery_does_not_have_is_refused_in_one_line(explorer: Explorer, value: object, place: str) -> None:
    asked = {"attributes": ["colour: red", value]} if place == "attribute" else {place: value}
    with pytest.raises(UserError, match=r"choose one of|such as \['colour: blue'\]") as said:
        explorer.filter(**asked)
    assert "\n" not in str(said.value)
    assert len(str(said.value)) < 400


@pytest.mark.parametrize("value", [*HOSTILE, None])
def test_only_the_gallerys_own_images_have_a_row(explorer: Explorer, value: object) -> None:
    with pytest.raises(UserError, match="gallery 'wares'"):
        explorer.row_of(value)
    assert explorer.ids[explorer.row_of("p17")] == "p17"


def test_totals_and_counts_are_those_of_the_rows(explorer: Explorer, frame: pd.DataFrame) -> None:
    rows = explorer.find(explorer.filter(attributes=["size: s"]))
    part = frame[frame["predicted_size"] == "s"]
    by_split = part["split"].value_counts()
    splits = ", ".join(f"{split} {by_split[split]}" for split in ("train", "val", "test"))
    assert explorer.totals(rows) == f"{len(part)} of {N} images ({splits})"
    assert explorer.totals(explorer.find(Filter())).startswith(f"{N} images (")
    for task, column in (("class", "label_class"), ("colour", "label_colour")):
        expected = pd.crosstab(part[column].fillna(NOT_KNOWN), part["split"])
        counts = explorer.counts(rows, task)
        assert list(counts.columns) == ["train", "val", "test"]
        pd.testing.assert_frame_equal(
            counts, expected.reindex(counts.index)[counts.columns], check_names=False, check_dtype=False
        )


@pytest.mark.parametrize("task", ["class", "colour"])
def test_mistakes_are_wrong_answers_the_most_confident_first(
    explorer: Explorer, frame: pd.DataFrame, task: str
) -> None:
    rows = explorer.find(explorer.filter(attributes=["size: l"]))
    part = frame.loc[rows]
    known = part[part[f"label_{task}"].notna()]
    wrong = known[known[f"label_{task}"] != known[f"predicted_{task}"]]
    expected = wrong.sort_values(f"confidence_{task}", ascending=False, kind="stable")
    found = explorer.mistakes(rows, task)
    assert found.evaluated == len(known)
    assert found.rows.tolist() == expected.index.tolist()
    assert len(found.rows) > 3
    first = expected.iloc[0]
    label, answer, confidence = explorer.mistake(int(found.rows[0]), task)
    assert (label, answer) == (first[f"label_{task}"], first[f"predicted_{task}"])
    assert confidence == pytest.approx(first[f"confidence_{task}"])
    none = explorer.mistakes(rows[:0], task)
    assert (len(none.rows), none.evaluated) == (0, 0)


def test_without_labels_there_are_no_mistakes_to_be_found(explorer: Explorer) -> None:
    with pytest.raises(UserError, match="'size'; tasks: class, colour"):
        explorer.mistakes(explorer.find(Filter()), "size")


def test_facts_name_labels_and_answers(explorer: Explorer, frame: pd.DataFrame) -> None:
    row = 13  # its colour is not known
    facts, known = explorer.facts(row), frame.loc[row]
    assert [*facts] == ["id", "split", "caption", "class", "colour", "size"]
    verdict = "✓" if known["label_class"] == known["predicted_class"] else "✗"
    said = f"the model predicts {known['predicted_class']} ({known['confidence_class']:.2f}) {verdict}"
    assert facts["class"] == f"{known['label_class']}; {said}"
    answer = f"{known['predicted_colour']} ({known['confidence_colour']:.2f})"
    assert facts["colour"] == f"{NOT_KNOWN}; the model predicts {answer}"
    assert facts["size"] == f"the model predicts {known['predicted_size']} ({known['confidence_size']:.2f})"


def test_no_confidence_is_shown_where_none_is_known(tmp_path: Path) -> None:
    made_by = identity(labels=[], encodes_text=False)
    gallery = Gallery.create(str(tmp_path / "gallery"), made_by)
    rows = image_rows(made_by, ["a"], vectors(1))
    said = {"predicted_class": pa.array(["bag"]), "confidence_class": pa.nulls(1, pa.float32())}
    for name, values in said.items():
        column = rows.column_names.index(name)
        rows = rows.set_column(column, rows.schema.field(column), [values])
    with gallery.writing() as writer:
        writer.add(rows)
    facts = Explorer(ServedGallery(tmp_path / "gallery", "bare")).facts(0)
    assert facts["class"] == "the model predicts bag"


def test_a_gallery_of_photos_without_labels_is_browsed_by_what_the_model_says(tmp_path: Path) -> None:
    small_gallery(tmp_path / "gallery", labels=[], encodes_text=False)
    explorer = Explorer(ServedGallery(tmp_path / "gallery", "photos", data_roots=[tmp_path]))
    assert explorer.classes == ("bag", "sneakers", "tableware_water_bottle")
    assert not any(facet.labelled for facet in explorer.facets.values())
    assert explorer.evaluated_tasks() == []
    # p3 is a bag that the model takes for sneakers.
    assert explorer.find(explorer.filter(class_name="sneakers", attributes=["colour: blue"])).tolist() == [3, 10, 11]


def test_a_gallery_that_knows_nothing_of_its_images_is_browsed_all_the_same(tmp_path: Path) -> None:
    made_by = identity(labels=[], predicts={}, encodes_text=False)
    gallery = Gallery.create(str(tmp_path / "gallery"), made_by)
    with gallery.writing() as writer:
        writer.add(image_rows(made_by, ["a", "b"], vectors(2)))
    explorer = Explorer(ServedGallery(tmp_path / "gallery", "bare"))
    assert (explorer.main, explorer.classes, explorer.attribute_options) == ("", (), [])
    assert explorer.find(explorer.filter()).tolist() == [0, 1]
    assert explorer.facts(0) == {"id": "a", "split": "test"}
    with pytest.raises(UserError, match="there are none"):
        explorer.filter(class_name="mug")


def test_attributes_that_are_called_like_columns_of_the_gallery(tmp_path: Path) -> None:
    made_by = identity(labels=["class", "id", "split"], predicts={}, encodes_text=False)
    gallery = Gallery.create(str(tmp_path / "gallery"), made_by)
    columns = {"label_class": ["x", "y"], "label_id": ["no", "1"], "label_split": ["red", "blue"]}
    rows = image_rows(made_by, ["a", "b"], vectors(2), **columns)
    with gallery.writing() as writer:
        writer.add(rows)
    served = ServedGallery(tmp_path / "gallery", "odd")
    facts = Explorer(served).facts(0)
    assert facts == {"id": "a", "split": "test", "class": "x", "attribute id": "no", "attribute split": "red"}
    assert served.choices["split"] == ["blue", "red"]
    assert served.fitting({"split": ["blue"], "gallery_split": ["test"]}).tolist() == [1]


def test_a_name_that_cannot_be_a_column_is_refused(tmp_path: Path) -> None:
    for name in ("f.stop", "a`b"):
        with pytest.raises(UserError, match="cannot be a column of a gallery"):
            Gallery.create(str(tmp_path / "gallery"), identity(labels=["class", name]))


@pytest.mark.parametrize("count", [0, 1, 19, 20, 21, 40, 101])
def test_the_pages_together_have_every_row_once(count: int) -> None:
    rows = np.arange(count, dtype=np.int64) * 3
    pages = [page_of(rows, number, 20) for number in range(1, page_of(rows, 1, 20).pages + 1)]
    assert np.concatenate([page.rows for page in pages]).tolist() == rows.tolist()
    assert [page.number for page in pages] == [*range(1, len(pages) + 1)]
    assert all(len(page.rows) == 20 for page in pages[:-1])
    assert [page.first for page in pages] == ([1 + 20 * place for place in range(len(pages))] if count else [0])


@pytest.mark.parametrize(("asked", "given"), [(-5, 1), (0, 1), (3, 3), (4, 3), (10**30, 3)])
def test_a_page_outside_is_the_nearest_one(asked: int, given: int) -> None:
    assert page_of(np.arange(50, dtype=np.int64), asked, 20).number == given


def test_a_drawn_order_has_every_row_once_and_is_its_seeds_alone() -> None:
    rows = np.arange(5, 300, dtype=np.int64)
    one = shuffled(rows, 3)
    assert sorted(one.tolist()) == rows.tolist()
    assert one.tolist() != rows.tolist()
    assert shuffled(rows, 3).tolist() == one.tolist()
    assert shuffled(rows, 4).tolist() != one.tolist()
    assert shuffled(rows, None).tolist() == rows.tolist()


def test_steps_go_through_the_order_and_end_at_its_ends() -> None:
    rows = np.array([8, 2, 9, 4], np.int64)
    places, current = [], None
    for _ in range(6):
        places.append(step(rows, current, 1) if current is not None else step(rows, None, 0))
        current = int(rows[places[-1]])
    assert places == [0, 1, 2, 3, 3, 3]
    assert step(rows, 9, -1) == 1
    assert step(rows, 8, -1) == 0
    assert step(rows, 77, 1) == 0  # filtered away since: from the first again


@pytest.fixture(scope="module")
def of_every_kind(tmp_path_factory: pytest.TempPathFactory) -> ServedGallery:
    folder = tmp_path_factory.mktemp("kinds") / "gallery"
    gallery_of_every_kind(folder)
    return ServedGallery(folder, "kinds")


def test_tasks_of_every_kind_are_filtered_counted_and_described(of_every_kind: ServedGallery) -> None:
    explorer = Explorer(of_every_kind)
    assert explorer.facets["grade"].values == ("poor", "fair", "good", NOT_KNOWN)
    tagged = explorer.find(explorer.filter(attributes=["tags: cat"]))
    assert tagged.tolist() == [0, 1]
    counts = explorer.counts(tagged, "tags").sum(axis=1)
    assert counts.to_dict() == {"cat": 2, "cat's toy": 0, "dog": 1, "(no label)": 0, NOT_KNOWN: 0}
    assert [explorer.value_of(1, task) for task in explorer.facets] == ["sneakers", "fair", "12.99", "cat, dog"]
    assert explorer.value_of(2, "tags") == "(no label)"
    facts = explorer.facts(1)
    assert facts["tags"] == "cat, dog; the model predicts dog 0.88 + cat 0.50 ✓"
    assert facts["price"] == "12.99; the model predicts 13.5 ± 2"
    assert facts["grade"] == "fair; the model predicts fair (0.60) ✓"
    cheap = explorer.facets["price"].values[0]
    assert explorer.find(explorer.filter(attributes=[f"price: {cheap}"])).tolist() == [0]


def test_mistakes_of_several_labels_are_other_sets(of_every_kind: ServedGallery) -> None:
    explorer = Explorer(of_every_kind)
    assert explorer.evaluated_tasks() == ["class", "grade", "tags"]
    found = explorer.mistakes(np.arange(6), "tags")
    assert (found.rows.tolist(), found.evaluated) == ([4, 2, 5], 5)
    assert explorer.mistake(5, "tags") == ("cat's toy", "cat's toy, dog", 0.625)
    with pytest.raises(UserError, match="tasks: class, grade, tags"):
        explorer.mistakes(np.arange(6), "price")


def test_search_filters_of_every_kind(of_every_kind: ServedGallery) -> None:
    assert of_every_kind.choices["tags"] == ["cat", "cat's toy", "dog", "(no label)"]
    assert of_every_kind.choices["grade"] == ["poor", "fair", "good"]
    assert of_every_kind.fitting({"tags": ["cat", "(no label)"], "grade": ["fair", "poor"]}).tolist() == [0, 1, 3]
