"""What all tests share: one thread each (they run side by side), and no trace outside of their own folders."""

from __future__ import annotations

import os

# Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification results of tests do not land in the user's cache."""
    if "VITRINE_CACHE" not in os.environ:
        monkeypatch.setenv("VITRINE_CACHE", str(tmp_path_factory.mktemp("cache")))
