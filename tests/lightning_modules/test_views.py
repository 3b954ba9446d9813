"""Views of images, against torchvision."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T

from lightning_modules.ensemble import VIEWS, checked_views, seen_as
from vitrail.errors import UserError

IMAGE = torch.randint(0, 256, (2, 3, 16, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_flips_are_those_of_torchvision() -> None:
    assert seen_as(IMAGE, "identity") is IMAGE
    assert torch.equal(seen_as(IMAGE, "hflip"), T.hflip(IMAGE))
    assert torch.equal(seen_as(IMAGE, "vflip"), T.vflip(IMAGE))


def test_zoom_is_the_middle_at_the_whole_size() -> None:
    cropped = T.center_crop(IMAGE, [14, 28])
    expected = T.resize(cropped.float(), [16, 32], InterpolationMode.BICUBIC, antialias=False)
    seen = seen_as(IMAGE, "zoom")
    assert seen.dtype == torch.uint8
    assert seen.shape == IMAGE.shape
    assert torch.equal(seen, expected.round().clamp(0, 255).to(torch.uint8))


def test_every_view_shows_a_plain_image_as_it_is() -> None:
    plain = torch.full((1, 3, 9, 7), 201, dtype=torch.uint8)
    for view in VIEWS:
        assert torch.equal(seen_as(plain, view), plain), view


def test_names_are_checked_and_put_in_order() -> None:
    assert checked_views(None) == ["identity"]
    assert checked_views(["zoom", "identity"]) == ["identity", "zoom"]
    assert checked_views(["hflip"]) == ["hflip"]
    for views, said in ((["sideways", "hflip"], "no sideways"), ([], "at least one"), (["hflip"] * 2, "each once")):
        with pytest.raises(UserError, match=f"tta_views: .*{said}.*; there are identity, hflip"):
            checked_views(views)
