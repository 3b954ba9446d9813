from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datamodules.loading.dataset import received, to_be_sent

N = 4


def collate(samples: list[int]) -> Any:
    ids = torch.tensor(samples)
    made = {
        "image": ids[:, None, None].expand(-1, 300, 300).to(torch.uint8),
        "sample_id": ids,
        "is_padding": ids > 2,
        "mix": {"lam": ids.float() / 2, "partner": ids.flip(0)},
        "caption": [str(number) for number in samples],
    }
    return to_be_sent(made)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_come_as_they_were(workers: int) -> None:
    (sent,) = DataLoader(range(N), batch_size=N, num_workers=workers, collate_fn=collate)  # type: ignore[arg-type]
    assert isinstance(sent["image"], torch.Tensor)
    assert isinstance(sent["mix"]["lam"], np.ndarray) == bool(workers)
    batch = received(sent)
    assert batch["image"][2].unique().tolist() == [2]
    assert batch["sample_id"].tolist() == [0, 1, 2, 3]
    assert batch["is_padding"].dtype == torch.bool
    assert torch.equal(batch["mix"]["lam"], torch.tensor([0.0, 0.5, 1.0, 1.5]))
    assert batch["mix"]["partner"].tolist() == [3, 2, 1, 0]
    assert batch["caption"] == ["0", "1", "2", "3"]
    batch["sample_id"][0] = 7
    assert batch["sample_id"].tolist() == [7, 1, 2, 3]
