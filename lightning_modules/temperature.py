"""The scale of similarities in a contrastive loss, learned or fixed, apart from the loss."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import nn

from lightning_modules.precision import KeepsFloat32
from vitrail.errors import UserError


class TemperatureOptions(TypedDict, total=False):
    """The temperature; what is left out has the value in brackets.

    Attributes:
        scale: what cosines are multiplied by at first, 1 / temperature [that of the pretrained model; 1 / 0.07 where
            there is none, 10 with the sigmoid loss].
        learned: whether it is learned [true].
        lr: highest learning rate of the temperature and bias [that of the heads].
        max_scale: it never grows beyond [100, or the scale of the pretrained model, if that is larger].
        bias: added to the scaled cosines at first; with the sigmoid loss only [that of the pretrained model, or -10].
    """

    scale: float
    learned: bool
    lr: float
    max_scale: float
    bias: float


class Temperature(KeepsFloat32):
    """Scale (and bias) of cosines.

    The scale is learned as its logarithm and clamped at 100, as CLIP does (Radford et al., 2021), or at that of the
    pretrained model, which SigLIP's (Zhai et al., 2023), whose the bias is, exceeds.

    Args:
        options: the settings.
        with_bias: whether the loss has a bias.

    Attributes:
        log_scale: float32 scalar in every precision, a parameter, or a buffer where the temperature is fixed.
        bias: float32 scalar likewise, 0 where the loss has none.
        max_log_scale: logarithm of the largest scale; a checkpoint has to keep it.

    Raises:
        UserError: for an unknown key or a value out of range.
    """

    log_scale: torch.Tensor
    bias: torch.Tensor

    def __init__(self, options: TemperatureOptions | None, *, with_bias: bool) -> None:
        super().__init__()
        given = options or {}
        if strange := sorted(set(given) - set(TemperatureOptions.__annotations__)):
            known = ", ".join(TemperatureOptions.__annotations__)
            raise UserError(f"temperature: unknown key {strange[0]!r}; known keys are {known}")
        max_scale = given.get("max_scale", 100.0)
        scale = given.get("scale", min(10.0 if with_bias else 1 / 0.07, max_scale))
        if not 0 < scale <= max_scale:
            raise UserError(f"temperature: scale must be above 0 and at most max_scale {max_scale}, got {scale}")
        if given.get("lr", 0.0) < 0:
            raise UserError(f"temperature: lr must not be negative, got {given['lr']}")
        if "bias" in given and not with_bias:
            raise UserError("temperature: bias belongs to the loss sigmoid; leave it out")
        self.max_log_scale = math.log(max_scale)
        self._given, self._with_bias = given, with_bias
        self.learned = given.get("learned", True)
        log_scale = torch.tensor(math.log(scale))
        bias = torch.tensor(given.get("bias", -10.0) if with_bias else 0.0)
        if self.learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        if self.learned and with_bias:
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and bias, float32 scalars."""
        return self.log_scale.exp(), self.bias

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the scale below its maximum; to be called after each step of the optimizer.

        Not in ``forward``, where a clamped value would have no gradient and could never come back.
        """
        self.log_scale.clamp_(max=self.max_log_scale)

    @torch.no_grad()
    def take_pretrained(self, log_scale: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        """Take over the values of a pretrained model as they are, unless the options give other ones.

        Raises:
            UserError: if the scale is beyond the ``max_scale`` of the options.
        """
        if log_scale is not None and "scale" not in self._given:
            if "max_scale" in self._given and float(log_scale) > self.max_log_scale:
                raise UserError(
                    f"temperature.max_scale: {self._given['max_scale']:g} is below the scale of the pretrained model, "
                    f"{math.exp(float(log_scale)):.6g}; raise it, or give temperature.scale"
                )
            self.log_scale.copy_(log_scale.reshape(()))
            self.max_log_scale = max(self.max_log_scale, float(log_scale))
        if bias is not None and "bias" not in self._given and self._with_bias:
            self.bias.copy_(bias.reshape(()))
