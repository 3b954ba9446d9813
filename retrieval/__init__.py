"""Retrieval: how well a gallery answers queries (``metrics``). Knows embeddings and ids, no data set and no model."""

from __future__ import annotations
