from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import wares
from datamodules.wares import Wares, ware_spec
from datamodules.wares.render import COLOURS, CONDITIONS, KINDS, MATERIALS, MATERIALS_OF, draw_ware
from tests.support.data import from_yaml
from vitrail.errors import UserError

SPLITS = ("train", "val", "test")


def sizes(data: Wares) -> list[int]:
    return [len(data.table.split_indices(split)) for split in SPLITS]


def test_tasks_and_sizes_of_the_default() -> None:
    data = Wares()
    assert data.tasks == {
        "class": list(KINDS),
        "colour": sorted(COLOURS),
        "material": list(MATERIALS),
        "condition": list(CONDITIONS),
    }
    assert data.num_classes == 10
    assert sizes(data) == [360, 120, 120]
    assert data.generated


def test_no_object_is_in_two_splits_and_all_its_views_agree() -> None:
    data = Wares(n_samples=300, views=4)
    table = data.table
    by_split = [set(table.group_ids[table.split_indices(split)].tolist()) for split in SPLITS]
    assert sum(map(len, by_split)) == len(set.union(*by_split)) == 75
    for targets in table.targets.values():
        for group in range(75):
            assert len(set(targets[table.group_ids == group].tolist())) == 1
    assert data.group_names()[:5] == ["ware_000000"] * 4 + ["ware_000001"]
    assert data.sample_names()[:5] == [f"ware_000000_{view}" for view in range(4)] + ["ware_000001_0"]


def test_each_split_has_its_share_of_each_class() -> None:
    data = Wares(n_samples=1000, views=2, val_fraction=0.1, test_fraction=0.3)
    assert sizes(data) == pytest.approx([600, 100, 300], abs=10)
    for split, expected in zip(SPLITS, (60, 10, 30), strict=True):
        assert data.table.class_counts(split)["class"] == pytest.approx([expected] * 10, abs=4)


def test_values_are_equally_frequent() -> None:
    specs = [ware_spec(3, number) for number in range(240)]
    assert set(Counter(spec.kind for spec in specs).values()) == {24}
    assert set(Counter(spec.colour for spec in specs).values()) == {30}
    assert set(Counter(spec.condition for spec in specs).values()) == {80}
    assert all(spec.material in MATERIALS_OF[spec.kind] for spec in specs)
    assert len({spec.seed for spec in specs}) == 240


def test_a_larger_data_set_begins_with_the_smaller_one() -> None:
    small, large = Wares(n_samples=60, resolution=32), Wares(n_samples=200, resolution=32)
    assert large.sample_names()[:60] == small.sample_names()
    assert large.table.captions.to_pylist()[:60] == small.table.captions.to_pylist()
    assert (large.table.split_codes[:60] == small.table.split_codes).all()
    for task, targets in small.table.targets.items():
        assert (large.table.targets[task][:60] == targets).all()
    assert all(torch.equal(small.read_image(index), large.read_image(index)) for index in (0, 17, 59))


def test_the_draw_seed_and_not_the_seed_decides_what_is_drawn() -> None:
    def content(**arguments: Any) -> tuple[str, torch.Tensor]:
        data = Wares(n_samples=60, resolution=24, **arguments)
        return data.table.fingerprint(), data.read_image(5)

    (table, image), (same_table, same_image), (other_table, other_image) = (
        content(),
        content(seed=4),
        content(draw_seed=4),
    )
    assert table == same_table
    assert torch.equal(image, same_image)
    assert table != other_table
    assert not torch.equal(image, other_image)


def test_captions_name_all_values_in_varied_words() -> None:
    data = Wares(n_samples=400)
    captions = data.table.captions.to_pylist()
    for task, names in data.tasks.items():
        for caption, target in zip(captions, data.table.targets[task].tolist(), strict=True):
            assert names[target] in caption
    assert len({caption.split()[0] for caption in captions}) > 6


