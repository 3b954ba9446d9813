"""The web application under load: first prediction, search in a large gallery, and eight users at once.

    python -m benchmarks.app_load [--repeats 3] [--pictures 100000] [--users 8]

The classifier is a DeiT-Tiny at 224 px, the dual encoder the quickstart's; both have trained for a moment only, since
their answers do not matter here. The gallery holds random vectors of the dual encoder's length with texts and classes.
The server is a process of its own; users press buttons, upload a photo, and fetch the thumbnails of an answer, without
a pause. A user whose request fails fails the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.app_data import CLASSIFIER, DEIT_TINY, LARGE, PAIRS, WORDS, a_photo, make_gallery, make_runs
from benchmarks.app_users import User
from benchmarks.interleaved import Row, in_new_process, row, say

PICTURES, USERS, TURNS = 100_000, 8, 5
PREDICTION, SEARCH, LOOK = "classify an upload", "search by a text", "a thumbnail"
FIRST_LIMIT, SEARCH_LIMIT = "one second", "100 ms"


def first_prediction(folder: Path) -> dict[str, float]:
    """Seconds of the first prediction after the model is loaded, upload and decoding included, and of the next one."""
    from app.logic.uploads import read_picture
    from app.state.runs import ServedRun

    path = folder / "photo.jpg"
    run = ServedRun(folder / CLASSIFIER, device="cpu")
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        (answer,) = run.predict([read_picture(path)])
        seconds.append(time.perf_counter() - begin)
        assert len(answer.tasks) == 4
    return {"first": seconds[0], "next": seconds[1]}


def search_times(folder: Path) -> dict[str, float]:
    """Median seconds of a search in the large gallery on the server, by ranker, and with a filter."""
    from app.logic.search import Request, Searching
    from app.state.context import AppContext
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedRun
    from retrieval.search.searcher import Query

    run = ServedRun(folder / PAIRS, PAIRS, "cpu")
    gallery = ServedGallery(folder / LARGE, LARGE, run)
    searching = Searching(AppContext({PAIRS: run}, {LARGE: gallery}))
    kinds = gallery.choices["class"]
    asked = {
        "by vectors": {"ranker": "clip"},
        "by words": {"ranker": "tfidf"},
        "by both": {"ranker": "hybrid"},
        "by vectors, filtered": {"ranker": "clip", "filters": {"class": kinds[:1]}},
    }
    found: dict[str, float] = {}
    for name, options in asked.items():
        seconds = []
        for text in [f"a red metal {kind}" for kind in kinds[:5]]:
            begin = time.perf_counter()
            page = searching.search(Request(LARGE, Query(text=text), **options))  # type: ignore[arg-type]
            seconds.append(time.perf_counter() - begin)
            assert page.results
        found[name] = median(seconds)
    return found


@contextmanager
def a_server(folder: Path) -> Iterator[str]:
    """The application in a process of its own; its address."""
    command = [sys.executable, "-m", "benchmarks.app_load", "--serve", str(folder)]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError(f"the server did not start:\n{(folder / 'server.log').read_text()[-2000:]}")
            yield url
        finally:
            process.terminate()
            process.wait(30)


def serve(folder: Path) -> None:
    """Prints the address once everything is loaded, and serves until the process is ended."""
    import socket

    import uvicorn

    from app.server import build_app, server_config
    from app.state.context import AppContext
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedRun

    runs = {name: ServedRun(folder / name, name, "cpu") for name in (CLASSIFIER, PAIRS)}
    context = AppContext(runs, {LARGE: ServedGallery(folder / LARGE, LARGE, runs[PAIRS])})
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = server_config(build_app(context), context)
        sys.stdout.write(f"http://127.0.0.1:{listening.getsockname()[1]}\n")
        sys.stdout.flush()
        uvicorn.Server(config).run(sockets=[listening])


def load_times(url: str, users: int, turns: int) -> dict[str, list[float]]:
    """Seconds of every request of all users, by kind.

    Raises:
        RuntimeError: if any of them failed.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    wrong: list[str] = []
    photo = a_photo()

    def timed(kind: str, action: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        action()
        seconds[kind].append(time.perf_counter() - begin)

    def use(number: int) -> None:
        try:
            with User(url) as user:
                for turn in range(turns):
                    text = f"{WORDS[(number + turn) % len(WORDS)]} mug"
                    timed(PREDICTION, lambda: user.press("classify-ask", {"Pictures": user.upload("a.jpg", photo)}))
                    timed(SEARCH, lambda text=text: user.press("search-ask", {"Look for": text}))  # type: ignore[misc]
                    for place in range(8):
                        address = f"/pictures?gallery={LARGE}&id={(8 * turn + place) % 100}&side=256"
                        timed(LOOK, lambda address=address: user.look(address))  # type: ignore[misc]
        except Exception as error:  # whatever it is, it is what the benchmark looks for
            wrong.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=use, args=(number,)) for number in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {users} users met an error: {wrong[0]}")
    return dict(seconds)


def measure(pictures: int, users: int, repeats: int, turns: int = TURNS, backbone: str = "") -> list[Row]:
    """All rows; what takes a while is said.

    Args:
        pictures: of the gallery.
        users: at once.
        repeats: of every measurement.
        turns: of every user.
        backbone: of the classifier; DeiT-Tiny by default.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_runs(folder, backbone or DEIT_TINY)
        make_gallery(folder, pictures)
        (folder / "photo.jpg").write_bytes(a_photo())
        firsts = [in_new_process("benchmarks.app_load", ["--first", name]) for _ in range(repeats)]
        searches = [in_new_process("benchmarks.app_load", ["--search", name]) for _ in range(repeats)]
        rounds = []
        with a_server(folder) as url:
            load_times(url, 1, 1)  # what is imported by the first request of its kind
            alone = load_times(url, 1, turns)
            rounds = [load_times(url, users, turns) for _ in range(repeats)]
    values = {"first": [one["first"] for one in firsts], FIRST_LIMIT: [1.0] * repeats}
    note = f"the next one {median(one['next'] for one in firsts):.3f} s"
    rows = [row("application, prediction by DeiT-Tiny after load", "first", FIRST_LIMIT, values, "s", "< 1", note)]
    for kind in searches[0]:
        values = {kind: [one[kind] for one in searches], SEARCH_LIMIT: [0.1] * repeats}
        rows.append(row(f"application, search in {pictures:,}", kind, SEARCH_LIMIT, values, "s of the server", "< 1"))
    for kind in (PREDICTION, SEARCH, LOOK):
        values = {f"{users} users": [median(one[kind]) for one in rounds], "one user": [median(alone[kind])] * repeats}
        slow = median(quantiles(one[kind], n=20)[-1] for one in rounds)
        note = f"p95 {slow:.3f} s; {sum(len(one[kind]) for one in rounds)} requests, no error"
        rows.append(row(f"application, {kind}", f"{users} users", "one user", values, "s, median", "", note))
    return rows


def run(repeats: int) -> list[Row]:
    """First prediction, searches, and users at once."""
    return measure(PICTURES, USERS, repeats)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows; the other options are for processes that this one starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--users", type=int, default=USERS)
    for name in ("first", "search", "serve"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if options.first or options.search:
        found = first_prediction(options.first) if options.first else search_times(options.search)
        sys.stdout.write(f"{json.dumps(found)}\n")
    elif options.serve:
        serve(options.serve)
    else:
        say(measure(options.pictures, options.users, options.repeats))


if __name__ == "__main__":
    main()
