"""Names that a filter of a gallery may use, the short ones too."""

from __future__ import annotations

from collections.abc import Sequence

from datamodules.schema import LABEL_TASK
from retrieval.filters import Column
from retrieval.gallery_writer import NOT_METADATA
from retrieval.schema import CONFIDENCE, LABEL, PREDICTED, ModelIdentity


def filter_columns(names: Sequence[str], identity: ModelIdentity) -> dict[str, Column]:
    """What each name means: the table's columns, then short names where no column has them.

    ``colour`` is what the model says of the colour, or where it says nothing, the label; ``confidence`` is that of the
    class.

    Args:
        names: columns of the table of pictures.
        identity: which tasks the model predicts and the data have labels of.
    """
    columns = {
        name: Column(name, "number" if name.startswith(CONFIDENCE) else "text")
        for name in names
        if name not in NOT_METADATA
    }
    short = {task: Column(f"{LABEL}{task}", "text") for task in identity.labels}
    short |= {task: Column(f"{PREDICTED}{task}", "text") for task in identity.predicts}
    if LABEL_TASK in identity.predicts:
        short["confidence"] = Column(f"{CONFIDENCE}{LABEL_TASK}", "number")
    return columns | {name: column for name, column in short.items() if name not in columns}
