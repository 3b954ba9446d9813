"""Files that could be uploaded to do harm, and broken ones that come without any intent; all made here."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>'
HTML = b"<!DOCTYPE html><html><body><script>alert(document.domain)</script></body></html>"


def encoded(kind: str = "PNG", size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: Any) -> bytes:
    """A harmless image of seeded noise in a format."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, kind, **options)
    return content.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int, *, pixels: bool = True) -> bytes:
    """A few kilobytes that decode to ``width × height`` white pixels, one bit each."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * ((width + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush() if pixels else zlib.compress(b"\0")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A small PNG with a compressed comment of 50 MB."""
    whole = encoded()
    comment = png_chunk(b"zTXt", b"c\0\0" + zlib.compress(b"a" * 50_000_000, 9))
    return whole[:33] + comment + whole[33:]


def hostile_files() -> Iterator[tuple[str, str, bytes]]:
    """What each is, its name, its content; none of them is an image that can be read."""
    yield "empty", "a.png", b""
    yield "a text", "a.jpg", b"hello" * 100
    yield "an SVG", "a.svg", SVG
    yield "an SVG that is called PNG", "a.png", SVG
    yield "a page", "a.html", HTML
    yield "a page that is called JPEG", "a.jpg", HTML
    yield "a PostScript", "a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n%%EOF"
    yield "a PDF", "a.pdf", b"%PDF-1.7\n1 0 obj<</OpenAction<</S/JavaScript/JS(app.alert(1))>>>>endobj"
    yield "a pickle", "a.png", b"cos\nsystem\n(S'echo it was opened'\ntR."
    yield "an archive", "a.png", b"PK\x03\x04" + b"\0" * 200
    yield "an ICO", "a.ico", encoded("ICO", (32, 32))
    yield "a TGA", "a.png", encoded("TGA")
    yield "a bomb", "a.png", png_bomb(20_000, 20_000)
    yield "a bomb just above the limit", "a.png", png_bomb(50_001, 1_000)
    yield "a bomb in its header only", "a.png", png_bomb(2**31 - 1, 2**31 - 1, pixels=False)
    yield "a flat bomb", "a.png", png_bomb(2**30, 1, pixels=False)
    yield "a PNG of no size", "a.png", png_bomb(0, 0, pixels=False)
    yield "pixels that end early", "a.png", png_bomb(3_000, 3_000, pixels=False)
    yield "a BMP with a lie about its size", "a.bmp", _bmp_with_size(60_000, 60_000)
    yield "a BMP of negative width", "a.bmp", _bmp_with_size(-40, 30)
    yield "a GIF with a huge screen", "a.gif", b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + encoded("GIF")[10:]
    yield "a TIFF that points at itself", "a.tif", b"II*\0\x08\0\0\0\0\0\x08\0\0\0"
    yield "depths of unknown range", "a.tif", _float_tiff()
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = encoded(kind)
        for share in (0.02, 0.3, 0.6):
            yield f"{kind}, cut at {share:.0%}", f"a.{kind.lower()}", whole[: int(len(whole) * share)]
    for number in range(20):
        rng = np.random.default_rng(number)
        yield f"noise {number}", "a.jpg", rng.bytes(int(rng.integers(1, 5_000)))
        head = (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x10\0\0WEBPVP8 ", b"GIF89a", b"II*\0")[number % 5]
        yield f"noise behind a true beginning {number}", "a.jpg", head + rng.bytes(2_000)


def harmless_files() -> Iterator[tuple[str, str, bytes]]:
    """Odd, but images: what each is, its name, its content."""
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"):
        yield kind, f"a.{kind.lower()}", encoded(kind)
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        yield f"mode {mode}", "a.png", encoded("PNG", mode=mode) if mode != "I;16" else _deep_png()
    yield "CMYK", "a.jpg", encoded("JPEG", mode="CMYK")
    yield "one pixel", "a.png", encoded(size=(1, 1))
    yield "a long line", "a.png", encoded(size=(3_000, 1))
    yield "a page behind a JPEG", "a.html", encoded("JPEG") + HTML
    yield "a JPEG called SVG", "a.svg", encoded("JPEG")
    yield "an archive behind a PNG", "a.png", encoded() + b"PK\x03\x04" + b"\0" * 200
    yield "a moving image", "a.gif", _moving()


def _bmp_with_size(width: int, height: int) -> bytes:
    whole = bytearray(encoded("BMP"))
    whole[18:26] = struct.pack("<ii", width, height)
    return bytes(whole)


def _float_tiff() -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8), 1e9, np.float32)).save(content, "TIFF")
    return content.getvalue()


def _deep_png() -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.linspace(0, 65_535, 1_200, dtype=np.uint16).reshape(30, 40)).save(content, "PNG")
    return content.getvalue()


def _moving() -> bytes:
    content = io.BytesIO()
    frames = [Image.new("RGB", (40, 30), (255 - 50 * step, 0, 0)) for step in range(4)]
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:])
    return content.getvalue()
