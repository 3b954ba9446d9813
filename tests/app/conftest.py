"""What the tests of the application share: two trained runs with galleries, a server, and a browser on it.

The runs are made once for a test session; where several processes test side by side, the first one makes them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from filelock import FileLock

from app.logic.explore import Explorer
from app.state.context import AppContext
from app.state.galleries import ServedGallery
from app.state.runs import ServedRun
from experiments.train.cli import main as experiments
from retrieval.__main__ import main as retrieval
from tests.app.explored_gallery import explored_gallery
from tests.app.running import PATIENCE, Served, opened_browser, serving
from tests.support.plain_figures import plain_figures

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

_SMALL: dict[str, dict[str, Any]] = {
    "data": {"init_args": {"n_samples": 300, "resolution": 64, "image": {"size": 48}, "loader": {"batch_size": 16}}},
    "trainer": {"enable_progress_bar": False, "enable_model_summary": False},
    "wandb": {"mode": "disabled"},
}


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test session see."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "app"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def quickstart_run(shared_folder: Path) -> Path:
    """The quickstart's experiment with fewer and smaller images: trained, tested, and with a gallery."""
    return trained("quickstart", shared_folder, epochs=6)


@pytest.fixture(scope="session")
def pairs_run(shared_folder: Path) -> Path:
    """The quickstart's dual encoder, likewise."""
    return trained("quickstart_pairs", shared_folder, epochs=3)


def trained(name: str, folder: Path, *, epochs: int) -> Path:
    """The run directory of a small version of an experiment, made where it is missing."""
    with FileLock(folder / f"{name}.lock"):
        run = folder / "runs" / name / "20260101-000000"
        if not run.exists():
            overlay = folder / f"{name}.yaml"
            overlay.write_text(yaml.safe_dump({**_SMALL, "trainer": {**_SMALL["trainer"], "max_epochs": epochs}}))
            configs = ["--config", str(EXPERIMENTS / f"{name}.yaml"), "--config", str(overlay)]
            with plain_figures():
                assert experiments(["fit", *configs, "--runs", str(folder / "made"), "--test_best=true"]) == 0
            (made,) = (folder / "made" / name).glob("*")
            run.parent.mkdir(parents=True)
            made.rename(run)
            assert retrieval(["index", "--run", str(run)]) == 0
        return run


@pytest.fixture(scope="session")
def context(quickstart_run: Path, pairs_run: Path) -> AppContext:
    """Both runs and their galleries, as ``quickstart`` and ``pairs``."""
    runs = {name: ServedRun(path, name, "cpu") for name, path in (("quickstart", quickstart_run), ("pairs", pairs_run))}
    galleries = {name: ServedGallery(run.path / "gallery", name, run) for name, run in runs.items()}
    return AppContext(runs, galleries)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedGallery:
    """A gallery for the dataset browser; a module may have another one."""
    return explored_gallery(tmp_path_factory.mktemp("explored") / "gallery")


@pytest.fixture(scope="module")
def explorer(served: ServedGallery) -> Explorer:
    """Looks through it."""
    return Explorer(served)


@pytest.fixture(scope="session")
def server(context: AppContext) -> Iterator[Served]:
    """The whole application on a free port of this machine."""
    from app.server import build_app

    with serving(build_app(context), context) as served:
        yield served


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests; skips where there is none."""
    with opened_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: Served) -> Iterator[Page]:
    """An empty page; relative addresses lead to the server, and whatever the page says to its console is kept.

    ``page.goto("/?tab=search")`` opens a tab. The test fails where the page threw an error or asked another server.
    """
    yield from fresh_page(browser, server.url)


@pytest.fixture
def phone(browser: Browser, server: Served) -> Iterator[Page]:
    """As ``page``, as narrow as a phone and dark."""
    yield from fresh_page(browser, server.url, viewport={"width": 390, "height": 844}, color_scheme="dark")


def fresh_page(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """See ``page``."""
    window: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}, **options}
    with browser.new_context(base_url=url, **window) as context:
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(f"the page threw {error}"))
        page.on("request", lambda asked: wrong.append(f"asked {asked.url}") if is_foreign(asked.url, url) else None)
        yield page
        assert not wrong, wrong


def is_foreign(address: str, url: str) -> bool:
    """Whether a request leaves the server."""
    return not address.startswith((f"{url}/", "data:", "blob:"))


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where browser tests leave their images: what is kept of a run where ``$VITRAIL_SCREENSHOTS`` is set."""
    folder = Path(os.environ.get("VITRAIL_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
