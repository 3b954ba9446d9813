"""A gallery finds what a comparison with every vector finds, whatever was added, replaced and removed before.

Changes are whole: after a kill before any commit, doing it again gives the gallery of an undisturbed writer.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from retrieval import gallery as gallery_module
from retrieval.gallery import Gallery, _write_lock
from retrieval.schema import CAPTIONS, caption_schema
from retrieval.search.searcher import Query, Searcher
from retrieval.store import Store, matrix_of
from tests.retrieval.gallery_processes import BATCH, add_batch
from tests.support.forks import run_program
from tests.support.galleries import (
    CLASSES,
    DIM,
    SHOWN,
    caption_rows,
    identity,
    image_rows,
    meaning_vector,
    small_gallery,
    small_rows,
    vectors,
)
from tests.support.processes import read_only
from vitrail.errors import UserError

QUERIES = vectors(5, seed=9)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return small_gallery(tmp_path_factory.mktemp("gallery") / "small")


def brute_force(
    content: dict[str, NDArray[np.float32]], queries: NDArray[np.float32], k: int, keep: Callable[[str], bool]
) -> list[list[str]]:
    """Ids of the best of each query by sorting all scores; equal scores in the order of the content."""
    names = [name for name in content if keep(name)]
    matrix = np.stack([content[name] for name in names]).astype(np.float64)
    return [[names[place] for place in np.argsort(-(matrix @ query), kind="stable")[:k]] for query in queries]


def test_a_gallery_opens_by_path_and_by_uri(small: Gallery) -> None:
    for uri in (small.uri, f"file://{small.uri}"):
        opened = Gallery.open(uri)
        assert len(opened) == len(SHOWN)
        assert opened.n_captions() == 2 * len(SHOWN)
        assert opened.identity == identity()
        assert opened.nearest(QUERIES, 3) == small.nearest(QUERIES, 3)


def test_a_gallery_on_s3_is_filled_and_searched(
    small: Gallery, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path))
    far = small_gallery(f"{bucket}/far")
    assert Gallery.open(f"{bucket}/far").nearest(QUERIES, 12) == small.nearest(QUERIES, 12)
    assert far.nearest_captions(QUERIES, 5) == small.nearest_captions(QUERIES, 5)
    assert len(list(tmp_path.glob("galleries/*/images.*.vectors"))) == 1


def test_it_finds_what_the_query_means(small: Gallery) -> None:
    query = np.stack([meaning_vector("tableware_water_bottle", "blue", "plastic")])
    [hits] = small.nearest(query, 3)
    assert SHOWN[int(hits[0].id[1:])] == ("tableware_water_bottle", "blue", "plastic")
    assert hits[0].score == pytest.approx(float(small.vectors([hits[0].id])[0] @ query[0]), abs=1e-6)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_rows_and_vectors_come_in_the_order_that_was_asked_for(small: Gallery) -> None:
    asked = ["p7", "p0", "p7", "p11"]
    assert small.rows(asked, ["id", "label_class"]).to_pylist() == [
        {"id": name, "label_class": SHOWN[int(name[1:])][0]} for name in asked
    ]
    assert small.rows([], ["id"]).num_rows == 0
    everything = small.table(["id", "vector"])
    assert everything.column("id").to_pylist() == [f"p{row}" for row in range(len(SHOWN))]
    for name, vector in zip(asked, small.vectors(asked), strict=True):
        assert vector.tolist() == everything.column("vector")[int(name[1:])].as_py()


def test_an_unknown_id_is_refused(small: Gallery) -> None:
    with pytest.raises(UserError, match="no image 'p12'"):
        small.rows(["p1", "p12"], ["id"])
    with pytest.raises(UserError, match='no image "it\'s"'):
        small.vectors(["it's"])


def test_wrong_questions_are_one_line(small: Gallery) -> None:
    with pytest.raises(UserError, match="top-k: must be at least 1; got 0"):
        small.nearest(QUERIES, 0)
    with pytest.raises(UserError, match="vectors of length 8"):
        small.nearest(vectors(1, dim=5), 3)
    with pytest.raises(UserError, match="not finite"):
        small.nearest(np.full((1, DIM), np.nan, np.float32), 3)
    with pytest.raises(UserError, match="has no index"):
        small.nearest(QUERIES, 3, exact=False)
    assert [len(hits) for hits in small.nearest(QUERIES, 10_000)] == [len(SHOWN)] * len(QUERIES)
    assert small.nearest(QUERIES, 3, "colour = 'green'") == [[]] * len(QUERIES)
    assert small.nearest(np.zeros((0, DIM), np.float32), 3) == []


def test_any_text_is_a_name(tmp_path: Path) -> None:
    gallery = Gallery.create(str(tmp_path / "g"), identity(encodes_text=False))
    names = ["it's", 'a "b"', "c\\d", "e\nf", "", "ü/é 1", "g; DROP TABLE images --", "%", "`h`", "x" * 5000]
    matrix = vectors(len(names))
    with gallery.writing() as writer:
        writer.add(image_rows(gallery.identity, names, matrix))
        writer.add(image_rows(gallery.identity, names[:6], matrix[:6]))
    assert len(gallery) == len(names)
    assert np.array_equal(gallery.vectors(names), matrix)
    assert [hits[0].id for hits in gallery.nearest(matrix, 1)] == names
    with gallery.writing() as writer:
        writer.remove(names[:4])
    assert gallery.table(["id"]).column("id").to_pylist() == names[6:] + names[4:6]


def test_captions_are_found_once_each_and_only_of_images_that_the_filter_keeps(tmp_path: Path) -> None:
    gallery = Gallery.create(str(tmp_path / "g"), identity())
    said = [("a", "one"), ("a", "two"), ("b", "one"), ("c", "three"), ("b", "four")]
    spoken = vectors(len(said), seed=3)
    spoken[2] = spoken[0]
    rows = image_rows(identity(), ["a", "b", "c"], vectors(3), split=["train", "test", "test"])
    with gallery.writing() as writer:
        writer.add(rows, caption_rows(identity(), said, spoken))
    for where, texts in (("", ["one", "two", "three", "four"]), ("split = 'test'", ["one", "three", "four"])):
        [hits] = gallery.nearest_captions(spoken[[0]], 9, where)
        scores = {text: float(vector @ spoken[0]) for (_, text), vector in zip(said, spoken, strict=True)}
        assert [hit.caption for hit in hits] == sorted(texts, key=lambda text: -scores[text])
        assert [hit.score for hit in hits] == pytest.approx(sorted((scores[t] for t in texts), reverse=True), abs=1e-6)
        assert hits[0].image == ("b" if where else "a")
    written = gallery.captions_of(["c", "b", "unknown"])
    assert list(zip(*written.select(["image", "caption"]).to_pydict().values(), strict=True)) == said[2:]
    assert np.array_equal(matrix_of(written.column("vector")), spoken[2:])
    without = Gallery.create(str(tmp_path / "none"), identity(encodes_text=False))
    with pytest.raises(UserError, match="has no captions"):
        without.nearest_captions(QUERIES, 1)
    with pytest.raises(UserError, match="has no captions"):
        without.captions_of(["a"])


def test_search_stays_that_of_brute_force_while_images_come_change_and_go(tmp_path: Path) -> None:
    gallery = Gallery.create(str(tmp_path / "g"), identity())
    content: dict[str, NDArray[np.float32]] = {}
    draws = np.random.default_rng(5)
    for step in range(8):
        with gallery.writing() as writer:
            if content and step % 3 == 2:
                gone = list(draws.choice(list(content), 7, replace=False))
                writer.remove(gone)
                for name in gone:
                    del content[name]
            for _ in range(2):
                old = list(draws.choice(list(content), 5, replace=False)) if content else []
                fresh = [f"s{step}-{draws.integers(1 << 30)}" for _ in range(20)]
                names = [str(name) for name in draws.permutation([*old, *fresh])]
                matrix = vectors(len(names), seed=int(draws.integers(1 << 30)))
                matrix[3] = matrix[2]  # equal scores keep the gallery's order
                splits = ["test" if name[-1] in "02468" else "train" for name in names]
                writer.add(image_rows(identity(), names, matrix, split=splits))
                for was_there in (True, False):  # replaced ones stand before new ones, both at the end
                    for name, vector in zip(names, matrix, strict=True):
                        if (name in old) == was_there:
                            content.pop(name, None)
                            content[name] = vector
        reopened = Gallery.open(gallery.uri)
        for found in (gallery, reopened):
            assert found.table(["id"]).column("id").to_pylist() == list(content)
            for where, keep in (("", lambda _: True), ("split = 'test'", lambda name: name[-1] in "02468")):
                hits = [[hit.id for hit in near] for near in found.nearest(QUERIES, 30, where)]
                assert hits == brute_force(content, QUERIES, 30, keep)
        assert len(list(Path(gallery.uri).glob("images.*.vectors"))) == 1


def test_a_reader_goes_on_with_what_was_there_when_it_opened(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    reader, later = Gallery.open(gallery.uri), Gallery.open(gallery.uri)
    before = reader.nearest(QUERIES, 30)
    with gallery.writing() as writer:
        writer.remove(["p0", "p1"])
        writer.add(image_rows(identity(), ["new"], vectors(1)))
        # Reading goes on during writing.
        assert Gallery.open(gallery.uri).nearest(QUERIES, 3) == gallery.nearest(QUERIES, 3)
    assert reader.nearest(QUERIES, 30) == before
    assert later.nearest(QUERIES, 30) == before
    assert len(gallery.nearest(QUERIES, 30)[0]) == len(Gallery.open(gallery.uri).nearest(QUERIES, 30)[0]) == 11


def test_an_empty_gallery_answers_nothing(tmp_path: Path) -> None:
    gallery = Gallery.create(str(tmp_path / "g"), identity())
    with gallery.writing() as writer:
        assert writer.known().num_rows == 0
    assert len(gallery) == 0
    assert gallery.nearest(QUERIES, 3) == [[]] * len(QUERIES)
    assert gallery.table(["id"], "colour = 'blue'").num_rows == 0


def test_another_models_gallery_is_refused_and_a_new_name_asked_for(small: Gallery) -> None:
    assert len(Gallery.open_or_create(small.uri, identity(run="runs/same_weights_elsewhere"))) == len(SHOWN)
    others = {
        "the weights of runs/other are others": identity(weights="b" * 64, run="runs/other"),
        "images were made as": identity(input_options={"size": 64}),
        "the model predicts other classes": identity(predicts={"class": ["x"]}),
        "the task is another": identity(task="MultiTask"),
        "the data have labels of class, not of class, colour, material": identity(labels=["class"]),
    }
    for said, other in others.items():
        with pytest.raises(UserError, match="name a new gallery") as caught:
            Gallery.open_or_create(small.uri, other)
        assert said in str(caught.value)
        assert "made by DualEncoder of runs/small/20260101-000000" in str(caught.value)
    assert len(Gallery.open(small.uri)) == len(SHOWN)


def test_what_a_kill_left_of_making_another_models_gallery_is_no_hindrance(tmp_path: Path) -> None:
    Store.create(str(tmp_path / "g"), CAPTIONS, caption_schema(identity(dim=4)))
    with pytest.raises(UserError, match="is no gallery"):
        Gallery.open(str(tmp_path / "g"))
    gallery = small_gallery(tmp_path / "g")
    assert gallery.n_captions() == 24
    assert gallery.nearest_captions(QUERIES, 3) == Gallery.open(gallery.uri).nearest_captions(QUERIES, 3)


def test_what_is_no_gallery_is_refused(small: Gallery, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("no gallery", encoding="utf-8")
    for name, said in (("none", "there is no gallery here"), ("", "is no gallery"), ("file.txt", "is no gallery")):
        with pytest.raises(UserError, match=said):
            Gallery.open(str(tmp_path / name))
    with pytest.raises(UserError, match="is a file; name a folder"):
        Gallery.create(str(tmp_path / "file.txt"), identity())
    with pytest.raises(UserError, match="there is a gallery already"):
        Gallery.create(small.uri, identity())
    with pytest.raises(UserError, match="nowhere://x: table 'images' cannot be read"):
        Gallery.open("nowhere://x")
    assert {path.name for path in tmp_path.iterdir()} == {"file.txt"}


def test_tables_that_others_made_are_no_gallery(tmp_path: Path) -> None:
    import lancedb

    database = lancedb.connect(str(tmp_path / "foreign"))
    database.create_table("images", image_rows(identity(), ["a"], vectors(1)).replace_schema_metadata(None))
    with pytest.raises(UserError, match="no gallery's"):
        Gallery.open(str(tmp_path / "foreign"))
    newer = image_rows(identity(), ["a"], vectors(1))
    text = newer.schema.metadata[b"vitrail.gallery"].replace(b'"format": 1', b'"format": 9')
    lancedb.connect(str(tmp_path / "newer")).create_table(
        "images", newer.replace_schema_metadata({b"vitrail.gallery": text})
    )
    with pytest.raises(UserError, match="newer version"):
        Gallery.open(str(tmp_path / "newer"))


def test_past_the_limit_search_is_exact_until_an_index_is_built(
    small: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = small.nearest(QUERIES, 5)
    monkeypatch.setattr(gallery_module, "EXACT_LIMIT", 3)
    assert small.nearest(QUERIES, 5) == before
    assert small.nearest(QUERIES, 5, exact=True) == before


ROOT = Path(__file__).parents[2]


def content(gallery: Gallery) -> tuple[pa.Table, pa.Table]:
    """Everything in the gallery's two tables, in order."""
    captions = Store.open(gallery.uri, CAPTIONS)
    assert captions is not None
    said = captions.scan(["id", "image", "caption", "vector"]).drop_columns(["_rowid"])
    return gallery.table(["id", "content", "caption", "text", "run", "vector"]), said


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    gallery = small_gallery(tmp_path_factory.mktemp("undisturbed") / "g")
    add_batch(gallery)
    return gallery


