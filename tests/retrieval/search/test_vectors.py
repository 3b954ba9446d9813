from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval import gallery as gallery_module
from retrieval import store as lance_store
from retrieval.gallery import Gallery
from retrieval.schema import IMAGES
from retrieval.search import vectors as vector_rows
from retrieval.search.exact import ExactIndex, coarse_copy
from retrieval.search.vectors import DamagedError, IndexReport, exact_neighbours, open_vectors, write_vectors
from retrieval.store import Store
from tests.support.galleries import identity, image_rows, small_gallery, vectors
from vitrail.errors import UserError

QUERIES = vectors(4, seed=9)


def files(gallery: Gallery) -> list[Path]:
    return sorted(Path(gallery.uri).glob("*.vectors"))


def test_a_lost_or_cut_matrix_is_made_again(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    expected = gallery.nearest(QUERIES, 20, "split = 'test'")
    [captions, images] = files(gallery)
    assert captions.name.startswith("captions.")
    whole = images.read_bytes()
    for content in (None, b"", whole[:-100], b"foreign" + whole[7:]):
        images.unlink()
        if content is not None:
            images.write_bytes(content)
        assert Gallery.open(gallery.uri).nearest(QUERIES, 20, "split = 'test'") == expected
        assert images.read_bytes() == whole
    assert files(gallery) == [captions, images]


@pytest.mark.parametrize("integers", [True, False])
def test_a_damaged_matrix_never_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, integers: bool
) -> None:
    """With its body zeroed, with noise in it and with single bytes changed, of images and captions."""
    monkeypatch.setattr("retrieval.search.exact.integer_products", lambda: integers)
    monkeypatch.setattr(vector_rows, "integer_products", lambda: integers)
    gallery = small_gallery(tmp_path / "g")
    expected = gallery.nearest(QUERIES, 20), gallery.nearest_captions(QUERIES, 5)
    random = np.random.default_rng(0)
    for path in files(gallery):
        whole = path.read_bytes()
        body = len(whole) - 64
        damaged = [whole[:64] + bytes(body), whole[:64] + random.bytes(body), random.bytes(len(whole))]
        for place in random.integers(64, len(whole), 5).tolist():
            damaged.append(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        for content in damaged:
            path.write_bytes(content)
            capsys.readouterr()
            again = Gallery.open(gallery.uri)
            assert (again.nearest(QUERIES, 20), again.nearest_captions(QUERIES, 5)) == expected
            assert path.read_bytes() == whole
            warning = capsys.readouterr().err
            assert warning.count("\n") == 1
            assert path.name in warning
            assert "made again from the gallery's table" in warning


def test_damage_that_is_found_by_the_search_that_looks_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without integer products the whole file is read, and checked, when it is opened.
    monkeypatch.setattr("retrieval.search.exact.integer_products", lambda: True)
    monkeypatch.setattr(vector_rows, "integer_products", lambda: True)
    monkeypatch.setattr("retrieval.search.vectors._CHECKED", 64)  # so small a gallery has one block else
    gallery = small_gallery(tmp_path / "g")
    expected = gallery.nearest(QUERIES, 20)
    opened = Gallery.open(gallery.uri)
    opened.nearest(QUERIES[:1], 1, "split = 'none'")  # opens the matrix and looks at no vector
    [_, images] = files(gallery)
    content = bytearray(images.read_bytes())
    content[64:96] = bytes(32)
    with images.open("r+b") as file:  # in place: a mapped file shows it
        file.write(content)
    assert opened.nearest(QUERIES, 20) == expected


def test_a_matrix_of_a_former_revision_never_answers(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    [_, former] = files(gallery)
    kept = former.read_bytes()
    with gallery.writing() as writer:
        writer.remove(["p0"])
        writer.add(image_rows(identity(), ["new"], vectors(1)))
    expected = gallery.nearest(QUERIES, 20)
    former.write_bytes(kept)
    [_, current] = [file for file in files(gallery) if file != former]
    current.unlink()
    assert Gallery.open(gallery.uri).nearest(QUERIES, 20) == expected
    assert {hit.id for hit in expected[0]} == {*(f"p{row}" for row in range(1, 12)), "new"}
    with gallery.writing():
        pass
    assert not former.exists()


@pytest.fixture
def growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gallery:
    """A gallery of 40 images, large enough for appended ones to get a file of their own."""
    monkeypatch.setattr(vector_rows, "_FEWEST", 8)
    gallery = Gallery.create(str(tmp_path / "g"), identity(encodes_text=False))
    append(gallery, 40, seed=0)
    return gallery


def append(gallery: Gallery, count: int, seed: int) -> None:
    with gallery.writing() as writer:
        names = [f"{seed}-{row}" for row in range(count)]
        writer.add(image_rows(gallery.identity, names, vectors(count, seed=seed)))


def expect_all(gallery: Gallery) -> None:
    """Every search finds what a comparison with every vector in the table finds."""
    names = gallery.table(["id"]).column("id").to_pylist()
    best = brute_force(gallery.vectors(names), QUERIES, 20)
    for found in (gallery, Gallery.open(gallery.uri)):
        hits = [[hit.id for hit in near] for near in found.nearest(QUERIES, 20)]
        assert hits == [[names[row] for row in rows] for rows in best]
        some = np.arange(1, len(names), 2)
        best_of_some = some[brute_force(gallery.vectors(names)[some], QUERIES, 20)]
        hits = [[hit.id for hit in near] for near in found.nearest(QUERIES, 20, some)]
        assert hits == [[names[row] for row in rows] for rows in best_of_some]


def test_appending_writes_what_is_appended(growing: Gallery) -> None:
    [first] = files(growing)
    whole, written = first.read_bytes(), first.stat().st_ino
    reader = Gallery.open(growing.uri)
    before = reader.nearest(QUERIES, 20)
    append(growing, 8, seed=1)
    assert first.read_bytes() == whole
    assert first.stat().st_ino == written
    [new] = [file for file in files(growing) if file != first]
    opened = open_vectors(new)
    assert opened is not None
    assert len(opened.matrix) == 8
    assert [(one.name, one.rows) for one in opened.earlier] == [(first.name, 40)]
    expect_all(growing)
    assert reader.nearest(QUERIES, 20) == before


def test_files_stay_few_and_each_is_a_few_times_as_large_as_the_next(growing: Gallery) -> None:
    for seed in range(1, 17):
        append(growing, 8, seed)
        last = open_vectors(max(files(growing), key=lambda file: file.stat().st_mtime_ns))
        assert last is not None
        # The last file may have taken in some that were larger than it.
        sizes = [one.rows for one in last.earlier]
        assert all(one >= 4 * other for one, other in itertools.pairwise(sizes))
        assert len(files(growing)) == len(sizes) + 1
    expect_all(growing)


def test_joining_small_files_of_the_table_writes_no_vectors_again(growing: Gallery) -> None:
    """Their rows get new ids, in the same order."""
    append(growing, 200, seed=100)
    [first] = files(growing)
    former = growing._images.row_ids()
    for seed in range(1, 19):
        append(growing, 1, seed)
    assert not np.array_equal(growing._images.row_ids()[: len(former)], former)
    assert first in files(growing)
    expect_all(growing)


def test_removed_and_replaced_images_are_not_found_in_earlier_files(growing: Gallery) -> None:
    append(growing, 8, seed=1)
    with growing.writing() as writer:
        writer.remove(["0-3"])
        writer.add(image_rows(growing.identity, ["0-4", "new"], vectors(2, seed=9)))
    expect_all(growing)
    assert len(growing) == 48
    assert len(files(growing)) == 1


@pytest.mark.parametrize("harm", ["removed", "cut", "changed"])
def test_damage_in_an_earlier_file_is_noticed(growing: Gallery, harm: str) -> None:
    [first] = files(growing)
    append(growing, 8, seed=1)
    content = bytearray(first.read_bytes())
    content[200] ^= 1
    first.unlink()
    if harm != "removed":
        first.write_bytes(content if harm == "changed" else content[:-10])
    expect_all(Gallery.open(growing.uri))
    append(growing, 8, seed=2)
    expect_all(growing)


def test_a_kill_between_the_commit_and_its_file_costs_nothing(
    growing: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    [first] = files(growing)
    with monkeypatch.context() as patch:
        patch.setattr(vector_rows.VectorRows, "_write", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            append(growing, 8, seed=1)
    assert files(growing) == [first]
    with growing.writing():
        pass
    assert len(files(growing)) == 2
    expect_all(growing)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_gallery_that_was_made_again_in_the_same_place_has_a_matrix_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vector_rows, "_folders", lambda _: [tmp_path / "cache"])
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "g", ignore_errors=True)
        gallery = Gallery.create(str(tmp_path / "g"), identity())
        with gallery.writing() as writer:
            writer.add(image_rows(identity(), ["a", "b"], vectors(2, seed=seed)))
        [hits] = Gallery.open(gallery.uri).nearest(vectors(2, seed=seed)[[1]], 1)
        assert hits[0].id == "b"
        assert hits[0].score == pytest.approx(1, abs=1e-6)


def test_where_the_folder_refuses_the_cache_serves_and_where_both_refuse_the_error_has_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = small_gallery(tmp_path / "g")
    expected = gallery.nearest(QUERIES, 20)
    for file in files(gallery):
        file.unlink()
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    refusing = {tmp_path / "g"}

    def refused(path: Path, *arguments: object) -> None:
        if any(folder in path.parents for folder in refusing):
            raise PermissionError(13, "Permission denied", str(path))
        write_vectors(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(vector_rows, "write_vectors", refused)
    assert Gallery.open(gallery.uri).nearest(QUERIES, 20) == expected
    assert files(gallery) == []
    kept = list((tmp_path / "cache").rglob("*.vectors"))
    assert len(kept) == 1
    assert Gallery.open(gallery.uri).nearest(QUERIES, 20) == expected
    kept[0].unlink()
    refusing.add(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"set \$VITRAIL_CACHE"):
        Gallery.open(gallery.uri).nearest(QUERIES, 20)


@pytest.mark.parametrize("value", [0.0, 0.5, float("nan"), float("inf")])
def test_a_table_with_damaged_vectors_answers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """LanceDB keeps no checksums; every vector was of unit length when it was written."""
    gallery = small_gallery(tmp_path / "g")
    for file in files(gallery):
        file.unlink()
    read = lance_store.Store.vectors

    def damaged(store: lance_store.Store, start: int = 0) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint64]]]:
        for some, row_ids in read(store, start):
            broken = some.copy()
            broken[3] = value
            yield broken, row_ids

    monkeypatch.setattr(lance_store.Store, "vectors", damaged)
    with pytest.raises(UserError, match=r"table 'images': 1 of 12 vectors read are not of unit length.*damaged"):
        Gallery.open(gallery.uri).nearest(QUERIES, 3)
    assert files(gallery) == []


