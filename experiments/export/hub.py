"""Exports on the Hugging Face hub: pushed by an explicit command, loaded back from there or from a folder.

The model card of an export in the format of the Hugging Face hub, written from the run's own files alone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.tables.summary import TaskSummary, summarise
from experiments.export.parity import Form, parity_table
from experiments.export.weights import SUMMARY
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.runs import Run

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from experiments.export.predict_onnx import Model
    from lightning_modules.base import VisionTask


_USE = {
    "onnx": """\
```
pip install onnxruntime numpy pillow
python predict.py photo.jpg --top 3
```

`predict.py` needs no PyTorch.{texts} From the hub, whose copies of scripts are not run, it is
`python -m experiments.export.predict_onnx --model FOLDER photo.jpg` of Vitrail.""",
    "safetensors": """\
```python
from experiments.export.hub import load

task = load("FOLDER or owner/name")  # a module of Vitrail; task(images) takes uint8 (B, 3, {size}, {size})
```""",
    "torch_export": """\
```python
import torch
import torch.ao.quantization.fx._decomposed  # the operators of eight-bit graphs

model = torch.export.load("{file}.pt2").module()  # torch.compile makes it fast; images are uint8 (B, 3, {size}, {size})
```""",
}


def write_card(
    path: Path, files: Run, metadata: Mapping[str, Any], kind: str, forms: Sequence[Form], split: str
) -> None:
    """Writes ``README.md``. What the run's files do not say is left out, or said to be missing.

    Args:
        path: of the file.
        files: of the run.
        metadata: of ``export_metadata``.
        kind: format of the export.
        forms: that were compared.
        split: that they were compared on.
    """
    found = _scores(files, metadata["checkpoint"])
    parts = [
        f"---\n{_front_matter(files, metadata, kind, found).to_yaml()}\n---",
        f"# {metadata['name']}",
        _what(metadata, files),
        f"## Use\n\n{_use(metadata, kind)}",
        f"## Results\n\n{_results(found)}",
        f"## Exported\n\n{_exported(forms, split)}",
        f"## Data\n\n{_data(files)}",
        f"## Training\n\n{_training(files, metadata)}",
        f"## Classes\n\n{_classes(metadata)}",
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front_matter(
    files: Run, metadata: Mapping[str, Any], kind: str, found: Mapping[str, list[TaskSummary]]
) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    task = "zero-shot-image-classification" if metadata["text"] else "image-classification"
    data = str(_part(files.record, "data").get("data", "unknown"))
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data.lower(),
            dataset_name=data,
            # Of two results of one data set the hub keeps the tasks apart by this only.
            dataset_config=row.task,
            dataset_split=split,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for split, rows in found.items()
        for row in rows
        for metric, name, value in (("accuracy", "accuracy", row.accuracy), ("f1", "macro F1", row.f1_macro))
        if not math.isnan(value)
    ]
    tags = ["vitrail", kind, *({"image-feature-extraction"} if metadata["text"] else ())]
    return ModelCardData(
        library_name="vitrail",
        pipeline_tag=task,
        tags=tags,
        model_name=metadata["name"],
        eval_results=results or None,
    )


def _scores(files: Run, checkpoint: str) -> dict[str, list[TaskSummary]]:
    """Summaries of the splits that the run has predictions of, made by the checkpoint that is exported.

    A record that does not say which checkpoint was tested is taken to mean the best one.
    """
    found: dict[str, list[TaskSummary]] = {}
    for split in ("test", "val"):
        if (files.predicted_by(split) or "best") != checkpoint:
            continue
        if split in files.splits and (predictions := files.predictions(split)) is not None:
            counts = files.class_counts(predictions.tasks)
            found[split] = summarise(predictions, counts, files.name, split)
    return found


def _what(metadata: Mapping[str, Any], files: Run) -> str:
    parameters = _part(files.record, "model").get("parameters")
    count = f", {parameters:,} parameters" if isinstance(parameters, int) else ""
    image = metadata["image"]
    from datamodules.loading.transforms import scaled_side

    how = {
        "crop": ("short side", "cropped"),
        "squash": ("both sides", "cropped"),
        "pad": ("long side", "cropped, with grey borders"),
    }
    side, center = how[image.get("resize", "crop")]
    lines = [
        f"A {metadata['kind']} of Vitrail{count}. It takes uint8 RGB images of "
        f"{image['size']} × {image['size']} pixels: {side} scaled ({image['interpolation']}) to "
        f"{scaled_side(image)}, centre {center}. Normalisation is part of the model."
    ]
    if metadata["temperatures"]:
        told = ", ".join(f"{task} {value:.3g}" for task, value in metadata["temperatures"].items())
        lines.append(f"Logits divided by these temperatures, fitted on validation, are calibrated: {told}.")
    return "\n\n".join(lines)


def _use(metadata: Mapping[str, Any], kind: str) -> str:
    texts = ' `--text "a red mug"` compares images with texts (`pip install tokenizers`).' if metadata["text"] else ""
    file = "image" if metadata["text"] else "model"
    return _USE[kind].format(texts=texts, size=metadata["image"]["size"], file=file)


def _results(found: Mapping[str, list[TaskSummary]]) -> str:
    if not found:
        return "The run has no predictions of a labelled split by this checkpoint, so no score is claimed."
    columns = ["split", "task", "n", "groups", "majority", "accuracy [95 %]", "macro F1 [95 %]", "note"]
    rows = [
        [
            split,
            row.task,
            str(row.n),
            str(row.groups),
            _number(row.majority),
            f"{_number(row.accuracy)} [{_number(row.accuracy_interval.low)}, {_number(row.accuracy_interval.high)}]",
            f"{_number(row.f1_macro)} [{_number(row.f1_macro_interval.low)}, {_number(row.f1_macro_interval.high)}]",
            row.note,
        ]
        for split, summaries in found.items()
        for row in summaries
    ]
    return f"{Table(columns, rows).markdown()}\n\nOf the model before its export. Intervals resample groups (objects)."


def _exported(forms: Sequence[Form], split: str) -> str:
    table = parity_table(forms).markdown()
    return f"Compared with the model on the images of {split}; sizes and times are ratios.\n\n{table}"


def _data(files: Run) -> str:
    data = _part(files.record, "data")
    if not data:
        return "Not recorded."
    counts = _part(data, "samples")
    groups = _part(data, "groups")
    told = ", ".join(f"{split} {count:,} ({groups.get(split, '?')} groups)" for split, count in counts.items())
    lines = [f"{data.get('data')}: {told}. Fingerprint `{str(data.get('fingerprint', ''))[:16]}`."]
    for task, values in _part(data, "unseen").items():
        if values:
            lines.append(f"Values of {task} that training never saw: {', '.join(map(str, values))}.")
    return "\n\n".join(lines)


def _training(files: Run, metadata: Mapping[str, Any]) -> str:
    record = files.record
    git = _part(record, "git")
    changed = f", {git['changed_files']} files changed" if git.get("changed_files") else ""
    commands = dict.fromkeys(str(stage.get("command", "")) for stage in files.stages)
    packages = ", ".join(f"{name} {version}" for name, version in _part(record, "packages").items())
    lines = [
        f"Run `{metadata['run']}`, checkpoint `{metadata['checkpoint']}`, seed {record.get('seed', 'not recorded')}, "
        f"revision `{str(git.get('revision', 'not recorded'))[:12]}`{changed}.",
        "```\n" + "\n".join(_without_folders(command) for command in commands if command) + "\n```",
        f"Weights `{metadata['weights'][:16]}`. {packages}.",
    ]
    return "\n\n".join(line for line in lines if line != "```\n\n```")


def _classes(metadata: Mapping[str, Any]) -> str:
    lines = [f"- {task}: {', '.join(names)}" for task, names in metadata["tasks"].items()]
    return "\n".join(lines) or "None; images and texts are compared by their embeddings."


def _without_folders(command: str) -> str:
    """A command without the names of this machine's folders, which are nobody else's business."""
    return re.sub(r"(?<=[\s='\"])/(?:[^\s/'\"]+/)+", "…/", command)


def _part(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = values.get(key)
    return part if isinstance(part, dict) else {}


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def check_card(path: Path) -> None:
    """Refuse a card that the hub would not take.

    Raises:
        UserError: tells what is wrong with it.
    """
    from huggingface_hub import ModelCard

    try:
        ModelCard.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no model card ({error}); export again") from error


_WAIT = 5.0
"""Seconds that the hub has to answer at all."""

_NO_CODE = ["*.json", "*.md", "*.onnx", "*.safetensors"]
"""What is fetched: data only, never scripts, nor PyTorch's archives, which are for whoever trusts them."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``push-to-hub``."""
    command.description = (
        "Uploads an export to the Hugging Face hub, in one commit. Log in with `hf auth login`, or set HF_TOKEN."
    )
    command.add_argument("folder", type=Path, metavar="FOLDER", help="that `export` wrote")
    command.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made where it is not there")
    command.add_argument("--public", action="store_true", help="for all to see (default: private)")
    command.add_argument("--message", default="Export of Vitrail", help="of the commit")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Upload and print the address."""
    url = push(options.folder, options.repo, private=not options.public, message=options.message)
    sys.stdout.write(f"{url}\n")


def push(folder: Path, repository: str, *, private: bool = True, message: str = "Export of Vitrail") -> str:
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
        from experiments.export.weights import read_weights

        return read_weights(folder)
    if kind == "onnx":
        from experiments.export.predict_onnx import Model, PredictError

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
    from lightning_modules.encoders.weights import file_sha256

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

    from lightning_modules.encoders.weights import reachable

    if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT, _WAIT):
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no answer from {constants.ENDPOINT}"
        raise UserError(f"{name}: the hub cannot be reached ({cause}); connect to the network, or use a local folder")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