def check_what_a_kill_left(uri: str) -> None:
    """The gallery opens, every image is found, and captions belong to images."""
    left = Gallery.open(uri)
    ids = set(left.table(["id"]).column("id").to_pylist())
    assert {f"p{row}" for row in range(12)} <= ids <= {f"p{row}" for row in range(12)} | set(BATCH)
    assert {hit.id for hit in left.nearest(vectors(1), 20)[0]} == ids
    assert {hit.image for hit in left.nearest_captions(vectors(1), 100)[0]} <= ids


COMMITS = 4
"""Removing the replaced image's captions, adding the new ones, replacing an image, adding images."""


@pytest.mark.parametrize("number", range(COMMITS))
def test_a_writer_that_stops_before_any_commit_can_be_finished(
    undisturbed: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    gallery = small_gallery(tmp_path / "g")
    commit = Store._commit
    commits = []

    def stopped(store: Store, change: Callable[[], object]) -> None:
        commits.append(change)
        if len(commits) > number:
            raise KeyboardInterrupt
        commit(store, change)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_commit", stopped)
        with pytest.raises(KeyboardInterrupt):
            add_batch(gallery)
    assert len(commits) == number + 1
    check_what_a_kill_left(gallery.uri)
    add_batch(Gallery.open(gallery.uri))
    for found, expected in zip(content(Gallery.open(gallery.uri)), content(undisturbed), strict=True):
        assert found.equals(expected)


def test_a_writer_that_is_killed_between_captions_and_images_can_be_finished(
    undisturbed: Gallery, tmp_path: Path
) -> None:
    gallery = small_gallery(tmp_path / "g")
    run_program("tests.retrieval.gallery_processes", "2", gallery.uri, code=-signal.SIGKILL)
    assert Gallery.open(gallery.uri).n_captions() == undisturbed.n_captions()
    assert len(Gallery.open(gallery.uri)) == 12
    check_what_a_kill_left(gallery.uri)
    add_batch(Gallery.open(gallery.uri))
    for found, expected in zip(content(Gallery.open(gallery.uri)), content(undisturbed), strict=True):
        assert found.equals(expected)


def test_on_s3_a_killed_writer_is_finished_while_others_read(undisturbed: Gallery, bucket: str) -> None:
    uri = small_gallery(f"{bucket}/g").uri
    readers = [Gallery.open(uri) for _ in range(3)]
    before = [reader.nearest(QUERIES, 5) for reader in readers]
    run_program("tests.retrieval.gallery_processes", "2", uri, code=-signal.SIGKILL)
    check_what_a_kill_left(uri)
    add_batch(Gallery.open(uri))
    for found, expected in zip(content(Gallery.open(uri)), content(undisturbed), strict=True):
        assert found.equals(expected)
    # They keep what was there when they opened it.
    assert [reader.nearest(QUERIES, 5) for reader in readers] == before
    assert [len(reader) for reader in readers] == [12] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "the object store cannot be reached; check the network"),
        ({"AWS_ACCESS_KEY_ID": ""}, "no credentials for the object store; set AWS_ACCESS_KEY_ID"),
        ({}, "there is no such bucket .*make it, or correct the address"),
    ],
    ids=["unreachable", "no credentials", "no bucket"],
)
def test_what_an_object_store_refuses_is_one_line(
    bucket: str, changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in changes.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name)
    uri = f"{bucket}/g" if changes else "s3://no-such-bucket/g"
    with pytest.raises(UserError, match=message) as caught:
        Gallery.open(uri)
    assert str(caught.value).startswith(uri)
    assert len(str(caught.value)) < 250
    assert "not-so-secret" not in str(caught.value)


