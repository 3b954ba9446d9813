"""What all DataModules share: tasks, splits, checks before training, and loaders whose batches are counted.

A data set is one subclass that says what its samples are (``load_table``) and, where its pictures are not files, how
to read one (``read_image``). Everything else is here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from datamodules import images
from datamodules.captions import CaptionMode, Texts
from datamodules.dataset import Collate, CountedLoader, ImageDataset
from datamodules.loaders import eval_loader, train_loader, train_sampler
from datamodules.options import (
    AugmentOptions,
    CheckOptions,
    ImageOptions,
    LoaderOptions,
    complete_augment,
    complete_checks,
    complete_image,
    complete_loader,
)
from datamodules.prompts import PromptOptions, class_prompts
from datamodules.record import record_of
from datamodules.samplers import EvalSampler
from datamodules.schema import LABEL_TASK, UserError
from datamodules.table import SPLITS, SampleTable, table_error
from datamodules.transforms import eval_transform, learns_colour, train_transform

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.verification import Verification


class ImageDataModule(LightningDataModule):
    """Base of all data sets of pictures with labels.

    A subclass takes its own arguments first, passes these on, and implements ``load_table``. What depends on the
    table only (``tasks``, ``num_classes``, ``class_names``, ``class_counts``, ``image_size``) is there from
    construction on, so that the command line can link it into the model.

    Batches are :class:`~datamodules.schema.Batch`. Order and augmentation are functions of (seed, epoch, sample), so
    they depend neither on the number of workers nor on where a run was interrupted.

    Args:
        image: size, crop and interpolation of the pictures.
        augment: augmentation of the training pictures; none by default.
        loader: batch size, workers and sampling.
        checks: what to do about unreadable pictures and leaks between the splits.
        seed: of order, sampling and augmentation.
        prompts: texts for the classes; where given also the captions, which else are the table's own, if it has some.
        caption: which of several captions, or of several prompts, training sees: first, random (one drawn each epoch)
            or all (of captions; an epoch then has all pairs).
    """

    generated: ClassVar[bool] = False
    """True where pictures are computed, so that they can be neither corrupt nor duplicates by accident."""

    def __init__(
        self,
        image: ImageOptions | None = None,
        augment: AugmentOptions | None = None,
        loader: LoaderOptions | None = None,
        checks: CheckOptions | None = None,
        seed: int = 0,
        prompts: PromptOptions | None = None,
        caption: CaptionMode = "random",
    ) -> None:
        super().__init__()
        # Lightning walks up through the constructors, so the subclass's own arguments are saved as well.
        self.save_hyperparameters()
        self.image_options = complete_image(image)
        self.loader_options = complete_loader(loader)
        self.check_options = complete_checks(checks)
        complete_augment(augment, hue_safe=False)  # a mistake is told now, not after the table was read
        self._augment = augment
        self.seed = seed
        self.prompts = prompts
        self.caption_mode = caption
        class_prompts(prompts, [])  # likewise
        self._table: SampleTable | None = None
        self._texts: Texts | None = None
        self._bad: dict[int, str] | None = None
        self._content: NDArray[np.uint8] | None = None

    def load_table(self) -> SampleTable:
        """Reads the data set's table. Called once a process, the first time that the table is needed.

        Raises:
            UserError: where the data are missing or the table has mistakes.
        """
        raise TypeError(f"{type(self).__name__} must define load_table()")

    def read_image(self, index: int) -> torch.Tensor:
        """Reads one picture; to be overridden where pictures are not files.

        Args:
            index: row of the table.

        Returns:
            uint8 ``(3, H, W)``, RGB, in the picture's own size.

        Raises:
            ImageError: where the picture cannot be read.
        """
        return images.read_image(self.table.source(index))

    @property
    def table(self) -> SampleTable:
        """The table of all samples, read when first needed."""
        if self._table is None:
            try:
                self._table = self.load_table()
            except AttributeError as error:
                # Inside a property an AttributeError reads as "no such attribute", and the CLI would link None.
                raise RuntimeError(f"{type(self).__name__}.load_table(): {error}") from error
        return self._table

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Class names of each task in the order of the indices; the main task first."""
        return self.table.tasks

    @property
    def texts(self) -> Texts:
        """Which text goes with which sample."""
        if self._texts is None:
            self._texts = Texts(self.table, self.prompts, self.caption_mode, self.seed)
        return self._texts

    @property
    def class_names(self) -> list[str]:
        """Class names of the main task; none for data without labels."""
        return self.tasks.get(LABEL_TASK, [])

    @property
    def class_prompts(self) -> list[list[str]]:
        """For each class the texts that stand for it."""
        return self.texts.class_prompts

    @property
    def chunk_size(self) -> int:
        """Samples that a dual encoder encodes at a time; 0 for the whole training batch."""
        batch_size = self.loader_options["batch_size"]
        return batch_size if self.loader_options["contrastive_batch_size"] > batch_size else 0

    def training_texts(self) -> list[str]:
        """Distinct captions of the train split and all class prompts, to train a tokenizer on."""
        return self.texts.training_texts(self.split_indices("train"))

    @property
    def num_classes(self) -> int:
        """Number of classes of the main task."""
        return len(self.class_names)

    @property
    def class_counts(self) -> dict[str, list[int]]:
        """For each task the number of training samples of each class, as the table has them."""
        return self.table.class_counts("train")

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.image_options["size"]

    @property
    def augment_options(self) -> AugmentOptions:
        """The augmentation as applied: preset filled in, its hue jitter off where a colour is to be learned."""
        return complete_augment(self._augment, hue_safe=learns_colour(self.tasks))

    def prepare_data(self) -> None:
        """Reads every picture once and looks for leaks between the splits; the result is cached on disk.

        Raises:
            UserError: for unreadable pictures (unless they are to be skipped) and leaks that are not allowed.
        """
        from datamodules.audit import refuse_leaks

        refuse_leaks(self, self._verify())

    def setup(self, stage: str | None = None) -> None:
        """Leaves out the unreadable pictures, on every process."""
        self._verify()

    def split_indices(self, split: str) -> NDArray[np.int64]:
        """Rows of a split in the table's order without the skipped ones, int64."""
        if self._bad is None:
            self._verify()
        indices = self.table.split_indices(split)
        return indices[~np.isin(indices, list(self._bad or {}))]

    def dataset(self, split: str, *, augmented: bool = False) -> ImageDataset:
        """The samples of a split.

        Args:
            split: train, val or test.
            augmented: whether pictures get the training augmentation; else the evaluation transform.
        """
        transform: Callable[[torch.Tensor], torch.Tensor]
        if augmented:
            transform = train_transform(self.image_options, self._augment, hue_safe=learns_colour(self.tasks))
        else:
            transform = eval_transform(self.image_options)
        rows = self.split_indices(split)
        read = self._reader(rows, self._augment if augmented else None)
        # In training a picture may come several times, with other captions; in evaluation it comes once.
        rows, numbers = self.texts.pairs(rows) if augmented else (rows, None)
        return ImageDataset(rows, read, transform, self.seed, numbers)

    def train_dataloader(self) -> CountedLoader:
        """Augmented training batches.

        Raises:
            UserError: where there is no training batch.
        """
        dataset = self.dataset("train", augmented=True)
        if not len(dataset):
            raise UserError(f"{self.table.origin}: the train split is empty; give it samples")
        augment = self.augment_options
        collate = Collate(self.table, self.seed, texts=self.texts, mixup=augment["mixup"], cutmix=augment["cutmix"])
        sampler = train_sampler(dataset, self.table, self.texts, self.loader_options, self.seed, *self._place())
        return train_loader(dataset, sampler, collate, self.loader_options)

    def val_dataloader(self) -> CountedLoader:
        """Validation batches in the table's order."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> CountedLoader:
        """Test batches in the table's order."""
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> CountedLoader:
        """All samples of the test split."""
        return self.eval_dataloader("test")

    def eval_dataloader(self, split: str) -> CountedLoader:
        """Batches of any split with the evaluation transform, in the table's order.

        Raises:
            UserError: where the split is empty.
        """
        dataset = self.dataset(split)
        if not len(dataset):
            raise UserError(f"{self.table.origin}: the {split} split is empty; choose another division by data split")
        collate = Collate(self.table, self.seed, texts=self.texts, evaluation=True)
        return eval_loader(dataset, EvalSampler(len(dataset), *self._place()), collate, self.loader_options)

    def sample_names(self) -> list[str]:
        """Stable names of all samples, indexed by ``sample_id``."""
        return [str(name) for name in self.table.names.to_pylist()]

    def group_names(self) -> list[str]:
        """Names of all samples' groups, indexed by ``sample_id``."""
        return [str(group) for group in self.table.groups.to_pylist()]

    def data_record(self) -> dict[str, Any]:
        """What the run record says of the data: fingerprint, counts, unseen values and skipped pictures."""
        kept = {split: self.split_indices(split) for split in SPLITS}
        return {"data": type(self).__name__, **record_of(self.table, kept, self._bad or {})}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: their fingerprint. Place and epoch are the loaders' to keep."""
        return {"fingerprint": self.table.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warns where training is resumed on other data than those of the checkpoint."""
        resumes = self.trainer is not None and self.trainer.state.fn == "fit"
        if resumes and state_dict["fingerprint"] != self.table.fingerprint():
            rank_zero_warn(f"{self.table.origin}: the data have changed since the checkpoint; the run is not the same")

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes that are spawned get a pickled copy, which needs no trainer.
        return {**self.__dict__, "trainer": None}

    def _verify(self) -> Verification | None:
        """Verifies the pictures (at once where that was done before), notes the bad ones; None for generated data."""
        if self.generated:
            self._bad = {}
            return None
        from datamodules.verification import verify

        verification = verify(self)
        if verification.bad and self.check_options["on_bad_image"] == "error":
            problems = [(int(self.table.rows[index]), reason) for index, reason in verification.bad.items()]
            way_out = "mend or remove these pictures, or set data checks.on_bad_image: skip"
            raise table_error(self.table.origin, problems, way_out)
        self._bad, self._content = dict(verification.bad), verification.content
        return verification

    def _reader(self, rows: NDArray[np.int64], augment: AugmentOptions | None) -> Callable[[int], torch.Tensor]:
        """What reads pictures of these rows; generated ones have no need of a cache on disk."""
        if self._content is None:
            return self.read_image
        from datamodules.readers import picture_reader

        return picture_reader(self, rows, self._content, augment)

    def _place(self) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
