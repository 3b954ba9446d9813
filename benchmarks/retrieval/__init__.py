"""Indexing and search against named peers."""