def test_the_next_writer_removes_captions_that_a_kill_left_without_an_image(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    captions = Store.open(gallery.uri, CAPTIONS)
    assert captions is not None
    captions.append(caption_rows(identity(), [("never", "an orphan")], vectors(1)))
    gallery = Gallery.open(gallery.uri)
    assert gallery.n_captions() == 25
    assert "an orphan" not in {hit.caption for hit in gallery.nearest_captions(vectors(1), 100)[0]}
    with gallery.writing():
        pass
    assert gallery.n_captions() == Gallery.open(gallery.uri).n_captions() == 24


def test_replacing_and_removing_takes_captions_along(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    images, captions = small_rows(identity())
    with gallery.writing() as writer:
        writer.remove(["p0", "p1"])
        writer.add(images.slice(2, 1), captions.slice(4, 1))
        writer.add(images.slice(3, 1))  # its captions stay
        writer.add(images.slice(4, 1), captions.slice(0, 0))
    said = Store.open(gallery.uri, CAPTIONS)
    assert said is not None
    owners = said.scan(["image"]).column("image").to_pylist()
    assert {name: owners.count(name) for name in ("p0", "p1", "p2", "p3", "p4", "p5")} == {
        "p0": 0, "p1": 0, "p2": 1, "p3": 2, "p4": 0, "p5": 2,
    }  # fmt: skip
    order = [*(f"p{row}" for row in range(5, 12)), "p2", "p3", "p4"]
    assert gallery.table(["id"]).column("id").to_pylist() == order


def test_what_is_known_comes_without_large_columns(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    with gallery.writing() as writer:
        known = writer.known()
    assert {"id", "content", "label_colour", "confidence_class"} <= set(known.column_names)
    assert not {"vector", "thumbnail"} & set(known.column_names)
    assert known.num_rows == 12


@pytest.mark.parametrize("broken", [np.nan, 0.0, 2.0])
def test_a_vector_that_is_not_of_unit_length_is_refused(tmp_path: Path, broken: float) -> None:
    gallery = small_gallery(tmp_path / "g")
    matrix = vectors(3)
    matrix[1] *= broken
    with pytest.raises(UserError, match="image 'b': its vector has the length"), gallery.writing() as writer:
        writer.add(image_rows(identity(), ["a", "b", "c"], matrix))
    assert len(Gallery.open(gallery.uri)) == 12


def test_rows_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    good = image_rows(identity(), ["a", "b"], vectors(2))
    with gallery.writing() as writer:
        with pytest.raises(ValueError, match="an id is there twice"):
            writer.add(image_rows(identity(), ["a", "a"], vectors(2)))
        with pytest.raises(ValueError, match="'caption'"):
            writer.add(good.drop_columns(["caption"]))
        with pytest.raises(ValueError, match="of 'elsewhere'"):
            writer.add(good, caption_rows(identity(), [("elsewhere", "x")], vectors(1)))
        with pytest.raises(UserError, match="no image 'unknown'"):
            writer.remove(["p0", "unknown"])
    assert len(Gallery.open(gallery.uri)) == 12
    silent = small_gallery(tmp_path / "silent", encodes_text=False)
    with silent.writing() as writer, pytest.raises(ValueError, match="encodes no texts"):
        writer.add(image_rows(silent.identity, ["a"], vectors(1)), caption_rows(identity(), [("a", "x")], vectors(1)))


FILTERS = [f"class = '{name}'" for name in CLASSES] + [
    f"confidence_colour > {0.4 + 0.05 * row:.2f}" for row in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery whose rows are not in the order of their row ids: the first was replaced."""
    folder = tmp_path_factory.mktemp("filtered") / "g"
    gallery = small_gallery(folder)
    with gallery.writing() as writer:
        rows = gallery.rows(["p0"], [*writer.known().column_names, "vector", "thumbnail"])
        writer.add(rows)
    return folder


def test_places_are_those_of_the_rows_that_fit(folder: Path) -> None:
    gallery = Gallery.open(str(folder))
    ids = gallery.table(["id"]).column("id").to_pylist()
    for where in FILTERS:
        expected = gallery.table(["id"], where).column("id").to_pylist()
        assert [ids[place] for place in gallery.places(where).tolist()] == expected
    assert gallery.places().tolist() == list(range(12))


def test_the_rows_of_the_last_filters_are_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, scan = Gallery.open(str(folder)), Store.scan
    scans: list[str] = []

    def counted(store: Store, columns: Sequence[str], where: str = "") -> pa.Table:
        scans.append(where)
        return scan(store, columns, where)

    monkeypatch.setattr(Store, "scan", counted)
    for where in (*FILTERS[:3], *FILTERS[:3]):
        gallery.places(where)
    assert len(scans) == 4  # everything, and each filter once
    for where in FILTERS:
        gallery.places(where)
    scans.clear()
    gallery.places(FILTERS[0])
    assert len(scans) == 1  # pushed out by the others, and scanned again


def test_a_new_revision_is_scanned_again(folder: Path, tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    assert len(gallery.places("class = 'bag'")) == 3
    with gallery.writing() as writer:
        writer.remove(["p0"])
    assert len(gallery.places("class = 'bag'")) == 2


@pytest.mark.parametrize("ranker", ["vector", "text", "hybrid"])
def test_places_filter_as_the_filter_itself(folder: Path, ranker: str) -> None:
    gallery = Gallery.open(str(folder))
    where = "colour = 'black'"
    query = [Query(like="p5")]
    by_filter = Searcher(gallery).rank_all(query, 12, ranker, where)  # type: ignore[arg-type]
    by_places = Searcher(gallery).rank_all(query, 12, ranker, gallery.places(where))  # type: ignore[arg-type]
    assert by_places == by_filter
    assert len(by_places[0].hits) > 3


def test_nearest_among_no_places(folder: Path) -> None:
    gallery = Gallery.open(str(folder))
    vector = meaning_vector("bag")[None]
    assert gallery.nearest(vector, 3, np.zeros(0, np.int64)) == [[]]
    assert [hit.id for hit in gallery.nearest(vector, 3, np.array([5, 2]))[0]] == ["p3", "p6"]
    with pytest.raises(UserError, match="filter"):
        gallery.places("colour = ")


@pytest.mark.slow
def test_a_second_writer_is_refused_while_reading_goes_on_and_until_the_first_is_killed(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    command = [sys.executable, "-m", "tests.retrieval.gallery_processes", "holding", gallery.uri]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writing\n"
        with pytest.raises(UserError, match=f"process {other.pid} is writing to this gallery; wait"), gallery.writing():
            pass
        assert len(Gallery.open(gallery.uri).nearest(vectors(1), 20)[0]) == 12
        other.kill()
        other.wait(timeout=60)
    with gallery.writing() as writer:
        writer.remove(["p0"])
    assert len(Gallery.open(gallery.uri)) == 11


def test_a_second_object_of_the_same_process_is_refused_too(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    other = Gallery.open(gallery.uri)
    with gallery.writing():
        with pytest.raises(UserError, match="is writing to this gallery"), other.writing():
            pass
        with pytest.raises(UserError, match="is writing to this gallery"):
            other.build_index()
    with gallery.writing() as writer:
        writer.remove(["p0"])
    with other.writing() as writer:  # on top of what was written meanwhile
        writer.remove(["p1"])
    assert len(other) == len(Gallery.open(gallery.uri)) == 10


def test_of_two_that_make_a_gallery_at_once_one_gets_an_error(tmp_path: Path) -> None:
    uri = str(tmp_path / "new")
    (tmp_path / "new").mkdir()
    with _write_lock(uri), pytest.raises(UserError, match=r"process \d+ is writing to this gallery; wait"):
        Gallery.open_or_create(uri, identity())
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".writing.lock"]
    first = Gallery.open_or_create(uri, identity())
    second = Gallery.open_or_create(uri, identity())
    with first.writing(), pytest.raises(UserError, match=r"is writing to this gallery"), second.writing():
        pass


def test_one_that_comes_while_the_gallery_is_made_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "new")
    made: list[Gallery] = []

    @contextmanager
    def after_the_other(place: str) -> Iterator[None]:
        # Between looking and locking, another process has made it and is done.
        monkeypatch.undo()
        made.append(Gallery.create(place, identity()))
        with _write_lock(place):
            yield

    monkeypatch.setattr("retrieval.gallery._write_lock", after_the_other)
    assert Gallery.open_or_create(uri, identity())._images.revision == made[0]._images.revision


def test_a_gallery_in_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    with read_only(tmp_path), pytest.raises(UserError, match=r"gallery: cannot be written \(Permission denied\)"):
        Gallery.open_or_create(str(tmp_path / "gallery"), identity())
