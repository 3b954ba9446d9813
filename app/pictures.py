"""The galleries' own pictures for the browser, scaled; nothing else of the disk can be asked for."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse, Response

from app.context import AppContext
from app.picture_address import ROUTE, picture_url
from datamodules.loading.decode import ValueRange
from vitrail.errors import UserError

__all__ = ["PictureStore", "add_pictures", "picture_url"]

SIDES = (64, 128, 256, 512, 1024, 1600)
"""Longest sides that are made; a request gets the next larger one, so that few versions of a picture are kept."""

_AT_ONCE = 4
_NOT_FOUND = 404


class PictureStore:
    """Makes pictures small and keeps what it made.

    Args:
        context: what is served.
        capacity: bytes that are kept; what was asked for longest ago goes first.

    Attributes:
        size: bytes that are kept at the moment.
    """

    def __init__(self, context: AppContext, capacity: int = 64 * 2**20) -> None:
        self._context = context
        self._capacity = capacity
        self._kept: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self.size = 0
        self._lock = threading.Lock()
        # A page asks for twenty at once; decoding more than a few together would only need more memory.
        self._decoding = threading.BoundedSemaphore(_AT_ONCE)

    def jpeg(self, gallery: str, sample_id: str, side: int) -> bytes:
        """A picture of a gallery as JPEG.

        Args:
            gallery: its name.
            sample_id: the picture's id in it; it is looked up, never made part of a path.
            side: longest side in pixels; smaller pictures stay as they are.

        Raises:
            UserError: for names that are not there, and a picture that cannot be read.
        """
        key = (gallery, sample_id, next((size for size in SIDES if size >= side), SIDES[-1]))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        served = self._context.gallery(gallery)
        found = served.picture(sample_id)
        with self._decoding:
            content = _scaled(found, sample_id, key[2], served.value_range)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = content
                self.size += len(content)
            while self.size > self._capacity:
                self.size -= len(self._kept.popitem(last=False)[1])
        return content


def add_pictures(app: FastAPI, context: AppContext) -> None:
    """Adds the route that ``picture_url`` leads to."""
    store = PictureStore(context)

    def picture(request: Request, gallery: str, id: str, side: int = 256) -> Response:  # noqa: A002 -- part of the address
        try:
            content = store.jpeg(gallery, id, min(max(side, 1), context.limits.side))
        except UserError:
            # Why there is none can name a file; it does not concern the browser.
            return PlainTextResponse("there is no such picture", _NOT_FOUND)
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {"etag": tag, "cache-control": "private, max-age=600"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type="image/jpeg", headers=headers)

    app.get(ROUTE, include_in_schema=False)(picture)


def _scaled(found: Path | bytes, sample_id: str, side: int, value_range: ValueRange) -> bytes:
    """JPEG whose longest side is at most ``side``."""
    from PIL import Image

    from datamodules.loading.decode import read_image

    image = Image.fromarray(read_image(found, sample_id, value_range).permute(1, 2, 0).numpy())
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=88)
    return content.getvalue()
