"""The model card of an export in the format of the Hugging Face hub, written from the run's own files alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.summary import TaskSummary, markdown_rows, summarise
from experiments.export_timing import Form, markdown
from vitrail.errors import UserError
from vitrail.runs import RunFiles

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

_USE = {
    "onnx": """\
```
pip install onnxruntime numpy pillow
python predict.py photo.jpg --top 3
```

`predict.py` needs no PyTorch.{texts} From the hub, whose copies of scripts are not run, it is
`python -m experiments.predict_onnx --model FOLDER photo.jpg` of Vitrine.""",
    "safetensors": """\
```python
from experiments.hub import load

task = load("FOLDER or owner/name")  # a module of Vitrine; task(images) takes uint8 (B, 3, {size}, {size})
```""",
    "torch_export": """\
```python
import torch
import torch.ao.quantization.fx._decomposed  # the operators of eight-bit graphs

model = torch.export.load("{file}.pt2").module()  # torch.compile makes it fast; images are uint8 (B, 3, {size}, {size})
```""",
}


def write_card(
    path: Path, files: RunFiles, metadata: Mapping[str, Any], kind: str, forms: Sequence[Form], split: str
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
    files: RunFiles, metadata: Mapping[str, Any], kind: str, found: Mapping[str, list[TaskSummary]]
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
    tags = ["vitrine", kind, *({"image-feature-extraction"} if metadata["text"] else ())]
    return ModelCardData(
        library_name="vitrine",
        pipeline_tag=task,
        tags=tags,
        model_name=metadata["name"],
        eval_results=results or None,
    )


def _scores(files: RunFiles, checkpoint: str) -> dict[str, list[TaskSummary]]:
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


def _what(metadata: Mapping[str, Any], files: RunFiles) -> str:
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
        f"A {metadata['kind']} of Vitrine{count}. It takes uint8 RGB pictures of "
        f"{image['size']} × {image['size']} pixels: {side} scaled ({image['interpolation']}) to "
        f"{scaled_side(image)}, centre {center}. Normalisation is part of the model."
    ]
    if metadata["temperatures"]:
        told = ", ".join(f"{task} {value:.3g}" for task, value in metadata["temperatures"].items())
        lines.append(f"Logits divided by these temperatures, fitted on validation, are calibrated: {told}.")
    return "\n\n".join(lines)


def _use(metadata: Mapping[str, Any], kind: str) -> str:
    texts = ' `--text "a red mug"` compares pictures with texts (`pip install tokenizers`).' if metadata["text"] else ""
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
    return f"{markdown_rows(columns, rows)}\n\nOf the model before its export. Intervals resample groups (objects)."


def _exported(forms: Sequence[Form], split: str) -> str:
    return f"Compared with the model on the pictures of {split}; sizes and times are ratios.\n\n{markdown(forms)}"


def _data(files: RunFiles) -> str:
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


def _training(files: RunFiles, metadata: Mapping[str, Any]) -> str:
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
    return "\n".join(lines) or "None; pictures and texts are compared by their embeddings."


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
