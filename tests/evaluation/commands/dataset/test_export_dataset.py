from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from datamodules.files.corrections import exported_corrections
from tests.support.runs import kinds_run
from vitrail.errors import UserError
from vitrail.programs import main
from vitrail.runs import Run


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with tasks of every kind as a FiftyOne dataset and as Parquet, with one finding."""
    folder = tmp_path_factory.mktemp("exported")
    name = Run(kinds_run()).load_datamodule().sample_names()[3]
    (folder / "findings.json").write_text(json.dumps([{"image": name, "finding": "blurry"}]))
    for place in ("fiftyone", "all.parquet"):
        arguments = ["export-dataset", str(kinds_run()), "--to", str(folder / place)]
        assert main("evaluation", [*arguments, "--findings", str(folder / "findings.json")]) == 0
    return folder


def test_the_table_has_labels_predictions_and_findings_of_every_image(exported: Path) -> None:
    opened = Run(kinds_run())
    data = opened.load_datamodule()
    table = pq.read_table(exported / "all.parquet")
    assert table["name"].to_pylist() == data.sample_names()
    assert table["findings"].to_pylist()[3] == ["blurry"]
    predictions = opened.predictions("test")
    assert predictions is not None
    place = {name: row for row, name in enumerate(table["name"].to_pylist())}
    rows = [place[name] for name in predictions.names]
    names = predictions.tasks["class"]
    expected = [names[code] if code >= 0 else "" for code in predictions.predicted("class").tolist()]
    assert [table["predicted_class"].to_pylist()[row] for row in rows] == expected
    assert [table["predicted_price"].to_pylist()[row] for row in rows] == predictions.values("price").tolist()
    assert [table["target_class"].to_pylist()[row] for row in rows] == data.table.target_texts(
        "class", predictions.sample_id
    )


def test_samples_are_what_fiftyone_serialises(exported: Path) -> None:
    folder = exported / "fiftyone"
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    metadata = json.loads((folder / "metadata.json").read_text())
    assert (metadata["media_type"], "version" in metadata) == ("image", False)
    assert all((folder / sample["filepath"]).is_file() for sample in samples)
    assert samples[3]["tags"][1:] == ["blurry"]
    assert {sample["tags"][0] for sample in samples} == {"train", "val", "test"}
    kinds = {one["_cls"] for sample in samples for one in sample.values() if isinstance(one, dict) and "_cls" in one}
    assert kinds == {"Classification", "Classifications"}
    assert any(isinstance(sample.get("price"), float) for sample in samples)


def test_fiftyone_reads_the_samples(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its own importer needs no database as long as no Dataset is made.
    monkeypatch.setitem(os.environ, "FIFTYONE_DATABASE_URI", "mongodb://localhost:1")
    importers = pytest.importorskip("fiftyone.utils.data.importers", reason="fiftyone is not installed")
    importer = importers.LegacyFiftyOneDatasetImporter(str(exported / "fiftyone"))
    importer.setup()
    samples = list(importer)
    assert len(samples) == len(Run(kinds_run()).load_datamodule().table)
    assert samples[0].ground_truth.label
    assert Path(samples[0].filepath).is_file()


def test_labels_that_were_corrected_there_come_back(exported: Path, tmp_path: Path) -> None:
    content = json.loads((exported / "fiftyone" / "samples.json").read_text())
    sample = content["samples"][3]
    sample["ground_truth"]["label"] = "another"
    (tmp_path / "samples.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no sample has the tag 'corrected'"):
        exported_corrections(tmp_path, "corrected")
    sample["tags"].append("corrected")
    (tmp_path / "samples.json").write_text(json.dumps(content))
    found = {one.task: one for one in exported_corrections(tmp_path, "corrected")}
    assert found["class"].label == "another"
    assert "tags" in found, "a task that is called like a field of FiftyOne's"
    assert {one.image for one in found.values()} == {sample["vitrail_name"]}
    (tmp_path / "samples.json").write_text("[]")
    with pytest.raises(UserError, match="not the samples of a FiftyOne dataset"):
        exported_corrections(tmp_path, "corrected")


def test_findings_of_other_data_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.json").write_text(json.dumps([{"image": "elsewhere.jpg", "finding": "dark"}]))
    arguments = ["export-dataset", str(kinds_run()), "--to", str(tmp_path / "a.parquet"), "--findings"]
    assert main("evaluation", [*arguments, str(tmp_path / "f.json")]) == 2
    assert "'elsewhere.jpg' is not in the run's data" in capsys.readouterr().err
    (tmp_path / "f.csv").write_text("a,b\n1,2\n")
    assert main("evaluation", [*arguments, str(tmp_path / "f.csv")]) == 2
    assert "not what audit --findings writes" in capsys.readouterr().err
    assert not (tmp_path / "a.parquet").exists()
