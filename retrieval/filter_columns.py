"""Names that a filter of a gallery may use, the short ones too."""

from __future__ import annotations

from collections.abc import Sequence

from retrieval.filters import Column
from retrieval.gallery_writer import NOT_METADATA
from retrieval.schema import CONFIDENCE, LABEL, PREDICTED, ModelIdentity
from vitrail.types import LABEL_TASK


def filter_columns(names: Sequence[str], identity: ModelIdentity) -> dict[str, Column]:
    """What each name means: the table's columns, and short names.

    ``colour`` is what the model predicts of the colour, or where it predicts nothing, the label; ``confidence`` is that
    of the class. Where an attribute is called like a column (``split``, ``caption`` …), the bare name is refused:
    ``label_split`` and ``predicted_split`` are the attribute, ``gallery_split`` is the gallery's own.

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
    own = {name: columns[name] for name in columns if name in short}
    if LABEL_TASK in identity.predicts:
        confidence = Column(f"{CONFIDENCE}{LABEL_TASK}", "number")
        (own if "confidence" in short else short)["confidence"] = confidence
    for name, column in own.items():
        tasks = [
            f"{LABEL}{name}" if name in identity.labels else "",
            f"{PREDICTED}{name}" if name in identity.predicts else "",
        ]
        meant = column.name if column.name.startswith(CONFIDENCE) else f"gallery_{name}"
        short[meant] = column
        columns[name] = Column("", column.kind, tuple(filter(None, [*tasks, meant])))
    return columns | {name: column for name, column in short.items() if name not in columns}
