"""What a dual encoder minimises: a contrastive loss with its temperature, over the pairs of all processes."""

from __future__ import annotations

from typing import get_args

import torch
from torch import nn

from lightning_modules.gather import gather_rows, is_distributed, own_rows
from lightning_modules.losses import ContrastiveLoss, Pairs, info_nce, label_aware_info_nce, sigmoid_contrastive
from lightning_modules.temperature import Temperature, TemperatureOptions
from vitrail.errors import UserError


class ContrastiveObjective(nn.Module):
    """A contrastive loss and its temperature.

    Args:
        loss: which one.
        temperature: the scale of the similarities.

    Raises:
        UserError: if a setting is unknown or out of range.
    """

    def __init__(self, loss: ContrastiveLoss, temperature: TemperatureOptions | None) -> None:
        super().__init__()
        if loss not in get_args(ContrastiveLoss):
            raise UserError(f"loss: {loss!r} is unknown; choose one of {', '.join(get_args(ContrastiveLoss))}")
        self.loss = loss
        self.temperature = Temperature(temperature, with_bias=loss == "sigmoid")

    def forward(self, own: Pairs, *, joined: bool) -> torch.Tensor:
        """The loss.

        Args:
            own: pairs of this process, of unit length.
            joined: whether they are compared with those of all processes, which must then all call this; the mean over
                processes has the gradient of the joined batch.

        Returns:
            float32 scalar.
        """
        pool, first = own, 0
        if joined and is_distributed():
            pool, first = Pairs(*(gather_rows(rows) for rows in own)), own_rows(len(own.image)).start
        scale, bias = self.temperature()
        # Half precision would round away the differences that are compared.
        with torch.autocast(own.image.device.type, enabled=False):
            if self.loss == "info_nce":
                return info_nce(own, scale, pool=pool, first=first)
            if self.loss == "sigmoid":
                return sigmoid_contrastive(own, scale, bias, pool=pool)
            return label_aware_info_nce(own, scale, pool=pool)
