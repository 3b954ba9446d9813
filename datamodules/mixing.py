"""mixup and CutMix on uint8 batches, counted like all other randomness.

mixup: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018); CutMix: Yun et al., "CutMix:
Regularization Strategy to Train Strong Classifiers with Localizable Features" (ICCV 2019). Where both are on, each
batch gets one of them with equal chance, as in timm.
"""

from __future__ import annotations

import torch
from torch.distributions import Beta

from vitrail.seeding import counted_rng
from vitrail.types import Mix


def mix_batch(
    images: torch.Tensor, key: tuple[int, ...], *, mixup: float, cutmix: float
) -> tuple[torch.Tensor, Mix | None]:
    """Mixes every picture of a batch with another one of it, all with the same share.

    Args:
        images: uint8 ``(B, 3, H, W)``.
        key: what the randomness is counted by, such as (seed, epoch, id of the first sample).
        mixup: alpha of the Beta distribution of mixup's share, 0 for off.
        cutmix: alpha of the Beta distribution of CutMix's share, 0 for off.

    Returns:
        The mixed pictures, uint8 ``(B, 3, H, W)``, and how they were mixed; None for the latter where nothing is on or
        the batch has one picture only.
    """
    size = len(images)
    if size < 2 or not (mixup or cutmix):
        return images, None
    with counted_rng("mix", *key):
        cuts = bool(cutmix) and (not mixup or bool(torch.rand(()) < 0.5))
        alpha = cutmix if cuts else mixup
        share = float(Beta(alpha, alpha).sample())
        partner = torch.randperm(size)
        centre = torch.rand(2)
    if cuts:
        mixed, share = _cut(images, partner, share, centre)
    else:
        mixed, share = _blend(images, partner, share)
    return mixed, {"partner": partner, "lam": torch.full((size,), share, dtype=torch.float32)}


def _blend(images: torch.Tensor, partner: torch.Tensor, share: float) -> tuple[torch.Tensor, float]:
    """mixup, and the share that was really used: in steps of 1/128, so that 16-bit integers do (faster than floats)."""
    weight = round(share * 128)
    mixed = torch.empty_like(images)
    for row, other in enumerate(partner.tolist()):
        base = images[other].to(torch.int16)
        difference = images[row].to(torch.int16).sub_(base)
        mixed[row] = difference.mul_(weight).add_(64).bitwise_right_shift_(7).add_(base)
    return mixed, weight / 128


def _cut(images: torch.Tensor, partner: torch.Tensor, share: float, centre: torch.Tensor) -> tuple[torch.Tensor, float]:
    """CutMix, and the share that is really left, as the box was clipped and rounded."""
    height, width = images.shape[-2:]
    top, bottom, left, right = _box(height, width, share, centre)
    mixed = images.clone()
    for row, other in enumerate(partner.tolist()):
        mixed[row, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _box(height: int, width: int, share: float, centre: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a box of area 1 - share about the centre, clipped to the picture."""
    side = (1 - share) ** 0.5
    row, column = float(centre[0]) * height, float(centre[1]) * width
    half_height, half_width = side * height / 2, side * width / 2
    return (
        max(round(row - half_height), 0),
        min(round(row + half_height), height),
        max(round(column - half_width), 0),
        min(round(column + half_width), width),
    )
