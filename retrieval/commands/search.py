"""``python -m retrieval search``: what is asked, who ranks, how it is shown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.errors import UserError

if TYPE_CHECKING:
    from datamodules.loading.decode import ValueRange
    from retrieval.commands.output import Answer, Found
    from retrieval.gallery import Gallery
    from retrieval.image_files import ImageFiles
    from retrieval.search.searcher import Encoder, Query, Searcher

_WIDTH_WITHOUT_TERMINAL = 160

_EPILOG = """\
examples:
  python -m retrieval search --gallery G "blue plastic bottle" --top-k 5
  python -m retrieval search --gallery G --like 00042 --where "colour = 'blue' AND confidence > .5"
  python -m retrieval search --gallery G --image photo.jpg --find captions
  python -m retrieval search --gallery G "black leather bag" --ranker hybrid --words-gallery G2 --html sheet.html
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``search``."""
    command.epilog = _EPILOG
    command.add_argument("text", nargs="*", metavar="TEXT", help="what to look for, in words")
    command.add_argument("--gallery", required=True, metavar="G", help="folder or address of the gallery")
    command.add_argument("--image", type=Path, metavar="FILE", help="look for images like this file")
    command.add_argument("--like", metavar="ID", help="look for images like this one of the gallery")
    command.add_argument("--where", default="", metavar="FILTER", help="only images that fit, such as colour = 'blue'")
    command.add_argument("--top-k", type=int, default=10, metavar="K", help="how many (default: 10)")
    command.add_argument(
        "--ranker",
        choices=("clip", "tfidf", "hybrid"),
        help="clip: vectors; tfidf: words; hybrid: both, fused (default: clip where the model can encode the query)",
    )
    command.add_argument(
        "--find", choices=("images", "captions"), default="images", help="what to find (default: images)"
    )
    command.add_argument(
        "--words",
        choices=("predicted", "label", "caption"),
        default="predicted",
        help="what tfidf searches in: what the model says, true labels, or captions (default: predicted)",
    )
    command.add_argument("--words-gallery", metavar="G2", help="gallery of the same images to take the words from")
    command.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="FIELD=W",
        help="how much the words of a field count (default: class=2, others 1); repeatable",
    )
    model = command.add_mutually_exclusive_group()
    model.add_argument("--run", type=Path, metavar="RUN", help="run that made the gallery, if it was moved")
    model.add_argument("--checkpoint", type=Path, metavar="FILE", help="checkpoint that made the gallery")
    command.add_argument("--device", default="cpu", help="to compute on, such as cuda (default: cpu)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument(
        "--data-root",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="folder whose images --html may show besides those of the gallery and its data; repeatable",
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="also write a contact sheet, one page with images")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Search as the command line says, and show what was found.

    Raises:
        UserError: for every mistake in what was asked.
    """
    if rest:
        raise UserError(f"search: unknown argument {rest[0]!r}; put the text in quotes")
    answer = _answer(options)
    if options.html is not None:
        _write_sheet(options.html, answer, options)
    _show(answer, options)


def _answer(options: argparse.Namespace) -> Answer:
    from retrieval.commands.output import Answer
    from retrieval.gallery import Gallery
    from retrieval.search.searcher import Query, Searcher
    from vitrail.runtime import check_device

    # Before anything is opened: the cheapest mistakes are told first.
    text = " ".join(options.text) if options.text else None
    query = Query(text=text, image=options.image, like=options.like)
    weights = _weights(options.weight)
    if options.find == "captions" and options.ranker not in {None, "clip"}:
        raise UserError(f"--ranker {options.ranker}: does not go with --find captions, which compares vectors")
    gallery = Gallery.open(options.gallery, check_device(options.device))
    if query.like is not None:
        query = Query(like=gallery.id_of(query.like))
    searcher = Searcher(
        gallery,
        lambda: _encoder(gallery, options),
        words=options.words,
        words_gallery=Gallery.open(options.words_gallery) if options.words_gallery else None,
        weights=weights,
    )
    ranker, found, notes = _found(searcher, query, options)
    return Answer(
        query=query,
        gallery=gallery.uri,
        identity=gallery.identity,
        ranker=ranker,
        find=options.find,
        where=options.where,
        found=found,
        notes=notes,
        example=_example(gallery, query),
    )