def test_only_training_images_have_short_captions_too() -> None:
    lists = Wares(n_samples=60, views=1, short_captions=True).table.caption_lists.of(range(60))
    table = Wares(n_samples=60, views=1).table
    assert [captions[0] for captions in lists] == table.captions.to_pylist()
    train = set(table.split_indices("train").tolist())
    for index, captions in enumerate(lists):
        kind = table.tasks["class"][int(table.targets["class"][index])]
        assert (kind in captions[1:]) == (index in train)
        assert len(captions) == (8 if index in train else 1)


def test_each_image_is_drawn_once_and_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counting(spec: Any, view_seed: int, resolution: int) -> Any:
        drawn.append(view_seed)
        return draw_ware(spec, view_seed, resolution)

    monkeypatch.setattr(wares, "draw_ware", counting)
    data = Wares(n_samples=100, resolution=16)
    data.setup("test")
    assert len(drawn) == len(data.table.split_indices("test"))
    data.setup("fit")
    data.setup("fit")
    for split in SPLITS:
        for index in data.table.split_indices(split).tolist():
            data.read_image(index).zero_()  # what a reader does to an image stays with it
            assert data.read_image(index).any()
    assert len(drawn) == len(set(drawn)) == 100


def test_a_data_set_too_large_for_the_memory_is_drawn_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Wares(n_samples=60, resolution=16)
    monkeypatch.setattr(wares, "MEMORY_LIMIT", 60 * 3 * 16 * 16 - 1)
    lazy = Wares(n_samples=60, resolution=16)
    lazy.setup()
    assert all(torch.equal(lazy.read_image(index), kept.read_image(index)) for index in (0, 30))


def test_a_million_images_are_not_drawn_to_know_their_tasks() -> None:
    data = Wares(n_samples=2000, views=5, resolution=4096)
    assert sum(data.class_counts["class"]) == 1200


@pytest.mark.parametrize("key", ["n_samples", "views", "resolution", "draw_seed", "val_fraction", "test_fraction"])
def test_numbers_out_of_range_are_named(key: str) -> None:
    arguments: dict[str, Any] = {key: -1}
    with pytest.raises(UserError, match=f"^data {key}: is -1, must be at least"):
        Wares(**arguments)
    with pytest.raises(UserError, match=r"^data val_fraction, test_fraction: together 1, must be below 1"):
        Wares(val_fraction=0.5, test_fraction=0.5)


def test_a_split_that_would_stay_empty_is_refused() -> None:
    with pytest.raises(UserError, match=r"data n_samples: 10 images of 2 objects leave the \w+ split empty; raise"):
        _ = Wares(n_samples=10, views=5).tasks
    assert sizes(Wares(n_samples=10, views=5, val_fraction=0, test_fraction=0)) == [10, 0, 0]


def test_tasks_of_every_kind_follow_from_what_an_image_shows() -> None:
    data, plain = (Wares(n_samples=60, resolution=16, every_kind=every) for every in (True, False))
    assert data.task_kinds == {"condition": "ordinal", "tags": "multi_label", "price": "regression"}
    assert data.tasks["condition"] == ["new", "used", "worn"]
    assert (list(plain.tasks), plain.task_kinds) == (["class", "colour", "material", "condition"], {})
    spec = ware_spec(0, 3)
    row = 3 * data.views
    assert data.table.target_texts("tags", np.array([row])) == [";".join(wares.ware_tags(spec))]
    assert float(data.table.targets["price"][row]) == pytest.approx(wares.ware_price(spec))
    cheaper = replace(spec, condition="worn" if spec.condition != "worn" else "used")
    assert (wares.ware_price(cheaper) < wares.ware_price(spec)) == (spec.condition != "worn")


def test_arguments_from_yaml() -> None:
    data = from_yaml(
        "class_path: datamodules.Wares\n"
        "init_args: {n_samples: 60, views: 3, resolution: 16, image: {size: 24}, loader: {batch_size: 4}}"
    )
    assert isinstance(data, Wares)
    assert len(data.table) == 60
    assert data.image_size == 24
    assert data.hparams["views"] == 3
    np.testing.assert_array_equal(data.table.group_ids[:6], [0, 0, 0, 1, 1, 1])
