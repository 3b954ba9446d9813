"""Small sets of shards for the tests of streaming, and a server that gives parts of files."""

from __future__ import annotations

import io
import json
import re
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from datamodules.loading.dataset import CountedLoader
from datamodules.options import ImageOptions
from datamodules.products import Products
from datamodules.splits import SplitOptions
from datamodules.streaming import StreamedImages
from tests.support.data import draw_image, write_products
from vitrail.types import Batch

SIZES = {"train": 36, "val": 9, "test": 9}
TRAIN = set(range(SIZES["train"]))


def source(root: Path) -> Products:
    """The data set that is packed: 54 photos as JPEG files."""
    write_products(root, instances=6)
    return Products(
        str(root), attributes=["colour", "material"], split=SplitOptions(by="table"), image=ImageOptions(size=16)
    )


def streamed(shards: Any, **options: Any) -> StreamedImages:
    """A set with small, augmented images, batches of 4, four streams and a buffer of 12."""
    loader = {"batch_size": 4, **options.pop("loader", {})}
    defaults: dict[str, Any] = {
        "image": {"size": 16},
        "augment": {"preset": "reference", "mixup": 0.3},
        "shuffle_buffer": 12,
        "streams": 4,
        "seed": 3,
    }
    return StreamedImages(shards, **{**defaults, **options, "loader": loader})


class Place:
    """What a DataModule asks of a trainer to know which process it is on."""

    def __init__(self, rank: int, world_size: int, folder: Path) -> None:
        self.global_rank = rank
        self.world_size = world_size
        self.default_root_dir = str(folder)


def on_rank(shards: str, rank: int, world_size: int, folder: Path, **options: Any) -> StreamedImages:
    """As ``streamed``, on one of several processes."""
    data = streamed(shards, **options)
    data.trainer = Place(rank, world_size, folder)  # type: ignore[assignment]  # as far as it is asked
    return data


def batches(loader: CountedLoader, epoch: int = 0) -> list[Batch]:
    """All batches of an epoch."""
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def assert_same(first: Sequence[Batch], second: Sequence[Batch]) -> None:
    """Two runs saw the same, bit by bit."""
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one["sample_id"].equal(other["sample_id"])
        assert one["image"].equal(other["image"])
        assert one["caption"] == other["caption"]
        assert one["is_padding"].equal(other["is_padding"])


def ids_of(seen: Sequence[Batch], *, counted: bool = False) -> list[int]:
    """Sample ids of some batches in their order; without padding rows if only counted ones are asked for."""
    kept = [batch["sample_id"][~batch["is_padding"]] if counted else batch["sample_id"] for batch in seen]
    ids: list[int] = torch.cat(kept).tolist()
    return ids


def encoded(look: int, ending: str = "png", shape: int = 0) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    draw_image(shape, "red", look=look, size=(12, 10)).save(buffer, format={"jpg": "JPEG"}.get(ending, ending))
    return buffer.getvalue()


def write_tar(path: Path, samples: Sequence[tuple[str, Mapping[str, Any]]], mode: str = "w") -> Path:
    """A WebDataset shard; members are bytes, texts, or what becomes JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for key, members in samples:
            for suffix, content in members.items():
                text = content if isinstance(content, bytes | str) else json.dumps(content)
                data = text.encode() if isinstance(text, str) else text
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


class _Handler(SimpleHTTPRequestHandler):
    """Serves files, parts of them if ``ranges`` is set, and counts what was asked for."""

    ranges = True
    asked: list[str]

    def send_head(self) -> Any:
        self.asked.append(self.path)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not self.ranges or match is None or not path.is_file():
            return super().send_head()
        content = path.read_bytes()
        first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        return io.BytesIO(content[first : last + 1])

    def end_headers(self) -> None:
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the base class's word
        pass


@contextmanager
def served(folder: Path, *, ranges: bool = True) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server of a folder; gives its address and the list of paths that were asked for."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"asked": asked, "ranges": ranges})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
