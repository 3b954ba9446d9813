"""The table keeps order and rows, and each of its troubles is one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retrieval.gallery import Gallery
from retrieval.schema import IMAGES, caption_schema
from retrieval.store import ROW_ID, Store
from tests.support.galleries import caption_rows, identity, small_gallery, vectors
from vitrail.errors import UserError
from vitrail.files import local_folder

ROOT = Path(__file__).parents[2]


def rows(names: list[str], seed: int = 0) -> pa.Table:
    return caption_rows(identity(), [(name, name) for name in names], vectors(len(names), seed=seed))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.create(str(tmp_path), "captions", caption_schema(identity()))
    made.append(rows([f"a{row}" for row in range(300)]))
    return made


def test_places_are_folders_or_uris() -> None:
    assert local_folder("runs/gallery") == Path("runs/gallery")
    assert local_folder("file:///data/gallery") == Path("/data/gallery")
    assert local_folder("file:///data/my%20gallery") == Path("/data/my gallery")
    assert local_folder("s3://bucket/gallery") is None
    assert local_folder("s3+ddb://bucket/gallery") is None


def test_order_is_that_of_writing_and_replaced_rows_stand_at_the_end(store: Store) -> None:
    draws = np.random.default_rng(0)
    replaced = [f"a{row}" for row in draws.permutation(300)[:200]]
    store.replace(rows(replaced, seed=1))
    store.append(rows(["b1", "b0"]))
    kept = [f"a{row}" for row in range(300) if f"a{row}" not in set(replaced)]
    found = store.scan(["id", "vector"])
    assert found.column("id").to_pylist() == [f"{name}#0" for name in [*kept, *replaced, "b1", "b0"]]
    assert found.column("vector")[len(kept)].as_py() == vectors(200, seed=1)[0].tolist()


def test_rows_are_taken_in_the_order_of_their_ids(store: Store) -> None:
    known = store.scan(["id"])
    order = np.random.default_rng(1).permutation(300)
    taken = store.take(known.column(ROW_ID).to_numpy()[order], ["id", "vector"])
    assert taken.column_names == ["id", "vector"]
    assert taken.column("id").to_pylist() == [f"a{row}#0" for row in order]


def test_vectors_come_in_batches_in_the_order_of_the_rows(store: Store) -> None:
    store.append(rows(["b0"], seed=2))
    batches = list(store.vectors())
    matrix = np.concatenate([batch for batch, _ in batches])
    assert np.array_equal(matrix, np.concatenate([vectors(300), vectors(1, seed=2)]))
    assert np.concatenate([ids for _, ids in batches]).tolist() == store.scan(["id"]).column(ROW_ID).to_pylist()


def test_many_values_are_deleted(store: Store) -> None:
    store.append(rows([f"c'{row}" for row in range(700)]))
    store.delete("image", [f"c'{row}" for row in range(690)])
    assert len(store) == 310


def test_every_change_has_a_revision_of_its_own_even_in_a_table_that_is_made_again(tmp_path: Path) -> None:
    seen = []
    for _ in range(2):
        store = Store.create(str(tmp_path / "g"), "captions", caption_schema(identity()))
        seen.append(store.revision)
        store.append(rows(["a"]))
        seen.append(store.revision)
        reopened = Store.open(str(tmp_path / "g"), "captions")
        assert reopened is not None
        assert reopened.revision == store.revision
        shutil.rmtree(tmp_path / "g")
    assert len(set(seen)) == 4


def test_a_second_writer_at_a_place_without_locks_is_refused(bucket: str) -> None:
    uri = f"{bucket}/gallery"
    first = Store.create(uri, "captions", caption_schema(identity()))
    second = Store.open(uri, "captions")
    assert second is not None
    first.append(rows(["a"]))
    changes: list[Callable[[], None]] = [
        lambda: second.append(rows(["a"])),
        lambda: second.replace(rows(["a"])),
        lambda: second.delete("id", ["a#0"]),
        second.tidy,
        second.build_index,
    ]
    for change in changes:
        with pytest.raises(UserError, match="another process has written to it meanwhile; wait"):
            change()
    first.append(rows(["b"]))
    second.refresh()
    assert len(second) == len(first) == 2
    with pytest.raises(UserError, match="exists already; name a new gallery"):
        Store.create(uri, "captions", caption_schema(identity()))


def test_a_writer_between_check_and_commit_is_noticed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{bucket}/gallery"
    first = Store.create(uri, "captions", caption_schema(identity()))
    second = Store.open(uri, "captions")
    assert second is not None
    monkeypatch.setattr(second, "_refuse_second_writer", lambda: first.append(rows(["a"])))
    with pytest.raises(UserError, match="another process has written to it"):
        second.append(rows(["b"]))


def test_a_kill_while_a_table_was_being_made_leaves_room_for_it(tmp_path: Path) -> None:
    (tmp_path / "images.lance" / "_transactions").mkdir(parents=True)
    (tmp_path / "images.lance" / "_transactions" / "0.txn").write_bytes(b"half")
    with pytest.raises(UserError, match="is no gallery"):
        Gallery.open(str(tmp_path))
    assert len(small_gallery(tmp_path)) == 12


def test_small_files_are_joined_and_order_stays(store: Store, tmp_path: Path) -> None:
    for row in range(20):
        store.append(rows([f"b{row}"]))
    before = store.scan(["id"]).column("id").to_pylist()
    store.tidy()
    assert store.scan(["id"]).column("id").to_pylist() == before
    assert store._table.stats()["fragment_stats"]["num_fragments"] == 1
    reopened = Store.open(str(tmp_path), "captions")
    assert reopened is not None
    assert reopened.revision == store.revision
    store.append(rows(["later"]))
    assert len(store) == len(before) + 1


def largest(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("harm", ["cut", "removed", "emptied", "overwritten"])
def test_a_damaged_file_of_rows_is_one_line_and_the_rest_stays(tmp_path: Path, harm: str) -> None:
    gallery = small_gallery(tmp_path / "g")
    file = largest(tmp_path / "g" / "images.lance" / "data")
    if harm == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif harm == "removed":
        file.unlink()
    elif harm == "emptied":
        file.write_bytes(b"")
    else:
        file.write_bytes(b"\xff" * file.stat().st_size)
    before = {path: path.stat().st_size for path in (tmp_path / "g").rglob("*") if path.is_file()}
    damaged = Gallery.open(gallery.uri)
    for ask in (lambda: damaged.table(["id"]), lambda: damaged.nearest(vectors(1), 3, "colour = 'blue'")):
        with pytest.raises(UserError, match="table 'images' cannot be read") as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert ".rs:" not in str(caught.value)
        assert "restore it from a copy" in str(caught.value)
    assert damaged.n_captions() == 24
    assert {path: path.stat().st_size for path in (tmp_path / "g").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("harm", ["cut", "emptied", "all removed"])
def test_a_damaged_list_of_revisions_is_one_line_and_is_not_overwritten(tmp_path: Path, harm: str) -> None:
    uri = small_gallery(tmp_path / "g").uri
    versions = tmp_path / "g" / "images.lance" / "_versions"
    newest = min(versions.glob("*.manifest"))  # numbers count down
    if harm == "all removed":
        shutil.rmtree(versions)
    else:
        newest.write_bytes(newest.read_bytes()[: 40 if harm == "cut" else 0])
    for ask in (Gallery.open, lambda place: Gallery.open_or_create(place, identity())):
        with pytest.raises(UserError, match="table 'images'") as caught:
            ask(uri)
        assert "\n" not in str(caught.value)
        assert "copy" in str(caught.value)
    assert list((tmp_path / "g" / "images.lance" / "data").iterdir())


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    command = [sys.executable, "-m", "tests.retrieval.gallery_processes", "full", gallery.uri]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout
    assert said.count("\n") == 1
    assert "File too large" in said
    assert "free some space; what was there is untouched" in said
    reopened = Gallery.open(gallery.uri)
    assert len(reopened) == 12
    with reopened.writing() as writer:
        assert writer.known().num_rows == 12


def test_only_one_of_the_names_is_a_table(tmp_path: Path) -> None:
    assert Store.open(str(tmp_path / "none"), IMAGES) is None
    assert not (tmp_path / "none").exists()
