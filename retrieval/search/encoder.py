"""The model that made a gallery's vectors, loaded again to encode queries: from its run, or as the user names it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from retrieval.schema import ModelIdentity, shortened
from vitrail.errors import UserError
from vitrail.files import local_folder
from vitrail.runs import Run, load_checkpoint, prepared_image
from vitrail.types import TextReading

if TYPE_CHECKING:
    from retrieval.gallery import Gallery


class QueryEncoder:
    """Encodes texts and images as the gallery's were; an ``Encoder`` of ``retrieval.search.searcher``.

    Args:
        task: a ``lightning_modules.VisionTask`` with the weights that made the gallery, on the device to compute on.
        identity: of the gallery, with the options by which images are prepared.
    """

    def __init__(self, task: Any, identity: ModelIdentity) -> None:
        self._task, self._identity = task, identity

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """See ``Encoder``."""
        import torch

        self._check_texts()
        with torch.inference_mode():
            vectors: NDArray[np.float32] = self._task.encode_text(texts).float().cpu().numpy()
        return shortened(vectors, self._identity.dim)

    def encode_image(self, path: Path) -> NDArray[np.float32]:
        """See ``Encoder``; raises ``UserError`` if the image cannot be read."""
        import torch
        import torch.nn.functional as F

        if path.is_dir():
            raise UserError(f"--image {path}: is a folder; name a file")
        image = prepared_image(path, self._identity.input_options)
        encode = self._task.encode_image if self._identity.encodes_text else self._task.image_features
        with torch.inference_mode():
            features = encode(image[None].to(self._task.device)).float()
            vector = features if self._identity.encodes_text else F.normalize(features, dim=-1)
        found: NDArray[np.float32] = shortened(vector.cpu().numpy(), self._identity.dim)[0]
        return found

    def reading(self, text: str) -> TextReading:
        """See ``Encoder``."""
        self._check_texts()
        reading: TextReading = self._task.towers.tokenizer.reading(text)
        return reading

    def _check_texts(self) -> None:
        if not self._identity.encodes_text or self._task.towers.tokenizer is None:
            raise UserError(f"{type(self._task).__name__} does not encode texts; use --ranker text")


def load_encoder(
    gallery: Gallery, run: Path | None = None, checkpoint: Path | None = None, device: str = "cpu"
) -> QueryEncoder:
    """Load the model whose weights made a gallery.

    Args:
        gallery: names the weights and the run.
        run: where the run's directory is now, if it was moved.
        checkpoint: the very file, instead of a run.
        device: to compute on.

    Raises:
        UserError: if it does not exist, or has other weights.
    """
    files = [checkpoint] if checkpoint is not None else _checkpoints(gallery, run)
    for file in files:
        task = load_checkpoint(file, device)
        if task.weights_digest() == gallery.identity.weights:
            return QueryEncoder(task, gallery.identity)
    raise UserError(
        f"{files[0]}: has other weights than those that made {gallery.uri}, so its vectors do not compare; name the "
        "right one with --run or --checkpoint, or make a new gallery with this one"
    )


def _checkpoints(gallery: Gallery, run: Path | None) -> list[Path]:
    """Checkpoints of the run that may have made the gallery, the most likely first."""
    recorded = Path(gallery.identity.run)
    # A gallery inside of its run may have been moved with it.
    place = local_folder(gallery.uri)
    folders = [run] if run is not None else [recorded, *([place.parent] if place else [])]
    for folder in folders:
        files = [folder / name for name in (Run.BEST, Run.LAST)]
        if there := [file for file in files if file.is_file()]:
            return there
    if run is not None:
        raise UserError(f"--run {run}: has no checkpoints/best.ckpt; name the run that made {gallery.uri}")
    raise UserError(
        f"{gallery.uri}: its run {gallery.identity.run or '(unknown)'} has no checkpoints any more; name its place "
        "with --run or --checkpoint, or search without the model (--like, --ranker text)"
    )
