"""Files of vectors: whole or absent."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.search.exact import ExactIndex, coarse_copy
from retrieval.search.vectors import DamagedError, open_vectors, write_vectors
from vitrail.errors import UserError

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


def test_there_is_none(tmp_path: Path) -> None:
    assert open_vectors(tmp_path / "absent") is None


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
    path.write_bytes(whole)
    assert open_vectors(path) is not None


@pytest.mark.parametrize("place", [0, 8, 24])
def test_a_foreign_file_or_another_format_reads_as_absent(tmp_path: Path, place: int) -> None:
    vectors, ids = vectors_of(9, 3)
    path = tmp_path / "v"
    write_vectors(path, in_batches(vectors, ids, 4), 3)
    content = bytearray(path.read_bytes())
    content[place] ^= 0x55  # the magic, the format, the number of rows
    path.write_bytes(content)
    assert open_vectors(path) is None
    path.write_bytes(b"PAR1" * 100)
    assert open_vectors(path) is None


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

    with pytest.raises(UserError, match=r"v: there is no room on the disk; make room") as told:
        write_vectors(path, full(), 3)
    assert "\n" not in str(told.value)
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


def test_a_file_of_the_former_format_is_made_again_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v").write_bytes(b"VITRVEC\n" + (1).to_bytes(4, "little") + bytes(1000))
    assert open_vectors(tmp_path / "v") is None
    assert capsys.readouterr().err == ""