def _found(searcher: Searcher, query: Query, options: argparse.Namespace) -> tuple[str, list[Found], list[str]]:
    """The ranker that was used, what it found, and notes."""
    from retrieval.commands.output import look_up

    if options.find == "captions":
        captions = searcher.search_captions(query, options.top_k, options.where)
        images, scores = [hit.image for hit in captions.hits], [hit.score for hit in captions.hits]
        texts = [hit.caption for hit in captions.hits]
        return "clip", look_up(searcher.gallery, images, scores, texts), captions.notes
    result = searcher.search(query, options.top_k, options.ranker, options.where)
    ids, scores = [hit.id for hit in result.hits], [hit.score for hit in result.hits]
    return result.ranker, look_up(searcher.gallery, ids, scores), result.notes


def _example(gallery: Gallery, query: Query) -> Found | None:
    """The image that is asked with."""
    from retrieval.commands.output import Found, look_up

    if query.like is not None:
        return look_up(gallery, [query.like], [1.0])[0]
    return None if query.image is None else Found(str(query.image), 1.0, str(query.image), "", {}, {}, None)


def _encoder(gallery: Gallery, options: argparse.Namespace) -> Encoder:
    # Lightning takes seconds to import, and --like and tfidf do without.
    from retrieval.search.encoder import load_encoder

    return load_encoder(gallery, options.run, options.checkpoint, options.device)


def _weights(given: Sequence[str]) -> dict[str, float]:
    weights = {}
    for text in given:
        field, equals, number = text.rpartition("=")
        try:
            weights[field] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise UserError(f"--weight {text}: give a field and a number, such as class=3")
    return weights


def _show(answer: Answer, options: argparse.Namespace) -> None:
    from retrieval.commands.output import as_json, result_table

    if options.json:
        sys.stdout.write(f"{as_json(answer)}\n")
        return
    from rich.console import Console

    # Wide enough for whole ids where there is no terminal to fit (a pipe, a log).
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)
    if answer.found:
        console.print(result_table(answer))
    else:
        console.print(f"no match for {answer.asked}", markup=False, highlight=False)
    for note in answer.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    if options.html is not None:
        console.print(f"contact sheet: {options.html}", markup=False, highlight=False)


def _write_sheet(path: Path, answer: Answer, options: argparse.Namespace) -> None:
    from retrieval.commands.output import contact_sheet
    from retrieval.image_files import ImageFiles
    from vitrail.files import write_text_atomically

    files = ImageFiles(options.gallery, options.run or answer.identity.run, options.data_root)
    value_range: ValueRange = answer.identity.input_options.get("value_range", "auto")
    refused: list[str] = []

    def shown(found: Found) -> bytes | None:
        return _image(found, files, refused, value_range)

    example = None
    if answer.example is not None:
        # The file that the user has named is the user's own.
        own = answer.query.image is not None
        example = _small(Path(answer.example.path), value_range) if own else shown(answer.example)
    images = [shown(found) for found in answer.found]
    if refused:
        others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        answer.notes.append(f"{refused[0]}{others}")
    page = contact_sheet(answer, images, example)
    try:
        write_text_atomically(path, page)
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror}); name another file") from error


def _image(found: Found, files: ImageFiles, refused: list[str], value_range: ValueRange) -> bytes | None:
    """What is shown of an image: its file, or what the gallery kept of it.

    Args:
        found: the image.
        files: that may be shown.
        refused: gets a line for a file that may not.
        value_range: of deep images.
    """
    from retrieval.image_files import OutsideError

    if not found.path:
        return found.thumbnail
    try:
        return _small(files.file(found.path), value_range) or found.thumbnail
    except OutsideError as error:
        refused.append(str(error))
    except UserError:
        pass
    return found.thumbnail


def _small(path: Path, value_range: ValueRange) -> bytes | None:
    """A file as a small JPEG; None where it cannot be read."""
    from datamodules.loading.decode import ImageError, read_image
    from retrieval.commands.output import small_jpeg

    try:
        return small_jpeg(read_image(path, value_range=value_range).permute(1, 2, 0).numpy())
    except ImageError:
        return None
