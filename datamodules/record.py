"""What the run record says of the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.table import SampleTable

if TYPE_CHECKING:
    from numpy.typing import NDArray


def record_of(table: SampleTable, kept: Mapping[str, NDArray[np.int64]], bad: Mapping[int, str]) -> dict[str, Any]:
    """Fingerprint, counts, unseen and missing values and skipped pictures, in types that JSON knows.

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
