from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from rich.console import Console
from sklearn.metrics import average_precision_score, ndcg_score

from evaluation.retrieval import (
    METRICS,
    AttributeRow,
    Ground,
    RankedAnswers,
    Row,
    System,
    ground_of,
    measure,
    report_rows,
    report_table,
    rows_of,
    systems_of,
    write_report,
)
from evaluation.statistics.intervals import share_interval
from retrieval.gallery import Gallery
from retrieval.search.searcher import Query, Searcher
from tests.support.galleries import SHOWN, small_gallery
from tests.support.models import PerfectEncoder
from vitrail.errors import UserError

IMAGES = 60


def answers() -> list[RankedAnswers]:
    """Each image asks once, and 1 to 4 texts an image ask; all of them fare alike."""
    rng = np.random.default_rng(0)
    images = np.arange(IMAGES, dtype=np.int64) + 1000
    owners = np.repeat(images, rng.integers(1, 5, IMAGES))
    hard = rng.integers(1, 31, IMAGES)
    made = []
    for name, ids in (("image_to_text", images), ("text_to_image", owners)):
        ranks = np.maximum(1, hard[ids - 1000] + rng.integers(-2, 3, len(ids))).astype(np.int64)
        made.append(RankedAnswers(name, ranks, 1 / ranks, ids))
    return made


def by_name(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row.direction, row.metric): row for row in rows}


def test_values_and_order() -> None:
    rows = report_rows(answers(), n_resamples=200)
    metrics = ["R@1", "R@5", "R@10", "median_rank", "mAP"]
    assert [row.metric for row in rows] == [*metrics, *metrics, "mean_recall"]
    found = by_name(rows)
    recalls: list[float] = []
    for answer in answers():
        ranks, name = answer.first_rank, answer.direction
        for k in (1, 5, 10):
            recalls.append(float(np.mean(ranks <= k)))
            assert found[name, f"R@{k}"].value == pytest.approx(recalls[-1])
        assert found[name, "median_rank"].value == pytest.approx(np.median(ranks))
        assert found[name, "mAP"].value == pytest.approx(np.mean(1 / ranks))
        assert {row.n for row in rows if row.direction == name} == {len(ranks)}
    assert found["both", "mean_recall"].value == pytest.approx(np.mean(recalls))
    assert found["both", "mean_recall"].n == IMAGES


def test_intervals_equal_brute_force() -> None:
    """Sample images, take all their queries along, compute again: the same intervals but for chance."""
    made, rng = answers(), np.random.default_rng(1)
    queries = [[np.flatnonzero(answer.images == 1000 + index) for index in range(IMAGES)] for answer in made]
    resampled: dict[tuple[str, str], list[float]] = {}
    for _ in range(3000):
        drawn = rng.integers(IMAGES, size=IMAGES)
        recalls: list[float] = []
        for answer, rows in zip(made, queries, strict=True):
            ranks = answer.first_rank[np.concatenate([rows[index] for index in drawn])]
            values = {f"R@{k}": float(np.mean(ranks <= k)) for k in (1, 5, 10)}
            recalls += values.values()
            values |= {"median_rank": float(np.median(ranks)), "mAP": float(np.mean(1 / ranks))}
            for metric, value in values.items():
                resampled.setdefault((answer.direction, metric), []).append(value)
        resampled.setdefault(("both", "mean_recall"), []).append(float(np.mean(recalls)))
    for name, row in by_name(report_rows(made)).items():
        low, high = np.quantile(resampled[name], [0.025, 0.975])
        if row.metric.startswith("R@") and row.direction != "both":
            answer = next(one for one in made if one.direction == row.direction)
            own = answer.first_rank <= int(row.metric.removeprefix("R@"))
            assert (row.low, row.high) == share_interval(own.astype(np.float64), answer.images)
            continue
        near = 1.0 if row.metric == "median_rank" else 0.02
        assert [row.low, row.high] == pytest.approx([low, high], abs=near), name
        assert row.low < row.value < row.high


def test_texts_of_a_image_stay_together() -> None:
    """Were texts drawn one by one, the interval would be narrower."""
    grouped = answers()[1]
    apart = grouped._replace(images=np.arange(len(grouped.images), dtype=np.int64))
    widths = []
    for answer in (grouped, apart):
        row = by_name(report_rows([answer]))["text_to_image", "R@10"]
        widths.append(row.high - row.low)
    assert widths[0] > 1.2 * widths[1]


