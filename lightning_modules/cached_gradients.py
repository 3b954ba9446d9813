"""Contrastive batches larger than memory: encode in chunks, keep only the embeddings, encode again for the gradients.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache), RepL4NLP 2021. The
loss sees all embeddings at once, so its value and its gradients are those of the one large batch; gradient accumulation
over small batches would have fewer negatives. It is what gradient checkpointing (Chen et al., 2016) does with one
segment a chunk: torch replays each chunk's random state and mixed precision, and frees it before the next one. One
backward pass goes through everything, so the temperature's gradient is counted once, and DDP sums once.

BatchNorm in training mode normalises by the chunk, as in any method of this kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def encode_in_chunks(
    encode: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], chunk_size: int, network: nn.Module
) -> torch.Tensor:
    """Encode a batch with the memory of one chunk.

    Args:
        encode: from inputs ``(b, …)`` to embeddings ``(b, D)``.
        inputs: tensors of B rows each.
        chunk_size: rows that are encoded at a time; 0 for all at once, with nothing encoded twice.
        network: what ``encode`` computes with; its BatchNorm statistics are only moved by the first pass.

    Returns:
        ``(B, D)``.
    """
    rows = len(inputs[0])
    if chunk_size == 0 or rows <= chunk_size:
        return encode(*inputs)
    chunks = list(zip(*(torch.split(tensor, chunk_size) for tensor in inputs), strict=True))
    if not torch.is_grad_enabled():
        return torch.cat([encode(*chunk) for chunk in chunks])

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(network)

    return torch.cat([checkpoint(encode, *chunk, use_reentrant=False, context_fn=contexts) for chunk in chunks])


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Leave running means and variances as they are, so that encoding twice does not count twice."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.training]
    for norm, _, _ in kept:
        # With a momentum of 0 a batch counts nothing; the counter itself is exchanged for the time.
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, counter in kept:
            norm.momentum = momentum
            norm.num_batches_tracked = counter
