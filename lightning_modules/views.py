"""Views of a picture that show the same thing: what test-time augmentation averages over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from vitrail.errors import UserError

View = Literal["identity", "hflip", "vflip", "zoom"]
VIEWS: tuple[View, ...] = get_args(View)

_ZOOM = 7 / 8
"""Share of each side that ``zoom`` keeps: 224 of 256, the usual centre crop."""


def seen_as(image: torch.Tensor, view: View) -> torch.Tensor:
    """A view of pictures.

    - ``identity``: as they are.
    - ``hflip``: mirrored, left and right exchanged.
    - ``vflip``: upside down; only where pictures have no up and down, as from above or through a microscope.
    - ``zoom``: the middle, 7/8 of each side, scaled to the whole size.

    Args:
        image: uint8 ``(B, 3, H, W)``, RGB.
        view: which.

    Returns:
        uint8 ``(B, 3, H, W)``.
    """
    if view == "hflip":
        return image.flip(-1)
    if view == "vflip":
        return image.flip(-2)
    if view == "zoom":
        height, width = image.shape[-2:]
        rows, columns = max(1, round(height * _ZOOM)), max(1, round(width * _ZOOM))
        top, left = (height - rows) // 2, (width - columns) // 2
        middle = image[..., top : top + rows, left : left + columns].float()
        scaled = F.interpolate(middle, (height, width), mode="bicubic", align_corners=False)
        return scaled.round().clamp(0, 255).to(torch.uint8)
    return image


def checked_views(views: Sequence[str] | None) -> list[View]:
    """Views that can be had, each once.

    Args:
        views: names; none for the pictures as they are.

    Raises:
        UserError: for other names, a name twice, or an empty list.
    """
    found = list(views) if views is not None else ["identity"]
    unknown = sorted(set(found) - set(VIEWS))
    if unknown or not found or len(set(found)) < len(found):
        what = f"there is no {', '.join(unknown)}" if unknown else "name at least one, and each once"
        raise UserError(f"tta_views: {what}; there are {', '.join(VIEWS)}")
    return [view for view in VIEWS if view in found]