def test_perfect_answers_have_intervals_too() -> None:
    """The data say nothing about their spread: as many trials as images."""
    perfect = [
        answer._replace(first_rank=answer.first_rank**0, average_precision=np.ones(len(answer.images)))
        for answer in answers()
    ]
    for row in report_rows(perfect):
        assert row.value == 1
        if row.metric == "median_rank":
            assert row.low == 1
            assert 1 < row.high < 1.1
        else:
            assert row.high == 1
            assert 0.9 < row.low < 1


def test_file_and_table_agree(tmp_path: Path) -> None:
    rows = report_rows(answers(), n_resamples=200)
    write_report(tmp_path / "reports" / "test_retrieval.csv", rows)
    frame = pd.read_csv(tmp_path / "reports" / "test_retrieval.csv")
    assert list(frame.columns) == ["direction", "metric", "value", "low", "high", "n"]
    assert [Row(*values) for values in frame.itertuples(index=False)] == rows
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["test_retrieval.csv"]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(report_table(rows, "test"))
    printed = console.export_text()
    assert f"n = {IMAGES}" in printed
    row = by_name(rows)["text_to_image", "R@5"]
    assert f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" in printed
    assert f"mean_recall {rows[-1].value:.3f} [" in printed
    assert "cannot be below 1" not in printed
    few = Console(width=100, file=io.StringIO(), record=True)
    few.print(report_table(rows, "test", {"image_to_text": 11, "text_to_image": 5}))
    notes = " ".join(few.export_text().split())
    assert "R@5, R@10 of text_to_image cannot be below 1: there are 5 candidates" in notes
    assert "of image_to_text" not in notes


VECTOR, PREDICTED, LABEL = System("vector", None), System("text", "predicted"), System("text", "label")
HYBRID, RANDOM = System("hybrid", "predicted"), System("random", None)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return small_gallery(tmp_path_factory.mktemp("measured") / "gallery")


@pytest.fixture(scope="module")
def ground(gallery: Gallery) -> Ground:
    return ground_of(gallery)


def searcher(gallery: Gallery, system: System) -> Searcher | None:
    return None if system is RANDOM else Searcher(gallery, PerfectEncoder, text_source=system.source or "label")


def values_of(gallery: Gallery, ground: Ground, system: System) -> dict[str, NDArray[np.float64]]:
    parts = list(measure(ground, searcher(gallery, system), system))
    return {metric: np.concatenate([part[metric] for part in parts]) for metric in METRICS}


def rows_by_metric(gallery: Gallery, ground: Ground, system: System) -> dict[str, AttributeRow]:
    made = rows_of("G", system, ground, measure(ground, searcher(gallery, system), system))
    return {row.metric: row for row in made}


def test_queries_are_those_that_the_labels_answer(ground: Ground) -> None:
    answers = {query.text: [ground.ids[row] for row in query.relevant] for query in ground.queries}
    blue_bottles = [f"p{row}" for row, shown in enumerate(SHOWN) if shown[:2] == ("tableware_water_bottle", "blue")]
    assert answers["blue bottle"] == blue_bottles
    assert answers["black leather bag"] == [f"p{SHOWN.index(('bag', 'black', 'leather'))}"]
    # The material of the last image is not known, so it answers no question for one.
    assert answers["plastic sneakers"] == [f"p{SHOWN.index(('sneakers', 'black', 'plastic'))}"]
    assert len(answers) == 3 * 2 * 2 + 3 * 2 + 3 * 2 + 2 * 2 + 3 + 2 + 2 - 1


def test_metrics_are_those_of_scikit_learn_over_the_same_search(gallery: Gallery, ground: Ground) -> None:
    values = values_of(gallery, ground, VECTOR)
    for place, query in enumerate(ground.queries):
        hits = Searcher(gallery, PerfectEncoder).search(Query(text=query.text), 12, "vector").hits
        scores = {hit.id: hit.score for hit in hits}
        relevant = np.isin(np.arange(12), query.relevant).astype(int)
        ordered = np.array([scores[identifier] for identifier in ground.ids])
        assert values["mAP"][place] == pytest.approx(average_precision_score(relevant, ordered))
        assert values["nDCG@10"][place] == pytest.approx(ndcg_score(relevant[None], ordered[None], k=10))
        assert values["P@5"][place] == relevant[np.argsort(-ordered)[:5]].sum() / 5


