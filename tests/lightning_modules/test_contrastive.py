from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from lightning_modules import contrastive
from lightning_modules.contrastive import (
    ContrastiveObjective,
    LogitScale,
    Pairs,
    encode_in_chunks,
    info_nce,
    label_aware_info_nce,
    sigmoid_contrastive,
)
from lightning_modules.options import ContrastiveOptions, LogitScaleOptions, checked
from tests.support.models import pair_batch, tiny_pair
from vitrail.errors import UserError
from vitrail.types import Batch


def some_pairs(count: int = 7, ids: list[int] | None = None, *, dtype: torch.dtype = torch.float64) -> Pairs:
    generator = torch.Generator().manual_seed(1)
    image, text = (F.normalize(torch.randn(count, 5, generator=generator, dtype=dtype), dim=-1) for _ in range(2))
    positive_id = torch.tensor(ids) if ids else torch.arange(count)
    return Pairs(image.requires_grad_(), text.requires_grad_(), positive_id)


def test_info_nce_is_that_of_open_clip_and_of_transformers() -> None:
    from open_clip.loss import ClipLoss
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    pairs, scale = some_pairs(dtype=torch.float32), torch.tensor(20.0)
    ours = info_nce(pairs, scale)
    assert float(ours) == pytest.approx(float(ClipLoss()(pairs.image, pairs.text, scale)), abs=1e-6)
    assert float(ours) == pytest.approx(
        float(image_text_contrastive_loss(scale * pairs.text @ pairs.image.T)), abs=1e-6
    )


def test_the_sigmoid_loss_is_that_of_open_clip() -> None:
    from open_clip.loss import SigLipLoss

    pairs, scale, bias = some_pairs(dtype=torch.float32), torch.tensor(10.0), torch.tensor(-10.0)
    peer = SigLipLoss()(pairs.image, pairs.text, scale, bias)
    assert float(sigmoid_contrastive(pairs, scale, bias)) == pytest.approx(float(peer), abs=1e-6)


def test_without_repeated_ids_the_label_aware_loss_is_the_plain_one() -> None:
    pairs, scale = some_pairs(), torch.tensor(20.0)
    torch.testing.assert_close(label_aware_info_nce(pairs, scale), info_nce(pairs, scale))


def test_the_label_aware_loss_averages_over_all_positives() -> None:
    pairs, scale = some_pairs(5, [3, 8, 3, 3, 8]), torch.tensor(4.0)
    expected = 0.0
    for one, other in ((pairs.image, pairs.text), (pairs.text, pairs.image)):
        log_share = np.log(np.exp(4.0 * (one @ other.T).detach().numpy()))
        log_share = log_share - np.log(np.exp(log_share).sum(axis=1, keepdims=True))
        for row, positives in enumerate(([0, 2, 3], [1, 4], [0, 2, 3], [0, 2, 3], [1, 4])):
            expected -= log_share[row, positives].mean() / 10
    assert float(label_aware_info_nce(pairs, scale)) == pytest.approx(expected)


def test_pairs_that_share_an_id_are_positives_of_the_sigmoid_loss() -> None:
    pairs = some_pairs(4, [0, 1, 0, 2])
    logits = (5.0 * pairs.image @ pairs.text.T - 1.0).detach().numpy()
    sign = np.where(np.equal.outer([0, 1, 0, 2], [0, 1, 0, 2]), 1, -1)
    expected = np.log1p(np.exp(-sign * logits)).sum() / 4
    assert float(sigmoid_contrastive(pairs, torch.tensor(5.0), torch.tensor(-1.0))) == pytest.approx(expected)


CASES: dict[str, dict[str, Any]] = {
    "info_nce": {"loss": "info_nce"},
    "label_aware": {"loss": "label_aware"},
    "sigmoid": {"loss": "sigmoid"},
    "cached": {"loss": "label_aware", "chunk_size": 2},
    "in blocks": {"loss": "info_nce", "loss_options": {"matryoshka": [8], "hard_negatives": 0.5}},
}
IDS = [0, 1, 2, 3, 4, 6, 9, 12]


class Step(nn.Module):
    """The training step as DDP wants it, a forward."""

    def __init__(self, folder: Path, changes: dict[str, Any]) -> None:
        super().__init__()
        self.task = tiny_pair(folder, **changes)
        texts = [f"number {index} of a rose or tulip or daisy or iris" for index in IDS]
        self.task.towers.tokenizer = self.task.towers.train_tokenizer(texts)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.task._shared_step(batch, "train")[0]