Batches = Iterator[tuple[NDArray[np.float32], NDArray[np.uint64]]]


def vectors_of(rows: int, dim: int) -> tuple[NDArray[np.float32], NDArray[np.uint64]]:
    random = np.random.default_rng(0)
    ids = random.permutation(10 * rows)[:rows].astype(np.uint64) << np.uint64(32)  # as LanceDB's second fragment
    return random.standard_normal((rows, dim)).astype(np.float32), ids


def in_batches(vectors: NDArray[np.float32], ids: NDArray[np.uint64], size: int) -> Batches:
    for start in range(0, len(vectors), size):
        yield vectors[start : start + size], ids[start : start + size]


@pytest.mark.parametrize(("rows", "dim"), [(100, 5), (33, 64), (1, 1), (0, 8)])
@pytest.mark.parametrize("size", [7, 1000])
def test_what_was_written_is_there(tmp_path: Path, rows: int, dim: int, size: int) -> None:
    vectors, ids = vectors_of(rows, dim)
    path = tmp_path / "new" / "images.vectors"
    write_vectors(path, in_batches(vectors, ids, size), dim)
    opened = open_vectors(path)
    assert opened is not None
    np.testing.assert_array_equal(opened.matrix, vectors)
    np.testing.assert_array_equal(opened.row_ids, ids)
    assert opened.matrix.dtype == np.float32
    assert opened.row_ids.dtype == np.uint64
    assert opened.matrix.shape == (rows, dim)
    assert not opened.matrix.flags.writeable
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_coarse_copy_of_the_file_is_that_of_the_vectors(tmp_path: Path) -> None:
    vectors, ids = vectors_of(500, 24)
    write_vectors(tmp_path / "v", in_batches(vectors, ids, 64), 24)
    opened = open_vectors(tmp_path / "v")
    assert opened is not None
    made = coarse_copy(np.asarray(opened.matrix))
    np.testing.assert_allclose(opened.coarse.centre, made.centre, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(opened.coarse.scale, made.scale, rtol=1e-6)
    assert np.abs(opened.coarse.codes.astype(int) - made.codes).max() <= 1
    assert opened.coarse.residual == pytest.approx(made.residual, rel=1e-3)
    assert opened.coarse.norm == pytest.approx(np.linalg.norm(vectors, axis=1).max())
    found = ExactIndex(opened.matrix, coarse=opened.coarse).search(vectors[:20], 1)
    np.testing.assert_array_equal(found.rows, ExactIndex(vectors).search(vectors[:20], 1).rows)


def test_a_file_cut_anywhere_reads_as_absent(tmp_path: Path) -> None:
    vectors, ids = vectors_of(9, 3)
    path = tmp_path / "v"
    write_vectors(path, in_batches(vectors, ids, 4), 3)
    whole = path.read_bytes()
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        assert open_vectors(path) is None
    path.write_bytes(whole + b"\0")
    assert open_vectors(path) is None
    assert open_vectors(tmp_path / "absent") is None
    path.write_bytes(whole)
    assert open_vectors(path) is not None


@pytest.mark.parametrize("place", [0, 8, 24])
def test_a_foreign_file_or_another_format_reads_as_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: int
) -> None:
    vectors, ids = vectors_of(9, 3)
    path = tmp_path / "v"
    write_vectors(path, in_batches(vectors, ids, 4), 3)
    content = bytearray(path.read_bytes())
    content[place] ^= 0x55  # the magic, the format, the number of rows
    path.write_bytes(content)
    assert open_vectors(path) is None
    path.write_bytes(b"PAR1" * 100)
    assert open_vectors(path) is None
    capsys.readouterr()
    for former in (1, 2):
        path.write_bytes(b"VITRVEC\n" + former.to_bytes(4, "little") + bytes(1000))
        assert open_vectors(path) is None
    assert capsys.readouterr().err == ""