def test_true_words_are_the_ceiling_and_random_orders_the_floor(gallery: Gallery, ground: Ground) -> None:
    values = {system: values_of(gallery, ground, system) for system in (RANDOM, PREDICTED, HYBRID, LABEL, VECTOR)}
    measured = {system: own["mAP"].mean() for system, own in values.items()}
    # Two of the twelve images are mistaken.
    assert measured[RANDOM] < 0.5 < measured[PREDICTED] < min(measured[LABEL], measured[HYBRID])
    assert min(measured[LABEL], measured[VECTOR]) > 0.95
    share = np.array([len(query.relevant) / len(ground.ids) for query in ground.queries])
    for metric in ("P@5", "P@10"):
        assert values[RANDOM][metric].mean() == pytest.approx(share.mean(), rel=0.1)
    # One of the four bags is taken for sneakers, and is not in the list for "bag" at all.
    bag = [query.text for query in ground.queries].index("bag")
    assert values[PREDICTED]["R-precision"][bag] == values[PREDICTED]["mAP"][bag] == pytest.approx(3 / 4)


def test_chunks_do_not_matter(gallery: Gallery, ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = values_of(gallery, ground, VECTOR)
    monkeypatch.setattr("evaluation.retrieval._QUERIES_AT_ONCE", 5)
    parts = values_of(gallery, ground, VECTOR)
    for metric in METRICS:
        np.testing.assert_allclose(parts[metric], whole[metric], atol=1e-12)


def test_interval_resamples_queries_by_head(gallery: Gallery, ground: Ground) -> None:
    row = rows_by_metric(gallery, ground, PREDICTED)["mAP"]
    values = values_of(gallery, ground, PREDICTED)["mAP"]
    heads = np.array([query.text.split()[-1] for query in ground.queries])
    assert row.groups == len(set(heads)) == 7
    assert (row.queries, row.images) == (len(ground.queries), 12)
    assert row.value == pytest.approx(values.mean())
    assert row.low < row.value < row.high
    assert (row.low, row.high) == share_interval(values, heads)


def test_only_images_of_a_split(gallery: Gallery) -> None:
    unseen = ground_of(gallery, splits=["val", "test"])
    assert unseen.ids == [f"p{row}" for row in range(12) if row % 4]
    assert unseen.where == "split IN ('val', 'test')"
    values = values_of(gallery, unseen, VECTOR)
    assert values["mAP"].mean() > 0.95
    both = ground_of(gallery, splits=["val"], where="label_colour = 'black' OR label_class = 'bag'")
    assert both.ids == ["p1", "p5", "p9"]


def test_tasks_and_class_words_can_be_chosen(gallery: Gallery) -> None:
    texts = {query.text for query in ground_of(gallery, tasks=["class"], class_words="full").queries}
    assert texts == {"bag", "tableware water bottle", "sneakers"}


def test_rankers_that_fit_a_gallery(tmp_path: Path, gallery: Gallery) -> None:
    assert systems_of(gallery, [], []) == [VECTOR, PREDICTED, LABEL, HYBRID, RANDOM]
    assert systems_of(gallery, ["hybrid"], ["label", "caption"]) == [System("hybrid", "caption")]
    classifier = small_gallery(tmp_path / "classifier", encodes_text=False)
    assert systems_of(classifier, [], ["predicted"]) == [PREDICTED, RANDOM]
    silent = small_gallery(tmp_path / "silent", predicts={})
    assert systems_of(silent, ["vector", "hybrid"], ["predicted"]) == [VECTOR]
    assert systems_of(silent, ["hybrid", "text"], ["predicted"], has_text_gallery=True) == [HYBRID]


def test_ground_is_the_same_in_galleries_of_the_same_data(tmp_path: Path, gallery: Gallery, ground: Ground) -> None:
    other = small_gallery(tmp_path / "other", encodes_text=False, predicts={})
    assert ground.same_as(ground_of(other))
    assert not ground.same_as(ground_of(other, splits=["test"]))
    assert not LABEL.depends_on_model
    assert not RANDOM.depends_on_model
    assert HYBRID.depends_on_model


def test_mistakes_are_reported(tmp_path: Path, gallery: Gallery) -> None:
    with pytest.raises(UserError, match=r"--tasks style: .* has labels of class, colour, material"):
        ground_of(gallery, tasks=["style"])
    with pytest.raises(UserError, match="no image of holdout that fits has a label"):
        ground_of(gallery, splits=["holdout"])
    with pytest.raises(UserError, match="--rankers: must be one of vector, text, hybrid, random; got 'bm25'"):
        systems_of(gallery, ["bm25"], [])
    with pytest.raises(UserError, match="attribute queries need labels"):
        ground_of(small_gallery(tmp_path / "unlabelled", labels=[]))
