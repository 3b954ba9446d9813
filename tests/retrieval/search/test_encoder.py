"""Queries are encoded as the gallery's images were; ``test_search_command`` has dual encoders and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.loading.decode import read_image
from datamodules.loading.transforms import eval_transform
from lightning_modules.checkpoint import load_task
from retrieval.gallery import Gallery
from retrieval.schema import identity_of
from retrieval.search.searcher import load_encoder
from tests.support.models import TinyData, tiny_multitask, tiny_trainer
from vitrail.errors import UserError


def test_a_image_becomes_what_a_multi_task_model_puts_into_its_gallery(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.fit(tiny_multitask(), TinyData())
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(path)
    task: Any = load_task(path)
    options: Any = {"size": 32, "crop_fraction": 0.8, "interpolation": "bilinear"}
    gallery = Gallery.create(str(tmp_path / "run" / "gallery"), identity_of(task, "gone", options, []))
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(photo)

    image = eval_transform(options)(read_image(photo))[None]
    batch = {"image": image, "label": torch.zeros(1, dtype=torch.int64), "sample_id": torch.zeros(1)}
    with torch.inference_mode():
        expected = task.predict_step({**batch, "attributes": {"type": batch["label"]}}, 0)["image_embedding"]
    # The run is named wrongly; the gallery stands in it.
    encoder = load_encoder(gallery)
    np.testing.assert_allclose(encoder.encode_image(photo), expected[0].numpy(), atol=1e-6)
    with pytest.raises(UserError, match="MultiTaskClassifier does not encode texts; use --ranker text"):
        encoder.encode_texts(["a text"])
    with pytest.raises(UserError, match="MultiTaskClassifier does not encode texts; use --ranker text"):
        encoder.reading("a text")