def test_a_kill_between_batches_leaves_the_old_file(tmp_path: Path) -> None:
    vectors, ids = vectors_of(20, 3)
    path = tmp_path / "v"
    write_vectors(path, in_batches(vectors[:10], ids[:10], 10), 3)

    def stopped() -> Batches:
        yield vectors[:10], ids[:10]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_vectors(path, stopped(), 3)
    opened = open_vectors(path)
    assert opened is not None
    assert len(opened.matrix) == 10
    assert [file.name for file in tmp_path.iterdir()] == ["v"]


def test_who_has_a_file_open_keeps_it_when_it_is_replaced(tmp_path: Path) -> None:
    vectors, ids = vectors_of(20, 3)
    path = tmp_path / "v"
    write_vectors(path, in_batches(vectors, ids, 10), 3)
    opened = open_vectors(path)
    write_vectors(path, in_batches(vectors[:2] + 1, ids[:2], 10), 3)
    assert opened is not None
    np.testing.assert_array_equal(opened.matrix, vectors)


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    vectors, ids = vectors_of(20, 3)
    path = tmp_path / "v"
    write_vectors(path, in_batches(vectors, ids, 10), 3)

    def full() -> Batches:
        yield vectors, ids
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"v: there is no room on the disk; make room") as caught:
        write_vectors(path, full(), 3)
    assert "\n" not in str(caught.value)
    assert open_vectors(path) is not None
    assert [file.name for file in tmp_path.iterdir()] == ["v"]


