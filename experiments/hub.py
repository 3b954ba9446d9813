"""Exports on the Hugging Face hub: pushed by an explicit command, loaded back from there or from a folder."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.export_metadata import SUMMARY
from experiments.model_card import check_card
from vitrail.errors import UserError, run_reporting_user_errors

if TYPE_CHECKING:
    from experiments.predict_onnx import Model
    from lightning_modules.base import VisionTask

_WAIT = 5.0
"""Seconds that the hub has to answer at all."""

_NO_CODE = ["*.json", "*.md", "*.onnx", "*.safetensors"]
"""What is fetched: data only, never scripts, nor PyTorch's archives, which are for whoever trusts them."""


def main(args: Sequence[str]) -> int:
    """``python -m experiments push_to_hub FOLDER --repo owner/name``.

    Args:
        args: arguments after ``push_to_hub``.

    Returns:
        Exit code: 0, or 2 after a mistake of the user.
    """
    command = argparse.ArgumentParser(
        prog="python -m experiments push_to_hub",
        description="Uploads an export to the Hugging Face hub, in one commit. Log in with `hf auth login`, or set "
        "HF_TOKEN.",
        allow_abbrev=False,
    )
    command.add_argument("folder", type=Path, metavar="FOLDER", help="that `export` wrote")
    command.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made where it is not there")
    command.add_argument("--public", action="store_true", help="for all to see (default: private)")
    command.add_argument("--message", default="Export of Vitrine", help="of the commit")
    options = command.parse_args(list(args))

    def run() -> None:
        url = push(options.folder, options.repo, private=not options.public, message=options.message)
        sys.stdout.write(f"{url}\n")

    return run_reporting_user_errors(run)


def push(folder: Path, repository: str, *, private: bool = True, message: str = "Export of Vitrine") -> str:
    """Uploads an export in one commit.

    Args:
        folder: that ``export`` wrote.
        repository: owner and name; made where it is not there.
        private: whether a new one is.
        message: of the commit.

    Returns:
        Address of the commit.

    Raises:
        UserError: if the folder is no finished export, or the hub does not take it.
    """
    from huggingface_hub import HfApi

    summary_of(folder)
    check_card(folder / "README.md")
    _check_name(repository, "--repo")
    _check_reachable(repository)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:
        raise UserError(
            f"--repo {repository}: the hub does not take it ({_first_line(error)}); log in with `hf auth login`, or "
            "set HF_TOKEN to a token that may write"
        ) from error
    return str(commit.commit_url)


def load(name: str | Path) -> VisionTask | Model:
    """An export as something to call: a task for safetensors, ``predict_onnx.Model`` for ONNX.

    No code comes with it: weights are plain tensors, and the graph is run by ONNX Runtime.

    Args:
        name: folder that ``export`` wrote, or owner and name on the hub.

    Raises:
        UserError: if it cannot be had, or is in neither of these formats.
    """
    folder = folder_of(name)
    kind = summary_of(folder).get("format")
    if kind == "safetensors":
        from experiments.export_weights import read_weights

        return read_weights(folder)
    if kind == "onnx":
        from experiments.predict_onnx import Model, PredictError

        try:
            return Model(folder)
        except PredictError as error:
            raise UserError(str(error)) from error
    raise UserError(f"{name}: is in the format {kind}; torch.export.load reads it, if you trust who made it")


def folder_of(name: str | Path) -> Path:
    """Local folder of an export, fetched from the hub if need be.

    Raises:
        UserError: if it cannot be had.
    """
    if Path(name).is_dir():
        return Path(name)
    _check_name(str(name), "export")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), local_files_only=True, allow_patterns=_NO_CODE))
    except Exception:
        # Not in the cache; told below, if it cannot be had at all.
        _check_reachable(str(name))
    try:
        return Path(snapshot_download(str(name), allow_patterns=_NO_CODE))
    except Exception as error:
        raise UserError(
            f"{name}: cannot be fetched ({_first_line(error)}); check the name, or give a local folder"
        ) from error


def summary_of(folder: Path) -> dict[str, Any]:
    """What ``export.json`` of a folder says, which its files are compared with.

    Raises:
        UserError: if the folder is no finished export, or its files are not those that were exported.
    """
    from lightning_modules.encoders.image import file_sha256

    path = folder / SUMMARY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in found["files"] if not (folder / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: is no export ({SUMMARY} is missing or damaged); run `export` first") from error
    if missing:
        raise UserError(f"{folder}: lacks {', '.join(missing)}; export again, or fetch the whole folder")
    recorded: dict[str, str] = found.get("sha256", {})  # older versions recorded none
    if changed := [name for name, digest in recorded.items() if file_sha256(folder / name) != digest]:
        raise UserError(f"{folder}: {', '.join(changed)} changed since the export (SHA-256 differs); export again")
    return dict(found)


def _check_name(name: str, key: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{key}: {name!r} is neither a folder nor owner/name on the hub")


def _check_reachable(name: str) -> None:
    from huggingface_hub import constants

    from lightning_modules.encoders.image import reachable

    if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT, _WAIT):
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no answer from {constants.ENDPOINT}"
        raise UserError(f"{name}: the hub cannot be reached ({cause}); connect to the network, or use a local folder")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
