"""Draw the corruptions of a generated photo: python docs/corruptions.py writes docs/images/corruptions.jpg."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from datamodules.loading.corruptions import corrupted
from datamodules.wares import ware_spec
from datamodules.wares.render import draw_ware
from evaluation.robustness import IMAGENET_C

SIDE, SHOWN, TEXT, COLUMNS = 256, 150, 16, 5
SEVERITY = 3


def main() -> None:
    """Write the sheet: a column of three for each group of five, severity 3."""
    photo = torch.from_numpy(np.array(draw_ware(ware_spec(0, 7), 7, SIDE))).permute(2, 0, 1)
    rows = -(-len(IMAGENET_C) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SHOWN, rows * (SHOWN + TEXT)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, name in enumerate(IMAGENET_C):
        left, top = place % COLUMNS * SHOWN, place // COLUMNS * (SHOWN + TEXT)
        pixels = corrupted(photo, name, SEVERITY, (0, 0)).permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((SHOWN - 4, SHOWN - 4)), (left + 2, top + TEXT))
        pen.text((left + 4, top + 2), name.replace("_", " "), fill="black")
    sheet.save(Path(__file__).parent / "images" / "corruptions.jpg", quality=80)


if __name__ == "__main__":
    main()
