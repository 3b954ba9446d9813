"""``vitrail serve RUN``: what is served, to whom, and within which limits."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.command import add_serving_arguments, listening_socket
from vitrail.errors import UserError
from vitrail.runs import Run

if TYPE_CHECKING:
    from app.api.guard import Settings
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedModel

TOKEN = "VITRAIL_SERVE_TOKEN"
_SHORTEST_TOKEN = 16
_EPILOG = """\
examples:
  vitrail serve RUN
  curl -F images=@photo.jpg http://127.0.0.1:8000/v1/classify
  vitrail serve RUN --engine onnx                    # RUN/export/onnx, without PyTorch
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``serve``."""
    parser.description = "Serve a model as an HTTP API: classify, embed, zero-shot, search. /docs describes it."
    parser.epilog = _EPILOG
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, or the folder of an export")
    parser.add_argument("--gallery", default="", metavar="G", help="folder or address (default: RUN/gallery, if any)")
    parser.add_argument(
        "--engine",
        choices=("auto", "torch", "onnx"),
        default="auto",
        help="onnx needs no PyTorch (default: torch, for an ONNX export onnx)",
    )
    parser.add_argument("--device", default="", help="of PyTorch, such as cpu or cuda:1 (default: a GPU if any)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the processor (default: all cores)")
    add_serving_arguments(parser, port=8000)
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help=f"token that requests must have (default: ${TOKEN}, if set)"
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="HOST", help="name that a reverse proxy passes; repeatable"
    )
    parser.add_argument("--max-bytes", type=int, default=20 * 2**20, metavar="N", help="of a request (default: 20 MiB)")
    parser.add_argument("--max-images", type=int, default=16, metavar="N", help="of a request (default: 16)")
    parser.add_argument(
        "--rate", type=float, default=100.0, metavar="N", help="requests a second of one address; 0: any (default: 100)"
    )
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="requests that wait or run (default: 64)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images a batch at most (default: 16)")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Load the model, and serve it until Ctrl-C or SIGTERM."""
    settings = _settings(options)
    # Before anything is loaded: a taken port is reported at once.
    with listening_socket(options.host, options.port) as listening:
        model = load_model(options.run, options.engine, options.device, options.threads)
        gallery = load_gallery(model, options.run, options.gallery, options.data_root)
        from app.api.server import build_app, serve

        for note in model.notes:
            sys.stderr.write(f"{model.name}: {note}\n")
        app = build_app(model, gallery, settings)
        shown = f"[{options.host}]" if ":" in options.host else options.host
        sys.stdout.write(f"Vitrail: http://{shown}:{listening.getsockname()[1]}/docs (Ctrl-C ends it)\n")
        sys.stdout.flush()
        serve(app, listening, settings)


def load_model(path: Path, engine: str = "auto", device: str = "", threads: int = 0) -> ServedModel:
    """Load a run or an export with one of the engines.

    Args:
        path: run directory or folder of an export.
        engine: ``torch``, ``onnx``, or ``auto``: onnx for an ONNX export.
        device: of PyTorch; a GPU by default where there is one.
        threads: of the processor; 0 for all cores.

    Raises:
        UserError: there is no such model.
    """
    from app.state.exports import ONNX_FILES, ServedExport

    def is_onnx(folder: Path) -> bool:
        return any((folder / name).is_file() for name in ONNX_FILES)

    if engine == "onnx" or (engine == "auto" and is_onnx(path)):
        folder = path if is_onnx(path) else path / Run.EXPORTS / "onnx"
        if not is_onnx(folder):
            raise UserError(f"--engine onnx: {path} has no ONNX export; make it: vitrail export {path} --format onnx")
        return ServedExport(folder, threads=threads)
    if threads:
        import torch

        torch.set_num_threads(threads)
    from app.state.context import display_name
    from app.state.runs import ServedRun

    return ServedRun(path, display_name(path.resolve().parts, []), device)


def load_gallery(model: ServedModel, path: Path, address: str, data_roots: Sequence[Path]) -> ServedGallery | None:
    """Open a gallery of the model's vectors: the given one, else that of the run; None where it has none.

    Raises:
        UserError: the gallery is another model's.
    """
    if not address and not (path / Run.GALLERY).is_dir():
        return None
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedRun

    address = address or str(path / Run.GALLERY)
    gallery = ServedGallery(address, "gallery", model if isinstance(model, ServedRun) else None, data_roots)
    if gallery.identity.weights != model.weights:
        raise UserError(
            f"--gallery {address}: was made by {gallery.identity.run or 'another model'}, whose vectors do not compare "
            f"with those of {model.name}; index with this model: vitrail index --run {path}"
        )
    return gallery


def _settings(options: argparse.Namespace) -> Settings:
    """Refuse what cannot work or is not safe, before anything is loaded."""
    for name in ("max_bytes", "max_pixels", "max_images", "queue", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1; got {getattr(options, name)}")
    if options.rate < 0 or options.threads < 0:
        raise UserError("--rate, --threads: must be at least 0")
    from app.api.guard import Settings
    from app.security import allowed_host, is_loopback
    from app.state.limits import Limits

    token = _token(options.token_file)
    if not token and not is_loopback(options.host):
        raise UserError(
            f"--host {options.host}: anyone who reaches this machine could use the API; give a token (--token-file "
            f"FILE or ${TOKEN}), or serve this machine only (--host 127.0.0.1)"
        )
    limits = Limits(
        upload_bytes=options.max_bytes,
        upload_pixels=options.max_pixels,
        images=options.max_images,
        # A little more than the files: the form around them.
        request_bytes=options.max_bytes + 2**16,
    )
    names = [allowed_host(name) for name in options.allow_host]
    return Settings(options.host, token, names, options.rate, options.queue, options.batch_size, limits)


def _token(file: Path | None) -> str:
    try:
        token = os.environ.get(TOKEN, "") if file is None else file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {file}: cannot be read ({error})") from error
    if (token or file is not None) and not (len(token) >= _SHORTEST_TOKEN and token.isascii() and token.isprintable()):
        raise UserError(
            f"{f'--token-file {file}' if file is not None else f'${TOKEN}'}: a token must have {_SHORTEST_TOKEN} or "
            "more printable ASCII characters; make one: openssl rand -hex 32"
        )
    return token
