"""Labels that a person corrects in the browser: kept there by gallery and image, and written as a table.

``vitrail relabel`` applies such a table to the labels it was made for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.logic.explore import Explorer
from app.state.limits import shortened
from vitrail.errors import UserError
from vitrail.files import write_csv

Corrections = dict[str, dict[str, str]]
"""Of each gallery the corrected value of the main task by image."""

MOST = 10_000
"""Corrections that a browser keeps."""


def read_corrections(kept: object, explorer: Explorer) -> dict[str, str]:
    """Return the corrections of a gallery; what is not of it is left out: a browser kept them."""
    own = kept.get(explorer.name) if isinstance(kept, Mapping) else None
    if not isinstance(own, Mapping):
        return {}
    known = set(explorer.ids)
    found = [(key, value) for key, value in own.items() if key in known and value in explorer.classes]
    return dict(found[:MOST])


def corrected(kept: object, explorer: Explorer, sample_id: object, value: object) -> Corrections:
    """Return the kept corrections with one more; the label that the data have removes it.

    Raises:
        UserError: there is no such image or class, or there are too many corrections.
    """
    row = explorer.row_of(sample_id)
    if not isinstance(value, str) or value not in explorer.classes:
        raise UserError(f"{explorer.main}: has no value {shortened(repr(value))}; choose one of the list")
    own = read_corrections(kept, explorer) | {explorer.ids[row]: value}
    if value == explorer.value_of(row, explorer.main):
        del own[explorer.ids[row]]
    if len(own) > MOST:
        raise UserError(f"{len(own):,} corrections are too many for a browser; download and apply them first")
    others = {name: dict(values) for name, values in kept.items()} if isinstance(kept, Mapping) else {}
    return {**others, explorer.name: own}


def corrections_file(own: Mapping[str, str], explorer: Explorer) -> Path:
    """Write corrections as a CSV with the columns ``id``, ``task``, ``label`` and ``old_label``."""
    import pandas as pd

    rows: list[dict[str, Any]] = [
        {
            "id": sample_id,
            "task": explorer.main,
            "label": value,
            "old_label": explorer.value_of(explorer.row_of(sample_id), explorer.main),
        }
        for sample_id, value in own.items()
    ]
    digest = hashlib.sha256(repr((explorer.name, rows)).encode()).hexdigest()[:32]
    path = Path(os.environ["GRADIO_TEMP_DIR"]) / "corrections" / digest / "corrections.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, pd.DataFrame(rows))
    return path
