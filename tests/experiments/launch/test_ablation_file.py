from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.launch.ablation import Variant, read_ablation
from vitrail.errors import UserError

BASE = {"model": {"class_path": "A", "init_args": {"lr": 1.0, "betas": [1, 2]}}, "trainer": {"max_epochs": 3}}
CHANGED: dict[str, Any] = {"model": {"init_args": {"lr": 2.0, "betas": [3]}}}


def write(folder: Path, variants: Any, **more: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "sub").mkdir(exist_ok=True)
    file = folder / "sub" / "ablation.yaml"
    file.write_text(yaml.safe_dump({"experiment": "../base.yaml", "variants": variants, **more}))
    return file


TWO = [{"name": "plain", "changes": {}}, {"name": "B/32: changed", "changes": CHANGED}]


def test_changes_are_laid_over_the_experiment(tmp_path: Path) -> None:
    plain, changed = read_ablation(write(tmp_path, TWO))
    assert plain.experiment == BASE
    assert changed.experiment["model"] == {"class_path": "A", "init_args": {"lr": 2.0, "betas": [3]}}
    assert changed.experiment["trainer"] == BASE["trainer"]
    assert changed.slug == "B_32_changed"
    assert plain.fingerprint != changed.fingerprint == read_ablation(write(tmp_path, TWO))[1].fingerprint


def test_overlays_come_after_changes_and_settings_last(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {lr: 5.0}}\ntrainer: {max_epochs: 9}")
    settings = ["trainer.max_epochs=7", "B/32: changed:model.init_args.betas=[4, 5]", "plain:model.init_args.lr=1e-3"]
    plain, changed = read_ablation(write(tmp_path, TWO), [overlay], settings)
    assert plain.experiment["trainer"] == changed.experiment["trainer"] == {"max_epochs": 7}
    assert changed.experiment["model"]["init_args"] == {"lr": 5.0, "betas": [4, 5]}
    assert plain.experiment["model"]["init_args"]["betas"] == [1, 2]


@pytest.mark.parametrize(
    ("variants", "more", "says"),
    [
        ([], {}, "empty"),
        ("x", {}, "a list variants"),
        (TWO, {"typo": 1}, "unknown key 'typo'"),
        ([{"name": "a"}], {}, r"variants\[0\]: needs name"),
        ([{"name": "a", "changes": {}}, {"name": "b", "changes": []}], {}, r"variants\[1\]: needs name"),
        ([{"name": "a/b", "changes": {}}, {"name": "a b", "changes": {}}], {}, "'a b' is not a name of its own"),
        ([{"name": "..", "changes": {}}], {}, "not a name of its own"),
        (TWO, {"experiment": "nothing.yaml"}, "nothing.yaml"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, variants: Any, more: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_ablation(write(tmp_path, variants, **more))


@pytest.mark.parametrize("setting", ["trainer.max_epochs", "nobody:trainer.max_epochs=1", "=1", "plain:=1", "a=[1"])
def test_a_wrong_setting_is_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(UserError, match="--set"):
        read_ablation(write(tmp_path, TWO), settings=[setting])


def test_a_slug_stays_readable() -> None:
    assert Variant("ViT-L/14@336", {}).slug == "ViT-L_14@336"