def gradients(step: nn.Module, module: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    loss = step(batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def on_one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own = pair_batch(IDS[rank * 4 : rank * 4 + 4])
    found = {}
    for name, changes in CASES.items():
        contrastive.LOGITS_AT_A_TIME = 16 if name == "in blocks" else 2**20
        step = Step(Path(folder, "clip"), changes)
        found[name] = gradients(DistributedDataParallel(step), step, own)
        dist.barrier()
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, torch.Tensor]]]]:
    folder = tmp_path_factory.mktemp("two")
    Step(folder / "clip", {})  # writes the configuration before both read it
    # Forked processes need not import everything again; where there is an accelerator they may not be forked.
    method = "spawn" if torch.accelerator.is_available() else "fork"
    start_processes(on_one_of_two_processes, args=(str(folder),), nprocs=2, start_method=method)  # type: ignore[no-untyped-call]
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradient_of_the_joined_batch(case: str, of_two: Any) -> None:
    folder, ranks = of_two
    step = Step(folder / "clip", {**CASES[case], "chunk_size": 0})
    expected = gradients(step, step, pair_batch(IDS))
    losses = [rank[case].pop("loss") for rank in ranks]
    torch.testing.assert_close(torch.stack(losses).mean(), expected.pop("loss"), rtol=1e-5, atol=0)
    assert "task.objective.temperature.log_scale" in expected
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for rank in ranks:
        assert rank[case].keys() == expected.keys()
        for name, gradient in expected.items():
            error = float((rank[case][name] - gradient).norm())
            # Relative to itself, or to the largest where it is nothing but rounding.
            assert error <= 1e-5 * max(float(gradient.norm()), 1e-3 * scale), name


@pytest.mark.parametrize(("with_bias", "initial"), [(False, (1 / 0.07, 0.0)), (True, (10.0, -10.0))])
def test_the_initial_scale_and_bias_are_those_of_clip_and_siglip(with_bias: bool, initial: tuple[float, float]) -> None:
    assert [float(value) for value in LogitScale(with_bias=with_bias)()] == pytest.approx(initial)


def test_a_trainable_scale_is_clamped_at_a_hundred_and_can_decrease_again() -> None:
    logit_scale = LogitScale(LogitScaleOptions(scale=99.0), with_bias=False)
    optimizer = torch.optim.SGD(logit_scale.parameters(), lr=1.0)
    for direction in (-1.0, 1.0):
        optimizer.zero_grad()
        (direction * logit_scale()[0]).backward()
        assert float(logit_scale.log_scale.grad) != 0  # type: ignore[arg-type]  # it has one
        optimizer.step()
        logit_scale.clamp()
        if direction < 0:
            assert float(logit_scale.log_scale) == pytest.approx(math.log(100))
    assert float(logit_scale()[0]) < 100


def test_a_fixed_scale_is_no_parameter_but_is_saved() -> None:
    logit_scale = LogitScale(LogitScaleOptions(scale=math.e, trainable=False), with_bias=True)
    assert not list(logit_scale.parameters())
    assert set(logit_scale.state_dict()) == {"log_scale", "bias"}
    assert float(logit_scale()[0]) == pytest.approx(math.e)


def test_pretrained_values_are_loaded_unless_the_options_set_others() -> None:
    given = nn.Parameter(torch.tensor([math.log(50.0)])), nn.Parameter(torch.tensor([-3.0]))
    ours, theirs = LogitScale(LogitScaleOptions(scale=7.0), with_bias=True), LogitScale(with_bias=True)
    for logit_scale in (ours, theirs):
        logit_scale.load_pretrained(*given)
    assert float(ours()[0]) == pytest.approx(7.0)
    assert float(theirs()[0]) == pytest.approx(50.0)
    assert float(theirs()[1]) == -3.0


@pytest.mark.parametrize("trainable", [True, False])
def test_a_pretrained_scale_beyond_a_hundred_is_not_cut(trainable: bool) -> None:
    """SigLIP's: a pair of cosine .13 is one of p = .91, not of .52."""
    logit_scale = LogitScale(LogitScaleOptions(trainable=trainable), with_bias=True)
    logit_scale.load_pretrained(torch.tensor(4.765), torch.tensor([-12.93]))
    logit_scale.clamp()
    scale, bias = (float(value) for value in logit_scale())
    assert torch.equal(logit_scale.log_scale, torch.tensor(4.765))
    assert bias == pytest.approx(-12.93)
    assert 1 / (1 + math.exp(-(0.13 * scale + bias))) == pytest.approx(0.9108, abs=1e-3)
    with torch.no_grad():
        logit_scale.log_scale.add_(1.0)
    logit_scale.clamp()
    assert float(logit_scale()[0]) == pytest.approx(math.exp(4.765))


def test_a_maximum_below_the_pretrained_scale_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_scale: 100 is below .* 117\.331"):
        LogitScale(LogitScaleOptions(max_scale=100.0), with_bias=True).load_pretrained(torch.tensor(4.765), None)


@pytest.mark.parametrize("options", [{"tau": 1.0}, {"scale": 0.0}, {"scale": 200.0}, {"lr": -1.0}, {"bias": 1.0}])
def test_wrong_settings_are_refused(options: Any) -> None:
    with pytest.raises(UserError, match="logit_scale"):
        LogitScale(checked(LogitScaleOptions, options, "logit_scale"), with_bias=False)


