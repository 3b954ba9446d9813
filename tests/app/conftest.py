"""What the tests of the application share: two trained runs with galleries, a server, and a browser on it.

The runs are made once for a test session; where several processes test side by side, the first one makes them.
"""

from __future__ import annotations

import functools
import json
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
from tests.app.running import PATIENCE, Served, serving
from tests.support.plain_figures import plain_figures

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request

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


@pytest.fixture
def page(browser: Browser, server: Served) -> Iterator[Page]:
    """An empty page without a memory; relative addresses lead to the server.

    ``page.goto("/?tab=search")`` opens a tab. The test fails where the page threw an error or asked another server.
    """
    yield from fresh_page(browser, server.url)


@pytest.fixture
def phone(browser: Browser, server: Served) -> Iterator[Page]:
    """As ``page``, as narrow as a phone and dark."""
    yield from fresh_page(browser, server.url, viewport={"width": 390, "height": 844}, color_scheme="dark")


def fresh_page(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """See ``page``."""
    page = _window(browser, url, json.dumps(options))
    wrong: list[str] = []

    def threw(error: object) -> None:
        wrong.append(f"the page threw {error}")

    def asked(request: Request) -> None:
        if is_foreign(request.url, url):
            wrong.append(f"asked {request.url}")

    page.on("pageerror", threw)
    page.on("request", asked)
    yield page
    page.remove_listener("pageerror", threw)
    page.remove_listener("request", asked)
    _empty(page)
    assert not wrong, wrong


@functools.cache
def _window(browser: Browser, url: str, options: str) -> Page:
    """One window for all tests of a server: two seconds of each test went into compiling the page's scripts again."""
    context = browser.new_context(base_url=url, **{"viewport": {"width": 1280, "height": 900}, **json.loads(options)})
    context.set_default_timeout(PATIENCE)
    return context.new_page()


def _empty(page: Page) -> None:
    """Leave nothing to the next test but what the browser has compiled."""
    page.unroute_all()
    if page.url.startswith("http"):
        page.evaluate("localStorage.clear(), sessionStorage.clear()")
    # Another site would be another process, which has compiled nothing.
    page.goto("/nothing")
    page.mouse.move(0, 0)
    page.context.clear_cookies()
    page.context.clear_permissions()


def is_foreign(address: str, url: str) -> bool:
    """Whether a request leaves the server."""
    return not address.startswith((f"{url}/", "data:", "blob:"))


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where browser tests leave their images: what is kept of a run where ``$VITRAIL_SCREENSHOTS`` is set."""
    folder = Path(os.environ.get("VITRAIL_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
