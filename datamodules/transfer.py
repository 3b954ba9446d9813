"""How batches come from worker processes: what is small within the message, and only pictures in shared memory.

Each tensor that leaves a worker process costs a file of shared memory, a connection and a handshake, about as much as
decoding a small picture; a batch has many tensors, nearly all of them tiny.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

_LARGE = 1 << 16


def to_be_sent(batch: Any) -> Any:
    """Tensors of less than 64 KiB as arrays, wherever they are nested in dictionaries; nothing in the main process."""
    return _mapped(batch, _small_to_array) if get_worker_info() is not None else batch


def received(batch: Any) -> Any:
    """Undoes ``to_be_sent``."""
    return _mapped(batch, _array_to_tensor)


def _mapped(value: Any, function: Any) -> Any:
    return {key: _mapped(item, function) for key, item in value.items()} if isinstance(value, dict) else function(value)


def _small_to_array(value: Any) -> Any:
    is_small = isinstance(value, torch.Tensor) and value.numel() * value.element_size() < _LARGE
    return value.numpy() if is_small else value


def _array_to_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
