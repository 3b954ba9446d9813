"""The model that made a gallery's vectors, found again to encode queries: from its run, or as the user names it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from retrieval.schema import ModelIdentity
from retrieval.search.searcher import Reading
from vitrail.errors import UserError
from vitrail.files import local_folder
from vitrail.runs import Run

if TYPE_CHECKING:
    from lightning_modules.base import VisionTask
    from retrieval.gallery import Gallery
    from vitrail.types import InputOptions


class QueryEncoder:
    """Encodes texts and images as the gallery's were.

    Args:
        task: with the weights that made the gallery, on the device to compute on.
        identity: of the gallery; says how images are made.
    """

    def __init__(self, task: VisionTask, identity: ModelIdentity) -> None:
        self._task, self._identity = task, identity

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """See ``Encoder``."""
        import torch

        from lightning_modules.dual_encoder import DualEncoder

        if not isinstance(self._task, DualEncoder):
            raise UserError(f"{type(self._task).__name__} does not encode texts; use --ranker tfidf")
        with torch.inference_mode():
            vectors: NDArray[np.float32] = self._task.encode_text(texts).float().cpu().numpy()
        return vectors

    def encode_image(self, path: Path) -> NDArray[np.float32]:
        """See ``Encoder``; the image goes the way of every evaluation image.

        Raises:
            UserError: if it cannot be read.
        """
        import torch
        import torch.nn.functional as F

        from datamodules.loading.decode import read_image
        from datamodules.loading.transforms import eval_transform
        from lightning_modules.dual_encoder import DualEncoder

        made = cast("InputOptions", self._identity.input_options)
        pixels = read_image(path, value_range=made.get("value_range", "auto"))
        image = eval_transform(made)(pixels)[None].to(self._task.device)
        with torch.inference_mode():
            if isinstance(self._task, DualEncoder):
                vector = self._task.encode_image(image)
            else:
                vector = F.normalize(self._task.image_features(image).float(), dim=-1)
        found: NDArray[np.float32] = vector[0].float().cpu().numpy()
        return found

    def reading(self, text: str) -> Reading:
        """See ``Encoder``."""
        from lightning_modules.dual_encoder import DualEncoder

        if not isinstance(self._task, DualEncoder) or self._task.towers.tokenizer is None:
            raise UserError(f"{type(self._task).__name__} does not encode texts; use --ranker tfidf")
        return Reading(*self._task.towers.tokenizer.reading(text))


def load_encoder(
    gallery: Gallery, run: Path | None = None, checkpoint: Path | None = None, device: str = "cpu"
) -> QueryEncoder:
    """The model whose weights made a gallery.

    Args:
        gallery: says which weights and which run.
        run: where the run's directory is now, if it was moved.
        checkpoint: the very file, instead of a run.
        device: to compute on.

    Raises:
        UserError: if it is not there, or has other weights.
    """
    from lightning_modules.checkpoint import load_task

    files = [checkpoint] if checkpoint is not None else _checkpoints(gallery, run)
    for file in files:
        task = load_task(file, map_location=device)
        if task.weights_digest() == gallery.identity.weights:
            return QueryEncoder(task, gallery.identity)
    raise UserError(
        f"{files[0]}: has other weights than those that made {gallery.uri}, so its vectors do not compare; name the "
        "right one with --run or --checkpoint, or make a new gallery with this one"
    )


def _checkpoints(gallery: Gallery, run: Path | None) -> list[Path]:
    """Checkpoints of the run that may have made the gallery, the likeliest first."""
    recorded = Path(gallery.identity.run)
    # A gallery that stands inside of its run may have been moved with it.
    place = local_folder(gallery.uri)
    folders = [run] if run is not None else [recorded, *([place.parent] if place else [])]
    for folder in folders:
        files = [folder / name for name in (Run.BEST, Run.LAST)]
        if there := [file for file in files if file.is_file()]:
            return there
    if run is not None:
        raise UserError(f"--run {run}: holds no checkpoints/best.ckpt; name the run that made {gallery.uri}")
    raise UserError(
        f"{gallery.uri}: its run {gallery.identity.run or '(unknown)'} has no checkpoints any more; say where it is "
        "with --run or --checkpoint, or search without the model (--like, --ranker tfidf)"
    )
