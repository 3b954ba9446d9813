"""What all DataModules share: tasks, splits, checks before training, and loaders.

A data set is one subclass that lists its samples (``load_table``) and, where its images are not files, reads one
(``read_image``). Order and augmentation are functions of (seed, epoch, sample), so they depend neither on the number
of workers nor on where a run was interrupted.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from PIL import Image

from datamodules.captions import CaptionMode, PromptOptions, Texts
from datamodules.files.label_csv import count_files_left_out, left_out_text
from datamodules.loading import decode as images
from datamodules.loading.cache import SplitReaders, cached_reader, decodes, is_lossy, writing_sink
from datamodules.loading.dataset import (
    Collate,
    CountedLoader,
    DistinctSampler,
    EvalSampler,
    ImageDataset,
    TrainSampler,
    inverse_frequency_weights,
    make_loader,
)
from datamodules.loading.transforms import eval_transform, is_light, mix_pending, targets_colour, train_transform
from datamodules.options import AugmentOptions, CheckOptions, ImageOptions, LoaderOptions, SplitName, plain
from datamodules.splits import with_shots
from datamodules.table import SPLITS, SampleTable, table_error
from vitrail.errors import UserError
from vitrail.predictions import refuse_kinds
from vitrail.runtime import cores
from vitrail.types import DEFAULT_SEED, LABEL_TASK, InputOptions, TaskFacts, TaskKind, kind_of, with_image_defaults

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from datamodules.checks.audit import AuditReport
    from datamodules.checks.verify import Verification


_MOST_WORKERS = 16


class ImageDataModule(LightningDataModule):
    """Base of all data sets of images.

    A subclass takes its own arguments, passes these on as ``**shared`` (the command line finds them in this signature),
    and implements ``load_table``. What depends on the table only (``tasks``, ``task_kinds``, ``num_classes``,
    ``class_names``, ``task_facts``) is available from construction on, so that the command line can
    link it into the model. Batches are :class:`~vitrail.types.Batch`.

    Args:
        image: size, crop and interpolation of the images.
        augment: augmentation of the training images; none by default.
        loader: batch size, workers and sampling.
        checks: what to do about unreadable images and leaks between the splits.
        seed: of order, sampling, augmentation and, unless ``split.seed`` is given, of the division into splits.
        prompts: texts for the classes, or the name of templates; where given also the captions, which otherwise are
            the table's own, if it has some.
        caption: which of several captions, or of several prompts, training uses: first, random (one sampled each epoch)
            or all (of captions; an epoch then has all pairs).
        shots: training images of each class of the main task, sampled by ``seed``, from different groups as long as
            there are any left; fewer shots are among more of them. All of a class that has fewer, which a note of the
            run reports. 0 for all images.
    """

    generated: ClassVar[bool] = False
    """True where images are computed, so that they can be neither corrupt nor duplicates by accident."""

    missing_texts: ClassVar[tuple[str, ...]] = ()
    """Default of ``checks.missing``: texts that mean unknown in this format; the empty one always does."""

    def __init__(
        self,
        image: ImageOptions = ImageOptions(),
        augment: AugmentOptions = AugmentOptions(),
        loader: LoaderOptions = LoaderOptions(),
        checks: CheckOptions = CheckOptions(),
        seed: int = DEFAULT_SEED,
        prompts: PromptOptions | str | None = None,
        caption: CaptionMode = "random",
        shots: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        # Lightning walks up through the constructors, so the subclass's own arguments are saved as well.
        self.save_hyperparameters()
        self.save_hyperparameters(plain(dict(self.hparams)))
        asked = ImageOptions.of(image)
        self.image_options: InputOptions = asked.resolved()
        self._given_image = asked.given
        self.max_pixels: int = asked.max_pixels
        self.loader_options = LoaderOptions.of(loader)
        self.check_options = CheckOptions.of(checks)
        if self.check_options.missing is None:
            self.check_options = replace(self.check_options, missing=list(self.missing_texts))
        self._augment = AugmentOptions.of(augment)
        self.seed = seed
        self.prompts = None if prompts is None else PromptOptions.of(prompts)
        self.caption_mode = caption
        if shots < 0:
            raise UserError(f"data shots: must be 0 (for all images) or more; got {shots}")
        self.shots = shots
        self._table: SampleTable | None = None
        self._texts: Texts | None = None
        self._left_out: dict[str, int] | None = None
        self._auto_range: list[float] | None = None
        self._deep: dict[str, Any] = {}
        self._bad: dict[int, str] | None = None
        self._content: NDArray[np.uint8] | None = None
        self._compares_pixels = False
        self._worker_notes: set[str] = set()
        self.lossy_cache = False

    def load_table(self) -> SampleTable:
        """Read the data set's table; called once per process.

        Raises:
            UserError: where the data are missing or the table has mistakes.
        """
        raise TypeError(f"{type(self).__name__} must define load_table()")

    def read_image(self, index: int) -> torch.Tensor:
        """Read the image of a row of the table, uint8 ``(3, H, W)``, RGB, in its own size; override for other sources.

        Raises:
            ImageError: where the image cannot be read.
        """
        return images.read_image(self.table.source(index), value_range=self.value_range, max_pixels=self.max_pixels)

    def encoded_image(self, index: int) -> bytes:
        """Return the file of an image, or PNG where images are not files."""
        if self.image_files:
            return Path(self.table.source(index)).read_bytes()
        buffer = io.BytesIO()
        Image.fromarray(self.read_image(index).permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
        return buffer.getvalue()

    def images_state(self) -> str:
        """Return what changes with the images, where these are neither files nor below the table's origin."""
        return ""

    def count_left_out(self) -> dict[str, int]:
        """Count the files among the images that are not used, by the ending of their names."""
        if not self.image_files:
            return {}
        return count_files_left_out(self.table.sources.to_pylist(), self.table.origin)

    # Table, tasks and texts.

    @property
    def table(self) -> SampleTable:
        """The table of all samples, read when first needed."""
        if self._table is None:
            try:
                table = self.load_table()
                self._table = with_shots(table, self.shots, self.seed) if self.shots else table
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
    def task_kinds(self) -> dict[str, TaskKind]:
        """Kinds of the tasks that are not single-label."""
        return self.table.kinds

    @property
    def task_facts(self) -> TaskFacts:
        """What a model needs to know of the targets."""
        return TaskFacts(self.task_kinds, self.class_counts, self.target_stats)

    @property
    def target_stats(self) -> dict[str, list[float]]:
        """Mean and standard deviation of each regression task's training targets; unreadable images count."""
        return self.table.target_stats()

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
    def num_classes(self) -> int:
        """Number of classes of the main task."""
        return len(self.class_names)

    @property
    def class_prompts(self) -> list[list[str]]:
        """Texts of each class."""
        return self.texts.class_prompts

    @property
    def class_counts(self) -> dict[str, list[int]]:
        """For each task the number of training samples of each class; unreadable images count."""
        return self.table.class_counts("train")

    @property
    def own_captions(self) -> bool:
        """Whether evaluation batches have captions of the data's own."""
        return self.texts.own

    def training_texts(self) -> list[str]:
        """Return the distinct captions of the train split and all class prompts, to train a tokenizer on."""
        return self.texts.training_texts(self.split_indices("train"))

    def evaluation_texts(self, split: str) -> list[str]:
        """Return all captions of a split; none where the data set has no captions of its own."""
        rows = self.split_indices(split).tolist()
        return [text for texts in self.texts.evaluation(rows) for text in texts] if self.texts.own else []

    def without_caption(self, split: str) -> int:
        """Return how many images of a split have no caption of the data's own; 0 where no image has one."""
        rows = self.split_indices(split).tolist()
        texts = self.texts.evaluation(rows) if self.texts.own else []
        return sum(not any(text.strip() for text in own) for own in texts)

    def sample_names(self) -> list[str]:
        """Return the stable names of all samples, indexed by ``sample_id``."""
        names: list[str] = self.table.names.to_pylist()
        return names

    def group_names(self) -> list[str]:
        """Return the groups of all samples, indexed by ``sample_id``."""
        groups: list[str] = self.table.groups.to_pylist()
        return groups

    def as_test_set(
        self,
        tasks: Mapping[str, Sequence[str]],
        kinds: Mapping[str, TaskKind] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """Make all samples the test split of a model with these tasks; see ``SampleTable.as_test_set``.

        Args:
            tasks: class names of each of the model's tasks.
            kinds: of these tasks.
            names: the model's names for classes of the main task that are called otherwise here.
        """
        self._table, self._texts = self.table.renamed(names or {}).as_test_set(tasks, kinds), None

    # How images are made.

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.image_options["size"]

    @property
    def chunk_size(self) -> int:
        """Samples that a dual encoder encodes at a time; 0 for the whole training batch."""
        options = self.loader_options
        return options.batch_size if options.contrastive_batch_size > options.batch_size else 0

    def adopt_image_options(self, own: Mapping[str, Any]) -> None:
        """Make images as a model's ``input_options`` (with the usual defaults) want them, where ours are left open."""
        wanted = with_image_defaults(own)
        adopted = {key: wanted[key] for key in with_image_defaults({}) if key not in self._given_image}
        if changed := {key: value for key, value in adopted.items() if self.image_options.get(key) != value}:
            shown = ", ".join(f"{key} {value}" for key, value in changed.items())
            rank_zero_info(f"data.image: {shown}, as the model's weights want it.")
            self.image_options = cast("InputOptions", {**self.image_options, **changed})

    @property
    def augment_options(self) -> AugmentOptions:
        """The augmentation as applied: preset filled in, its hue jitter off where a color is the target."""
        return self._augment.filled(hue_safe=targets_colour(self.tasks))

    @property
    def augments(self) -> bool:
        """Whether training images differ from epoch to epoch."""
        return self.augment_options.is_random

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with each other."""
        return bool(self.augment_options.mixup or self.augment_options.cutmix)

    @property
    def training_sizes(self) -> list[int]:
        """Sides of the training images in pixels that differ from that of the evaluation."""
        return sorted({side for _, side in self._augment.sizes} - {self.image_size})

    def transform(self, *, augmented: bool) -> torch.nn.Module:
        """Return the training augmentation, or the evaluation transform: uint8 ``(3, H, W)`` to ``(3, size, size)``."""
        if augmented:
            return train_transform(self.image_options, self.augment_options)
        return eval_transform(self.image_options)

    @property
    def value_range(self) -> images.ValueRange:
        """What becomes black and white in images with more than 8 bits a channel."""
        chosen = self.image_options.get("value_range", "auto")
        return images.UNDECIDED if chosen == "auto" else chosen

    @property
    def asked_range(self) -> images.ValueRange:
        """The option as it was given: still ``auto`` after it has been decided."""
        chosen = self.image_options.get("value_range", "auto")
        return "auto" if chosen == self._auto_range else chosen

    def decide_range(self, chosen: list[float] | None, facts: dict[str, Any] | None = None) -> None:
        """Set what is black and white where the option is ``auto`` (None: not decided), and facts for the record."""
        if self.asked_range == "auto":
            self.image_options = {**self.image_options, "value_range": chosen or "auto"}
            self._auto_range = chosen
        self._deep = facts or {}

    def adopt_range(self, recorded: images.ValueRange) -> None:
        """Read images with the range that a model was trained with, if it was trained on any that need one."""
        if isinstance(recorded, str) or recorded == self.image_options.get("value_range"):
            return
        rank_zero_info(f"{self.table.origin}: image.value_range {list(recorded)}, as the model was trained with.")
        self.image_options = {**self.image_options, "value_range": list(recorded)}
        self.verify()

    def range_record(self) -> dict[str, Any]:
        """Return the option, what is black and white, and how many images need it, by the bits that they use."""
        decided = self.image_options.get("value_range", "auto")
        return {"option": self.asked_range, "range": None if decided == "auto" else decided, **self._deep}

    # Checks before training.

    @property
    def image_files(self) -> bool:
        """Whether each image is a file of its own."""
        return type(self).read_image is ImageDataModule.read_image

    def image_sizes(self, rows: Sequence[int]) -> NDArray[np.float64]:
        """Return widths and heights in pixels from the files' headers, float64 ``(2, n)``; NaN where unreadable."""
        sizes = np.full((2, len(rows)), np.nan)
        for place, row in enumerate(rows):
            with suppress(images.ImageError, OSError):
                sizes[:, place] = images.read_header(self.table.source(row)).size
        return sizes

    @property
    def files_left_out(self) -> dict[str, int]:
        """Files among the images that are not used, counted by the ending of their names."""
        if self._left_out is None:
            self._left_out = self.count_left_out()
        return self._left_out

    def verify(self, cached_splits: Sequence[SplitName] = ()) -> Verification | None:
        """Read all images once (cached on disk), and note the bad ones; None for generated data.

        Args:
            cached_splits: whose pixel caches are written along the way, so that no image is decoded twice.

        Raises:
            UserError: for unreadable images, unless they are to be skipped.
        """
        if self.generated:
            self._bad = {}
            return None
        verification = self.verification(cached_splits)
        if verification.bad and self.check_options.on_bad_image == "error":
            problems = [(int(self.table.rows[index]), reason) for index, reason in verification.bad.items()]
            hint = "repair or remove these images, or set data checks.on_bad_image: skip"
            raise table_error(self.table.origin, problems, hint)
        self._bad, self._content = dict(verification.bad), verification.content
        self._compares_pixels = verification.mode == "full"
        return verification

    def verification(self, cached_splits: Sequence[SplitName] = (), *, quality: bool = False) -> Verification:
        """Return what is known of all images, unreadable ones included; read them where it is not cached.

        Args:
            cached_splits: see ``verify``.
            quality: whether the facts of the audit are wanted, too, for which every image is decoded.
        """
        from datamodules.checks.verify import verify

        # Rows of the table: which of them are readable is not known yet.
        parts = [
            (self.table.split_indices(split), self._augment if split == "train" else AugmentOptions())
            for split in cached_splits
        ]
        sink = None
        if parts:
            sink = writing_sink(self.read_image, parts, len(self.table), self.image_options, self.loader_options)
        return verify(
            self.table,
            self.read_image,
            self.decide_range,
            asked_range=self.asked_range,
            max_pixels=self.max_pixels,
            state=self.images_state(),
            image_files=self.image_files,
            mode="full" if quality else self.check_options.verify,
            quality=quality,
            sink=sink,
        )

    def audit(self) -> AuditReport:
        """Report counts, unknown and unseen values, leaks of every kind and unreadable images."""
        from datamodules.checks.audit import audit

        verification = None if self.generated else self.verification(quality=True)
        return audit(
            self.table,
            verification,
            self.read_image,
            self.check_options,
            data=type(self).__name__,
            value_range=self.range_record(),
            files_left_out=self.files_left_out,
            image_files=self.image_files,
        )

    def prepare_data(self) -> None:
        """Read every image once and look for leaks between the splits; the result is cached on disk.

        Raises:
            UserError: for unreadable images (unless they are to be skipped) and leaks that are not allowed.
        """
        from datamodules.checks.audit import VERIFY_NOTES, find_leaks, warn_of_conflicts

        if self.files_left_out:
            rank_zero_info(f"{self.table.origin}: files left out, {left_out_text(self.files_left_out)}.")
        fits = self.trainer is None or self.trainer.state.fn == "fit"
        verification = self.verify(("train", "val") if fits else ())
        if self._deep:
            rank_zero_info(
                f"{self.table.origin}: {self._deep['images']} images have more than 8 bits a channel; value_range "
                f"{self.asked_range}: {self.image_options.get('value_range')} become black and white."
            )
        if verification is not None and verification.mode != "full":
            rank_zero_info(
                f"{self.table.origin}: images are not decoded before the training (data checks.verify: "
                f"{verification.mode}): a damaged one ends the run, and {VERIFY_NOTES[verification.mode]}."
            )
        allowed = self.check_options.allow_leaks
        find_leaks(self.table, verification, self.read_image, allowed).refuse(self.table.origin, allowed)
        if verification is not None:
            warn_of_conflicts(self.table, verification)

    def setup(self, stage: str | None = None) -> None:
        """Leave out the unreadable images, on every process."""
        self.verify()

    def image_facts(self, sample_ids: NDArray[np.int64]) -> pa.Table:
        """See ``vitrail.types.DescribesImages``; images that have not been decoded yet are, for their hash."""
        from datamodules.checks.verify import content_of

        if self._bad is None:
            self.verify()
        if self._content is None or not self._compares_pixels:
            read = (self.read_image(row).permute(1, 2, 0).contiguous().numpy() for row in sample_ids.tolist())
            content = [content_of(pixels).hex() for pixels in read]
        else:
            content = [row.tobytes().hex() for row in self._content[sample_ids]]
        return self.table.facts(sample_ids, content, image_files=self.image_files)

    def data_record(self) -> dict[str, Any]:
        """Return what the run record keeps of the data: fingerprint, counts, unseen and missing values, skipped images.

        ``identical`` counts images that repeat another one of their split and those that contradict each other; it is
        null where pixels were not compared.
        """
        from datamodules.checks.audit import find_identical

        table, bad = self.table, self._bad or {}
        kept = {split: self.split_indices(split) for split in SPLITS}
        counts = None
        if self._content is not None and self._compares_pixels:
            identical = find_identical(table, self._content, ~np.isin(np.arange(len(table)), list(bad)))
            counts = {"repeated": identical.repeated, "conflicts": identical.conflict_counts()}
        return {
            "data": type(self).__name__,
            "origin": table.origin,
            "fingerprint": table.fingerprint(),
            "samples": {split: len(rows) for split, rows in kept.items()},
            "groups": {split: len(np.unique(table.group_ids[rows])) for split, rows in kept.items()},
            "unseen": table.unseen,
            "missing": table.missing,
            "notes": table.notes,
            "class_counts": self.class_counts,
            "task_kinds": self.task_kinds,
            "target_stats": self.target_stats,
            "target_medians": self.table.target_medians(),
            "skipped": [
                {"name": table.name(row), "row": int(table.rows[row]), "reason": reason}
                for row, reason in sorted(bad.items())
            ],
            "identical": counts,
            "verify": None if self.generated else self.check_options.verify,
            "value_range": self.range_record(),
            "files_left_out": self.files_left_out,
        }

    # Rows and loaders.

    def split_indices(self, split: str) -> NDArray[np.int64]:
        """Return the rows of a split in the table's order without the skipped ones, int64."""
        if self._bad is None:
            self.verify()
        indices = self.table.split_indices(split)
        return indices[~np.isin(indices, list(self._bad or {}))]

    def rows_of(self, splits: Sequence[str]) -> NDArray[np.int64]:
        """Return the rows of several splits without the skipped ones, in the table's order, int64."""
        return np.sort(np.concatenate([self.split_indices(split) for split in dict.fromkeys(splits)]))

    def dataset(self, split: str, *, augmented: bool = False) -> ImageDataset:
        """Return the samples of a split, with the training augmentation or the evaluation transform."""
        rows = self.split_indices(split)
        reader = self._reader(rows, augmented=augmented)
        return ImageDataset(rows, reader, self.transform(augmented=augmented), self.seed)

    def train_dataloader(self) -> CountedLoader:
        """Return augmented training batches."""
        dataset = self.dataset("train", augmented=True)
        if not len(dataset):
            raise UserError(f"{self.table.origin}: the train split is empty; give it samples")
        # In training an image may come several times, with other captions; in evaluation it comes once.
        dataset = dataset.with_captions(*self.texts.pairs(dataset.indices))
        sampler = self._train_sampler(dataset)
        workers = self.worker_processes(cheap=not decodes(dataset.read_image) and is_light(self.augment_options))
        return make_loader(dataset, sampler, self.collate(training=True), self.loader_options, workers, training=True)

    def val_dataloader(self) -> CountedLoader:
        """Return validation batches in the table's order."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> CountedLoader:
        """Return test batches in the table's order."""
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> CountedLoader:
        """Return all samples of the splits that ``loader.predict`` names, in the table's order."""
        splits = self.loader_options.predict
        if len(splits) == 1:
            return self.eval_dataloader(splits[0])
        if not len(rows := self.rows_of(splits)):
            raise UserError(f"{self.table.origin}: there is no image in {', '.join(splits)}; name another split")
        return self.rows_dataloader(rows)

    def rows_dataloader(self, rows: NDArray[np.int64]) -> CountedLoader:
        """Return batches of some rows, int64 ``(n,)``, ascending, with the evaluation transform."""
        reader = SplitReaders(self.table.split_codes, lambda part: self._reader(part, augmented=False), rows)
        return self._eval_loader(ImageDataset(rows, reader, self.transform(augmented=False), self.seed))

    def eval_dataloader(self, split: str) -> CountedLoader:
        """Return batches of any split with the evaluation transform, in the table's order."""
        loader = self.view_dataloader(split, None)
        if not len(loader):
            raise UserError(f"{self.table.origin}: the {split} split is empty; choose another division by data split")
        return loader

    def view_dataloader(self, split: str, view: int | None) -> CountedLoader:
        """Return every sample of a split once, in the table's order.

        Images are augmented as in epoch ``view`` of training; None is for the evaluation transform.
        """
        return self._eval_loader(self.dataset(split, augmented=view is not None), view or 0)

    def worker_processes(self, *, cheap: bool = False) -> int:
        """Return ``loader.num_workers``, chosen by the cores at hand where it is ``auto``; a note reports the choice.

        Args:
            cheap: whether images cost less than handing them over: they come from the cache, not augmented but by
                crops and flips.
        """
        asked = self.loader_options.num_workers
        if asked != "auto":
            return int(asked)
        trainer = self.trainer
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if trainer is None else trainer.num_devices
        on_gpu = torch.cuda.is_available() if trainer is None else trainer.strategy.root_device.type != "cpu"
        share = max(1, cores() // max(processes, 1))
        workers, why = min(_MOST_WORKERS, share - 1), f"cores at hand for each process: {share}"
        if cheap and not on_gpu:
            workers, why = 0, "images come from the cache, which is faster"
        elif trainer is None and multiprocessing.get_start_method() == "spawn":
            # A script that does not guard its main module would start itself again.
            workers, why = 0, "here processes start from scratch"
        note = f"{self.table.origin}: worker processes for images: {workers} ({why}; data loader.num_workers: auto)."
        if note not in self._worker_notes:
            self._worker_notes.add(note)
            rank_zero_info(note)
        return workers

    def collate(self, *, training: bool) -> Collate:
        """Return what makes a batch of samples."""
        augment = self.augment_options if training else None
        return Collate(self.table, self.seed, texts=self.texts, augment=augment, evaluation=not training)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mix the images of a batch on the model's device, with ``augment.mix_on_device``."""
        if isinstance(batch, dict) and "pending" in batch.get("mix", ()):
            batch["image"] = mix_pending(batch["image"], batch["mix"])
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the data: fingerprint, value range, and whether the cache was lossy.

        The loaders keep their place.
        """
        value_range = self.image_options.get("value_range", "auto")
        state = {"fingerprint": self.table.fingerprint(), "value_range": value_range}
        return {**state, "cache": "jpeg"} if self.lossy_cache else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's value range, and warn where training is resumed on other data."""
        self.adopt_range(state_dict.get("value_range", "auto"))
        resumes = self.trainer is not None and self.trainer.state.fn == "fit"
        if resumes and state_dict["fingerprint"] != self.table.fingerprint():
            rank_zero_warn(f"{self.table.origin}: the data have changed since the checkpoint; the run is not the same")

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes that are spawned get a pickled copy, which needs no trainer.
        return {**self.__dict__, "trainer": None}

    def _train_sampler(self, dataset: ImageDataset) -> TrainSampler | DistinctSampler:
        options, repeats = self.loader_options, self._augment.repeats
        if options.sampling == "distinct":
            if repeats > 1:
                raise UserError(
                    "data augment.repeats: no batch of loader.sampling: distinct may have repetitions; set 1"
                )
            ids = torch.from_numpy(self.texts.positive_ids[dataset.indices])
            return DistinctSampler(ids, options.training_batch_size, self.seed, *self._place())
        weights = None
        if options.sampling == "balanced":
            targets = self.table.targets
            if (task := options.balance_on) not in targets:
                raise UserError(f"data loader.balance_on: no task {task!r}; tasks are {', '.join(targets)}")
            refuse_kinds(
                {task: kind_of(self.task_kinds, task)},
                "data loader.sampling: balanced",
                fix="set loader.balance_on to a task of these kinds, or use shuffle",
            )
            weights = inverse_frequency_weights(torch.from_numpy(targets[task][dataset.indices]))
        return TrainSampler(len(dataset), self.seed, *self._place(), weights, repeats)

    def _reader(self, rows: NDArray[np.int64], *, augmented: bool) -> Callable[[int], torch.Tensor]:

        if self._content is None:
            return self.read_image
        augment = self._augment if augmented else AugmentOptions()
        reader = cached_reader(
            self.read_image, rows, self._content, self.image_options, augment, self.loader_options, self.table.origin
        )
        self.lossy_cache = self.lossy_cache or is_lossy(reader)
        return reader

    def _eval_loader(self, dataset: ImageDataset, view: int = 0) -> CountedLoader:
        sampler = EvalSampler(len(dataset), *self._place(), view=view, batch_size=self.loader_options.batch_size)
        workers = self.worker_processes(cheap=not decodes(dataset.read_image))
        return make_loader(dataset, sampler, self.collate(training=False), self.loader_options, workers, training=False)

    def _place(self) -> tuple[int, int]:
        """Rank and world size."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
