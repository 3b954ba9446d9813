"""What is known of a data set before a picture is read: its table, and what follows from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from datamodules.captions import CaptionMode, Texts
from datamodules.prompts import PromptOptions, class_prompts
from datamodules.table import SampleTable
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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
