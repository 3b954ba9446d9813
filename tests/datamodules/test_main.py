from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from datamodules.__main__ import main
from tests.support.data import write_image_folder, write_products


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VITRAIL_DEBUG", raising=False)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def wares(tmp_path: Path) -> str:
    text = (
        "seed_everything: 3\nmodel: {class_path: no.such.Model}\ntrainer: {max_epochs: 5}\n"
        "data:\n  class_path: datamodules.Wares\n  init_args: {n_samples: 90, views: 3, image: {size: 32}}\n"
    )
    return write(tmp_path / "wares.yaml", text)


@pytest.fixture
def products(tmp_path: Path) -> str:
    """Products whose first image is in the test split as well."""
    root = write_products(tmp_path / "products")
    images = sorted((root / "images").iterdir())
    shutil.copy(images[0], images[-1])
    data = f"{{class_path: datamodules.Products, init_args: {{root: {root}}}}}"
    return write(tmp_path / "products.yaml", f"data: {data}\n")


def test_a_clean_data_set(wares: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--config", wares]) == 0
    printed = capsys.readouterr()
    assert "samples" in printed.out
    assert "soap dispenser" in printed.out
    assert "groups in several splits: none" in printed.out
    assert printed.err == ""


def test_single_values_can_be_given(wares: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ["--data.init_args.n_samples=60", "--data.val_fraction", "0.4"]
    assert main(["audit", f"--config={wares}", *arguments, "--json", str(report)]) == 0
    assert json.loads(report.read_text(encoding="utf-8"))["samples"] == {"train": 24, "val": 24, "test": 12}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_later_file_changes_single_values(wares: str, tmp_path: Path) -> None:
    overlay = write(tmp_path / "overlay.yaml", "data: {init_args: {n_samples: 60, image: {crop_fraction: 0.9}}}\n")
    report = tmp_path / "report.json"
    assert main(["audit", "--config", wares, "--config", overlay, "--json", str(report)]) == 0
    assert sum(json.loads(report.read_text(encoding="utf-8"))["samples"].values()) == 60


def test_another_class_does_not_inherit_arguments(wares: str, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "folder")
    other = write(
        tmp_path / "other.yaml",
        f"data: {{class_path: datamodules.ImageFolder, init_args: {{root: {root}}}}}\n",
    )
    assert main(["audit", "--config", wares, "--config", other]) == 0


def test_the_seed_of_the_run_divides_as_in_the_run(tmp_path: Path) -> None:
    root = write_products(tmp_path / "products", instances=8)
    part = f"data: {{class_path: datamodules.Products, init_args: {{root: {root}, split: {{by: group}}}}}}\n"
    fingerprints = []
    for seed in ("", "seed_everything: 1\n", "seed_everything: 2\n"):
        config = write(tmp_path / "config.yaml", seed + part)
        assert main(["audit", "--config", config, "--json", str(tmp_path / "report.json")]) == 0
        report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        fingerprints.append(report["fingerprint"])
    assert len(set(fingerprints)) == 3


def test_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--data", "datamodules.Wares", "--data.n_samples", "60"]) == 0
    assert main(["audit"]) == 2
    assert "data" in capsys.readouterr().err


def test_leaks_are_printed_and_then_refused(products: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "deep" / "report.json"
    assert main(["audit", "--config", products, "--json", str(report)]) == 2
    printed = capsys.readouterr()
    assert "identical images across splits: 1 (not allowed)" in printed.out
    assert printed.err.startswith("error: ")
    assert "allow_leaks: [exact]" in printed.err
    assert len(json.loads(report.read_text(encoding="utf-8"))["leaks"]["exact"]) == 1
    assert main(["audit", "--config", products, "--data.checks", "{allow_leaks: [exact]}"]) == 0
    assert "identical images across splits: 1 (allowed)" in capsys.readouterr().out


def test_unreadable_images_are_printed_and_then_refused(
    products: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted((tmp_path / "products" / "images").iterdir())[-25:]:
        path.write_bytes(b"")
    assert main(["audit", "--config", products]) == 2
    printed = capsys.readouterr()
    assert "unreadable images: 25 (not allowed)" in printed.out
    assert "and 5 more" in printed.out
    assert "on_bad_image: skip" in printed.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {}\n", "has no data: part"),
        ("just text\n", "holds no keys"),
        ("data: [1, 2\n", "not a YAML file"),
        ("data: {class_path: datamodules.Wares, init_args: {n_samples: 0}}\n", "data n_samples: is 0"),
        ("data: {class_path: datamodules.Wares, init_args: {sizes: 3}}\n", "sizes"),
        ("data: {class_path: datamodules.Nothing}\n", "datamodules.Nothing"),
        ("data: {class_path: datamodules.Products, init_args: {root: /no/such/folder}}\n", "no folder /no/such/folder"),
    ],
)
def test_mistakes_are_told_in_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "--config", write(tmp_path / "wrong.yaml", text)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--config", "nowhere.yaml"]) == 2
    assert (
        capsys.readouterr().err
        == "error: --config nowhere.yaml: No such file or directory; give an experiment's YAML file\n"
    )


def test_a_report_that_cannot_be_written(wares: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--config", wares, "--json", f"{wares}/report.json"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_DEBUG", "1")
    with pytest.raises(ValueError, match="nowhere"):
        main(["audit", "--config", "nowhere.yaml"])
