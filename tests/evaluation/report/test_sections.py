from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from evaluation.commands.efficiency import write_costs as write
from evaluation.efficiency import BatchCost, Costs, Counts, cpu_latency, read_efficiency
from evaluation.report.sections import (
    calibration_section,
    class_table,
    classes_section,
    configuration_section,
    confusion_section,
    data_section,
    efficiency_section,
    environment_section,
    retrieval_section,
    run_section,
    scores_section,
    stage_minutes,
)
from evaluation.statistics.calibration import expected_calibration_error
from evaluation.statistics.intervals import share_interval
from evaluation.tables.summary import flattened, summarise
from retrieval.gallery import Gallery
from tests.support.galleries import caption_rows, identity, image_rows, small_gallery, vectors
from tests.support.runs import write_run
from vitrail.predictions import Predictions
from vitrail.runs import Run
from vitrail.types import UNKNOWN


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path, gallery=False)


def changed(run: Path, **facts: Any) -> Run:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps({**record, **facts}), encoding="utf-8")
    return Run(run)


def values(table: Any) -> dict[str, str]:
    return dict(zip(table.iloc[:, 0], table.iloc[:, 1], strict=True))


def test_keys_of_nested_values() -> None:
    nested = {"a": {"b": 1, "c": {}}, "d": [{"e": 2}, {"e": 3}], "f": [1, 2], "g": None}
    assert flattened(nested) == {"a.b": 1, "a.c": {}, "d.0.e": 2, "d.1.e": 3, "f": [1, 2], "g": None}


def test_minutes_of_a_stage() -> None:
    assert stage_minutes({"started": "2026-01-01T10:00:00", "ended": "2026-01-01T11:30:30"}) == 90.5
    for unknown in ({}, {"started": "2026-01-01T10:00:00"}, {"started": "soon", "ended": "later"}):
        assert math.isnan(stage_minutes(unknown))


def test_stages_and_commands(run: Path) -> None:
    section = run_section(Run(run))
    table = section.tables["stages"]
    assert table["minutes"][0] == 3.5
    assert table["best on validation"].tolist() == ["val/class/accuracy 0.7000", ""]
    assert section.paragraphs == ["`python -m experiments fit --config shop.yaml`"]
    assert section.missing == []


def test_settings_and_the_whole_file(run: Path) -> None:
    section = configuration_section(Run(run))
    settings = values(section.tables["settings"])
    assert settings["model"] == "lightning_modules.MultiTaskClassifier"
    assert settings["model.lr"] == "0.001"
    assert settings["trainer.callbacks.0.unfreeze_epoch"] == "4"
    assert section.folded == {"all of config.yaml": (run / "config.yaml").read_text(encoding="utf-8")}


def test_environment(run: Path) -> None:
    section = environment_section(Run(run))
    facts = values(section.tables["environment"])
    assert facts["git revision"] == "a" * 40
    assert facts["torch"] == "2.15.0"
    assert facts["gpus"] == "none"
    assert facts["model parameters"] == "1,000"
    assert section.missing == []


@pytest.mark.parametrize(
    ("git", "message"),
    [(None, "revision of the source is not known"), ({"revision": "b", "changed_files": 3}, "had 3 changed files")],
)
def test_source_that_does_not_reproduce_the_run_is_reported(run: Path, git: Any, message: str) -> None:
    assert message in environment_section(changed(run, git=git)).missing[0]


def test_data_that_were_seen(run: Path) -> None:
    section = data_section(Run(run))
    assert section.tables["data_splits"].to_dict("list") == {
        "split": ["train", "val", "test"],
        "samples": [36, 9, 9],
        "groups": [12, 3, 3],
    }
    assert "Values that are missing in training, left out as unknown: colour 'gold' (5 samples)." in section.paragraphs
    assert "Images left out because they cannot be read: 0." in section.paragraphs


def test_skipped_images_are_listed(run: Path) -> None:
    skipped = [{"name": "a.jpg", "row": 3, "reason": "truncated"}]
    section = data_section(changed(run, data={"data": "Products", "skipped": skipped}))
    assert section.tables["skipped_images"].to_dict("records") == skipped


def test_nothing_is_called_none_that_is_not_recorded(run: Path) -> None:
    section = data_section(changed(run, data={"data": "Products"}))
    text = " ".join(section.paragraphs)
    assert "Every value of every label" not in text
    assert "cannot be read" not in text
    assert "fingerprint not recorded" in text
    assert section.missing == [
        "The run record does not list values that are missing in training.",
        "The run record does not list images that were left out.",
    ]


