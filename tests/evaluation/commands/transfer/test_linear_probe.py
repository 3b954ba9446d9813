from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from datamodules.base import ImageDataModule
from datamodules.options import ImageOptions, LoaderOptions
from datamodules.table import SampleTable
from evaluation.__main__ import main
from evaluation.commands.transfer.linear_probe import extract_features, linear_probe
from lightning_modules.encoders.image import ImageEncoder
from vitrail.errors import UserError
from vitrail.types import TaskKind

SIZE = 32
SPLIT_SIZES = {"train": 40, "val": 12, "test": 16}


class Shades(ImageDataModule):
    """Images whose class is their brightness; the second target is noise, the third has one class."""

    generated: ClassVar[bool] = True

    def __init__(self, targets: list[str], sizes: dict[str, int] | None = None) -> None:
        super().__init__(image=ImageOptions(size=SIZE), loader=LoaderOptions(batch_size=8))
        self.targets = targets
        self.sizes = sizes or SPLIT_SIZES

    def load_table(self) -> SampleTable:
        splits = [split for split, size in self.sizes.items() for _ in range(size)]
        rng = np.random.default_rng(0)
        rows = range(len(splits))
        frame = pd.DataFrame(
            {
                "name": [f"photo {row}" for row in rows],
                "source": [str(row) for row in rows],
                "split": splits,
                "group": [f"object {row // 4}" for row in rows],
                "class": [["dark", "grey", "light"][row % 3] for row in rows],
                "noise": rng.choice(["a", "b"], len(splits)),
                "constant": ["same"] * len(splits),
            }
        )
        # "rare" is a class that no training sample has.
        vocabularies = {"class": ["dark", "grey", "light", "rare"]}
        return SampleTable.from_frame(frame, self.targets, vocabularies, origin="made")

    def read_image(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        noise = torch.randint(0, 40, (3, SIZE, SIZE), generator=generator)
        return (noise + 90 * (index % 3)).to(torch.uint8)


def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder("test_resnet", SIZE, pretrained=False)


def test_probe_shows_what_features_know() -> None:
    rows = linear_probe(Shades(["class", "noise"]), encoder())
    assert [(row.task, row.split, row.n, row.groups) for row in rows] == [
        ("class", "val", 12, 3),
        ("class", "test", 16, 4),
        ("noise", "val", 12, 3),
        ("noise", "test", 16, 4),
    ]
    assert rows[0].accuracy == rows[1].accuracy == 1.0
    assert rows[0].run == "linear probe of test_resnet"
    assert not rows[3].above_majority
    assert {row.majority_source for row in rows} == {"train"}


def test_probe_is_logistic_regression_on_standardised_features() -> None:
    data, model = Shades(["class", "noise"]), encoder().eval()
    rows = linear_probe(data, model)
    train, _, train_targets = extract_features(data, model, "train")
    test, sample_id, targets = extract_features(data, model, "test")
    assert sample_id.tolist() == data.split_indices("test").tolist()
    mean, std = train.mean(axis=0), train.std(axis=0)
    std[std < 1e-6] = 1
    by_hand = LogisticRegression(max_iter=5_000).fit((train - mean) / std, train_targets["noise"])
    expected = np.mean(by_hand.predict((test - mean) / std) == targets["noise"])
    assert rows[3].accuracy == pytest.approx(expected)


class Mixed(Shades):
    """With labels, a number and an order that follow from the brightness; "never" applies to no image."""

    def load_table(self) -> SampleTable:
        splits = [split for split, size in self.sizes.items() for _ in range(size)]
        shades = [row % 3 for row in range(len(splits))]
        frame = pd.DataFrame(
            {
                "name": [f"photo {row}" for row in range(len(splits))],
                "source": [str(row) for row in range(len(splits))],
                "split": splits,
                "group": [f"object {row // 4}" for row in range(len(splits))],
                "class": [["dark", "grey", "light"][shade] for shade in shades],
                "tags": [[["lit"], ["lit", "bright"], []][shade - 1] for shade in shades],
                "price": [10.0 * shade for shade in shades],
            }
        )
        kinds: dict[str, TaskKind] = {"class": "ordinal", "tags": "multi_label", "price": "regression"}
        vocabularies = {"class": ["dark", "grey", "light"], "tags": ["bright", "lit", "never"]}
        return SampleTable.from_frame(frame, ["class", "tags", "price"], vocabularies, kinds=kinds, origin="made")


def test_tasks_of_every_kind_are_probed() -> None:
    data, model = Mixed([]), encoder()
    rows = {row.task: row for row in linear_probe(data, model) if row.split == "test"}
    assert {task: row.kind for task, row in rows.items()} == {
        "class": "ordinal",
        "tags": "multi_label",
        "price": "regression",
    }
    assert rows["tags"].scores["exact_match"].value == rows["tags"].scores["mAP"].value == 1.0
    assert rows["class"].scores["quadratic_kappa"].value == 1.0
    assert all(row.above_majority and row.majority_source == "train" for row in rows.values())
    train, _, targets = extract_features(data, model, "train")
    test, _, truth = extract_features(data, model, "test")
    by_hand = make_pipeline(StandardScaler(), Ridge()).fit(train, targets["price"])
    expected = np.abs(by_hand.predict(test) - truth["price"]).mean()
    assert rows["price"].scores["mae"].value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["class", "constant"]}, "task 'constant' has fewer than two classes"),
        ({"targets": ["class"], "sizes": {"train": 8, "test": 8}}, "the val split is empty"),
    ],
)
def test_what_cannot_be_probed_is_reported(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        linear_probe(Shades(**arguments), encoder())


def test_command_reads_the_data_part_of_an_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITRAIL_DEBUG", raising=False)
    config = tmp_path / "experiment.yaml"
    config.write_text(
        f"data:\n  class_path: {Shades.__module__}.Shades\n  init_args: {{targets: [class]}}\n"
        "model: {class_path: lightning_modules.ImageClassifier}\n",
        encoding="utf-8",
    )
    arguments = ["linear-probe", "--config", str(config), "--backbone", "test_resnet", "--pretrained", "false"]
    torch.manual_seed(0)
    assert main([*arguments, "--image-size", "32", "--json"]) == 0
    assert [row["accuracy"] for row in json.loads(capsys.readouterr().out)] == [1.0, 1.0]
    override = ["--image-size", "32", "--json", "--data.init_args.targets", "[class, noise]"]
    assert main([*arguments, *override]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4
    assert main([*arguments, "--data.init_args.target", "[class]"]) == 2
    assert main(["linear-probe", "--config", str(tmp_path / "none.yaml"), "--backbone", "test_resnet"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("error: ") for line in errors)
    with pytest.raises(SystemExit) as caught:
        main(["summary", "somewhere", "--data.init_args.targets", "[class]"])
    assert caught.value.code == 2
