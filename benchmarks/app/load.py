"""The web application under load: first prediction, search in a large gallery, and eight users at once.

The classifier is a DeiT-Tiny at 224 px, the dual encoder the quickstart's; both have trained for a moment only, since
their predictions do not matter here. The gallery holds random vectors of the dual encoder's length with texts and
classes. The server is a process of its own; users press buttons, upload a photo, and fetch thumbnails, without a pause.
A user whose request fails fails the benchmark.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from types import TracebackType
from typing import Any

import httpx
import numpy as np

from benchmarks.harness.interleaved import Row, row
from benchmarks.harness.processes import in_new_process
from benchmarks.retrieval.search import random_directions

State = dict[str, Any]


class User:
    """One open page without a browser."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=120)
        self._session = uuid.uuid4().hex
        page: State = self._client.get("/config").raise_for_status().json()
        self._parts: dict[int, State] = {part["id"]: part for part in page["components"]}
        self._functions: list[State] = page["dependencies"]

    def __enter__(self) -> User:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def press(self, button: str, values: Mapping[str, Any]) -> list[Any]:
        """Press a button and wait for the response.

        Args:
            button: its ``elem_id``.
            values: by the label of a component what it holds; the others hold what they begin with.

        Returns:
            New values of the components.

        Raises:
            RuntimeError: if the response is an error, or there is no such button.
        """
        function = next((one for one in self._functions if self._is_pressed(one, button)), None)
        if function is None:
            raise RuntimeError(f"{button}: the page has no such button")
        data = [self._value(number, values) for number in function["inputs"]]
        asked = {"fn_index": function["id"], "data": data, "session_hash": self._session}
        self._client.post("/gradio_api/queue/join", json=asked).raise_for_status()
        response = self._response()
        if not response["success"]:
            raise RuntimeError(f"{button}: {response['output']}")
        found: list[Any] = response["output"]["data"]
        return found

    def upload(self, name: str, content: bytes) -> list[State]:
        """Upload an image; return the value of a component for images."""
        response = self._client.post("/gradio_api/upload", files={"files": (name, content)}).raise_for_status()
        file = {"path": response.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        return [{"image": file, "caption": None}]

    def look(self, address: str) -> int:
        """Fetch an image; return its length in bytes."""
        return len(self._client.get(address).raise_for_status().content)

    def _response(self) -> State:
        with self._client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self._session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    return dict(message)
        raise RuntimeError("the server ended the response early")

    def _is_pressed(self, function: State, button: str) -> bool:
        return any(
            event == "click" and self._parts[number]["props"].get("elem_id") == button and function["backend_fn"]
            for number, event in function["targets"]
            if number is not None
        )

    def _value(self, number: int, values: Mapping[str, Any]) -> Any:
        properties = self._parts[number]["props"]
        label = str(properties.get("label") or "")
        return next((value for key, value in values.items() if label.startswith(key)), properties.get("value"))


CLASSIFIER, PAIRS, LARGE = "classifier", "pairs", "large"
"""Folders of the runs and of the gallery, and their names in the application."""

DEIT_TINY = "deit_tiny_patch16_224"

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
_SHORT: dict[str, Any] = {
    "test_best": False,
    "trainer": {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "enable_progress_bar": False},
    "wandb": {"mode": "disabled"},
}
_DEIT: dict[str, Any] = {
    "data": {"init_args": {"n_samples": 120, "image": {"size": 224}, "loader": {"batch_size": 4}}},
}
WORDS = ("red", "blue", "green", "metal", "glass", "plastic", "new", "used", "worn")
_CHUNK = 20_000


def make_runs(folder: Path, backbone: str = DEIT_TINY, *, pairs: bool = True) -> None:
    """Run directories ``classifier`` and, if asked, ``pairs`` with a checkpoint each."""
    deit = {**_DEIT, "model": {"init_args": {"backbone": backbone}}}
    few = {"data": {"init_args": {"n_samples": 240}}}
    made = [(CLASSIFIER, "quickstart", deit), *([(PAIRS, "quickstart_pairs", few)] if pairs else [])]
    for name, experiment, overlay in made:
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**_SHORT, **overlay}), encoding="utf-8")
        configs = ["--config", str(EXPERIMENTS / f"{experiment}.yaml"), "--config", str(path)]
        command = ["experiments", "fit", *configs, "--runs", str(folder / "runs"), "--name", name]
        done = subprocess.run([sys.executable, "-m", *command], check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        (run,) = (folder / "runs" / name).glob("*")
        run.rename(folder / name)


def make_gallery(folder: Path, images: int) -> None:
    """A gallery of the dual encoder, of random vectors with words and classes; its first images can be looked at."""
    import pyarrow as pa

    from lightning_modules.checkpoint import load_task
    from retrieval.gallery import Gallery
    from retrieval.schema import identity_of, image_schema

    task = load_task(folder / PAIRS / "checkpoints" / "best.ckpt")
    identity = identity_of(task, str(folder / PAIRS), getattr(task, "input_options"), [])  # noqa: B009 -- of no base
    schema = image_schema(identity)
    random = np.random.default_rng(0)
    photo = a_photo()
    with Gallery.create(str(folder / LARGE), identity).writing() as writer:
        for start in range(0, images, _CHUNK):
            rows = min(_CHUNK, images - start)
            columns: dict[str, Any] = {field.name: pa.nulls(rows, field.type) for field in schema}
            columns |= {
                name: pa.array([""] * rows) for name in ("path", "caption", "group", "content", "run", "weights")
            }
            columns["id"] = pa.array([str(number) for number in range(start, start + rows)])
            columns["split"] = pa.array(["test"] * rows)
            columns["thumbnail"] = pa.array(
                [photo if start + place < 100 else None for place in range(rows)], pa.binary()
            )
            columns["vector"] = pa.FixedSizeListArray.from_arrays(
                pa.array(random_directions(random, rows, identity.dim).ravel()), identity.dim
            )
            predicted = {name: random.choice(classes, rows) for name, classes in identity.predicts.items()}
            words = random.choice(WORDS, (rows, 3))
            texts = [" ".join(row) for row in np.column_stack([*predicted.values(), words]).tolist()]
            columns["text"] = columns["caption"] = pa.array(texts)
            for name, classes in predicted.items():
                columns[f"predicted_{name}"] = pa.array(classes.tolist())
                columns[f"confidence_{name}"] = pa.array(random.random(rows), schema.field(f"confidence_{name}").type)
            writer.add(pa.table([columns[name] for name in schema.names], schema=schema))


def a_photo(size: int = 1024) -> bytes:
    """JPEG of smooth noise, as large as an uploaded photo."""
    from PIL import Image

    pixels = np.random.default_rng(1).integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return content.getvalue()


PREDICTION, SEARCH, LOOK = "classify an upload", "search by a text", "a thumbnail"
FIRST_LIMIT, SEARCH_LIMIT = "one second", "100 ms"


def first_prediction(folder: str) -> dict[str, float]:
    """Seconds of the first prediction after the model is loaded, upload and decoding included, and of the next one."""
    from app.logic.uploads import read_upload
    from app.state.runs import ServedRun

    run = ServedRun(Path(folder) / CLASSIFIER, device="cpu")
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        (answer,) = run.predict([read_upload(Path(folder) / "photo.jpg")])
        seconds.append(time.perf_counter() - begin)
        assert len(answer.tasks) == 4
    return {"first": seconds[0], "next": seconds[1]}


def search_times(folder: str) -> dict[str, float]:
    """Median seconds of a search in the large gallery on the server, by ranker, and with a filter."""
    from app.logic.search import Request, Searching
    from app.state.context import AppContext
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedRun
    from retrieval.search.searcher import Query

    run = ServedRun(Path(folder) / PAIRS, PAIRS, "cpu")
    gallery = ServedGallery(Path(folder) / LARGE, LARGE, run)
    searching = Searching(AppContext({PAIRS: run}, {LARGE: gallery}))
    kinds = gallery.choices["class"]
    asked = {
        "by vectors": {"ranker": "vector"},
        "by words": {"ranker": "text"},
        "by both": {"ranker": "hybrid"},
        "by vectors, filtered": {"ranker": "vector", "filters": {"class": kinds[:1]}},
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
    command = [sys.executable, "-c", f"import benchmarks.app.load as load; load.serve({str(folder)!r})"]
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


def serve(folder: str) -> None:
    """Print the address once everything is loaded, and serve until the process is ended."""
    import socket

    import uvicorn

    from app.server import build_app, server_config
    from app.state.context import AppContext
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedRun

    runs = {name: ServedRun(Path(folder) / name, name, "cpu") for name in (CLASSIFIER, PAIRS)}
    context = AppContext(runs, {LARGE: ServedGallery(Path(folder) / LARGE, LARGE, runs[PAIRS])})
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
    errors: list[str] = []
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
                    timed(PREDICTION, lambda: user.press("classify-button", {"Images": user.upload("a.jpg", photo)}))
                    timed(SEARCH, lambda text=text: user.press("search-button", {"Search for": text}))  # type: ignore[misc]
                    for place in range(8):
                        address = f"/images?gallery={LARGE}&id={(8 * turn + place) % 100}&side=256"
                        timed(LOOK, lambda address=address: user.look(address))  # type: ignore[misc]
        except Exception as error:  # whatever it is, it is what the benchmark looks for
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=use, args=(number,)) for number in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(f"{len(errors)} of {users} users met an error: {errors[0]}")
    return dict(seconds)


def run(repeats: int, images: int = 100_000, users: int = 8, turns: int = 5, backbone: str = DEIT_TINY) -> list[Row]:
    """First prediction, searches in a gallery of ``images``, and ``users`` at once, each for some turns."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_runs(folder, backbone)
        make_gallery(folder, images)
        (folder / "photo.jpg").write_bytes(a_photo())
        firsts = [in_new_process(f"{__name__}:first_prediction", name) for _ in range(repeats)]
        searches = [in_new_process(f"{__name__}:search_times", name) for _ in range(repeats)]
        with a_server(folder) as url:
            load_times(url, 1, 1)  # what is imported by the first request of its kind
            alone = load_times(url, 1, turns)
            rounds = [load_times(url, users, turns) for _ in range(repeats)]
    values = {"first": [one["first"] for one in firsts], FIRST_LIMIT: [1.0] * repeats}
    note = f"the next one {median(one['next'] for one in firsts):.3f} s"
    rows = [row("application, prediction by DeiT-Tiny after load", "first", FIRST_LIMIT, values, "s", "< 1", note)]
    for kind in searches[0]:
        values = {kind: [one[kind] for one in searches], SEARCH_LIMIT: [0.1] * repeats}
        rows.append(row(f"application, search in {images:,}", kind, SEARCH_LIMIT, values, "s of the server", "< 1"))
    for kind in (PREDICTION, SEARCH, LOOK):
        values = {f"{users} users": [median(one[kind]) for one in rounds], "one user": [median(alone[kind])] * repeats}
        slow = median(quantiles(one[kind], n=20)[-1] for one in rounds)
        note = f"p95 {slow:.3f} s; {sum(len(one[kind]) for one in rounds)} requests, no error"
        rows.append(row(f"application, {kind}", f"{users} users", "one user", values, "s, median", "", note))
    return rows
