"""The command line, with a tiny dual encoder that really encodes."""

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from datamodules.loading.decode import read_image
from datamodules.loading.transforms import eval_transform
from lightning_modules.checkpoint import load_task
from retrieval.__main__ import main
from retrieval.gallery import Gallery
from retrieval.schema import identity_of
from tests.support.galleries import caption_rows, image_rows, small_gallery, small_rows
from tests.support.models import TinyPairs, tiny_pair, tiny_trainer

CLASSES = ["rose", "tulip", "daisy", "iris"]


class Place(NamedTuple):
    """A run, its gallery, and the images in it."""

    run: Path
    gallery: str
    photos: list[Path]


class Said(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A gallery of eight photos with captions; the last image is no file but a thumbnail."""
    folder = tmp_path_factory.mktemp("search")
    run = folder / "run"
    task: Any = tiny_pair(folder / "clip")
    trainer = tiny_trainer(folder)
    trainer.fit(task, TinyPairs())
    trainer.save_checkpoint(run / "checkpoints" / "best.ckpt")
    task = load_task(run / "checkpoints" / "best.ckpt")
    made_by = identity_of(task, str(run), {"size": 32, "crop_fraction": 0.875, "interpolation": "bilinear"}, ["class"])
    generator = np.random.default_rng(0)
    photos = []
    for number in range(8):
        pixels = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        photos.append(folder / f"photo {number}.png")
        Image.fromarray(pixels).resize((60, 48), Image.Resampling.BICUBIC).save(photos[-1])
    transform = eval_transform(made_by.input_options)  # type: ignore[arg-type]  # a plain dictionary
    captions = [f"a {CLASSES[number % 4]} number {number}" for number in range(8)]
    with torch.no_grad():
        vectors = task.encode_image(torch.stack([transform(read_image(photo)) for photo in photos])).numpy()
        spoken = task.encode_text(captions).numpy()
    said = [CLASSES[number % 4] for number in range(8)]
    rows = image_rows(
        made_by,
        [f"n{number}" for number in range(8)],
        vectors,
        path=[*map(str, photos[:7]), ""],
        caption=captions,
        thumbnail=[*[None] * 7, photos[7].read_bytes()],
        label_class=said,
        predicted_class=said,
        confidence_class=[number / 10 for number in range(8)],
        text=said,
    )
    gallery = Gallery.create(str(folder / "gallery"), made_by)
    with gallery.writing() as writer:
        writer.add(rows, caption_rows(made_by, [(f"n{n}", text) for n, text in enumerate(captions)], spoken))
    (run / "config.yaml").write_text(f"data: {{init_args: {{root: {folder}}}}}\n", encoding="utf-8")
    return Place(run, gallery.uri, photos)


@pytest.fixture
def search(place: Place, capfd: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str, gallery: str = place.gallery) -> Said:
        code = main(["search", "--gallery", gallery, *arguments])
        return Said(code, *capfd.readouterr())

    return call


def _found(said: Said) -> list[str]:
    assert said.code == 0, said.err
    return [found["id"] for found in json.loads(said.out)["found"]]


def _cosines(place: Place, vector: np.ndarray[Any, Any]) -> list[str]:
    ids = [f"n{number}" for number in range(8)]
    return [ids[row] for row in np.argsort(-(Gallery.open(place.gallery).vectors(ids) @ vector), kind="stable")]


def test_a_text_is_encoded_by_the_model_of_the_run(place: Place, search: Any) -> None:
    task: Any = load_task(place.run / "checkpoints" / "best.ckpt")
    with torch.no_grad():
        vector = task.encode_text(["a photo of a tulip"])[0].numpy()
    assert _found(search("a photo of a tulip", "--top-k", "8", "--json")) == _cosines(place, vector)
    content = json.loads(search("a photo of a tulip", "--top-k", "3", "--json").out)
    assert content["ranker"] == "vector"
    assert content["found"][0]["score"] > content["found"][2]["score"]
    assert content["found"][0]["predicted"]["class"]["value"] in CLASSES


def test_a_photo_of_the_gallery_finds_itself_and_its_caption_is_found(place: Place, search: Any) -> None:
    """The photo goes the way that it went into the gallery: size, crop and interpolation."""
    content = json.loads(search("--image", str(place.photos[3]), "--json").out)
    assert content["found"][0]["id"] == "n3"
    assert content["found"][0]["score"] == pytest.approx(1, abs=1e-5)
    said = search("--image", str(place.photos[3]), "--find", "captions", "--top-k", "8", "--json")
    captions = [found["caption"] for found in json.loads(said.out)["found"]]
    assert set(captions) == {f"a {CLASSES[number % 4]} number {number}" for number in range(8)}
    said = search("a daisy number 2", "--find", "captions", "--top-k", "1", "--json")
    assert json.loads(said.out)["found"][0]["caption"] == "a daisy number 2"


def test_the_table_shows_scores_and_notes(search: Any) -> None:
    said = search("tulip purple", "--ranker", "tfidf")  # the name of version 0.1
    assert said.code == 0
    assert said.err == "warning: ranker tfidf is now called text\n"
    assert said.out.count("tulip 0.") == 2
    assert "n1" in said.out
    assert "note: no image has the word 'purple'" in said.out
    assert "note: 10 were requested, 2 were found; 8 are in the gallery" in said.out


@pytest.mark.slow
def test_text_like_and_filters_need_neither_run_nor_lightning(place: Place) -> None:
    """In a process of its own, because here everything is imported already."""
    program = (
        "import sys; from retrieval.__main__ import main\n"
        "base = ['search', '--gallery', sys.argv[1], '--top-k', '1']\n"
        "assert main([*base, 'daisies', '--ranker', 'text']) == 0\n"
        "assert main([*base, '--like', 'n2', '--where', \"class = 'daisy'\"]) == 0\n"
        "sys.exit('lightning' in sys.modules)"
    )
    command = [sys.executable, "-c", program, place.gallery]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "n2" in done.stdout
    assert "n6" in done.stdout


def test_the_contact_sheet_is_written_with_every_image(place: Place, search: Any, tmp_path: Path) -> None:
    sheet = tmp_path / "sheets" / "tulips.html"
    said = search("--like", "n0", "--top-k", "8", "--html", str(sheet))
    assert f"contact sheet: {sheet}" in said.out
    page = sheet.read_text(encoding="utf-8")
    # The query's image, six files and the thumbnail of the image without a file.
    assert page.count("<img ") == 8
    assert [path.name for path in sheet.parent.iterdir()] == ["tulips.html"]
    said = search("rose", "--ranker", "text", "--html", str(tmp_path), "--json")
    assert said.code == 2
    assert "--html" in said.err
    assert said.err.count("\n") == 1


def test_an_image_that_is_gone_or_broken_leaves_its_place(place: Place, search: Any, tmp_path: Path) -> None:
    moved = tmp_path / "photo.png"
    shutil.move(place.photos[1], moved)
    try:
        search("tulip", "--ranker", "text", "--html", str(tmp_path / "sheet.html"))
    finally:
        shutil.move(moved, place.photos[1])
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 1
    assert page.count("cannot be read any more") == 1


def test_a_strangers_gallery_shows_no_other_file(place: Place, search: Any, tmp_path: Path) -> None:
    """It names files of this machine by absolute path, over links and as addresses."""
    secrets = tmp_path / "home"
    secrets.mkdir()
    shutil.copy(place.photos[0], secrets / "secret.png")
    folder = tmp_path / "theirs"
    made = small_gallery(folder)
    (folder / "own.png").write_bytes(place.photos[0].read_bytes())
    (folder / "link.png").symlink_to(secrets / "secret.png")
    (folder / "linked").symlink_to(secrets)
    named = [
        *(str(secrets / "secret.png"), f"{folder}/../home/secret.png", "../home/secret.png", str(folder / "link.png")),
        *(str(folder / "linked" / "secret.png"), f"file://{secrets}/secret.png", "http://127.0.0.1:9/a.png"),
        *("file:secret.png", "\\\\host\\share\\a.png", "<img src=x onerror=alert(1)>"),
        *(str(folder / "own.png"), "own.png"),
    ]
    rows, _ = small_rows(made.identity)
    with made.writing() as writer:
        writer.add(rows.set_column(rows.schema.get_field_index("path"), "path", pa.array(named)))
    sheet = tmp_path / "sheet.html"
    said = search("--like", "p11", "--top-k", "12", "--html", str(sheet), gallery=str(folder))
    assert said.code == 0, said.err
    page = sheet.read_text(encoding="utf-8")
    assert page.count("<img ") == 2  # the query's image and its neighbour p10
    assert "<img src=x" not in page
    assert "name its folder with --data-root" in html.unescape(page)
    assert "(and 7 more)" in " ".join(said.out.split())
    assert "name its folder with --data-root" in " ".join(said.out.split())
    search("--like", "p11", "--top-k", "12", "--html", str(sheet), "--data-root", str(secrets), gallery=str(folder))
    assert sheet.read_text(encoding="utf-8").count("<img ") == 7


def test_hybrid_takes_text_from_another_gallery(place: Place, search: Any) -> None:
    said = search("rose", "--ranker", "hybrid", "--words-gallery", place.gallery, "--top-k", "2", "--json")
    assert set(_found(said)) & {"n0", "n4"}
    scores = [found["score"] for found in json.loads(said.out)["found"]]
    assert scores[0] <= 2 / 61


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give exactly one of a text, --image and --like"),
        (["rose", "--like", "n1"], "give exactly one"),
        ([""], "the query is empty"),
        (["   "], "the query is empty"),
        (["rose " * 10_000], "50,000 characters, 2,000 are allowed"),
        (["rose", "--top-k", "0"], "--top-k: must be 1 or more; got 0"),
        (["rose", "--top-k", "-1"], "--top-k: must be 1 or more; got -1"),
        (["--like", "n99"], "n99"),
        (["--image", "missing.jpg"], "missing.jpg: no such file"),
        (["--image", "missing.jpg", "--ranker", "text"], "an image file has no text fields"),
        (["rose", "--where", "colour = = 'blue'"], "colour"),
        (["rose", "--where", "class = 'rose'; DROP TABLE images"], ";"),
        (["rose", "--where", "price > 5"], "price"),
        (["rose", "--device", "nonsense"], "--device nonsense: cannot be used here"),
        (["rose", "--weight", "class"], "--weight class: give a field and a number"),
        (["rose", "--weight", "class=heavy"], "--weight class=heavy: give a field and a number"),
        (["rose", "--find", "captions", "--ranker", "text"], "--find captions"),
        (["--image", "."], "--image .: is a folder; name a file"),
        (["rose", "--words-gallery", "nowhere", "--ranker", "text"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(search: Any, arguments: Sequence[str], message: str) -> None:
    said = search(*arguments)
    assert said.code == 2
    assert said.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", said.err)
    assert message in said.err


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        (["синяя бутылка", "--ranker", "text"], "no word of the query is known: синяя, бутылка"),
        (["!!!", "--ranker", "text"], "no word of the query is known: it has none"),
        (["rose", "--where", "class = 'cactus'"], "no image fits the filter"),
    ],
)
def test_what_finds_nothing_says_so_and_is_no_error(search: Any, arguments: Sequence[str], note: str) -> None:
    said = search(*arguments)
    assert said.code == 0
    assert "no match for" in said.out
    assert note in said.out
    content = json.loads(search(*arguments, "--json").out)
    assert content["found"] == []
    assert any(note in line for line in content["notes"])


def test_a_query_in_another_script_is_answered_where_the_tokenizer_reads_it(search: Any) -> None:
    assert len(_found(search("синяя", "--json"))) == 8


def test_a_text_too_long_for_the_tower_is_read_in_part_and_said_so(search: Any) -> None:
    said = search("a photo of a rose " * 20, "--json")
    assert len(_found(said)) == 8
    assert any("reads only the beginning" in note for note in json.loads(said.out)["notes"])


def test_a_corrupt_image_is_named(search: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no image")
    said = search("--image", str(broken))
    assert said.code == 2
    assert str(broken) in said.err
    assert said.err.count("\n") == 1


def test_a_missing_gallery_and_one_of_a_classifier_are_reported(search: Any, tmp_path: Path) -> None:
    said = search("rose", gallery=str(tmp_path / "none"))
    assert said.code == 2
    assert "there is no gallery" in said.err
    assert not (tmp_path / "none").exists()
    plain = small_gallery(tmp_path / "plain", task="MultiTaskClassifier", encodes_text=False)
    said = search("blue bag", "--ranker", "vector", gallery=plain.uri)
    assert said.code == 2
    assert "does not encode texts; use --ranker text" in said.err
    assert "p2" in _found(search("blue bag", "--json", gallery=plain.uri))


def test_a_run_that_is_gone_or_another_model_is_reported(place: Place, search: Any, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.move(place.run, moved)
    try:
        gone = search("rose")
        found = search("rose", "--run", str(moved), "--json")
        by_file = search("rose", "--checkpoint", str(moved / "checkpoints" / "best.ckpt"), "--json")
        inside = shutil.copytree(place.gallery, moved / "gallery")
        with_gallery = search("rose", "--json", gallery=str(inside))
    finally:
        shutil.move(moved, place.run)
    assert gone.code == 2
    assert "--run or --checkpoint" in gone.err
    assert gone.err.count("\n") == 1
    assert _found(found) == _found(by_file) == _found(with_gallery)
    other = tmp_path / "other" / "checkpoints"
    other.mkdir(parents=True)
    content = torch.load(place.run / "checkpoints" / "best.ckpt", weights_only=True)
    name = next(name for name, value in content["state_dict"].items() if value.is_floating_point())
    content["state_dict"][name] = content["state_dict"][name] + 1
    torch.save(content, other / "best.ckpt")
    said = search("rose", "--run", str(other.parent))
    assert said.code == 2
    assert "has other weights than those that made" in said.err
    # The right one next to it is found.
    shutil.copy(place.run / "checkpoints" / "best.ckpt", other / "last.ckpt")
    assert _found(search("rose", "--run", str(other.parent), "--json")) == _found(search("rose", "--json"))
    said = search("rose", "--run", str(tmp_path))
    assert said.code == 2
    assert "has no checkpoints/best.ckpt" in said.err


def test_a_text_needs_no_quotes(search: Any) -> None:
    assert _found(search("a", "rose", "--json")) == _found(search("a rose", "--json"))
