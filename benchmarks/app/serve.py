"""``vitrail serve`` at eight clients, compared with the model alone, and with the same model behind LitServe.

All contenders classify the same JPEG photos with the same DeiT-Tiny at 224 px and as many threads. The model alone is
measured twice: ``Run.predict`` on lists of eight files, which decodes them as a server must, and its network on images
that are decoded already. The servers are processes of their own on this machine, and so are the eight clients, which
send one photo a request as fast as they get their responses: what clients, HTTP and forms cost is on the same cores.
LitServe runs as its guide shows, with one worker, batches of up to eight and its quick loop and parser of HTTP. It is
not among the packages of the tests; its rows are left out where it is missing: ``pip install litserve==0.2.19``.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from benchmarks.app.load import CLASSIFIER, DEIT_TINY, a_photo, make_runs
from benchmarks.harness.interleaved import Row, interleave, pick, row
from benchmarks.harness.processes import children

if find_spec("litserve") is not None:
    from litserve import LitAPI, LitServer
else:
    LitAPI = LitServer = object

BATCH = 8
NETWORK, PREDICT, OURS, PEER = "the network alone", "Run.predict", "vitrail serve", "LitServe"
_PHOTO = "photo.jpg"


class PeerApi(LitAPI):  # type: ignore[misc]  # untyped, and may be missing
    """The same model behind LitServe."""

    def setup(self, _device: str) -> None:
        """Load the model, in the worker's process."""
        from app.state.context import Limits
        from app.state.runs import ServedRun

        self.run = ServedRun(os.environ["SERVED_RUN"], device="cpu")
        self.limits = Limits()

    def decode_request(self, request: Any) -> Any:
        """Return the image as the model takes it."""
        return self.run.read(request["images"].file.read(), _PHOTO, self.limits)

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Images of several requests; the run stacks them itself."""
        return inputs

    def predict(self, batch: list[Any]) -> list[Any]:
        """Return predictions of a batch."""
        return self.run.predict(batch)

    def unbatch(self, output: list[Any]) -> list[Any]:
        """Return predictions of each request."""
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        """Return the response of a request."""
        from app.api.server import ImageResult

        return {"predictions": [ImageResult.of(_PHOTO, output, 5, caption=None).model_dump()]}


# LitServe takes annotations for types of FastAPI's.
PeerApi.decode_request.__annotations__.clear()
PeerApi.encode_response.__annotations__.clear()


def litserve_server(run: str, port: int) -> None:
    """Serve with LitServe until the process is ended."""
    os.environ["SERVED_RUN"] = run
    api = PeerApi(max_batch_size=BATCH, batch_timeout=0.005, api_path="/v1/classify")
    server = LitServer(api, accelerator="cpu", devices=1)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


def processor_seconds(process: int) -> float:
    """Seconds of the processor that a process and those that it started have used."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(processor_seconds(child) for child in children(process))


def load(server: subprocess.Popen[bytes], port: int, photo: Path, count: int, seconds: float) -> dict[str, float]:
    """What ``clients`` measures, and milliseconds of the processor per image that the server used for it."""
    begin = processor_seconds(server.pid)
    found = clients(port, str(photo), count, seconds)
    used = processor_seconds(server.pid) - begin
    return {**found, "cost": 1000 * used / found["images"]}


def clients(url_port: int, photo: str, count: int, seconds: float) -> dict[str, float]:
    """Responses a second of ``count`` clients, each on a connection of its own, and seconds of the slowest twentieth.

    Raises:
        RuntimeError: a request failed.
    """
    boundary = uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{_PHOTO}"\r\n'
    body = (
        f"{head}Content-Type: image/jpeg\r\n\r\n".encode()
        + Path(photo).read_bytes()
        + f"\r\n--{boundary}--\r\n".encode()
    )
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    times: list[float] = []
    errors: list[str] = []
    end = time.perf_counter() + seconds

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", url_port, timeout=60)
        while time.perf_counter() < end and not errors:
            begin = time.perf_counter()
            connection.request("POST", "/v1/classify", body, headers)
            response = connection.getresponse()
            content = response.read()
            if response.status != 200 or len(json.loads(content)["predictions"]) != 1:
                errors.append(f"{response.status}: {content[:200]!r}")
            times.append(time.perf_counter() - begin)
        connection.close()

    begin = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(f"a request failed with {errors[0]}")
    rate = len(times) / (time.perf_counter() - begin)
    return {"rate": rate, "p95": sorted(times)[int(0.95 * len(times))], "images": len(times)}


