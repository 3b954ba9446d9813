from __future__ import annotations

import torch
import torch.nn.functional as F

from retrieval.fill import Chunk


def test_what_the_model_does_not_predict_is_null() -> None:
    chunk = Chunk({"class": ["mug", "cap", "bag"]}, thumbnails=False)
    logits = torch.tensor([[0.0, 3, 1], [2, 2, 0], [1, 1, 1]])
    outputs = {
        # Rows come in the order of their ids, whatever the order of the batch.
        "sample_id": torch.tensor([7, 3, 5]),
        "image_embedding": F.normalize(torch.ones(3, 4), dim=1),
        "logits": {"class": logits},
    }
    chunk.add(outputs, {}, "model")
    images = chunk.encoded().images
    assert images.column("sample_id").to_pylist() == [3, 5, 7]
    assert images.column("predicted_class").to_pylist() == [None, None, "cap"]
    expected = logits.softmax(dim=1).amax(dim=1)[[1, 2, 0]]
    torch.testing.assert_close(torch.tensor(images.column("confidence_class").to_pylist()), expected)
