"""The commands ``app`` (also ``python -m app``) and ``serve``: what is served, to whom, and within which limits."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.errors import UserError

if TYPE_CHECKING:
    from app.api.guard import Settings
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedModel


_PORTS = range(2**16)


def add_app_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``app``."""
    parser.description = "Classify, zero-shot, search and explore in the browser, over trained runs and galleries."
    parser.epilog = (
        "A run without a gallery is indexed at the first start. Links: http://127.0.0.1:7860/?tab=search&q=blue+mug"
    )
    parser.add_argument(
        "--run", action="append", default=[], type=Path, metavar="RUN", help="run directory; repeatable"
    )
    parser.add_argument(
        "--gallery", action="append", default=[], metavar="G", help="folder or address of a gallery; repeatable"
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help="a classifier and a dual encoder on generated images, trained where they are missing",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where --demo looks (default: runs)"
    )
    add_serving_arguments(parser, port=7860)
    parser.add_argument(
        "--allow-remote", action="store_true", help="let other machines use it; there is no login and no encryption"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="HOST",
        help="name that people reach it by through a reverse proxy, such as app.example.org; repeatable",
    )
    parser.add_argument(
        "--root-path",
        default="",
        metavar="/PREFIX",
        help="path below which a reverse proxy serves it, such as /vitrail",
    )


def add_serving_arguments(parser: argparse.ArgumentParser, *, port: int) -> None:
    """Add what the application and the HTTP API have in common: where to listen, and which images."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=port, help=f"default: {port}")
    parser.add_argument(
        "--data-root",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="folder whose images may be shown in addition to those of the galleries and their data; repeatable",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=50_000_000,
        metavar="N",
        help="larger uploads are refused before they are decoded (default: 50000000)",
    )


def run_app(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Load what is to be served, and serve it until Ctrl-C."""
    _check_app(options)
    from app.security import allowed_host, root_path
    from app.state.startup import load

    allowed, prefix = [allowed_host(name) for name in options.allow_host], root_path(options.root_path)
    if allowed:
        sys.stderr.write(
            f"warning: serving as {', '.join(allowed)}: there is no login; anyone whom the proxy lets through sees all "
            "images of the galleries\n"
        )

    # Before anything is loaded or trained, which takes minutes.
    with listening_socket(options.host, options.port) as listening:
        context = load(options.run, options.gallery, demo=options.demo, root=options.runs, data_roots=options.data_root)
        limits = dataclasses.replace(context.limits, upload_pixels=options.max_pixels)
        context = dataclasses.replace(context, limits=limits)
        from app.server import serve

        shown = f"[{options.host}]" if ":" in options.host else options.host
        sys.stdout.write(f"Vitrail: http://{shown}:{listening.getsockname()[1]} (Ctrl-C ends it)\n")
        sys.stdout.flush()
        serve(context, listening, options.host, allowed=allowed, prefix=prefix)


def listening_socket(host: str, port: int) -> socket.socket:
    """Bind a socket; port 0 takes a free one.

    Raises:
        UserError: the port is taken.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host.removeprefix("[").removesuffix("]"), port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(f"--host {host} --port {port}: cannot be used ({error}); choose others") from error
    return listening


def _check_app(options: argparse.Namespace) -> None:
    """Refuse what cannot work or is not safe, before anything is loaded."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the web application needs more packages; install them: pip install -e '.[app]'")
    if not (options.run or options.gallery or options.demo):
        raise UserError("nothing to serve; name what: --run RUN, --gallery G, or --demo for models that it trains")
    if options.max_pixels < 1:
        raise UserError(f"--max-pixels: must be at least 1; got {options.max_pixels}")
    if options.port not in _PORTS:
        raise UserError(f"--port {options.port}: must be 0 to {_PORTS[-1]}")
    from app.security import is_loopback

    if not is_loopback(options.host):
        if not options.allow_remote:
            raise UserError(
                f"--host {options.host}: others in the network could use it, there is no login; serve this machine "
                "only (--host 127.0.0.1, with an SSH tunnel from elsewhere), or add --allow-remote"
            )
        sys.stderr.write(
            f"warning: listening on {options.host}: anyone who can reach this machine sees all images of the "
            "galleries and may upload their own; there is no login and no encryption\n"
        )


TOKEN = "VITRAIL_SERVE_TOKEN"
_SHORTEST_TOKEN = 16
_EPILOG = """\
examples:
  vitrail serve RUN
  curl -F images=@photo.jpg http://127.0.0.1:8000/v1/classify
  vitrail serve RUN --engine onnx                    # RUN/export/onnx, without PyTorch
"""


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
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


def run_serve(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
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
    from vitrail.runs import Run

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
    from vitrail.runs import Run

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
    from app.state.context import Limits

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
