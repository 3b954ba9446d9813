"""``python -m app`` and ``vitrail app``: what is served, to whom."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from vitrail.errors import UserError

_PORTS = range(2**16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Load what is to be served, and serve it until Ctrl-C."""
    _check(options)
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


def _check(options: argparse.Namespace) -> None:
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
