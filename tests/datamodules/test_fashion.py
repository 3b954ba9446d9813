from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch

from datamodules.fashion import Fashion, RareOptions, read_styles
from datamodules.options import AugmentOptions, CheckOptions
from datamodules.splits import SplitOptions
from tests.support.data import FASHION_HEADER, from_yaml, write_fashion, write_fashion_hub
from vitrail.errors import UserError
from vitrail.types import UNKNOWN

REAL = Path(os.environ.get("VITRAIL_DATA", "")) / "fashion"


def split_sizes(data: Fashion) -> list[int]:
    return [len(data.table.split_indices(split)) for split in ("train", "val", "test")]


def index_of(data: Fashion, name: str) -> int:
    return data.sample_names().index(name)


def no_group_crosses(data: Fashion) -> bool:
    ids = [set(data.table.group_ids[data.table.split_indices(split)].tolist()) for split in ("train", "val", "test")]
    return sum(map(len, ids)) == len(set.union(*ids))


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(write_fashion(tmp_path / "fashion"))


def test_rows_with_commas_and_quotes_in_the_name_are_read(root: str) -> None:
    data = Fashion(root)
    assert data.table.caption(index_of(data, "90001")) == "Take my advice, I don't use it"
    assert data.table.caption(index_of(data, "90002")) == "Live, Life, Laugh"
    assert data.table.caption(index_of(data, "90003")) == 'Brand 3.5" Shorts'
    assert data.repaired_rows == 2
    assert len(data.table) == 89


def test_the_target_is_any_column_and_unknown_where_it_says_na(root: str) -> None:
    assert Fashion(root).class_names == ["Accessories", "Apparel", "Footwear", "Home", "Personal Care"]
    data = Fashion(root, target="baseColour", attributes=["articleType", "season", "articleType"])
    assert list(data.tasks) == ["class", "articleType", "season"]
    row = index_of(data, "90004")
    assert data.table.targets["class"][row] == UNKNOWN
    assert data.table.caption(row) == ""
    assert data.table.group(row) == "90004", "a row without a name is a product of its own"


def test_splits_keep_products_together_and_class_shares_alike(tmp_path: Path) -> None:
    root = str(write_fashion(tmp_path, products=40, quirks=False))
    for seed in range(5):
        data = Fashion(root, split=SplitOptions(val_fraction=0.2, test_fraction=0.1), seed=seed)
        assert split_sizes(data) == [224, 64, 32]
        assert data.table.class_counts("test")["class"] == [8] * 4
        assert no_group_crosses(data)


def test_identical_images_under_two_ids_are_one_product(root: str) -> None:
    data = Fashion(root)
    first, second = index_of(data, "90006"), index_of(data, "90007")
    assert torch.equal(data.read_image(first), data.read_image(second))
    assert data.table.group_ids[first] == data.table.group_ids[second]
    assert data.read_image(index_of(data, "90008")).shape == (3, 80, 53), "grey, and of another size"


def test_rare_classes_are_kept_or_dropped_as_declared(root: str) -> None:
    assert "Home" in Fashion(root).class_names
    data = Fashion(root, rare=RareOptions(handling="drop"))
    assert "Home" not in data.class_names
    assert data.dropped == {"Home": 1}
    assert len(data.table) == 88
    with pytest.raises(UserError, match="no rows are left"):
        _ = Fashion(root, target="gender", rare=RareOptions(handling="drop", min_count=500)).tasks

    by_colour = Fashion(root, target="baseColour", rare=RareOptions(handling="drop"))
    assert "90004" in by_colour.sample_names(), "rows of unknown class are not rare"
    assert by_colour.dropped == {"Pink": 1, "Black": 1}


def test_rows_without_a_image_are_skipped_and_counted(root: str) -> None:
    with pytest.raises(UserError, match=r"styles.csv:86: .*90005.jpg"):
        Fashion(root).setup("fit")
    data = Fashion(root, checks=CheckOptions(on_bad_image="skip"), rare=RareOptions(handling="drop"))
    data.setup("fit")
    record = data.data_record()
    assert sum(record["samples"].values()) == 87
    assert [skipped["name"] for skipped in record["skipped"]] == ["90005"]
    assert record["dropped"] == {"Home": 1}
    assert record["repaired_rows"] == 2


def test_hue_is_safe_where_a_colour_is_the_target(root: str) -> None:
    assert Fashion(root, augment=AugmentOptions(preset="reference")).augment_options.hue == 0.1
    assert Fashion(root, target="baseColour", augment=AugmentOptions(preset="reference")).augment_options.hue == 0
    explicit = Fashion(root, target="baseColour", augment=AugmentOptions(preset="reference", hue=0.2))
    assert explicit.augment_options.hue == 0.2
    assert Fashion(root, attributes=["baseColour"], augment=AugmentOptions(preset="reference")).augment_options.hue == 0


