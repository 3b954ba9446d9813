"""What all DataModules share: tasks, splits, checks before training, and loaders whose batches are counted.

A data set is one subclass that says what its samples are (``load_table``) and, where its images are not files, how
to read one (``read_image``). Everything else is here.

What is known of a data set before an image is read: its table, and what follows from it.

What the run record says of the data.

From a data set, a sampler and the options to a loader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DistributedSampler

from datamodules.captions import CaptionMode, PromptOptions, Texts, class_prompts
from datamodules.files.label_csv import count_files_left_out, left_out_text
from datamodules.loading import decode as images
from datamodules.loading.cache import SplitReaders
from datamodules.loading.dataset import Collate, CountedLoader, ImageDataset
from datamodules.loading.samplers import (
    DistinctSampler,
    EvalSampler,
    SampleKey,
    TrainSampler,
    inverse_frequency_weights,
)
from datamodules.loading.transforms import eval_transform, learns_colour, train_transform
from datamodules.options import (
    AugmentOptions,
    CheckOptions,
    ImageOptions,
    LoaderOptions,
    complete_augment,
    complete_checks,
    complete_image,
    complete_loader,
    is_random,
)
from datamodules.table import SPLITS, SampleTable, table_error
from vitrail.errors import UserError
from vitrail.types import DEFAULT_SEED, LABEL_TASK, MODEL_IMAGE_DEFAULTS, with_image_defaults

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from datamodules.checks.verify import Verification


class TableDataModule(LightningDataModule):
    """A data set with a table: tasks, classes, texts, names of samples and groups.

    Args:
        seed: of the choice of texts.
        prompts: texts for the classes; where given also the captions, which else are the table's own, if it has some.
        caption: which of several captions, or of several prompts, training sees.

    Raises:
        UserError: for prompts that are not as they should be.
    """

    def __init__(self, seed: int, prompts: PromptOptions | None, caption: CaptionMode) -> None:
        super().__init__()
        self.seed = seed
        self.prompts = prompts
        self.caption_mode = caption
        class_prompts(prompts, [])  # a mistake is told now, not after the table was read
        self._table: SampleTable | None = None
        self._texts: Texts | None = None

    def split_indices(self, split: str) -> NDArray[np.int64]:
        """Rows of a split that are used, in the table's order, int64."""
        raise TypeError(f"{type(self).__name__} must define split_indices()")

    def load_table(self) -> SampleTable:
        """Reads the data set's table. Called once a process, the first time that the table is needed.

        Raises:
            UserError: where the data are missing or the table has mistakes.
        """
        raise TypeError(f"{type(self).__name__} must define load_table()")

    @property
    def table(self) -> SampleTable:
        """The table of all samples, read when first needed."""
        if self._table is None:
            try:
                self._table = self.load_table()
            except AttributeError as error:
                # Inside a property an AttributeError reads as "no such attribute", and the CLI would link None.
                raise RuntimeError(f"{type(self).__name__}.load_table(): {error}") from error
            for note in self._table.notes:
                rank_zero_info(note)
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
    def own_captions(self) -> bool:
        """Whether evaluation batches hold captions of the data's own."""
        return self.texts.own

    def training_texts(self) -> list[str]:
        """Distinct captions of the train split and all class prompts, to train a tokenizer on."""
        return self.texts.training_texts(self.split_indices("train"))

    def evaluation_texts(self, split: str) -> list[str]:
        """All captions of a split, where the data set has captions of its own."""
        rows = self.split_indices(split).tolist()
        return [text for texts in self.texts.evaluation(rows) for text in texts] if self.texts.own else []

    @property
    def num_classes(self) -> int:
        """Number of classes of the main task."""
        return len(self.class_names)

    @property
    def class_counts(self) -> dict[str, list[int]]:
        """For each task the number of training samples of each class, as the table has them."""
        return self.table.class_counts("train")

    def sample_names(self) -> list[str]:
        """Stable names of all samples, indexed by ``sample_id``."""
        return [str(name) for name in self.table.names.to_pylist()]

    def group_names(self) -> list[str]:
        """Names of all samples' groups, indexed by ``sample_id``."""
        return [str(group) for group in self.table.groups.to_pylist()]


