from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from timm.data import ImageNetInfo

from experiments.train.evaluate import merged_classes, read_class_map
from tests.support.data import write_csv
from tests.support.runs import data_of, products_run
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.programs import main
from vitrail.runs import Run

INFO = ImageNetInfo("imagenet-1k")
WNIDS = INFO.label_names()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    trained = products_run()
    return Path(shutil.copytree(trained, tmp_path / "runs" / trained.parent.name / trained.name))


def write_layout(run: Path, folders: Mapping[str, str]) -> int:
    """Class folders with the run's test images, by the folder's name for each class; return the number of images."""
    data, count = data_of(run), 0
    for row in data.split_indices("test").tolist():
        if folder := folders.get(data.class_names[data.table.targets["class"][row]]):
            Path("new", folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(data.table.source(row), Path("new", folder, f"{row}.png"))
            count += 1
    return count


def test_numbered_folders_are_places_among_the_classes_not_in_the_alphabet(run: Path) -> None:
    """As in ImageNet-V2, whose folder 10 comes before folder 2."""
    classes = data_of(run).class_names
    count = write_layout(run, {name: str(place) for place, name in enumerate(classes)})

    assert main("vitrail", ["evaluate", str(run), "--data", "new", "--class-map", "index"]) == 0

    found, known = Run(run / "evaluations" / "new").predictions("test"), Run(run).predictions("test")
    assert found is not None
    assert known is not None
    assert len(found) == count == len(known)
    right = [np.mean(one.predicted("class") == one.targets["class"]) for one in (found, known)]
    assert right[0] == right[1]
    assert read_class_map("index", ["10", "2", "x"], list("abcdefghijk")) == {"10": ["k"], "2": ["c"]}


def test_several_classes_of_one_folder_are_one_class(run: Path) -> None:
    """As in ObjectNet."""
    first, second, third = data_of(run).class_names
    write_layout(run, {first: "Thing", second: "Thing", third: "unheard of"})
    Path("map.json").write_text(json.dumps({"Thing": f"{first}; {second}", "never": [third]}))
    command = ["evaluate", str(run), "--data", "new", "--class-map", "map.json"]

    assert main("vitrail", command) == 0
    assert main("vitrail", [*command, "--name", "two", "--restrict-classes"]) == 0

    found = Run(run / "evaluations" / "new")
    predictions = found.predictions("test")
    assert predictions is not None
    assert predictions.tasks["class"] == [first, third]
    known = predictions.targets["class"] >= 0
    assert set(predictions.targets["class"][known].tolist()) == {0}
    assert known.sum() == len(list(Path("new/Thing").iterdir()))
    assert found.record["evaluation"]["unknown_classes"]["class"] == {"unheard of": int((~known).sum())}
    counts = Run(run).record["data"]["class_counts"]["class"]
    assert found.record["data"]["class_counts"]["class"] == [counts[0] + counts[1], counts[2]]
    restricted = Run(run / "evaluations" / "two").predictions("test")
    assert restricted is not None
    assert restricted.tasks["class"] == [first]
    single = Run(run / "evaluations" / "two").record["evaluation"]["class_map"]
    assert single == {"Thing": [first, second]}


def test_the_logit_of_joined_classes_is_their_largest() -> None:
    logits = np.array([[1, 5, 3], [4, 0, 2]], dtype=np.float32)
    names = np.array(["a", "b"], dtype=object)
    whole = Predictions(
        np.arange(2), names, names, {"class": ["x", "y", "z"]}, {"class": np.array([0, -1])}, {"class": logits}
    )

    found = merged_classes(whole, {"one": ["z", "x"]})

    assert found.tasks["class"] == ["z", "y"]
    assert found.logits["class"].tolist() == [[3, 5], [4, 0]]
    assert found.targets["class"].tolist() == [0, -1]
    # A prediction is right exactly where it is one of the classes that the name stands for.
    assert np.array_equal(found.predicted("class") == 0, np.isin(whole.predicted("class"), [0, 2]))


@pytest.mark.parametrize(
    ("classes", "wanted"),
    [
        (WNIDS, ["n01443537"]),
        ([INFO.label_name_to_description(name) for name in WNIDS], ["goldfish, Carassius auratus"]),
        (["gold_fish", "Goldfish", "tench"], ["Goldfish"]),
    ],
)
def test_names_of_wordnet_as_in_imagenet_r_a_and_sketch(classes: Sequence[str], wanted: list[str]) -> None:
    assert read_class_map("imagenet", ["n01443537", "goldfish", "n99999999"], classes) == {"n01443537": wanted}


def test_a_word_of_two_classes_is_taken_for_neither() -> None:
    cranes = [name for name in WNIDS if INFO.label_name_to_description(name) == "crane"]

    assert len(cranes) == 2
    assert read_class_map("imagenet", [*cranes, "n01443537"], ["crane", "goldfish"]) == {"n01443537": ["goldfish"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["folder", "class"], ["cup", "saucer"]], r"maps none of the names \(cup"),
        ([["folder", "class"], ["cup", "mug"], ["glass", "mug"]], "class 'mug' is given to cup and glass; keep one"),
        ([["folder"], ["cup"]], "must have names and classes"),
        (None, "there is no such file"),
    ],
)
def test_a_map_that_is_none(rows: list[list[str]] | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "map.csv"
    if rows is not None:
        write_csv(file, rows)

    with pytest.raises(UserError, match=message):
        read_class_map(str(file), ["cup", "glass"], ["mug", "vase"])


def test_one_domain_of_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As WILDS has them: all domains in one table, with columns for domain and split."""
    data = data_of(run)
    rows = [["filename", "y", "domain", "split"]]
    for row in data.split_indices("test").tolist():
        rows.append([data.table.source(row), str(data.table.targets["class"][row]), str(row % 3), "ood_val"])
    write_csv(Path("metadata.csv"), rows)
    command = ["evaluate", str(run), "--data", "metadata.csv", "--class-map", "index", "--rows"]

    assert main("vitrail", [*command, "domain=0", "domain=2", "split=ood_val"]) == 0
    assert main("vitrail", [*command, "domain=7"]) == 2
    assert main("vitrail", [*command, "place=7"]) == 2
    assert main("vitrail", [*command, "domain"]) == 2

    found = Run(run / "evaluations" / "metadata").predictions("test")
    assert found is not None
    assert len(found) == sum(row[2] != "1" for row in rows[1:])
    assert (found.targets["class"] >= 0).all()
    printed = capsys.readouterr().err
    assert "has no domain '7'; it has 0, 1, 2" in printed
    assert "has no column 'place'" in printed
    assert "--rows domain: must be COLUMN=VALUE" in printed
