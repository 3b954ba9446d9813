"""What a gallery is told of images besides what a model makes of them: names, places, hashes, captions and labels."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from datamodules.table import SPLITS, SampleTable
from vitrail.types import UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pyarrow as pa
    import torch
    from numpy.typing import NDArray


def facts_of(
    table: SampleTable, sample_ids: NDArray[np.int64], content: Sequence[str], *, image_files: bool
) -> pa.Table:
    """See ``vitrail.types.DescribesImages.image_facts``.

    Args:
        table: of all samples.
        sample_ids: int64 ``(n,)``, rows of the table.
        content: hash of each of them.
        image_files: whether the table's sources are files.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = pa.array(sample_ids)
    sources = table.sources.take(rows).to_pylist() if image_files else [""] * len(sample_ids)
    columns = {
        "id": table.names.take(rows),
        "path": [os.path.abspath(source) if source else "" for source in sources],  # noqa: PTH100 -- keeps links
        "content": content,
        "caption": table.captions.take(rows),
        "group": table.groups.take(rows),
        "split": pa.array(SPLITS).take(pa.array(table.split_codes[sample_ids])),
    }
    for task, names in table.tasks.items():
        codes = table.targets[task][sample_ids]
        columns[f"label_{task}"] = pa.array(names, pa.string()).take(pa.array(codes, mask=codes == UNKNOWN))
    as_strings = {name: pc.cast(pa.array(values), pa.string()) for name, values in _plain(columns).items()}
    captions = [[text for text in texts if text] for texts in table.caption_lists.of(sample_ids.tolist())]
    return pa.table({**as_strings, "captions": pa.array(captions, pa.list_(pa.string()))})


def _plain(columns: dict[str, object]) -> dict[str, object]:
    """Arrow's chunked arrays as single ones."""
    import pyarrow as pa

    return {
        name: values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        for name, values in columns.items()
    }


def decoded_content(read_image: Callable[[int], torch.Tensor], sample_ids: NDArray[np.int64]) -> list[str]:
    """Hashes of images that have to be made for it, hexadecimal.

    Args:
        read_image: gives uint8 ``(3, H, W)``.
        sample_ids: int64 ``(n,)``.
    """
    from datamodules.checks.verify import content_of

    hashes = []
    for row in sample_ids.tolist():
        hashes.append(content_of(read_image(row).permute(1, 2, 0).contiguous().numpy()).hex())
    return hashes
