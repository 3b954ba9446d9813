"""The device that a command computes on."""

from __future__ import annotations

from datamodules.schema import UserError


def checked_device(name: str) -> str:
    """The name of a device that can be used here.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1`` …

    Raises:
        UserError: if there is none of this name.
    """
    if name == "cpu":
        return name
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); try cpu") from error
    return name
