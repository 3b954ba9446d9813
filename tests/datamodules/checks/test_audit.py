from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageEnhance
from rich.console import Console

from datamodules.checks.audit import (
    TITLES,
    AuditReport,
    DuplicatePair,
    Leaks,
    Sample,
    SkippedImage,
    find_identical,
    find_leaks,
    label_pairs,
    numbers_of,
    print_report,
)
from datamodules.fashion import Fashion
from datamodules.image_folder import ImageFolder, UnlabeledFolder
from datamodules.options import CheckOptions, ImageOptions
from datamodules.products import Products
from datamodules.splits import SplitOptions
from datamodules.table import SampleTable
from datamodules.wares import Wares
from datamodules.wares.render import WareSpec, draw_ware
from tests.support.data import Noise, Recorder, frame, trainer, write_products
from vitrail.errors import UserError
from vitrail.types import TaskKind

DATA = Path(os.environ.get("VITRAIL_DATA", ""))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve images of different things, four in each split."""
    specs = [WareSpec(kind, "red", "plastic", "used", seed) for kind in ("mug", "vase") for seed in range(6)]
    for number, spec in enumerate(specs):
        folder = tmp_path / "data" / ("train", "val", "test")[number % 3] / spec.kind
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_ware(spec, number, 64)).save(folder / f"{number:02}.png")
    return tmp_path / "data"


def brighter(source: Path, target: Path) -> None:
    ImageEnhance.Brightness(Image.open(source)).enhance(1.05).save(target, quality=80)


def number_of_leaks(report: AuditReport) -> int:
    return len(report.leaks.groups) + len(report.leaks.exact) + len(report.leaks.near)


def refuse(data: Any) -> None:
    allowed = data.check_options.allow_leaks
    find_leaks(data.table, data.verification(), data.read_image, allowed).refuse(data.table.origin, allowed)


def test_counts_unknown_and_unseen_values() -> None:
    report = Noise(n=30).audit()
    assert report.data == "Noise"
    assert report.samples == {"train": 30, "val": 9, "test": 8}
    assert report.group_counts == {"train": 30, "val": 9, "test": 8}
    assert report.classes["class"]["ball"] == {"train": 6, "val": 2, "test": 2}
    assert report.unknown["colour"] == {"train": 5, "val": 1, "test": 1}
    assert report.unseen == {"class": {}, "colour": {}}
    assert report.leaks.near_radius is None, "generated images are not compared"
    report.refuse()


def test_the_counts_agree_with_the_products_table(tmp_path: Path) -> None:
    data = Products(str(write_products(tmp_path / "products", classes=3, instances=4, views=3)))
    report = data.audit()
    assert report.samples == {"train": 18, "val": 9, "test": 9}
    assert report.group_counts == {"train": 6, "val": 3, "test": 3}
    for task, counts in report.classes.items():
        assert list(counts) == data.tasks[task]
        assert [counts[name]["train"] for name in counts] == data.class_counts[task]
    assert report.unseen["colour"] == {"grey": 3}
    assert report.unknown["colour"]["val"] == 3


def test_no_leaks(root: Path) -> None:
    report = ImageFolder(str(root)).audit()
    assert number_of_leaks(report) == 0
    assert report.leaks.near_radius == 8
    report.refuse()
    refuse(ImageFolder(str(root)))


def test_a_group_in_several_splits_is_refused(root: Path) -> None:
    data = ImageFolder(str(root), group_pattern=r"(mug|vase)/")
    report = data.audit()
    assert [found.group for found in report.leaks.groups] == ["mug", "vase"]
    assert report.leaks.groups[0].counts == {"train": 2, "val": 2, "test": 2}
    assert len(report.leaks.groups[0].examples) == 3
    assert json.loads(json.dumps(report.to_dict()))["leaks"]["groups"][0]["counts"]["val"] == 2
    hint = r"2 groups in several splits: split again, or allow it with data checks.allow_leaks: \[groups\]"
    with pytest.raises(UserError, match=hint + r"\n.*group 'mug' is in train \(2\) and val \(2\) and test \(2\)"):
        report.refuse()
    with pytest.raises(UserError, match=hint):
        refuse(data)
    refuse(ImageFolder(str(root), group_pattern=r"(mug|vase)/", checks=CheckOptions(allow_leaks=["groups"])))


def test_groups_of_generated_data_are_checked_too(tmp_path: Path) -> None:
    class Leaky(Noise):
        def load_table(self) -> SampleTable:
            leaky = frame(self.n)
            leaky.loc[[0, 30], "group"] = "twice"
            return SampleTable.from_frame(leaky, ["class", "colour"])

    with pytest.raises(UserError, match=r"group 'twice' is in train \(1\) and val \(1\)"):
        trainer(tmp_path, 1).fit(Recorder(), datamodule=Leaky(image=ImageOptions(size=4)))
    Leaky(checks=CheckOptions(allow_leaks=["groups"])).prepare_data()


def test_identical_images_across_splits_are_refused(root: Path) -> None:
    shutil.copy(root / "train/mug/00.png", root / "val/mug/copy.png")
    shutil.copy(root / "train/mug/00.png", root / "train/mug/copy.png")
    Image.open(root / "train/vase/06.png").save(root / "test/vase/again.bmp")
    data = ImageFolder(str(root))
    report = data.audit()
    pairs = {frozenset((Path(p.first.source).name, Path(p.second.source).name)) for p in report.leaks.exact}
    assert frozenset(("06.png", "again.bmp")) in pairs
    assert {pair.first.split for pair in report.leaks.exact} == {"train"} or len(pairs) == 3
    assert report.leaks.near == [], "what is identical is not reported twice"
    with pytest.raises(UserError, match=r"3 identical images across splits: .*allow_leaks: \[exact\]"):
        refuse(data)
    refuse(ImageFolder(str(root), checks=CheckOptions(allow_leaks=["exact"])))


def test_nearly_identical_images_across_splits_are_refused(root: Path) -> None:
    brighter(root / "train/mug/00.png", root / "test/mug/brighter.jpg")
    brighter(root / "train/mug/03.png", root / "train/mug/same_split.jpg")
    data = ImageFolder(str(root))
    report = data.audit()
    assert report.leaks.exact == []
    (pair,) = report.leaks.near
    assert {Path(pair.first.source).name, Path(pair.second.source).name} == {"00.png", "brighter.jpg"}
    assert {pair.first.split, pair.second.split} == {"train", "test"}
    with pytest.raises(UserError, match=r"\[near\]\n.*nearly the same image as in row \d+: .*brighter.jpg \(test\)"):
        refuse(data)
    refuse(ImageFolder(str(root), checks=CheckOptions(allow_leaks=["near"])))


def test_all_kinds_come_in_one_error_and_what_is_allowed_does_not(root: Path) -> None:
    shutil.copy(root / "train/mug/00.png", root / "val/mug/copy.png")
    brighter(root / "train/vase/06.png", root / "test/vase/brighter.jpg")
    groups = r"(mug|vase)/"
    with pytest.raises(UserError) as refused:
        refuse(ImageFolder(str(root), group_pattern=groups))
    assert "allow_leaks: [groups, exact, near]" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1 + 2 + 1 + 1
    with pytest.raises(UserError) as refused:
        refuse(ImageFolder(str(root), group_pattern=groups, checks=CheckOptions(allow_leaks=["groups", "near"])))
    assert "allow_leaks: [exact]" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 2


def test_near_duplicates_are_looked_for_once_and_not_at_all_where_allowed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brighter(root / "train/mug/00.png", root / "test/mug/brighter.jpg")
    read: list[int] = []
    original = ImageFolder.read_image

    def counting(self: ImageFolder, index: int) -> torch.Tensor:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(ImageFolder, "read_image", counting)
    allowing = ImageFolder(str(root), checks=CheckOptions(allow_leaks=["near"]))
    refuse(allowing)
    assert len(read) == 13, "each image once, to verify it"
    with pytest.raises(UserError):
        refuse(ImageFolder(str(root)))
    assert len(read) > 13
    before = len(read)
    with pytest.raises(UserError):
        refuse(ImageFolder(str(root)))
    assert len(read) == before


def test_unreadable_images_are_reported_and_no_leaks(root: Path) -> None:
    shutil.copy(root / "train/mug/00.png", root / "val/mug/copy.png")
    for name in ("train/mug/00.png", "val/mug/copy.png"):
        (root / name).write_bytes(b"rubbish")
    report = ImageFolder(str(root), checks=CheckOptions(on_bad_image="skip")).audit()
    assert [Path(bad.sample.source).name for bad in report.skipped] == ["00.png", "copy.png"]
    assert all("not an image in a known format" in bad.reason for bad in report.skipped)
    assert report.leaks.exact == []
    report.refuse()
    strict = ImageFolder(str(root)).audit()
    with pytest.raises(UserError, match=r"2 problems; repair or remove these images, or set data checks.on_bad_image"):
        strict.refuse()


def test_wares_need_no_images_for_their_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wares, "read_image", None)
    report = Wares(n_samples=120).audit()
    assert sum(report.samples.values()) == 120
    report.refuse()


@pytest.mark.skipif(not (DATA / "products").is_dir(), reason="needs the product photos in $VITRAIL_DATA/products")
def test_the_real_product_photos_have_no_leaks() -> None:
    report = Products(str(DATA / "products"), split=SplitOptions(by="table")).audit()
    assert report.samples == {"train": 447, "val": 100, "test": 53}
    assert report.group_counts == {"train": 92, "val": 20, "test": 11}
    assert number_of_leaks(report) == 0
    assert report.skipped == []
    assert report.unseen["colour"] == {"gold": 5, "grey": 5}


@pytest.mark.skipif(not (DATA / "products").is_dir(), reason="needs the product photos in $VITRAIL_DATA/products")
def test_a_random_split_of_the_real_product_photos_lets_groups_cross() -> None:
    data = Products(str(DATA / "products"), split=SplitOptions(by="random", val_fraction=0.2, test_fraction=0.2))
    report = data.audit()
    assert len(report.leaks.groups) > 100
    with pytest.raises(UserError, match=r"groups in several splits(.|\n)*and \d+ more"):
        report.refuse()


@pytest.mark.skipif(not (DATA / "fashion").is_dir(), reason="needs the fashion photos in $VITRAIL_DATA/fashion")
def test_identical_images_in_the_real_fashion_photos() -> None:
    data = Fashion(
        str(DATA / "fashion"),
        split=SplitOptions(by="random", val_fraction=0.3, test_fraction=0.3),
        checks=CheckOptions(on_bad_image="skip"),
    )
    verification = data.verification()
    assert len(verification.bad) == 5
    leaks = find_leaks(data.table, verification, data.read_image, ignored=["groups", "near"])
    names = {frozenset((pair.first.name, pair.second.name)) for pair in leaks.exact}
    known = [("31091", "34048"), ("34024", "34025"), ("36723", "39834"), ("40152", "41969"), ("27198", "33486")]
    known += [("8775", "9617"), ("11102", "11103"), ("29633", "31636"), ("39864", "39865")]
    assert names
    assert names <= {frozenset(pair) for pair in known}
    assert leaks.groups == []
    assert leaks.near == []


def test_identical_images_with_different_labels_in_one_split(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(root / "train" / "mug" / "00.png", root / "train" / "vase" / "x.png")
    shutil.copy(root / "train" / "mug" / "00.png", root / "train" / "mug" / "y.png")
    shutil.copy(root / "val" / "vase" / "07.png", root / "val" / "vase" / "z.png")
    data = ImageFolder(str(root))
    report = data.audit()
    report.refuse()
    assert report.identical is not None
    assert report.identical.repeated == {"train": 2, "val": 1, "test": 0}
    (conflict,) = report.identical.conflicts
    assert (conflict.column, conflict.values, conflict.images) == ("class", ["mug", "vase"], 3)
    assert [sample.name for sample in conflict.samples] == ["train/mug/00.png", "train/vase/x.png"]
    assert json.loads(json.dumps(report.to_dict()))["identical"]["conflicts"][0]["samples"][1]["split"] == "train"
    counts = {"repeated": {"train": 2, "val": 1, "test": 0}, "conflicts": {"class": 1}}
    assert data.data_record()["identical"] == counts
    messages: list[str] = []
    monkeypatch.setattr("datamodules.checks.audit.rank_zero_info", messages.append)
    data.prepare_data()
    [message] = messages
    assert "1 identical images have different labels, first class: mug (" in message
    text = printed(report)
    assert "identical images within a split: train 2, val 1" in text
    assert "mug/00.png, train, row 1), vase (" in text


def test_conflicts_in_attributes_groups_and_captions() -> None:
    columns = {"name": list("abcde"), "source": list("abcde"), "split": ["train"] * 4 + ["test"]}
    columns |= {"class": ["x"] * 5, "colour": ["red", "", "blue", "red", "red"], "group": ["g", "g", "h", "", "g"]}
    frame = pd.DataFrame({**columns, "caption": ["one", "one", "", "two", "one"]})
    table = SampleTable.from_frame(frame, ["class", "colour"])
    content = np.zeros((5, 32), dtype=np.uint8)
    content[3] = 1
    found = find_identical(table, content, np.array([True] * 5))
    assert found.repeated == {"train": 2, "val": 0, "test": 0}
    assert found.conflict_counts() == {"attribute colour": 1, "group": 1}, "unknown values contradict nothing"
    assert find_identical(table, content, np.array([True, True, False, True, False])).conflicts == []
    content[3] = 0
    assert (
        found.conflict_counts() | {"caption": 1} == find_identical(table, content, np.ones(5, bool)).conflict_counts()
    )


def labels_and_numbers() -> SampleTable:
    frame = pd.DataFrame(
        {
            "name": list("abcdef"),
            "source": list("abcdef"),
            "split": ["train"] * 4 + ["val", "test"],
            "class": [["lid", "red"], ["lid", "red"], [], ["lid"], ["dots", "red"], None],
            "price": [1.0, 2.0, 4.0, np.nan, 3.0, np.nan],
        }
    )
    kinds: dict[str, TaskKind] = {"class": "multi_label", "price": "regression"}
    return SampleTable.from_frame(frame, ["class", "price"], {"class": ["dots", "lid", "red"]}, kinds=kinds)


def test_labels_that_go_together_and_numbers() -> None:
    table = labels_and_numbers()
    assert label_pairs(table, "class") == [("lid", "red", 2), ("dots", "red", 1)]
    found = numbers_of(table, "price")
    assert {name: found["train"][name] for name in ("samples", "min", "median", "max")} == {
        "samples": 3,
        "min": 1.0,
        "median": 2.0,
        "max": 4.0,
    }
    assert found["train"]["std"] == pytest.approx(np.std([1, 2, 4]))
    assert sum(found["train"]["histogram"]) == 3
    assert found["train"]["histogram"][-1] == 1
    assert (found["test"]["mean"], sum(found["test"]["histogram"])) == (None, 0)
    report = replace(
        Noise(n=30).audit(),
        classes={"class": {"lid": {"train": 3, "val": 0, "test": 0}}, "price": {}},
        unknown={task: {"train": 1, "val": 0, "test": 1} for task in ("class", "price")},
        labels={"class": label_pairs(table, "class")},
        numbers={"price": found},
    )
    text = printed(report)
    assert "class: 1 labels" in text
    assert "class, labels of the same sample: lid + red (2), dots + red (1)" in text
    assert "price: numbers" in text
    assert any("median" in line and "–" in line for line in text.splitlines())
    assert json.loads(json.dumps(report.to_dict()))["numbers"]["price"]["val"]["median"] == 3.0


def test_identical_images_with_other_labels_or_numbers_conflict() -> None:
    table = labels_and_numbers()
    found = find_identical(table, np.zeros((6, 32), np.uint8), np.array([True, True, True, False, False, True]))
    [labels, numbers] = sorted(found.conflicts, key=lambda conflict: len(conflict.values))
    assert (labels.column, labels.values) == ("class", ["lid;red", "(none)"])
    assert (numbers.column, numbers.values) == ("attribute price", ["1", "2", "4"])


@pytest.fixture
def report() -> AuditReport:
    return Noise(n=30).audit()


def printed(report: AuditReport) -> str:
    console = Console(file=StringIO(), width=100)
    print_report(report, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def pair(number: int) -> DuplicatePair:
    return DuplicatePair(
        Sample(f"a{number}", f"images/a[{number}].jpg", "train", number), Sample("b", "images/b.jpg", "test", 99)
    )


def test_none_is_only_reported_of_what_was_looked_for(tmp_path: Path) -> None:
    assert "files left out: not looked for (images are no files of their own)" in printed(Noise(n=30).audit())
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "one.png")
    alone = printed(UnlabeledFolder(root=str(tmp_path / "photos")).audit())
    assert "files left out: none" in alone
    assert "identical images within a split: not compared" in alone


def test_a_table_for_each_task(report: AuditReport) -> None:
    lines = printed(report).splitlines()
    assert lines[0].startswith("Noise")
    assert any("samples" in line and "30" in line and "9" in line and "8" in line for line in lines)
    assert "class: 3 classes" in "\n".join(lines)
    assert any("unknown" in line and "5" in line for line in lines)
    assert "groups in several splits: none" in lines


def test_twenty_pairs_and_the_number_of_the_others(report: AuditReport) -> None:
    leaks = Leaks([], [pair(number) for number in range(30)], [pair(1)], near_radius=8)
    text = printed(replace(report, leaks=leaks, allowed=["near"]))
    assert "identical images across splits: 30 (not allowed)" in text
    assert "images/a[19].jpg (train, row 19) = images/b.jpg (test, row 99)" in text, "brackets are no markup"
    assert "a[20]" not in text
    assert "and 10 more" in text
    assert "nearly identical images across splits: 1 (allowed)" in text
    assert "bits were compared" not in text
    assert "within 2 bits" in printed(replace(report, leaks=Leaks([], [], [], near_radius=2)))


def test_unseen_values_and_unreadable_images(report: AuditReport) -> None:
    bad = SkippedImage(Sample("a", "a.jpg", "val", 17), "a.jpg: no such file")
    text = printed(replace(report, unseen={"class": {}, "colour": {"gold": 5}}, skipped=[bad]))
    assert "colour, values that are not in the vocabulary: gold (5)" in text
    assert "unreadable images: 1 (not allowed)" in text
    assert "row 17 (val): a.jpg: no such file" in text
    assert "(skipped)" in printed(replace(report, skipped=[bad], skips_bad_images=True))


def test_what_was_not_compared_is_not_called_none(report: AuditReport) -> None:
    """Generated images are not read; one split has nothing to be compared with."""
    text = printed(Wares(n_samples=30, val_fraction=0.2, test_fraction=0.2).audit())
    assert "groups in several splits: none" in text
    assert "identical images across splits: not checked (images are generated)" in text
    assert "nearly identical images across splits: not checked (images are generated)" in text
    assert "unreadable images: not checked (images are generated)" in text
    leaks = Leaks([], [], [], None, {"near": "allowed, so not looked for"})
    assert "nearly identical images across splits: not checked (allowed" in printed(replace(report, leaks=leaks))
    assert "each image is one of its own" in printed(report)


def test_a_single_split_has_nothing_to_be_compared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    text = printed(Wares(n_samples=30, val_fraction=0.0, test_fraction=0.0).audit())
    for title in TITLES.values():
        assert f"{title}: not checked (fewer than two splits have images" in text