def record_of(table: SampleTable, kept: Mapping[str, NDArray[np.int64]], bad: Mapping[int, str]) -> dict[str, Any]:
    """Fingerprint, counts, unseen and missing values and skipped images, in types that JSON knows.

    Args:
        table: of all samples.
        kept: for each split int64 ``(n,)``, the rows that are used.
        bad: for each row that is skipped the reason.
    """
    return {
        "origin": table.origin,
        "fingerprint": table.fingerprint(),
        "samples": {split: len(rows) for split, rows in kept.items()},
        "groups": {split: len(np.unique(table.group_ids[rows])) for split, rows in kept.items()},
        "unseen": table.unseen,
        "missing": table.missing,
        "notes": table.notes,
        "class_counts": table.class_counts("train"),
        "skipped": [
            {"name": table.name(index), "row": int(table.rows[index]), "reason": reason}
            for index, reason in sorted(bad.items())
        ],
    }


def training_batch_size(options: LoaderOptions) -> int:
    """Samples of a training batch on each process."""
    return options["contrastive_batch_size"] or options["batch_size"]


def train_sampler(
    dataset: ImageDataset,
    table: SampleTable,
    texts: Texts,
    options: LoaderOptions,
    seed: int,
    rank: int,
    world_size: int,
) -> TrainSampler | DistinctSampler:
    """The order of training samples that the options ask for.

    Raises:
        UserError: where there is no task to balance on, or too few classes for a batch of different ones.
    """
    if options["sampling"] == "distinct":
        ids = torch.from_numpy(texts.positive_ids[dataset.indices])
        return DistinctSampler(ids, training_batch_size(options), seed, rank, world_size)
    weights = None
    if options["sampling"] == "balanced":
        task = options["balance_on"]
        if task not in table.tasks:
            raise UserError(f"data loader.balance_on: no task {task!r}; tasks are {', '.join(table.tasks)}")
        weights = inverse_frequency_weights(torch.from_numpy(table.targets[task][dataset.indices]))
    return TrainSampler(len(dataset), seed, rank, world_size, weights)


def train_loader(
    dataset: ImageDataset, sampler: DistributedSampler[SampleKey], collate: Collate, options: LoaderOptions
) -> CountedLoader:
    """Training batches.

    Raises:
        UserError: where only full batches are wanted and there is none.
    """
    batch_size = training_batch_size(options)
    if options["drop_last"] and len(sampler) < batch_size:
        raise UserError(
            f"data loader.drop_last: {len(sampler)} training samples a process do not fill one batch of "
            f"{batch_size}; lower loader.batch_size or set loader.drop_last: false"
        )
    # BatchNorm cannot normalise a batch of one.
    lone_image = len(sampler) > batch_size > 1 and len(sampler) % batch_size == 1
    return _loader(dataset, sampler, collate, options, batch_size, drop_last=options["drop_last"] or lone_image)


def eval_loader(
    dataset: ImageDataset, sampler: DistributedSampler[SampleKey], collate: Collate, options: LoaderOptions
) -> CountedLoader:
    """Evaluation batches."""
    return _loader(dataset, sampler, collate, options, options["batch_size"], drop_last=False)


def _loader(
    dataset: ImageDataset,
    sampler: DistributedSampler[SampleKey],
    collate: Collate,
    options: LoaderOptions,
    batch_size: int,
    drop_last: bool,
) -> CountedLoader:
    workers = options["num_workers"]
    return CountedLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        # Its own generator: else each epoch's loader would draw a seed from the global one.
        generator=torch.Generator().manual_seed(0),
    )