def test_another_error_of_the_system_is_not_called_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_vectors(tmp_path / "file" / "v", iter(()), 3)


def test_broken_vectors_are_refused(tmp_path: Path) -> None:
    vectors, ids = vectors_of(20, 3)
    with pytest.raises(ValueError, match=r"must be float32 \(20, 4\)"):
        write_vectors(tmp_path / "v", iter([(vectors, ids)]), 4)
    vectors[13, 1] = np.nan
    with pytest.raises(ValueError, match="row 13 holds numbers that are not finite"):
        write_vectors(tmp_path / "v", in_batches(vectors, ids, 5), 3)
    assert not list(tmp_path.iterdir())


def test_every_changed_byte_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One byte after the other: when the file is opened, or when the vectors in it are looked at."""
    vectors, ids = vectors_of(23, 5)
    path = tmp_path / "v"
    write_vectors(path, in_batches(vectors, ids, 10), 5)
    whole = path.read_bytes()
    unnoticed = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        opened = open_vectors(path)
        try:
            if opened is not None:
                opened.check_rows(np.arange(23))
                unnoticed.append(place)
        except DamagedError:
            pass
    assert not unnoticed
    assert "damaged" in capsys.readouterr().err


def test_only_the_blocks_of_the_rows_that_are_asked_for_are_compared(tmp_path: Path) -> None:
    vectors, ids = vectors_of(1000, 100)  # 400 bytes a row, 163 rows a block
    path = tmp_path / "v"
    write_vectors(path, in_batches(vectors, ids, 100), 100)
    content = bytearray(path.read_bytes())
    content[64 + 400 * 500] ^= 1
    path.write_bytes(content)
    opened = open_vectors(path)
    assert opened is not None
    opened.check_rows(np.array([0, 100, 999, 490]))  # row 490 ends before the damaged block
    for rows in ([492], [0, 600], [491]):  # row 491 begins in the block before it
        with pytest.raises(DamagedError, match="v: is damaged"):
            opened.check_rows(np.array(rows))
    with pytest.raises(DamagedError):
        opened.check_all()


def test_rows_longer_than_a_block_are_compared_whole(tmp_path: Path) -> None:
    vectors, ids = vectors_of(3, 50_000)
    path = tmp_path / "v"
    write_vectors(path, in_batches(vectors, ids, 1), 50_000)
    content = bytearray(path.read_bytes())
    content[64 + 200_000 + 100_000] ^= 1  # the middle of row 1
    path.write_bytes(content)
    opened = open_vectors(path)
    assert opened is not None
    opened.check_rows(np.array([0, 2]))
    with pytest.raises(DamagedError):
        opened.check_rows(np.array([1]))


DIM, IMAGES_OF_A_KIND, KINDS = 32, 60, 50
MADE_BY = identity(dim=DIM, encodes_text=False)


def clustered(seed: int = 0) -> NDArray[np.float32]:
    """Vectors that lie in heaps, as those of images do; float32 ``(KINDS * IMAGES_OF_A_KIND, DIM)``."""
    draws = np.random.default_rng(seed)
    centres = np.repeat(draws.standard_normal((KINDS, DIM)), IMAGES_OF_A_KIND, axis=0)
    matrix = centres + 0.5 * draws.standard_normal(centres.shape)
    return np.asarray(matrix / np.linalg.norm(matrix, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gallery, IndexReport]:
    gallery = Gallery.create(str(tmp_path_factory.mktemp("index") / "g"), MADE_BY)
    matrix = clustered()
    names = [f"p{row}" for row in range(len(matrix))]
    splits = ["test" if row % 10 == 0 else "train" for row in range(len(matrix))]
    with gallery.writing() as writer:
        writer.add(image_rows(MADE_BY, names, matrix, split=splits))
    file = next(Path(gallery.uri).glob("images.*.vectors"))
    report = gallery.build_index(sample=100)
    # Building the index changes no row, so the matrix is kept.
    assert not file.exists()
    assert len(list(Path(gallery.uri).glob("images.*.vectors"))) == 1
    return gallery, report


def brute_force(matrix: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    return np.argsort(-(queries.astype(np.float64) @ matrix.T.astype(np.float64)), axis=1, kind="stable")[:, :k]


def recall(found: list[set[str]], expected: NDArray[np.int64]) -> float:
    shares = [len(near & {f"p{row}" for row in rows}) / len(rows) for near, rows in zip(found, expected, strict=True)]
    return float(np.mean(shares))


def test_the_recall_that_is_printed_is_that_of_brute_force(indexed: tuple[Gallery, IndexReport]) -> None:
    gallery, report = indexed
    matrix = clustered()
    # The same choice of stored vectors; each finds itself first, which does not count.
    chosen = np.sort(np.random.default_rng(0).choice(len(matrix), 100, replace=False))
    expected = brute_force(matrix, matrix[chosen], 11)
    assert expected[:, 0].tolist() == chosen.tolist()
    hits = gallery.nearest(matrix[chosen], 11, exact=False)
    assert [near[0].id for near in hits] == [f"p{row}" for row in chosen]
    measured = recall([{hit.id for hit in near[1:]} for near in hits], expected[:, 1:])
    assert (report.rows, report.queries, report.k) == (len(matrix), 100, 10)
    assert report.recall == pytest.approx(measured)
    assert report.worst <= report.recall
    assert report.recall > 0.9


def test_scores_of_the_index_are_cosines(indexed: tuple[Gallery, IndexReport]) -> None:
    gallery, _ = indexed
    query = clustered(seed=1)[:1]
    [hits] = gallery.nearest(query, 5, exact=False)
    for hit in hits:
        assert hit.score == pytest.approx(float(gallery.vectors([hit.id])[0] @ query[0]), abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_a_filter_holds_before_the_best_are_chosen(indexed: tuple[Gallery, IndexReport]) -> None:
    gallery, _ = indexed
    matrix = clustered()
    queries = clustered(seed=1)[::100]
    tests = np.arange(0, len(matrix), 10)
    expected = tests[brute_force(matrix[tests], queries, 10)]
    hits = gallery.nearest(queries, 10, "split = 'test'", exact=False)
    assert [len(near) for near in hits] == [10] * len(queries)
    assert all(int(hit.id[1:]) % 10 == 0 for near in hits for hit in near)
    assert recall([{hit.id for hit in near} for near in hits], expected) > 0.9


def test_past_the_limit_the_index_answers_and_new_images_are_found_too(
    indexed: tuple[Gallery, IndexReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(indexed[0].uri, tmp_path / "g")
    gallery = Gallery.open(str(tmp_path / "g"))
    monkeypatch.setattr(gallery_module, "EXACT_LIMIT", 1000)
    queries = clustered(seed=1)[::500]
    assert gallery.nearest(queries, 5) == gallery.nearest(queries, 5, exact=False)
    with gallery.writing() as writer:
        writer.add(image_rows(MADE_BY, ["new"], queries[:1]))
        writer.remove([gallery.nearest(queries[1:2], 1)[0][0].id])
        # Before it is tidied the index does not have it.
        assert gallery.nearest(queries[:1], 1)[0][0].id == "new"
    for found in (gallery, Gallery.open(gallery.uri)):
        assert found.nearest(queries[:1], 1)[0][0].id == "new"
        assert found.nearest(queries[:1], 1)[0][0].score == pytest.approx(1, abs=1e-5)
        assert found.nearest(queries, 5) == found.nearest(queries, 5, exact=False)
        # The index may miss the nearest one, the exact search does not.
        [exact], [by_index] = found.nearest(queries[1:2], 5, exact=True), found.nearest(queries[1:2], 5)
        assert all(one.score >= other.score - 1e-5 for one, other in zip(exact, by_index, strict=True))
    # No matrix is made of what the index answers for, except where exact search was asked for.
    assert len(list((tmp_path / "g").glob("images.*.vectors"))) == 2


def test_exact_neighbours_are_found_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.store.BATCH_ROWS", 7)
    gallery = small_gallery(tmp_path / "g")
    store = Store.open(gallery.uri, IMAGES)
    assert store is not None
    matrix = gallery.vectors([f"p{row}" for row in range(12)])
    assert len(list(store.vectors())) > 1
    rows = store.scan(["id"]).column("_rowid").to_numpy()
    assert np.array_equal(
        exact_neighbours(store, vectors(5, seed=2), 9), rows[brute_force(matrix, vectors(5, seed=2), 9)]
    )


def test_too_small_a_gallery_is_refused(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    with pytest.raises(UserError, match=r"has 12 images; an index needs 1,000"):
        gallery.build_index()
    assert not gallery.has_index()
