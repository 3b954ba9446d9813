"""A name for weights: whoever has the same one has the same weights, whatever file they came from."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a module's weights, hexadecimal.

    Where weights are shared out among processes, all of them must call this.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            continue  # extra state, which no embedding depends on
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