def rows(count: int = 24) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chunk_size", [1, 5, 8, 23])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_chunks_have_the_loss_and_gradients_of_the_large_batch(chunk_size: int, dropout: float) -> None:
    network = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 4))
    found = []
    for cached in (True, False):
        torch.manual_seed(7)
        if cached:
            embedded = encode_in_chunks(network, [rows()], chunk_size, network)
        else:  # everything in memory, with dropout sampled in the same order
            embedded = torch.cat([network(chunk) for chunk in torch.split(rows(), chunk_size if dropout else 24)])
        unit = F.normalize(embedded, dim=-1)
        loss = info_nce(Pairs(unit, unit.flip(0), torch.arange(24)), torch.tensor(9.0))
        network.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        found.append([loss.detach(), *(parameter.grad for parameter in network.parameters())])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) <= 1e-5


def test_encoding_twice_moves_running_statistics_once() -> None:
    norm = nn.BatchNorm1d(6)
    peer = nn.BatchNorm1d(6)
    encode_in_chunks(norm, [rows()], 8, norm).sum().backward()  # type: ignore[no-untyped-call]
    for chunk in torch.split(rows(), 8):
        peer(chunk)
    torch.testing.assert_close(norm.running_mean, peer.running_mean)
    torch.testing.assert_close(norm.running_var, peer.running_var)
    assert int(norm.num_batches_tracked or 0) == 3
    assert norm.momentum == 0.1


def test_without_gradients_nothing_is_encoded_twice() -> None:
    calls: list[int] = []

    def noted(chunk: torch.Tensor) -> torch.Tensor:
        calls.append(len(chunk))
        return chunk

    with torch.no_grad():
        encoded = encode_in_chunks(noted, [rows()], 10, nn.Identity())
    assert calls == [10, 10, 4]
    assert torch.equal(encoded, rows())


LOSSES: dict[str, Any] = {
    "info_nce": info_nce,
    "label_aware": label_aware_info_nce,
    "hard_negatives": lambda pairs, scale: label_aware_info_nce(pairs, scale, hard_negatives=0.5),
    "sigmoid": lambda pairs, scale: sigmoid_contrastive(pairs, scale, torch.tensor(-3.0, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_blocks_of_logits_have_the_loss_and_gradients_of_all_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for logits in (2**20, 7 * 23):  # seven rows at a time
        monkeypatch.setattr("lightning_modules.contrastive.LOGITS_AT_A_TIME", logits)
        pairs, scale = some_pairs(23, [*range(12), *range(11)]), torch.tensor(9.0, dtype=torch.float64).requires_grad_()
        loss = LOSSES[name](pairs, scale)
        found.append([loss, *torch.autograd.grad(loss, [pairs.image, pairs.text, scale])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_large_batch_keeps_no_matrix_of_logits() -> None:
    """Counted: no tensor that autograd saves has as many numbers as all logits, which are computed in blocks."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(2048, 8, generator=generator), dim=-1).requires_grad_() for _ in range(2))
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = info_nce(Pairs(image, text, torch.arange(2048)), torch.tensor(10.0))
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    assert 0 < max(saved, default=0) < 2048 * 2048 / 4 or not saved


def test_hard_negatives_weigh_as_in_the_paper() -> None:
    pairs, scale, beta = some_pairs(5), torch.tensor(4.0), 0.7
    logits = (4.0 * pairs.image @ pairs.text.T).detach().numpy()
    expected = 0.0
    for matrix in (logits, logits.T):
        for row in range(5):
            others = np.delete(matrix[row], row)
            weights = 4 * np.exp(beta * others) / np.exp(beta * others).sum()
            positive = np.exp(matrix[row, row])
            expected -= np.log(positive / (positive + (weights * np.exp(others)).sum())) / 10
    assert float(label_aware_info_nce(pairs, scale, hard_negatives=beta)) == pytest.approx(expected)
    assert float(info_nce(pairs, scale, hard_negatives=beta)) == pytest.approx(expected)
    alike = some_pairs(3, [1, 1, 1])  # a row without negatives
    assert float(label_aware_info_nce(alike, scale, hard_negatives=beta)) == pytest.approx(
        float(label_aware_info_nce(alike, scale))
    )


def test_shorter_embeddings_are_trained_too() -> None:
    pairs = some_pairs(6, dtype=torch.float32)
    options = ContrastiveOptions(matryoshka=[2, 3])
    objective = ContrastiveObjective("info_nce", LogitScaleOptions(scale=10.0), options, 5)
    lengths = [
        Pairs(F.normalize(pairs.image[:, :d], dim=-1), F.normalize(pairs.text[:, :d], dim=-1), pairs.positive_id)
        for d in (5, 2, 3)
    ]
    expected = sum(float(info_nce(cut, torch.tensor(10.0))) for cut in lengths) / 3
    assert float(objective(pairs, joined=False)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match=r"loss_options.matryoshka: must be below the embeddings' 3; got 3"):
        ContrastiveObjective("info_nce", LogitScaleOptions(), options, 3)
    with pytest.raises(UserError, match=r"loss_options.hard_negatives: belongs to info_nce and label_aware"):
        ContrastiveObjective("sigmoid", LogitScaleOptions(), ContrastiveOptions(hard_negatives=1.0))
