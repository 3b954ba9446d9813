from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import entr, expit, logit

from evaluation.__main__ import main
from evaluation.commands.dataset.active_learning import long_tailed
from evaluation.dataset.active_learning import k_centre_greedy
from experiments.train.cli import main as experiments
from retrieval.__main__ import main as retrieval
from retrieval.gallery import Gallery
from tests.support.data import COLOURS, PRODUCTS_YAML, draw_image, write_products
from tests.support.runs import kinds_run
from vitrail.runs import Run

UNLABELLED = 9


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a run of one epoch, new images, and a gallery of both."""
    place = tmp_path_factory.mktemp("select")
    write_products(place / "products", grey=False)
    (place / "tiny.yaml").write_text(PRODUCTS_YAML.format(root=place / "products"), encoding="utf-8")
    assert experiments(["fit", "--config", str(place / "tiny.yaml"), "--runs", str(place / "runs")]) == 0
    (place / "new").mkdir()
    (place / "empty").mkdir()
    for number in range(UNLABELLED):
        image = draw_image(number, list(COLOURS)[number % 6], look=900 + number)
        image.save(place / "new" / f"{number}.png")
    (place / "new" / "bad.png").write_bytes(b"no image")
    index = ["index", "--run", str(run_of(place)), "--gallery", str(place / "g"), "--device", "cpu"]
    assert retrieval(index) == 0
    assert retrieval([*index, "--data", str(place / "new"), "--on-bad-image", "skip"]) == 0
    return place


def run_of(place: Path) -> Path:
    (run,) = (place / "runs" / "tiny").iterdir()
    return run


def select(place: Path, pool: Path, *arguments: object) -> int:
    to = ["--to", str(place / "to_label.csv")]
    return main(["select", "--run", str(run_of(place)), "--pool", str(pool), *to, *map(str, arguments)])


def selected(place: Path, pool: Path, *arguments: object) -> pd.DataFrame:
    assert select(place, pool, *arguments) == 0
    return pd.read_csv(place / "to_label.csv")


def test_a_folder_and_a_gallery_give_the_same_ranking(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = selected(place, place / "new", "--by", "confidence")
    printed = capsys.readouterr().out
    assert f"{UNLABELLED} of {UNLABELLED} images by confidence" in printed
    assert "fill in the column class" in printed
    gallery = selected(place, place / "g", "--by", "confidence")
    assert folder["name"].tolist() == gallery["name"].tolist()
    np.testing.assert_allclose(folder["score"], gallery["score"], atol=1e-4)
    assert folder["predicted"].tolist() == gallery["predicted"].tolist()
    assert (np.diff(folder["score"]) <= 0).all()
    assert "new/bad.png" not in folder["name"].tolist()
    assert folder["class"].isna().all()
    assert all(Path(path).is_file() for path in folder["path"])


@pytest.mark.parametrize("by", ["entropy", "margin"])
def test_another_task_of_the_model(place: Path, by: str) -> None:
    table = selected(place, place / "new", "--by", by, "--task", "colour", "--n", 4)
    assert len(table) == 4
    assert table["predicted"].isin(["red", "blue", "green", "gray"]).all()
    assert "colour" in table.columns


def test_the_core_set_counts_labelled_images_as_covered(place: Path) -> None:
    table = selected(place, place / "g", "--by", "coreset", "--n", 5)
    gallery = Gallery.open(str(place / "g"))
    rows = gallery.table(["id", "label_class"]).to_pylist()
    known = [row["id"] for row in rows if row["label_class"] is not None]
    new = [row["id"] for row in rows if row["label_class"] is None]
    assert len(new) == UNLABELLED
    expected = k_centre_greedy(gallery.vectors(new), 5, gallery.vectors(known))
    assert table["name"].tolist() == [new[row] for row in expected.rows]
    np.testing.assert_allclose(table["score"], expected.scores, atol=1e-5)


def test_the_core_set_of_a_folder_covers_the_training_images(place: Path) -> None:
    table = selected(place, place / "new", "--by", "coreset", "--n", 3)
    gallery = Gallery.open(str(place / "g"))
    rows = gallery.table(["id", "split", "label_class"]).to_pylist()
    trained = [row["id"] for row in rows if row["split"] == "train" and row["label_class"] is not None]
    new = [row["id"] for row in rows if row["label_class"] is None]
    expected = k_centre_greedy(gallery.vectors(new), 3, gallery.vectors(trained))
    assert table["name"].tolist() == [new[row] for row in expected.rows]
    np.testing.assert_allclose(table["score"], expected.scores, atol=1e-3)


@pytest.fixture(scope="module")
def of_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with new images, and a gallery of them by the model with tasks of every kind."""
    place = tmp_path_factory.mktemp("kinds")
    (place / "new").mkdir()
    for number in range(4):
        draw_image(number, list(COLOURS)[number], look=900 + number).save(place / "new" / f"{number}.png")
    index = ["index", "--run", str(kinds_run()), "--gallery", str(place / "g"), "--device", "cpu"]
    assert retrieval([*index, "--data", str(place / "new")]) == 0
    return place