def test_missing_values_and_contradictions_are_shown(run: Path) -> None:
    identical = {"repeated": {"train": 6, "val": 0}, "conflicts": {"class": 2, "attribute colour": 1}}
    data = {"missing": {"attribute colour": {"NA": 3}}, "notes": ["no row has 'x'"], "identical": identical}
    paragraphs = data_section(changed(run, data={"data": "Products", **data})).paragraphs
    assert "Counted as unknown (checks.missing): attribute colour 'NA' (3 samples)." in paragraphs
    assert "Images that repeat another one of their split: train 6." in paragraphs
    assert "Identical images that the data contradict themselves about: class 2, attribute colour 1." in paragraphs
    assert "no row has 'x'" in paragraphs


def test_records_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("", encoding="utf-8")
    files = Run(tmp_path)
    for make in (configuration_section, environment_section, data_section):
        section = make(files)
        assert section.missing
        assert not section.tables


@pytest.mark.parametrize(
    "data",
    ["text", {"samples": None, "unseen": [1], "skipped": None, "notes": 3, "missing": {"a": 1}, "identical": "x"}],
)
def test_odd_records_are_no_traceback(run: Path, data: Any) -> None:
    files = changed(run, data=data, packages=None, hardware="x", model=[], stages=[{"stage": "fit", "best": 3}])
    for make in (run_section, environment_section, data_section):
        assert make(files).title


CLASSES = ["bag", "cap", "mug", "pen", "fan"]


def sample(n: int = 60) -> Predictions:
    """No sample is a pen, none is answered to be a fan, one is a fan, and some are not known."""
    rng = np.random.default_rng(0)
    targets = rng.choice([UNKNOWN, 0, 1, 2], n)
    targets[7] = 4
    logits = rng.normal(size=(n, 5)).astype(np.float32) + 2 * np.eye(5, dtype=np.float32)[targets]
    logits[:, 4] = -9
    return Predictions(
        sample_id=np.arange(n),
        names=np.array([f"photo {index}" for index in range(n)], dtype=object),
        groups=np.array([f"object {index // 3}" for index in range(n)], dtype=object),
        tasks={"class": CLASSES, "size": ["small", "large"]},
        targets={"class": targets, "size": np.full(n, UNKNOWN)},
        logits={"class": logits, "size": np.zeros((n, 2), np.float32)},
    )


def test_class_table_is_that_of_scikit_learn_without_numbers_of_nothing() -> None:
    found = sample()
    table = class_table(found, "class", [9, 8, 7, 6, 5])
    rows = found.targets["class"] != UNKNOWN
    targets, answers = found.targets["class"][rows], found.predicted("class")[rows]
    expected = metrics.precision_recall_fscore_support(targets, answers, labels=range(5), zero_division=np.nan)
    np.testing.assert_allclose(table["precision"], expected[0])
    np.testing.assert_allclose(table["recall"], expected[1])
    assert table["samples"].tolist() == expected[3].tolist()
    assert np.isnan(table["f1"][3])
    np.testing.assert_allclose(table["f1"][:3], expected[2][:3])
    assert np.isnan(table["precision"][4])
    assert table["predicted"].sum() == rows.sum()
    assert table["train"].tolist() == [9, 8, 7, 6, 5]
    own = targets == 1
    low, high = share_interval((answers[own] == 1).astype(np.float64), found.groups[rows][own])
    assert table["recall [95 %]"][1] == f"[{low:.3f}, {high:.3f}]"
    assert table["recall [95 %]"][3] == "–"


def test_classes_with_few_samples_or_none_are_named() -> None:
    section = classes_section(sample(), {}, "test")
    text = " ".join(section.paragraphs)
    assert "class: fewer than 5 samples, so their scores mean little: fan (1)." in text
    assert "class: without any sample in test, so without recall and F1: pen." in text
    assert section.missing == ["Of 'size' no target is known."]
    assert list(section.tables) == ["classes_test_class"]


def test_most_frequent_confusions_first() -> None:
    found = sample()
    section = confusion_section(found, "test")
    table = section.tables["confused_test_class"]
    rows = found.targets["class"] != UNKNOWN
    matrix = metrics.confusion_matrix(found.targets["class"][rows], found.predicted("class")[rows], labels=range(5))
    assert table["samples"].is_monotonic_decreasing
    for row in table.to_dict("records"):
        target, predicted = CLASSES.index(row["target"]), CLASSES.index(row["predicted"])
        assert row["samples"] == matrix[target, predicted]
        assert row["share of the target"] == pytest.approx(matrix[target, predicted] / matrix[target].sum())
    np.testing.assert_array_equal(section.matrices[0].counts.iloc[:, :5], matrix)
    assert section.matrices[0].grid == "mistakes_test_class"
    assert section.missing == ["Of 'size' no target is known."]