def test_the_hubs_copy_is_the_same_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = Fashion(str(write_fashion_hub(tmp_path / "hub")), source="hub", attributes=["year", "baseColour"])
    csv = Fashion(str(write_fashion(tmp_path / "csv", quirks=False)), attributes=["year", "baseColour"])
    assert hub.tasks == csv.tasks
    assert hub.tasks["year"] == ["2012"]
    assert hub.sample_names() == csv.sample_names()
    assert hub.table.caption(3) == "Brand 1 Tshirts"
    assert split_sizes(hub) == split_sizes(csv)
    assert no_group_crosses(hub)
    assert hub.read_image(3).shape == (3, 80, 60)

    datasets.Dataset.from_dict({"id": [1], "image": [b""]}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(UserError, match="missing column gender, masterCategory"):
        _ = Fashion(str(tmp_path / "other"), source="hub").tasks


def test_problems_of_the_table_are_reported_together(tmp_path: Path) -> None:
    good = "1,Men,Apparel,Topwear,Tshirts,Red,Summer,2012,Casual,Shirt"
    lines = [FASHION_HEADER, good, good, "2,Men,Apparel", "", f"../{good}", f",{good[2:]}"]
    path = tmp_path / "styles.csv"
    path.write_bytes("\r\n".join(lines).encode() + b"\r\n7" + good[1:].encode() + b"\xe9\n")
    with pytest.raises(UserError) as error:
        read_styles(path)
    text = str(error.value)
    for row, part in [
        (3, "id 1 again, first in row 2"),
        (4, "3 fields where the header has 10"),
        (6, "'../1' is not a name"),
        (7, "id '' is not a name"),
        (8, "not UTF-8"),
    ]:
        assert f"{path}:{row}: " in text
        assert part in text
    assert "5 problems" in text

    path.write_text("id,name\n1,a\n", encoding="utf-8")
    with pytest.raises(UserError, match="the header is 'id,name', must be"):
        _ = Fashion(str(tmp_path)).tasks


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"target": "colour"}, "data target"),
        ({"attributes": ["price"]}, "data attributes"),
        ({"source": "web"}, "data source"),
        ({"rare": {"handling": "hide"}}, "data rare.handling"),
        ({"rare": {"count": 3}}, "data rare: unknown key 'count'"),
    ],
)
def test_mistaken_choices_are_refused_at_once(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Fashion(**arguments)  # type: ignore[arg-type]


def test_a_missing_folder_names_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"kaggle.com.*source: hub.*styles.csv next to images"):
        _ = Fashion(str(tmp_path / "nowhere")).tasks


def test_arguments_come_from_yaml(root: str) -> None:
    data = from_yaml(f"""
class_path: datamodules.Fashion
init_args:
  root: {root}
  target: subCategory
  attributes: [gender, baseColour]
  rare: {{handling: drop, min_count: 3}}
  split: {{val_fraction: 0.1, test_fraction: 0.1}}
  checks: {{on_bad_image: skip}}
""")
    assert isinstance(data, Fashion)
    assert list(data.tasks) == ["class", "gender", "baseColour"]


@pytest.mark.skipif(not REAL.is_dir(), reason="needs $VITRAIL_DATA/fashion")
def test_the_real_table() -> None:
    columns, rows, repaired = read_styles(REAL / "styles.csv")
    assert len(rows) == 4081
    assert repaired == 22
    well_formed = [i for i, name in enumerate(columns["productDisplayName"]) if "," not in name]
    assert len(well_formed) == 4059
    assert Counter(columns["masterCategory"][i] for i in well_formed) == {
        "Apparel": 1977,
        "Accessories": 1002,
        "Footwear": 851,
        "Personal Care": 218,
        "Free Items": 9,
        "Sporting Goods": 2,
    }
    genders = Counter(columns["gender"][i] for i in well_formed)
    assert genders == {"Men": 2029, "Women": 1713, "Unisex": 196, "Boys": 69, "Girls": 52}
    names = dict(zip(columns["id"], columns["productDisplayName"], strict=True))
    assert names["7491"] == "Nike Women's EM Tempo 3.5\" Pink Short"
    assert names["23107"] == "Turtle Men Formal Purple Tie, Cufflink and Pocket Square Combo Set"


@pytest.mark.skipif(not REAL.is_dir(), reason="needs $VITRAIL_DATA/fashion")
def test_the_real_split_is_stratified_and_grouped() -> None:
    data = Fashion(str(REAL), attributes=["baseColour", "usage"])
    assert data.class_names == ["Accessories", "Apparel", "Footwear", "Free Items", "Personal Care", "Sporting Goods"]
    assert no_group_crosses(data)
    for split, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        counts = data.table.class_counts(split)["class"]
        assert abs(sum(counts) / 4081 - share) < 0.005
        assert abs(counts[1] / sum(counts) - 0.4875) < 0.005
        assert counts[3] >= 1, "the nine free items are in every split"
    data = Fashion(str(REAL), rare=RareOptions(handling="drop"))
    assert "Sporting Goods" not in data.class_names
    assert data.dropped == {"Sporting Goods": 2}