class ImageDataModule(TableDataModule):
    """Base of all data sets of images with labels.

    A subclass takes its own arguments first, passes these on, and implements ``load_table``. What depends on the
    table only (``tasks``, ``num_classes``, ``class_names``, ``class_counts``, ``image_size``) is there from
    construction on, so that the command line can link it into the model.

    Batches are :class:`~vitrail.types.Batch`. Order and augmentation are functions of (seed, epoch, sample), so
    they depend neither on the number of workers nor on where a run was interrupted.

    Args:
        image: size, crop and interpolation of the images.
        augment: augmentation of the training images; none by default.
        loader: batch size, workers and sampling.
        checks: what to do about unreadable images and leaks between the splits.
        seed: of order, sampling and augmentation.
        prompts: texts for the classes; where given also the captions, which else are the table's own, if it has some.
        caption: which of several captions, or of several prompts, training sees: first, random (one drawn each epoch)
            or all (of captions; an epoch then has all pairs).
    """

    generated: ClassVar[bool] = False
    """True where images are computed, so that they can be neither corrupt nor duplicates by accident."""

    missing_texts: ClassVar[tuple[str, ...]] = ()
    """Default of ``checks.missing``: texts that mean unknown in this format, besides the empty one."""

    def __init__(
        self,
        image: ImageOptions | None = None,
        augment: AugmentOptions | None = None,
        loader: LoaderOptions | None = None,
        checks: CheckOptions | None = None,
        seed: int = DEFAULT_SEED,
        prompts: PromptOptions | None = None,
        caption: CaptionMode = "random",
    ) -> None:
        super().__init__(seed, prompts, caption)
        # Lightning walks up through the constructors, so the subclass's own arguments are saved as well.
        self.save_hyperparameters()
        self.image_options = complete_image(image)
        self._given_image = frozenset(image or {})
        self.loader_options = complete_loader(loader)
        self.check_options = complete_checks(checks, self.missing_texts)
        complete_augment(augment, hue_safe=False)  # a mistake is told now, not after the table was read
        self._augment = augment
        self._left_out: dict[str, int] | None = None
        self._auto_range: list[float] | None = None
        self._deep: dict[str, Any] = {}
        self._bad: dict[int, str] | None = None
        self._content: NDArray[np.uint8] | None = None

    def read_image(self, index: int) -> torch.Tensor:
        """Reads one image; to be overridden where images are not files.

        Args:
            index: row of the table.

        Returns:
            uint8 ``(3, H, W)``, RGB, in the image's own size.

        Raises:
            ImageError: where the image cannot be read.
        """
        return images.read_image(self.table.source(index), value_range=self.value_range)

    @property
    def value_range(self) -> images.ValueRange:
        """What ``read_image`` is to take for black and white in images with more than 8 bits a channel."""
        chosen = self.image_options.get("value_range", "auto")
        return images.UNDECIDED if chosen == "auto" else chosen

    @property
    def asked_range(self) -> images.ValueRange:
        """The option as it was given: ``auto`` also after it has been decided."""
        chosen = self.image_options.get("value_range", "auto")
        return "auto" if chosen == self._auto_range else chosen

    def decide_range(self, chosen: list[float] | None, facts: dict[str, Any] | None = None) -> None:
        """Take what the images of the data set say where the option is ``auto``.

        Args:
            chosen: what is black and white; None for not decided yet, or without images that need it.
            facts: about images with more than 8 bits a channel, for the record.
        """
        if self.asked_range == "auto":
            self.image_options = {**self.image_options, "value_range": chosen or "auto"}
            self._auto_range = chosen
        self._deep = facts or {}

    def adopt_range(self, recorded: images.ValueRange) -> None:
        """Read images as a model takes them; nothing changes where it was trained on none that need a range."""
        if isinstance(recorded, str) or recorded == self.image_options.get("value_range"):
            return
        rank_zero_info(f"{self.table.origin}: image.value_range {list(recorded)}, as the model was trained with.")
        self.image_options = {**self.image_options, "value_range": list(recorded)}
        self._verify()

    def range_record(self) -> dict[str, Any]:
        """The option, what is black and white, and how many images need it, by the bits that they use."""
        decided = self.image_options.get("value_range", "auto")
        return {"option": self.asked_range, "range": None if decided == "auto" else decided, **self._deep}

    def images_state(self) -> str:
        """What changes with the images, where they are neither files of their own nor below the table's origin."""
        return ""

    @property
    def chunk_size(self) -> int:
        """Samples that a dual encoder encodes at a time; 0 for the whole training batch."""
        batch_size = self.loader_options["batch_size"]
        return batch_size if self.loader_options["contrastive_batch_size"] > batch_size else 0

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.image_options["size"]

    def adopt_image_options(self, own: Mapping[str, Any]) -> None:
        """Make images as a model wants them, as far as the options say nothing else.

        Args:
            own: the model's ``input_options``; what they leave out is as it is by default.
        """
        wanted = with_image_defaults(own)
        adopted = {key: wanted[key] for key in MODEL_IMAGE_DEFAULTS if key not in self._given_image}
        if changed := {key: value for key, value in adopted.items() if self.image_options.get(key) != value}:
            told = ", ".join(f"{key} {value}" for key, value in changed.items())
            rank_zero_info(f"data.image: {told}, as the model's weights want it.")
            self.image_options = cast("ImageOptions", {**self.image_options, **changed})

    @property
    def augment_options(self) -> AugmentOptions:
        """The augmentation as applied: preset filled in, its hue jitter off where a colour is to be learned."""
        return complete_augment(self._augment, hue_safe=learns_colour(self.tasks))

    def prepare_data(self) -> None:
        """Reads every image once and looks for leaks between the splits; the result is cached on disk.

        Raises:
            UserError: for unreadable images (unless they are to be skipped) and leaks that are not allowed.
        """
        from datamodules.checks.audit import refuse_leaks, warn_of_conflicts

        if self.files_left_out:
            rank_zero_info(f"{self.table.origin}: files left out, {left_out_text(self.files_left_out)}.")
        verification = self._verify()
        if self._deep:
            rank_zero_info(
                f"{self.table.origin}: {self._deep['images']} images have more than 8 bits a channel; value_range "
                f"{self.asked_range}: {self.image_options['value_range']} become black and white."
            )
        refuse_leaks(self, verification)
        if verification is not None:
            warn_of_conflicts(self.table, verification)

    def setup(self, stage: str | None = None) -> None:
        """Leaves out the unreadable images, on every process."""
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
            augmented: whether images get the training augmentation; else the evaluation transform.
        """
        transform: Callable[[torch.Tensor], torch.Tensor]
        if augmented:
            transform = train_transform(self.image_options, self._augment, hue_safe=learns_colour(self.tasks))
        else:
            transform = eval_transform(self.image_options)
        rows = self.split_indices(split)
        return ImageDataset(rows, self._reader(rows, self._augment if augmented else None), transform, self.seed)

    def train_dataloader(self) -> CountedLoader:
        """Augmented training batches.

        Raises:
            UserError: where there is no training batch.
        """
        dataset = self.dataset("train", augmented=True)
        if not len(dataset):
            raise UserError(f"{self.table.origin}: the train split is empty; give it samples")
        # In training an image may come several times, with other captions; in evaluation it comes once.
        dataset = dataset.with_captions(*self.texts.pairs(dataset.indices))
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
        """All samples of the splits that ``loader.predict`` names, in the table's order.

        Raises:
            UserError: where these splits are empty.
        """
        splits = self.loader_options["predict"]
        if len(splits) == 1:
            return self.eval_dataloader(splits[0])
        if not len(rows := self.rows_of(splits)):
            raise UserError(f"{self.table.origin}: there is no image in {', '.join(splits)}; name another split")
        return self.rows_dataloader(rows)

    def rows_of(self, splits: Sequence[str]) -> NDArray[np.int64]:
        """Rows of several splits without the skipped ones, in the table's order, int64."""
        return np.sort(np.concatenate([self.split_indices(split) for split in dict.fromkeys(splits)]))

    def rows_dataloader(self, rows: NDArray[np.int64]) -> CountedLoader:
        """Batches of any rows with the evaluation transform, each row once, in the order given.

        Args:
            rows: int64 ``(n,)``, ascending.
        """
        reader = SplitReaders(self.table.split_codes, lambda part: self._reader(part, None), rows)
        return self._eval_loader(ImageDataset(rows, reader, eval_transform(self.image_options), self.seed))

    def eval_dataloader(self, split: str) -> CountedLoader:
        """Batches of any split with the evaluation transform, in the table's order.

        Raises:
            UserError: where the split is empty.
        """
        loader = self.view_dataloader(split, None)
        if not len(loader):
            raise UserError(f"{self.table.origin}: the {split} split is empty; choose another division by data split")
        return loader

    @property
    def augments(self) -> bool:
        """Whether training images differ from epoch to epoch."""
        return is_random(self.augment_options)

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with each other."""
        return bool(self.augment_options["mixup"] or self.augment_options["cutmix"])

    def view_dataloader(self, split: str, view: int | None) -> CountedLoader:
        """Every sample of a split once, in the table's order.

        Args:
            split: train, val or test.
            view: epoch that images are augmented for as in training; None for the evaluation transform.
        """
        return self._eval_loader(self.dataset(split, augmented=view is not None), view or 0)

    @property
    def image_files(self) -> bool:
        """Whether each image is a file of its own."""
        return type(self).read_image is ImageDataModule.read_image

    def image_facts(self, sample_ids: NDArray[np.int64]) -> pa.Table:
        """See ``vitrail.types.DescribesImages``; generated images are made for their hash."""
        from datamodules.gallery_facts import decoded_content, facts_of

        if self._bad is None:
            self._verify()
        if self._content is None:
            content = decoded_content(self.read_image, sample_ids)
        else:
            content = [row.tobytes().hex() for row in self._content[sample_ids]]
        return facts_of(self.table, sample_ids, content, image_files=self.image_files)

    def data_record(self) -> dict[str, Any]:
        """What the run record says of the data: fingerprint, counts, unseen and missing values, skipped images.

        ``identical`` counts images that repeat another one of their split and those that contradict each other; it is
        null where pixels were not compared.
        """
        from datamodules.checks.audit import find_identical

        kept = {split: self.split_indices(split) for split in SPLITS}
        record = {"data": type(self).__name__, **record_of(self.table, kept, self._bad or {}), "identical": None}
        if self._content is not None:
            readable = np.ones(len(self.table), dtype=bool)
            readable[list(self._bad or {})] = False
            identical = find_identical(self.table, self._content, readable)
            record["identical"] = {"repeated": identical.repeated, "conflicts": identical.conflict_counts()}
        return {**record, "value_range": self.range_record(), "files_left_out": self.files_left_out}

    @property
    def files_left_out(self) -> dict[str, int]:
        """Files that lie among the images and are not used, counted by the ending of their names."""
        if self._left_out is None:
            self._left_out = self.count_left_out()
        return self._left_out

    def count_left_out(self) -> dict[str, int]:
        """Count the files that lie among the images and are not used; to be overridden where images are no files."""
        if not self.image_files:
            return {}
        return count_files_left_out(self.table.sources.to_pylist(), self.table.origin)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: fingerprint and value range. Place and epoch are kept by the loaders."""
        return {"fingerprint": self.table.fingerprint(), "value_range": self.image_options.get("value_range", "auto")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's value range, and warn where training is resumed on other data."""
        self.adopt_range(state_dict.get("value_range", "auto"))
        resumes = self.trainer is not None and self.trainer.state.fn == "fit"
        if resumes and state_dict["fingerprint"] != self.table.fingerprint():
            rank_zero_warn(f"{self.table.origin}: the data have changed since the checkpoint; the run is not the same")

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes that are spawned get a pickled copy, which needs no trainer.
        return {**self.__dict__, "trainer": None}

    def _verify(self) -> Verification | None:
        """Verifies the images (at once where that was done before), notes the bad ones; None for generated data."""
        if self.generated:
            self._bad = {}
            return None
        from datamodules.checks.verify import verify

        verification = verify(self)
        if verification.bad and self.check_options["on_bad_image"] == "error":
            problems = [(int(self.table.rows[index]), reason) for index, reason in verification.bad.items()]
            hint = "mend or remove these images, or set data checks.on_bad_image: skip"
            raise table_error(self.table.origin, problems, hint)
        self._bad, self._content = dict(verification.bad), verification.content
        return verification

    def _reader(self, rows: NDArray[np.int64], augment: AugmentOptions | None) -> Callable[[int], torch.Tensor]:
        """What reads images of these rows; generated ones have no need of a cache on disk."""
        if self._content is None:
            return self.read_image
        from datamodules.loading.cache import image_reader

        return image_reader(self, rows, self._content, augment)

    def _eval_loader(self, dataset: ImageDataset, view: int = 0) -> CountedLoader:
        collate = Collate(self.table, self.seed, texts=self.texts, evaluation=True)
        batch_size = self.loader_options["batch_size"]
        sampler = EvalSampler(len(dataset), *self._place(), view=view, batch_size=batch_size)
        return eval_loader(dataset, sampler, collate, self.loader_options)

    def _place(self) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
