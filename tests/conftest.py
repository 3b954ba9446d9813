"""What all tests share: one thread each (they run side by side), and no trace outside of their own folders."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest

# For fixtures that are made before a test's own. Each process of pytest-xdist makes its own.
_SHARED = os.environ["VITRINE_CACHE"] = tempfile.mkdtemp(prefix="vitrine-tests-")
atexit.register(shutil.rmtree, _SHARED, ignore_errors=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests decode and verify does not land in the user's cache; a module may have one for all its tests."""
    if os.environ["VITRINE_CACHE"] == _SHARED:
        monkeypatch.setenv("VITRINE_CACHE", str(tmp_path_factory.mktemp("cache")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Something long that shares nothing comes first, or two workers would wait for the same runs at once."""
    items.sort(key=lambda item: "test_exact_resume" not in item.nodeid)
