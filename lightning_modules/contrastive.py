"""Contrastive losses, the logit scale, and cached gradients for batches larger than memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.distributed import gather_rows, is_distributed, own_rows
from lightning_modules.options import ContrastiveLoss, ContrastiveOptions, LogitScaleOptions
from lightning_modules.precision import KeepsFloat32
from vitrail.errors import UserError


class Pairs(NamedTuple):
    """Images and their texts as unit vectors."""

    image: torch.Tensor  # float `(N, D)`
    text: torch.Tensor  # float `(N, D)`; row i describes image i
    positive_id: torch.Tensor  # int64 `(N,)`; rows that share one are positives of each other


LOGITS_AT_A_TIME = 2**18
"""Logits in memory at a time; more of them are computed in blocks of rows, along with their gradients."""


def info_nce(
    own: Pairs, scale: torch.Tensor, *, pool: Pairs | None = None, first: int = 0, hard_negatives: float = 0.0
) -> torch.Tensor:
    """Symmetric InfoNCE: classify each image among all texts, and each text among all images.

    van den Oord et al., 2018; in this form Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision", ICML 2021. ``positive_id`` is ignored: another image's equal caption is a negative.

    Args:
        own: pairs of this process.
        scale: scalar factor of the cosine similarities.
        pool: pairs of all processes, by default ``own``.
        first: index of the first own pair in the pool.
        hard_negatives: see ``label_aware_info_nce``.

    Returns:
        float scalar, the mean over the own pairs and both directions; log(N) at chance.
    """
    pool = pool or own
    place = torch.arange(len(pool.image), device=own.image.device)
    own, pool = own._replace(positive_id=place[first : first + len(own.image)]), pool._replace(positive_id=place)
    return _both_directions(own, pool, scale, hard_negatives, unique=True)


def label_aware_info_nce(
    own: Pairs, scale: torch.Tensor, *, pool: Pairs | None = None, hard_negatives: float = 0.0
) -> torch.Tensor:
    """Symmetric InfoNCE in which all pairs with the same ``positive_id`` are positives.

    The target of a row is spread evenly over its positives (Yang et al., "Unified Contrastive Learning in
    Image-Text-Label Space", CVPR 2022; the outer sum of Khosla et al., "Supervised Contrastive Learning", 2020).
    Without repeated ids it equals ``info_nce``; with P positives of each row it cannot fall below log(P).

    Args:
        own: pairs of this process.
        scale: scalar factor of the cosine similarities.
        pool: pairs of all processes, by default ``own``, among which these are.
        hard_negatives: β of HN-NCE (Radenovic et al., "Filtering, Distillation, and Hard Negatives for Vision-Language
            Pre-Training", CVPR 2023): negatives are weighted by their softmax of β times the logits, times their
            number; with 0 all have the weight 1.

    Returns:
        float scalar, the mean over the own pairs and both directions.
    """
    return _both_directions(own, pool or own, scale, hard_negatives, unique=False)


def _both_directions(own: Pairs, pool: Pairs, scale: torch.Tensor, beta: float, *, unique: bool) -> torch.Tensor:
    """Mean cross-entropy of images among texts and texts among images."""

    def losses(ids: torch.Tensor, rows: torch.Tensor, candidates: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        logits = scale * rows @ candidates.T
        if unique and not beta:
            return F.cross_entropy(logits, ids, reduction="sum")
        positive = ids[:, None] == pool.positive_id
        if beta:
            logits = _with_hard_negatives(logits, positive, beta)
        target = positive.to(logits.dtype)
        return F.cross_entropy(logits, target / target.sum(dim=1, keepdim=True), reduction="sum")

    return _sum_over_pairs(losses, own, pool, (scale,), both=True) / (2 * len(own.image))


def _with_hard_negatives(logits: torch.Tensor, positive: torch.Tensor, beta: float) -> torch.Tensor:
    """Add to each negative's logit the logarithm of its weight."""
    # A finite number, because a row may have no negatives.
    negatives = (beta * logits).masked_fill(positive, torch.finfo(logits.dtype).min)
    count = (~positive).sum(dim=1, keepdim=True).clamp(min=1).to(logits.dtype)
    return torch.where(positive, logits, logits + count.log() + negatives.log_softmax(dim=1))


def _sum_over_pairs(
    losses: Callable[..., torch.Tensor],
    own: Pairs,
    pool: Pairs,
    scalars: tuple[torch.Tensor, ...],
    *,
    both: bool,
) -> torch.Tensor:
    """Sum of the losses of images among texts, and of texts among images if ``both``.

    More than ``LOGITS_AT_A_TIME`` logits are never in memory at once. ``losses`` maps ids, rows, candidates and the
    ``scalars`` to the sum of the rows' losses.
    """
    embeddings = (own.image, own.text) if pool.image is own.image else (own.image, own.text, pool.image, pool.text)
    directions = [(0, len(embeddings) - 1), (1, len(embeddings) - 2)][: 1 + both]
    inputs = (*embeddings, *scalars)
    in_blocks = len(own.image) * len(pool.text) > LOGITS_AT_A_TIME
    if in_blocks and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return cast("torch.Tensor", _BlockwiseSum.apply(losses, own.positive_id, directions, *inputs))
    sums = [losses(*block) for _, block in _blocks(own.positive_id, directions, inputs)]
    return torch.stack(sums).sum()


def _blocks(
    ids: torch.Tensor, directions: Sequence[tuple[int, int]], inputs: Sequence[torch.Tensor]
) -> Iterator[tuple[tuple[int, slice, int], tuple[torch.Tensor, ...]]]:
    """Arguments of the losses by blocks of rows, and where their rows and candidates are from."""
    scalars = [tensor for tensor in inputs if tensor.dim() == 0]
    for of_rows, of_candidates in directions:
        candidates = inputs[of_candidates]
        size = max(1, LOGITS_AT_A_TIME // len(candidates))
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            yield (of_rows, part, of_candidates), (ids[part], inputs[of_rows][part], candidates, *scalars)


class _BlockwiseSum(torch.autograd.Function):
    """Sum of losses by blocks of rows, whose gradients are computed at once, so that no logits are kept.

    Memory-efficient InfoNCE as of Cheng et al., "Breaking the Memory Barrier of Contrastive Loss", CVPR 2025, in plain
    torch: in memory are the logits of one block, the embeddings and one gradient of each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        losses: Callable[..., torch.Tensor],
        ids: torch.Tensor,
        directions: Sequence[tuple[int, int]],
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        gradients = [torch.zeros_like(tensor) for tensor in inputs]
        total = torch.zeros_like(inputs[-1])
        for (of_rows, part, of_candidates), (block_ids, *tensors) in _blocks(ids, directions, inputs):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            with torch.enable_grad():
                loss = losses(block_ids, *leaves)
            rows, candidates, *scalars = torch.autograd.grad(loss, leaves)
            gradients[of_rows][part] += rows
            gradients[of_candidates] += candidates
            for place, scalar in enumerate(scalars, len(inputs) - len(scalars)):
                gradients[place] += scalar
            total += loss.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(gradient * of_sum if need else None for of_sum, need in needed)


def sigmoid_contrastive(
    own: Pairs, scale: torch.Tensor, bias: torch.Tensor, *, pool: Pairs | None = None
) -> torch.Tensor:
    """Binary classification of every pair of an image and a text as matching or not.

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, with all pairs with the same
    ``positive_id`` as positives; without repeated ids it is the paper's.

    Returns:
        float scalar, the sum over all texts, averaged over the own images.
    """
    pool = pool or own

    def losses(
        ids: torch.Tensor, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        sign = (ids[:, None] == pool.positive_id).to(image.dtype) * 2 - 1
        return -F.logsigmoid(sign * (scale * image @ text.T + bias)).sum()

    return _sum_over_pairs(losses, own, pool, (scale, bias), both=False) / len(own.image)


class LogitScale(KeepsFloat32):
    """Scale (and bias) of cosine similarities.

    The scale is trained as its logarithm and clamped at 100, as in CLIP (Radford et al., 2021), or at that of the
    pretrained model: SigLIP's (Zhai et al., 2023) is larger.

    Attributes:
        log_scale: float32 scalar in every precision; a parameter, or a buffer if the scale is fixed.
        bias: float32 scalar likewise, 0 unless the loss has one.
        max_log_scale: logarithm of the maximum scale; saved in checkpoints.
    """

    log_scale: torch.Tensor
    bias: torch.Tensor

    def __init__(self, options: LogitScaleOptions = LogitScaleOptions(), *, with_bias: bool) -> None:
        super().__init__()
        max_scale = options.max_scale or 100.0
        scale = options.scale or min(10.0 if with_bias else 1 / 0.07, max_scale)
        if scale > max_scale:
            raise UserError(f"logit_scale.scale: must be at most max_scale {max_scale}; got {scale}")
        if options.bias is not None and not with_bias:
            raise UserError("logit_scale.bias: belongs to the loss sigmoid; leave it out")
        self.max_log_scale = math.log(max_scale)
        self._options, self._with_bias = options, with_bias
        log_scale = torch.tensor(math.log(scale))
        bias = torch.tensor((-10.0 if options.bias is None else options.bias) if with_bias else 0.0)
        if options.trainable:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        if options.trainable and with_bias:
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and bias, float32 scalars."""
        return self.log_scale.exp(), self.bias

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp the scale after an optimizer step; in ``forward`` a clamped value would have no gradient."""
        self.log_scale.clamp_(max=self.max_log_scale)

    @torch.no_grad()
    def load_pretrained(self, log_scale: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        """Load the values of a pretrained model unless the options set others."""
        options = self._options
        if log_scale is not None and options.scale is None:
            if options.max_scale is not None and float(log_scale) > self.max_log_scale:
                raise UserError(
                    f"logit_scale.max_scale: {options.max_scale:g} is below the scale of the pretrained model, "
                    f"{math.exp(float(log_scale)):.6g}; raise it, or give logit_scale.scale"
                )
            self.log_scale.copy_(log_scale.reshape(()))
            self.max_log_scale = max(self.max_log_scale, float(log_scale))
        if bias is not None and options.bias is None and self._with_bias:
            self.bias.copy_(bias.reshape(()))


class ContrastiveObjective(nn.Module):
    """A contrastive loss and its logit scale."""

    def __init__(
        self,
        loss: ContrastiveLoss,
        logit_scale: LogitScaleOptions,
        options: ContrastiveOptions = ContrastiveOptions(),
        embed_dim: int = 0,
    ) -> None:
        super().__init__()
        if loss not in get_args(ContrastiveLoss):
            raise UserError(f"loss: must be one of {', '.join(get_args(ContrastiveLoss))}; got {loss!r}")
        if options.hard_negatives and loss == "sigmoid":
            raise UserError("loss_options.hard_negatives: belongs to info_nce and label_aware; leave it out")
        if embed_dim and (wrong := [length for length in options.matryoshka if length >= embed_dim]):
            raise UserError(f"loss_options.matryoshka: must be below the embeddings' {embed_dim}; got {wrong[0]}")
        self.loss, self.options = loss, options
        # The name is that of version 0.1, which checkpoints and digests of weights contain.
        self.temperature = LogitScale(logit_scale, with_bias=loss == "sigmoid")

    @property
    def logit_scale(self) -> LogitScale:
        """Scale and bias of the cosines."""
        return self.temperature

    def forward(self, own: Pairs, *, joined: bool) -> torch.Tensor:
        """The loss, a float32 scalar.

        Args:
            own: pairs of this process, of unit length.
            joined: compare them with those of all processes, which must all call this; the mean over processes then
                has the gradient of the joined batch.
        """
        pool, first = own, 0
        if joined and is_distributed():
            pool, first = Pairs(*(gather_rows(rows) for rows in own)), own_rows(len(own.image)).start
        lengths = [own.image.shape[1], *self.options.matryoshka]
        # Half precision would round small differences away.
        with torch.autocast(own.image.device.type, enabled=False):
            return torch.stack([self._of_length(own, pool, first, length) for length in lengths]).mean()

    def _of_length(self, own: Pairs, pool: Pairs, first: int, length: int) -> torch.Tensor:
        own, pool = shortened(own, length), shortened(pool, length)
        scale, bias = self.logit_scale()
        if self.loss == "sigmoid":
            return sigmoid_contrastive(own, scale, bias, pool=pool)
        hard = self.options.hard_negatives
        if self.loss == "info_nce":
            return info_nce(own, scale, pool=pool, first=first, hard_negatives=hard)
        return label_aware_info_nce(own, scale, pool=pool, hard_negatives=hard)


def shortened(pairs: Pairs, length: int) -> Pairs:
    """The first numbers of the embeddings, of unit length again."""
    if length == pairs.image.shape[1]:
        return pairs
    image, text = (F.normalize(rows[:, :length], dim=-1) for rows in pairs[:2])
    return Pairs(image, text, pairs.positive_id)


def encode_in_chunks(
    encode: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], chunk_size: int, network: nn.Module
) -> torch.Tensor:
    """Encode a batch with the memory of one chunk: GradCache (Gao et al., RepL4NLP 2021).

    Each chunk is encoded without keeping activations, and again for its gradients. The loss takes all embeddings at
    once, so its value and gradients are those of the large batch, while gradient accumulation would have fewer
    negatives. It is gradient checkpointing (Chen et al., 2016) with one segment per chunk, so torch replays random
    state and mixed precision. BatchNorm in training mode normalises by the chunk.

    Args:
        encode: maps inputs ``(b, …)`` to embeddings ``(b, D)``.
        inputs: tensors of B rows each.
        chunk_size: rows per chunk; 0 for all at once, with nothing encoded twice.
        network: the network of ``encode``; only the first pass updates its BatchNorm statistics.

    Returns:
        ``(B, D)``. On one process ``backward`` must follow; ``torch.autograd.grad`` cannot take its gradients.
    """
    rows = len(inputs[0])
    if chunk_size == 0 or rows <= chunk_size:
        return encode(*inputs)
    chunks = list(zip(*(torch.split(tensor, chunk_size) for tensor in inputs), strict=True))
    if not torch.is_grad_enabled():
        return torch.cat([encode(*chunk) for chunk in chunks])

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(network)

    if is_distributed():
        # DDP and FSDP wait for the gradient of all chunks together.
        return torch.cat([checkpoint(encode, *chunk, use_reentrant=False, context_fn=contexts) for chunk in chunks])

    def again(_: torch.Tensor, *chunk: torch.Tensor) -> torch.Tensor:
        with contexts()[torch.is_grad_enabled()]:  # without gradients in the first pass
            return encode(*chunk)

    # Each chunk adds to the gradients when it is done; in one graph all would be summed in further memory first.
    starts = torch.zeros((), device=inputs[0].device, requires_grad=True)
    return torch.cat([checkpoint(again, starts, *chunk, use_reentrant=True) for chunk in chunks])


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Leave running means and variances unchanged in the second pass."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.training]
    for norm, _, _ in kept:
        # With a momentum of 0 a batch changes nothing; the counter is detached meanwhile.
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, counter in kept:
            norm.momentum = momentum
            norm.num_batches_tracked = counter
