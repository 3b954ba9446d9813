"""Images that a person gives to the page, and the ways of giving them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page

from datamodules.cli import load_datamodule


def wares(run: Path, folder: Path, count: int) -> list[Path]:
    """Files with images of a run's test split."""
    data = load_datamodule(run / "config.yaml")
    paths = []
    for row in data.split_indices("test")[:count].tolist():
        paths.append(folder / f"{data.sample_names()[row]}.png")
        Image.fromarray(data.read_image(row).permute(1, 2, 0).numpy()).save(paths[-1])
    return paths


def give(page: Page, field: str, files: Sequence[Path]) -> None:
    """Uploads files by the field for them."""
    page.locator(f"{field} input[type=file]").first.set_input_files(list(files))


def copy(page: Page, file: Path) -> None:
    """Puts a PNG file into the clipboard."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    content = base64.b64encode(file.read_bytes()).decode()
    page.evaluate(
        """async (content) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            await navigator.clipboard.write([new ClipboardItem({'image/png': new Blob([bytes], {type: 'image/png'})})]);
        }""",
        content,
    )