def selected_of(place: Path, pool: str, *arguments: str) -> pd.DataFrame:
    to = ["--to", str(place / "to_label.csv")]
    assert main(["select", "--run", str(kinds_run()), "--pool", str(place / pool), *to, *arguments]) == 0
    return pd.read_csv(place / "to_label.csv", keep_default_na=False)


def test_labels_and_numbers_are_selected(of_kinds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {Path(one.name).name: one.tasks for one in Run(kinds_run()).predict(of_kinds / "new")}
    tags = selected_of(of_kinds, "new", "--task", "tags", "--by", "entropy")
    assert "fill in the column tags, labels with ; between them" in capsys.readouterr().out
    assert (np.diff(tags["score"]) <= 0).all()
    model = Run(kinds_run()).load_model()
    for row in tags.to_dict("records"):
        one = found[Path(row["path"]).name]["tags"]
        # Run.predict is calibrated: logits divided by 1.5, and a bias for each label.
        logits = (logit(one.probabilities) - [0.25, -0.5, 0.0, 0.5]) * 1.5
        shares = expit(logits)
        assert row["score"] == pytest.approx(float(entr(shares).sum() + entr(1 - shares).sum()), abs=1e-4)
        reached = shares >= model.thresholds["tags"]
        assert set(filter(None, row["predicted"].split(";"))) == set(np.array(one.classes)[reached].tolist())
    price = selected_of(of_kinds, "new", "--task", "price")
    for row in price.to_dict("records"):
        one = found[Path(row["path"]).name]["price"]
        assert row["predicted"] == pytest.approx(one.value, rel=1e-4)
        assert one.deviation is not None
        assert row["score"] == pytest.approx((one.deviation / 1.25) ** 2, rel=1e-4)  # calibrated by 1.25
    gallery = selected_of(of_kinds, "g", "--task", "price")
    assert gallery["name"].tolist() == price["name"].tolist()
    np.testing.assert_allclose(gallery["score"], price["score"], rtol=1e-3)


def test_a_gallery_does_not_have_the_probabilities_of_all_labels(
    of_kinds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--pool", str(of_kinds / "g"), "--task", "tags", "--to", str(of_kinds / "no.csv")]
    assert main(["select", "--run", str(kinds_run()), *arguments]) == 2
    expected = (
        "every label, and this pool has those of the predicted labels only; name the images themselves as --pool, or"
    )
    assert expected in capsys.readouterr().err
    assert set(selected_of(of_kinds, "g", "--task", "tags", "--by", "coreset")["tags"]) == {""}


def test_labelled_images_are_ranked_only_if_asked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert select(place, place / "tiny.yaml", "--by", "margin") == 2
    assert "all 36 images have a label of 'class'" in capsys.readouterr().err
    table = selected(place, place / "tiny.yaml", "--by", "margin", "--labelled-too", "--n", 100)
    assert len(table) == 36


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pool", "PLACE/g", "--by", "entropy"], "has the best class's probability only"),
        (["--pool", "PLACE/new", "--n", "0"], "--n: is 0"),
        (["--pool", "PLACE/new", "--task", "size"], "--task size:"),
        (["--pool", "PLACE/nowhere"], "is neither a folder of images, a gallery nor an experiment's YAML file"),
        (["--pool", "PLACE/new", "--run", "PLACE"], "has no checkpoints/best.ckpt"),
        (["--pool", "PLACE/empty"], "has no images"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITRAIL_DEBUG", raising=False)
    (place / "to_label.csv").unlink(missing_ok=True)
    assert select(place, place, *[word.replace("PLACE", str(place)) for word in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (place / "to_label.csv").exists()


WARES = ["--data", "datamodules.Wares", "--data.init_args.n_samples", "150", "--data.init_args.resolution", "32"]


def test_curve_and_tables_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = "--by margin --seeds 2 --start 20 --step 15 --rounds 2 --long-tail 0.9"
    assert main(["learning-curve", *WARES, "--to", str(tmp_path / "out"), *schedule.split()]) == 0
    assert (tmp_path / "out" / "learning_curve.png").stat().st_size > 10_000
    curves = pd.read_csv(tmp_path / "out" / "learning_curve.csv")
    assert curves.groupby(["strategy", "seed"])["labels"].apply(list).tolist() == [[20, 35, 50]] * 4
    summary = pd.read_csv(tmp_path / "out" / "summary.csv").set_index("strategy")
    after = curves[(curves["strategy"] == "margin") & (curves["labels"] > 20)]
    assert summary.loc["margin", "accuracy"] == pytest.approx(after["accuracy"].mean())
    printed = capsys.readouterr().out
    assert "measured on 60 images" in printed
    row = summary.loc["margin"]
    assert f"| margin | {row['accuracy']:.3f} | {row['last']:.3f} | {row['ahead']:+.3f} [" in printed
    assert f"| {row['verdict']} |" in printed


@pytest.mark.parametrize(
    ("task", "heading", "strategies"),
    [
        ("tags", "mAP", ["random", "entropy", "margin", "coreset"]),
        ("price", "MAE", ["random", "variance", "coreset"]),
        ("condition", "accuracy", ["random", "entropy", "margin", "coreset"]),
    ],
)
def test_curves_of_every_kind(
    task: str, heading: str, strategies: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", "datamodules.Wares", "--data.init_args.n_samples", "45", "--data.init_args.resolution", "32"]
    schedule = ["--seeds", "1", "--start", "15", "--step", "10", "--rounds", "1", "--data.init_args.every_kind", "true"]
    assert main(["learning-curve", *data, "--task", task, "--to", str(tmp_path), *schedule]) == 0
    printed = capsys.readouterr().out
    assert f"Mean {heading} over all steps" in printed
    assert ("lower is better" in printed) == (task == "price")
    assert pd.read_csv(tmp_path / "summary.csv")["strategy"].tolist() == strategies


def test_long_tail_keeps_whole_groups() -> None:
    labels = np.repeat([0, 1, 2], 40)
    groups = np.array([f"object {row // 4}" for row in range(120)], dtype=object)
    rows = long_tailed(labels, groups, 0.5)
    assert np.bincount(labels[rows]).tolist() == [40, 20, 8]  # 10, 5 and 2 groups of four
    assert all(len(rows[groups[rows] == group]) == 4 for group in set(groups[rows]))
    assert long_tailed(labels, groups, 0.01).tolist() == [*range(40), *range(40, 48), *range(80, 88)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--long-tail", "0"], "--long-tail above 0"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--start", "5000"], "less than the pool's 90 images"),
        (["--task", "size"], "--task size: the data have class, colour"),
        (["--task", "price", "--long-tail", "0.5", "--data.init_args.every_kind", "true"], "'price' is regression"),
    ],
)
def test_mistakes_of_a_curve_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VITRAIL_DEBUG", raising=False)
    assert main(["learning-curve", *WARES, "--to", str(tmp_path / "out"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
