from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.contrastive import LogitScale, Pairs, encode_in_chunks, info_nce

Gradients = dict[str, torch.Tensor]


class Pair(nn.Module):
    """Two encoders with dropout and a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (
            nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 4)) for _ in range(2)
        )
        self.temperature = LogitScale(with_bias=False)


def inputs(rows: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 6, generator=generator)


def encode(network: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return F.normalize(network(rows), dim=-1)


def gradients(pair: Pair, image: torch.Tensor, text: torch.Tensor) -> tuple[float, Gradients]:
    loss = info_nce(Pairs(image, text, torch.arange(len(image))), pair.temperature()[0])
    pair.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss), {name: p.grad.clone() for name, p in pair.named_parameters() if p.grad is not None}


def cached(pair: Pair, chunk_size: int) -> tuple[float, Gradients]:
    torch.manual_seed(7)
    image, text = inputs()
    return gradients(
        pair,
        encode_in_chunks(lambda rows: encode(pair.image, rows), [image], chunk_size, pair),
        encode_in_chunks(lambda rows: encode(pair.text, rows), [text], chunk_size, pair),
    )


def at_once(pair: Pair, chunk_size: int) -> tuple[float, Gradients]:
    """One large batch with everything kept in memory, whose dropout is drawn in the same order."""
    torch.manual_seed(7)
    image, text = inputs()
    embedded = [
        torch.cat([encode(network, chunk) for chunk in rows.split(chunk_size)])  # type: ignore[no-untyped-call]
        for network, rows in ((pair.image, image), (pair.text, text))
    ]
    return gradients(pair, *embedded)


def assert_same(one: tuple[float, Gradients], other: tuple[float, Gradients]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        error = (gradient - other[1][name]).norm() / other[1][name].norm()
        assert float(error) <= 1e-5, name


@pytest.mark.parametrize("chunk_size", [1, 5, 8, 23])
def test_with_dropout_loss_and_gradients_are_those_of_the_large_batch(chunk_size: int) -> None:
    pair = Pair()
    assert_same(cached(pair, chunk_size), at_once(pair, chunk_size))
    assert "temperature.log_scale" in cached(pair, chunk_size)[1]


@pytest.mark.parametrize("chunk_size", [1, 7, 12])
def test_without_dropout_the_size_of_the_chunks_does_not_matter(chunk_size: int) -> None:
    pair = Pair().eval()
    assert_same(cached(pair, chunk_size), at_once(pair, 24))


def test_small_batches_with_accumulated_gradients_would_be_another_loss() -> None:
    pair = Pair().eval()
    image, text = inputs()
    half = gradients(pair, encode(pair.image, image[:12]), encode(pair.text, text[:12]))
    assert half[0] < at_once(pair, 24)[0] - 0.3


def test_encoding_twice_moves_running_statistics_once() -> None:
    norm = nn.BatchNorm1d(6)
    peer = nn.BatchNorm1d(6)
    rows = inputs()[0]
    encode_in_chunks(norm, [rows], 8, norm).sum().backward()  # type: ignore[no-untyped-call]
    for chunk in rows.split(8):  # type: ignore[no-untyped-call]
        peer(chunk)
    torch.testing.assert_close(norm.running_mean, peer.running_mean)
    torch.testing.assert_close(norm.running_var, peer.running_var)
    assert int(norm.num_batches_tracked or 0) == 3
    assert norm.momentum == 0.1


def test_without_gradients_nothing_is_encoded_twice() -> None:
    calls: list[int] = []

    def noted(rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        return rows

    with torch.no_grad():
        encoded = encode_in_chunks(noted, [inputs()[0]], 10, nn.Identity())
    assert calls == [10, 10, 4]
    assert torch.equal(encoded, inputs()[0])
