"""Reads back what the real W&B client wrote offline; the client itself (0.31) has no reader in Python any more."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024
HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
FULL, FIRST, LAST = 1, 2, 4


def records(store: Path) -> Iterator[Any]:
    """The records of a ``run-*.wandb`` file: protocol buffers in LevelDB's log format.

    Blocks of 32 KiB hold pieces of records: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4:
    last piece), data. Fewer than seven bytes at the end of a block are padding.
    """
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # waits for the process that writes, which may still hold the end of the file
    content = store.read_bytes()
    assert content[:7] == HEADER, content[:7]
    place, whole = 7, b""
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, place)
        data = content[place + 7 : place + 7 + length]
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) == checksum
        place += 7 + length
        whole = data if kind in (FULL, FIRST) else whole + data
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def history(run: Path) -> dict[str, Any]:
    """What a run logged, by key; of each key the last value.

    Args:
        run: the folder ``offline-run-…``.
    """
    (store,) = run.glob("*.wandb")
    items = [item for record in records(store) for item in record.history.item]
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