def test_calibration_before_and_after() -> None:
    found = sample()
    section = calibration_section(found, {"class": 2.0}, "test", "runs/shop/1")
    table = section.tables["calibration_test"]
    rows = found.targets["class"] != UNKNOWN
    correct = found.predicted("class")[rows] == found.targets["class"][rows]
    for place, temperature in enumerate((1.0, 2.0)):
        confidence = found.probabilities("class", temperature)[rows].max(axis=1)
        row = table.iloc[place]
        assert row["T"] == temperature
        assert row["ECE [95 %]"].startswith(f"{expected_calibration_error(confidence, correct):.3f} [")
        assert row["NLL"] == pytest.approx(
            metrics.log_loss(
                found.targets["class"][rows], found.probabilities("class", temperature)[rows], labels=range(5)
            )
        )
    assert list(section.charts) == ["reliability_test_class", "reliability_test_class_calibrated"]
    assert any("`python -m evaluation calibrate runs/shop/1`" in sentence for sentence in section.missing)
    assert not any("class" in sentence for sentence in section.missing)


def test_scores_of_a_task_without_targets_are_dashes() -> None:
    section = scores_section(sample(), summarise(sample(), {}, "shop/1", "test"), "test")
    row = section.tables["scores_test"].set_index("task").loc["size"]
    assert row["n"] == 0
    assert {str(row[name]) for name in ("majority", "accuracy [95 %]", "macro F1 [95 %]")} == {"–"}
    assert row["note"] == "no known targets"


def test_top_three_of_three_classes_is_not_shown() -> None:
    table = (
        scores_section(sample(), summarise(sample(), {}, "shop/1", "test"), "test")
        .tables["scores_test"]
        .set_index("task")
    )
    assert str(table.loc["size", "top-3 [95 %]"]) == "–"
    assert str(table.loc["class", "top-3 [95 %]"]) != "–"


def test_what_is_not_above_the_majority_is_said() -> None:
    found = sample()
    guess = Predictions(
        found.sample_id,
        found.names,
        found.groups,
        {"class": CLASSES},
        {"class": found.targets["class"]},
        {"class": np.random.default_rng(1).normal(size=(60, 5)).astype(np.float32)},
    )
    message = "Not shown to be better than always answering the majority class: class."
    assert message in scores_section(guess, summarise(guess, {}, "shop/1", "test"), "test").paragraphs
    assert message not in scores_section(found, summarise(found, {}, "shop/1", "test"), "test").paragraphs


def test_nearest_images_are_those_of_brute_force(gallery: Gallery) -> None:
    section = retrieval_section(gallery, "test", "class", None, None)
    table = gallery.table(["id", "group", "label_class"]).to_pydict()
    ids = table["id"]
    vectors = gallery.vectors(ids)
    assert len(section.cards) == 6
    for query, cards in section.cards.items():
        place = ids.index(query)
        scores = vectors @ vectors[place]
        scores[place] = -2
        order = np.argsort(-scores)[:5]
        assert cards[0].lines == ["query", f"class: {table['label_class'][place]}"]
        for hit, card in zip(order, cards[1:], strict=True):
            same = ["the same object"] if table["group"][hit] == table["group"][place] else []
            assert card.lines == [f"{scores[hit]:.3f}", f"class: {table['label_class'][hit]}", *same]


def test_queries_are_of_as_many_classes_as_there_are(gallery: Gallery) -> None:
    section = retrieval_section(gallery, "test", "class", None, None, seed=3)
    firsts = [cards[0].lines[1] for cards in list(section.cards.values())[:3]]
    assert len(set(firsts)) == 3


def test_a_split_that_the_gallery_lacks_is_reported(gallery: Gallery) -> None:
    section = retrieval_section(gallery, "val", "class", None, None)
    assert "the whole gallery, which has none of val" in section.paragraphs[0]


def test_images_come_from_the_reader(gallery: Gallery) -> None:
    asked: list[str] = []

    def read(name: str) -> np.ndarray | None:
        asked.append(name)
        return np.zeros((8, 8, 3), np.uint8) if len(asked) % 2 else None

    section = retrieval_section(gallery, "test", "class", read, None)
    cards = [card for row in section.cards.values() for card in row]
    assert len(asked) == len(cards)
    assert [card.jpeg is not None for card in cards] == [place % 2 == 0 for place in range(len(cards))]


def test_texts_find_the_images_of_brute_force(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "gallery")
    section = retrieval_section(gallery, "test", "class", None, None)
    ids = gallery.table(["id"]).column("id").to_pylist()
    images = gallery.vectors(ids)
    texts = {title: cards for title, cards in section.cards.items() if title.startswith("“")}
    queries = [title for title in section.cards if title not in texts]
    assert len(texts) == len(queries) == 6
    for query, (title, cards) in zip(queries, texts.items(), strict=True):
        first = gallery.captions_of([query]).slice(0, 1)
        assert title == f"“{first.column('caption')[0].as_py()}”"
        scores = images @ np.array(first.column("vector")[0].as_py(), np.float32)
        assert [card.lines[0] for card in cards] == [f"{score:.3f}" for score in np.sort(scores)[::-1][:5]]
        noted = ["the image that the text is of" in card.lines for card in cards]
        assert noted == [ids[place] == query for place in np.argsort(-scores, kind="stable")[:5]]
    # An image as a query has the texts nearest to it below.
    said = [line for line in section.cards[queries[0]][0].lines if "“" in line]
    assert len(said) == 3


