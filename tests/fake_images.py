"""Images that a small network can learn: the class decides the shape, the colour attribute its colour.

The background is different for each object, so that images of different objects are no near-duplicates of each other.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 30, 30),
    "blue": (30, 60, 215),
    "green": (25, 155, 55),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
    "yellow": (240, 215, 40),
    "gray": (128, 128, 128),
    "grey": (128, 128, 128),
    "orange": (245, 140, 20),
}


def draw_image(
    shape: int, colour: str, *, look: int, view: int = 0, size: tuple[int, int] = (32, 32), frame: str = ""
) -> Image.Image:
    """Draws one image.

    Args:
        shape: which of ten shapes, the class.
        colour: key of ``COLOURS``.
        look: number of the object; decides the background.
        view: number of the view; shifts the shape a little.
        size: width and height in pixels.
        frame: key of ``COLOURS`` for a frame around the image; none by default.

    Returns:
        RGB image.
    """
    width, height = size
    background = np.random.default_rng([look, 1]).integers(150, 221, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(background).resize(size, Image.Resampling.BICUBIC)
    pen, fill = ImageDraw.Draw(image), COLOURS[colour]
    rng = np.random.default_rng([look, view, 2])
    x, y = (int(side * rng.uniform(0.42, 0.58)) for side in (width, height))
    r = int(min(size) * rng.uniform(0.33, 0.4))
    if frame:
        pen.rectangle((0, 0, width - 1, height - 1), outline=COLOURS[frame], width=2)
    box = (x - r, y - r, x + r, y + r)
    match shape % 10:
        case 0:
            pen.ellipse(box, fill)
        case 1:
            pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill)
        case 2:
            pen.line((x - r, y - r, x + r, y + r), fill, max(2, r // 2))
        case 3:
            pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill)
        case 4:
            pen.ellipse(box, outline=fill, width=max(2, r // 3))
        case 5:
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
        case 6:
            pen.rectangle(box, outline=fill, width=max(2, r // 3))
        case 7:
            pen.line((x - r, y + r, x + r, y - r), fill, max(2, r // 2))
        case 8:
            pen.rectangle(box, fill)
        case _:
            pen.polygon([(x - r, y - r), (x + r, y - r), (x, y + r)], fill)
    return image