@contextmanager
def a_server(command: list[str], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the end of the block, which begins when it answers."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + 120
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]}: the server did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()
            process.wait(30)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Alone:
    """The model without a server, in this process."""

    def __init__(self, run: Path, photo: Path, seconds: float) -> None:
        from app.state.context import Limits
        from app.state.runs import ServedRun
        from vitrail.runs import Run

        self._content, self._seconds = photo.read_bytes(), seconds
        self._run = Run(run)
        self._run.model.cpu()
        self._served = ServedRun(run, device="cpu")
        self._image = self._served.read(self._content, _PHOTO, Limits())

    def network(self) -> dict[str, float]:
        """Images a second through the network."""
        return self._rate(lambda: self._served.outputs([self._image] * BATCH))

    def predict(self) -> dict[str, float]:
        """Images a second by ``Run.predict``'s way from the content of files."""
        named = [(_PHOTO, self._content)] * BATCH
        return self._rate(lambda: list(self._run.iter_predictions(named, BATCH)))

    def _rate(self, batch: Any) -> dict[str, float]:
        batch()
        count, begin, used = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - begin < self._seconds:
            batch()
            count += BATCH
        cost = 1000 * (time.process_time() - used) / count
        return {"rate": count / (time.perf_counter() - begin), "cost": cost}


def run(repeats: int, users: int = 8, seconds: float = 6.0, backbone: str = DEIT_TINY, size: int = 512) -> list[Row]:
    """Images a second of all contenders, each for some seconds a round."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_runs(folder, backbone, pairs=False)
        model, photo = folder / CLASSIFIER, folder / _PHOTO
        photo.write_bytes(a_photo(size))
        ports = {OURS: free_port(), PEER: free_port()}
        ours = ["vitrail", "serve", str(model), "--port", str(ports[OURS]), "--rate", "0", "--device", "cpu"]
        harness = "benchmarks.harness.processes"
        peer = [harness, f"{__name__}:litserve_server", json.dumps([str(model), ports[PEER]])]
        alone = Alone(model, photo, seconds)
        contenders = {NETWORK: alone.network, PREDICT: alone.predict}
        with a_server([*ours, "--batch-size", str(BATCH)], ports[OURS], folder / "ours.log") as server:
            contenders[OURS] = lambda: load(server, ports[OURS], photo, users, seconds)
            if LitAPI is object:
                found = interleave(contenders, repeats)
            else:
                with a_server(peer, ports[PEER], folder / "peer.log") as other:
                    contenders[PEER] = lambda: load(other, ports[PEER], photo, users, seconds)
                    found = interleave(contenders, repeats)
    values, costs = pick(found, "rate"), pick(found, "cost")
    what = f"{users} clients, photos of {size} px, DeiT-Tiny"
    slow = max(one["p95"] for one in found[OURS])
    rows = [row(what, OURS, PREDICT, values, "images/s", "≥ 0.8", f"p95 {slow:.3f} s")]
    rows.append(row(what, OURS, NETWORK, values, "images/s"))
    if PEER in values:
        slow = max(one["p95"] for one in found[PEER])
        rows.append(row(what, OURS, PEER, values, "images/s", "", f"p95 of LitServe {slow:.3f} s"))
    used = "the same, time of the processor"
    rows += [row(used, OURS, other, costs, "ms per image") for other in (PREDICT, NETWORK, PEER) if other in costs]
    return rows
