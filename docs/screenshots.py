"""Make the documentation's screenshots of the web application and the report, with a run of the quickstart.

``python docs/screenshots.py`` trains the quickstart, or takes ``--run RUN``, serves it with ``vitrail app``, and drives
Debian's chromium (``make browser``).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from datamodules.wares import ware_spec
from datamodules.wares.render import draw_ware

IMAGES = Path(__file__).parent / "images"
PORT = 7879
URL = f"http://127.0.0.1:{PORT}"
PATIENCE = 1800
"""Seconds for the application to start, trainings included."""


def wait_until_served() -> None:
    """Wait for the application."""
    for _ in range(PATIENCE):
        try:
            urllib.request.urlopen(URL, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(1)
        else:
            return
    raise SystemExit(f"{URL}: does not answer")


def shoot(page: Page, name: str) -> None:
    """Write a screenshot with 256 colors, which keeps it small."""
    path = IMAGES / name
    page.screenshot(path=path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


def main() -> None:
    """Start the application and write the images."""
    parser = argparse.ArgumentParser(description="Make the screenshots of the web application.")
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run of the quickstart (default: train one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or trained(Path(folder))
        server = subprocess.Popen([sys.executable, "-m", "vitrail", "app", "--run", str(run), "--port", str(PORT)])
        try:
            wait_until_served()
            shoot_all(Path(folder))
            shoot_report(Path(folder), run)
        finally:
            server.terminate()
            server.wait()


def trained(folder: Path) -> Path:
    """Train the quickstart, and return its run directory."""
    command = ["fit", "--config", "quickstart", "--runs", str(folder), "--test_best=true"]
    subprocess.run([sys.executable, "-m", "vitrail", *command], check=True)
    [run] = (folder / "quickstart").iterdir()
    return run


def shoot_all(folder: Path) -> None:
    """Visit the pages and write the images."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 860})
        page.set_default_timeout(240_000)
        page.goto(f"{URL}/?tab=search&q=blue+mug")
        page.locator("#search-grid img").nth(7).wait_for()
        page.wait_for_timeout(3000)  # images; the page keeps a stream open, so its network is never idle
        shoot(page, "app_search.png")
        photo = folder / "photo.png"
        Image.fromarray(draw_ware(ware_spec(7, 4), 1, 256)).save(photo)
        page.goto(f"{URL}/?tab=classify")
        page.locator("#classify-images input[type=file]").first.set_input_files(photo)
        page.locator("#classify-predictions button.bar").first.click()
        page.locator("#classify-overlay img").nth(1).wait_for()
        page.wait_for_timeout(3000)
        shoot(page, "app_classify.png")
        browser.close()


def shoot_report(folder: Path, run: Path) -> None:
    """Write the report of the run, and the image of its first screen."""
    subprocess.run([sys.executable, "-m", "vitrail", "report", str(run), "--to", str(folder)], check=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.goto((folder / "report.html").as_uri())
        page.locator(".tile img").first.wait_for()
        shoot(page, "report.png")
        browser.close()


if __name__ == "__main__":
    main()
