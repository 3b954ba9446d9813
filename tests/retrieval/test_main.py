from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from retrieval.__main__ import main
from retrieval.gallery import Gallery
from tests.support.galleries import identity, image_rows, small_gallery, vectors

ROOT = Path(__file__).parents[2]


def test_help_and_galleries_load_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from retrieval.__main__ import main\n"
        "try:\n    main(['search', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted({'torch', 'pandas', 'lancedb', 'lightning', 'jsonargparse'} & set(sys.modules)))\n"
        "import retrieval.gallery\n"
        "print('torch' in sys.modules)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "--top-k" in said
    assert said.splitlines()[-2:] == ["[]", "False"]


def test_info_shows_who_made_a_gallery_and_what_a_filter_may_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = small_gallery(tmp_path / "g", run="runs/[bold]small")
    assert main(["info", "--gallery", gallery.uri]) == 0
    said = capsys.readouterr().out
    for part in ("DualEncoder of runs/[bold]small", "a" * 64, "12 (", "test 6", "24", "colour (2)", "none; search"):
        assert part in said
    assert all(name in said for name in gallery.columns())


@pytest.mark.parametrize("command", ["info", "build-index"])
def test_no_gallery_is_one_line(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--gallery", str(tmp_path / "none")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "there is no gallery here" in said.err
    assert not list(tmp_path.iterdir())


def test_build_index_prints_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_by = identity(encodes_text=False, dim=16)
    gallery = Gallery.create(str(tmp_path / "g"), made_by)
    with gallery.writing() as writer:
        writer.add(image_rows(made_by, [f"p{row}" for row in range(1000)], vectors(1000, dim=16)))
    assert main(["build-index", "--gallery", gallery.uri, "--sample", "0"]) == 2
    assert "--sample: must be at least 1; got 0" in capsys.readouterr().err
    assert main(["build-index", "--gallery", gallery.uri, "--sample", "20"]) == 0
    said = capsys.readouterr().out
    assert "index of 1,000 images; recall@10 against exact search " in said
    recall = float(said.split("against exact search ")[1].split()[0])
    assert 0.8 < recall <= 1
    assert "search stays exact up to 1,000,000 images" in said
    assert main(["info", "--gallery", gallery.uri]) == 0
    assert "built" in capsys.readouterr().out


def test_commands_take_a_gallery_on_s3(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    uri = small_gallery(f"{bucket}/shop").uri
    assert main(["info", "--gallery", uri]) == 0
    assert "12" in capsys.readouterr().out
    assert main(["search", "--gallery", uri, "--like", "p1", "--top-k", "3", "--json"]) == 0
    assert [hit["id"] for hit in json.loads(capsys.readouterr().out)["found"]] == [
        hit.id for hit in Gallery.open(uri).nearest(Gallery.open(uri).vectors(["p1"]), 4)[0][1:]
    ]
