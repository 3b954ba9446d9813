"""``python -m retrieval search``: find images or captions, as a table, JSON or a contact sheet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vitrail.errors import UserError

if TYPE_CHECKING:
    from datamodules.loading.decode import ValueRange
    from retrieval.commands.output import Found, SearchOutput
    from retrieval.gallery import Gallery
    from retrieval.image_files import ImageFiles
    from retrieval.search.searcher import Query, Ranker

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
    command.add_argument("text", nargs="*", metavar="TEXT", help="what to look for")
    command.add_argument("--gallery", required=True, metavar="G", help="folder or address of the gallery")
    command.add_argument("--image", type=Path, metavar="FILE", help="look for images like this file")
    command.add_argument("--like", metavar="ID", help="look for images like this one of the gallery")
    command.add_argument("--where", default="", metavar="FILTER", help="only images that fit, such as colour = 'blue'")
    command.add_argument("--top-k", type=int, default=10, metavar="K", help="how many (default: 10)")
    command.add_argument(
        "--ranker",
        metavar="{vector,text,hybrid}",
        help="vector: cosine of vectors; text: TF-IDF over text fields; hybrid: both, fused (default: vector where the "
        "model can encode the query)",
    )
    command.add_argument(
        "--find", choices=("images", "captions"), default="images", help="what to find (default: images)"
    )
    command.add_argument(
        "--words",
        choices=("all", "predicted", "label", "caption"),
        default="all",
        help="text fields: predicted labels, true labels, all (both), or captions (default: all)",
    )
    command.add_argument(
        "--words-gallery", metavar="G2", help="gallery of the same images to take the text fields from"
    )
    command.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="FIELD=W",
        help="weight of a text field (default: class=2, others 1); repeatable",
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
        help="folder whose images --html may show in addition to those of the gallery and its data; repeatable",
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="also write a contact sheet, one page with images")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Search, and show what was found."""
    if rest:
        raise UserError(f"search: unknown argument {rest[0]!r}; put the text in quotes")
    output = _search(options)
    if options.html is not None:
        _write_sheet(options.html, output, options)
    _show(output, options)


def _search(options: argparse.Namespace) -> SearchOutput:
    from retrieval.commands.output import SearchOutput, look_up
    from retrieval.gallery import Gallery
    from retrieval.search.searcher import Query, Searcher, current_ranker, load_encoder
    from vitrail.runtime import check_device

    # What needs no gallery is checked first.
    text = " ".join(options.text) if options.text else None
    query = Query(text=text, image=options.image, like=options.like)
    weights = _weights(options.weight)
    ranker = current_ranker(options.ranker) if options.ranker else None
    if options.find == "captions" and ranker not in {None, "vector"}:
        raise UserError(f"--ranker {ranker}: does not go with --find captions, which compares vectors")
    gallery = Gallery.open(options.gallery, check_device(options.device))
    if query.like is not None:
        query = Query(like=gallery.id_of(query.like))
    searcher = Searcher(
        gallery,
        lambda: load_encoder(gallery, options.run, options.checkpoint, options.device),
        text_source=options.words,
        text_gallery=Gallery.open(options.words_gallery) if options.words_gallery else None,
        weights=weights,
    )
    if options.find == "captions":
        captions = searcher.search_captions(query, options.top_k, options.where)
        ranker, notes = "vector", captions.notes
        ids, scores = [hit.image for hit in captions.hits], [hit.score for hit in captions.hits]
        found = look_up(gallery, ids, scores, [hit.caption for hit in captions.hits])
    else:
        result = searcher.search(query, options.top_k, cast("Ranker | None", ranker), options.where)
        ranker, notes = result.ranker, result.notes
        found = look_up(gallery, [hit.id for hit in result.hits], [hit.score for hit in result.hits])
    example = _example(gallery, query)
    return SearchOutput(
        query, gallery.uri, gallery.identity, ranker, options.find, options.where, found, notes, example
    )


def _example(gallery: Gallery, query: Query) -> Found | None:
    """The image of the query."""
    from retrieval.commands.output import Found, look_up

    if query.like is not None:
        return look_up(gallery, [query.like], [1.0])[0]
    return None if query.image is None else Found(str(query.image), 1.0, str(query.image), "", {}, {}, None)


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


def _show(output: SearchOutput, options: argparse.Namespace) -> None:
    from retrieval.commands.output import as_json, result_table

    if options.json:
        sys.stdout.write(f"{as_json(output)}\n")
        return
    from rich.console import Console

    # Wide enough for whole ids where there is no terminal to fit (a pipe, a log).
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)
    if output.found:
        console.print(result_table(output))
    else:
        console.print(f"no match for {output.title}", markup=False, highlight=False)
    for note in output.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    if options.html is not None:
        console.print(f"contact sheet: {options.html}", markup=False, highlight=False)


def _write_sheet(path: Path, output: SearchOutput, options: argparse.Namespace) -> None:
    from retrieval.commands.output import contact_sheet
    from retrieval.image_files import ImageFiles
    from vitrail.files import write_text_atomically

    files = ImageFiles(options.gallery, options.run or output.identity.run, options.data_root)
    value_range: ValueRange = output.identity.input_options.get("value_range", "auto")
    refused: list[str] = []

    def shown(found: Found) -> bytes | None:
        return _image(found, files, refused, value_range)

    example = None
    if output.example is not None:
        # A file that the user has named may be shown.
        own = output.query.image is not None
        example = _small(Path(output.example.path), value_range) if own else shown(output.example)
    images = [shown(found) for found in output.found]
    if refused:
        others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        output.notes.append(f"{refused[0]}{others}")
    page = contact_sheet(output, images, example)
    try:
        write_text_atomically(path, page)
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror}); name another file") from error


def _image(found: Found, files: ImageFiles, refused: list[str], value_range: ValueRange) -> bytes | None:
    """A JPEG of an image's file, or else its thumbnail; a file that may not be shown adds a line to ``refused``."""
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
