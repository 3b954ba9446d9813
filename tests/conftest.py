"""What all tests share: one thread each (they run side by side), and no trace outside of their own folders."""

from __future__ import annotations

import atexit
import functools
import gc
import hashlib
import importlib.metadata
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("LOKY_MAX_CPU_COUNT", "1")  # loader.num_workers: auto starts no processes
os.environ.setdefault("WANDB_MODE", "disabled")

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import registry as external_callbacks

from datamodules import wares
from datamodules.wares.render import draw_ware

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# What tests write need not outlive a power cut, and a busy disk flushes for many milliseconds.
os.fsync = lambda fd: None

# For fixtures that are made before a test's own. Each process of pytest-xdist makes its own.
_SHARED = os.environ["VITRAIL_CACHE"] = tempfile.mkdtemp(prefix="vitrail-tests-")
atexit.register(shutil.rmtree, _SHARED, ignore_errors=True)


# Each Trainer looks through the metadata of all installed packages for callbacks: a tenth of a tiny training.
external_callbacks.entry_points = functools.cache(importlib.metadata.entry_points)  # type: ignore[assignment, attr-defined]

# Images of generated wares follow from their arguments: a fifth of a tiny training went into drawing the same ones.
vars(wares)["draw_ware"] = functools.lru_cache(maxsize=4096)(draw_ware)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test and the fixtures made for it draw at random is the same in every run, order and process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (the generator that libraries share)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests decode and verify does not land in the user's cache; a module may have one for all its tests."""
    if os.environ["VITRAIL_CACHE"] == _SHARED:
        monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))


LONGEST = [
    *("experiments/train/test_opened_run.py", "retrieval/test_killed_indexing.py", "experiments/train/test_cli.py"),
    *("experiments/test_several_processes.py", "experiments/export/test_hub.py", "app/browser/test_classify.py"),
    *(
        "evaluation/commands/test_weights.py",
        "experiments/launch/test_sweep.py",
        "evaluation/commands/test_ensemble.py",
    ),
    *(
        "experiments/launch/test_ablation.py",
        "experiments/test_every_experiment.py",
        "experiments/test_exact_resume.py",
    ),
    *("notebooks/test_notebooks.py", "evaluation/commands/dataset/test_explore.py", "callbacks/test_gallery_writer.py"),
    *("datamodules/streaming/test_streaming.py", "evaluation/report/test_browser.py", "vitrail/test_testing.py"),
    *("experiments/train/test_own_data.py", "experiments/train/test_trackers.py", "experiments/export/test_export.py"),
    *("evaluation/commands/dataset/test_active_learning.py", "experiments/test_precision_and_compile.py"),
]
"""Files of more than fifteen seconds, those that need the same runs apart from each other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that two workers end at the same time."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Modules stay; the garbage collector, which took a twentieth of all time, need not go through them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter end as it does without tests."""
    gc.unfreeze()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for the tests of a file; skips where there is none.

    Not for all files of a process: while Playwright runs, its event loop runs in this thread, so that
    ``asyncio.run`` fails in every test that comes after.
    """
    from tests.app.running import opened_browser

    with opened_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """A real S3 server for all tests of a process; skips where it is not installed."""
    from tests.support.servers import s3

    with s3() as environment:
        yield environment


@pytest.fixture
def bucket(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A new, empty bucket, ``s3://name``, that all clients find by the environment."""
    import s3fs

    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    # Clients keep the address of the server of a former test.
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"test-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def postgresql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real PostgreSQL server's database, for all tests of a process; skips where it is not installed."""
    from tests.support.servers import postgresql

    with postgresql(tmp_path_factory.mktemp("postgresql")) as url:
        yield url