def test_a_text_of_several_images_is_asked_once(tmp_path: Path) -> None:
    gallery = Gallery.create(str(tmp_path / "gallery"), identity(labels=[], predicts={}))
    ids = ["a", "b", "c"]
    rows = image_rows(gallery.identity, ids, vectors(3))
    with gallery.writing() as writer:
        writer.add(rows, caption_rows(gallery.identity, [("a", "mug"), ("c", "cap"), ("b", "mug")], vectors(3, seed=1)))
    titles = list(retrieval_section(gallery, "test", "", None, None).cards)
    assert sorted(titles) == ["a", "b", "c", "“cap”", "“mug”"]


def test_queries_without_captions_ask_no_texts(tmp_path: Path) -> None:
    gallery = Gallery.create(str(tmp_path / "gallery"), identity(labels=[], predicts={}))
    rows = image_rows(gallery.identity, ["a", "b", "c"], vectors(3), split=["test", "test", "train"])
    with gallery.writing() as writer:
        writer.add(rows, caption_rows(gallery.identity, [("c", "a cap")], vectors(1, seed=1)))
    section = retrieval_section(gallery, "test", "", None, None)
    assert sorted(section.cards) == ["a", "b"]
    assert len(section.paragraphs) == 1


COUNTS = Counts(2_000_000, 1_000, 5_000_000, None, 8_000_000, 224)
COSTS = Costs(
    "cpu",
    2,
    "shop/1",
    {1: BatchCost([0.02, 0.01, 0.03], [1.0, 2.0, 3.0], None), 8: BatchCost([0.1] * 3, [1.0] * 3, 5_000_000)},
)


@pytest.fixture
def files(tmp_path: Path) -> Run:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    return Run(tmp_path)


def test_what_was_measured_is_shown(files: Run) -> None:
    write(files.path / "efficiency.json", {"shop/1": (COUNTS, COSTS)})
    section = efficiency_section(files)
    counts = section.tables["efficiency_counts"]
    assert dict(zip(counts["what"], counts["value"], strict=True))["parameters"] == "2,000,000"
    assert "text flops" not in counts["what"].tolist()
    time = section.tables["efficiency_time"].set_index("batch size")
    assert time["p50 [ms]"].tolist() == pytest.approx([20, 100])
    assert time["images/s"].tolist() == pytest.approx([50, 80])
    assert time["time, ratio to shop/1"][1] == "2.00 [1.00, 3.00]"
    assert math.isnan(time["peak memory [MB]"][1])
    assert time["peak memory [MB]"][8] == 5
    assert section.missing == []


def test_latency_is_that_of_one_image_on_the_cpu(files: Run) -> None:
    for costs, expected in (
        (COSTS, 20),
        (Costs("NVIDIA", 2, "a", COSTS.batches), math.nan),
        (Costs("cpu", 2, "a", {8: COSTS.batches[8]}), math.nan),
        (None, math.nan),
    ):
        write(files.path / "efficiency.json", {"shop/1": (COUNTS, costs)})
        found = read_efficiency(files)
        assert not isinstance(found, str)
        assert cpu_latency(found[1]) == pytest.approx(expected, nan_ok=True)


def test_counts_alone_say_that_time_was_not_measured(files: Run) -> None:
    for costs in (None, Costs(error="no memory")):
        write(files.path / "efficiency.json", {"shop/1": (COUNTS, costs)})
        section = efficiency_section(files)
        assert list(section.tables) == ["efficiency_counts"]
        assert section.missing[0].startswith("Time and memory were not measured.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ("[]", "has no measurement of one model"),
        ("{}", "has no measurement of one model"),
        (json.dumps({"a": {"counts": {}}}), "has no measurement of one model"),
        (json.dumps({"a": {"counts": asdict(COUNTS), "costs": {"batches": {}, "odd": 1}}}), "has no measurement"),
    ],
)
def test_damaged_files_are_reported(files: Run, content: str, message: str) -> None:
    (files.path / "efficiency.json").write_text(content, encoding="utf-8")
    section = efficiency_section(files)
    assert message in section.missing[0]
    assert f"`python -m evaluation efficiency {files.path}`" in section.missing[0]
    assert not section.tables


def test_nothing_measured_names_the_command(files: Run) -> None:
    assert efficiency_section(files).missing == [f"Not measured: run `python -m evaluation efficiency {files.path}`."]
