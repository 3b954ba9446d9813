"""Exports on the Hugging Face hub: the model card, the upload by an explicit command, and loading them back."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.statistics.scores import heading
from evaluation.tables.summary import TaskSummary, summarise, summary_tables, train_targets_of
from vitrail.errors import UserError, first_line
from vitrail.runs import Run

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from experiments.export.parity import Form
    from experiments.export.predict_onnx import Model
    from lightning_modules.base import VisionTask


_CARD = """\
---
{{ card_data }}
---

# {{ meta.name }}

A {{ meta.kind }} of Vitrail{% if parameters %}, {{ "{:,}".format(parameters) }} parameters{% endif %}. It takes uint8 \
RGB images of {{ image.size }} × {{ image.size }} pixels: {{ resizing[0] }} scaled ({{ image.interpolation }}) to \
{{ scaled_side }}, centre {{ resizing[1] }}. Normalisation is part of the model.
{%- if meta.temperatures %}

Logits divided by these temperatures, fitted on validation, are calibrated: \
{% for task, value in meta.temperatures.items() %}{{ task }} {{ "%.3g"|format(value) }}{{ ", " if not loop.last }}\
{% endfor %}.
{%- endif %}

## Use

{% if kind.startswith(("onnx", "openvino")) -%}
```
pip install {{ "onnxruntime" if kind.startswith("onnx") else "openvino" }} numpy pillow
python predict.py photo.jpg --top 3
```

`predict.py` needs no PyTorch.{% if meta.text %} `--text "a red mug"` compares images with texts \
(`pip install tokenizers`).{% endif %} From the hub, whose copies of scripts are not run, it is
`python -m experiments.export.predict_onnx --model FOLDER photo.jpg` of Vitrail.
{%- elif kind in layouts -%}
```python
{{ layouts[kind] }}
```
{%- elif kind.startswith(("executorch", "coreml")) -%}
Each file takes one {{ "image" if not meta.text else "image or text" }} at a time\
{% if kind.startswith("coreml") %}: pixels as float32 from 0 to 255, tokens as int32{% endif %}. Texts are padded to \
their full length. In Python:

```python
{{ devices[kind.partition("_")[0]] }}
```
{%- elif kind == "safetensors" -%}
```python
from experiments.export.hub import load

task = load("FOLDER or owner/name")  # task(images) takes uint8 (B, 3, {{ image.size }}, {{ image.size }})
```
{%- else -%}
```python
import torch
import torch.ao.quantization.fx._decomposed  # the operators of eight-bit graphs

# torch.compile makes it fast; images are uint8 (B, 3, {{ image.size }}, {{ image.size }})
model = torch.export.load("{{ "image" if meta.text else "model" }}.pt2").module()
```
{%- endif %}

## Results

{% if results -%}
{{ results }}

Of the model before its export. Intervals resample groups (objects).
{%- else -%}
The run has no predictions of a labelled split by this checkpoint, so no score is claimed.
{%- endif %}

## Exported

Compared with the model on the images of {{ split }}; sizes and times are ratios.

{{ forms }}
{%- if unmeasured %}

{{ unmeasured }}.
{%- endif %}

## Data

{% if data -%}
{{ data.data }}: {% for name, count in data.samples.items() %}{{ name }} {{ "{:,}".format(count) }} \
({{ data.groups[name] or "?" }} groups){{ ", " if not loop.last }}{% endfor %}. \
Fingerprint `{{ (data.fingerprint or "")[:16] }}`.
{%- for task, values in data.unseen.items() if values %}

Values of {{ task }} that training never saw: {{ values | join(", ") }}.
{%- endfor %}
{%- else -%}
Not recorded.
{%- endif %}

## Training

Run `{{ meta.run }}`, checkpoint `{{ meta.checkpoint }}`, seed {{ seed }}, revision \
`{{ (git.revision or "not recorded")[:12] }}`{% if git.changed_files %}, \
{{ git.changed_files }} files changed{% endif %}.
{%- if parent %}

Training went on from the weights of `{{ parent }}`.
{%- endif %}
{%- if commands %}

```
{{ commands | join("\n") }}
```
{%- endif %}

Weights `{{ meta.weights[:16] }}`.{{ " " if packages }}{% for name, version in packages.items() %}\
{{ name }} {{ version }}{{ ", " if not loop.last else "." }}{% endfor %}

## Classes

{% for task, names in meta.tasks.items() -%}
- {{ task }}{% if task in meta.kinds %} ({{ meta.kinds[task] | replace("_", "-") }}){% endif %}: \
{{ names | join(" < " if meta.kinds[task] == "ordinal" else ", ") if names else meta.units[task] }}
{%- if task in meta.thresholds %}. Predicted from these probabilities: \
{% for value in meta.thresholds[task] %}{{ "%.3f"|format(value) }}{{ ", " if not loop.last }}{% endfor %}{% endif %}
{% else -%}
None; images and texts are compared by their embeddings.
{% endfor -%}
"""
"""Jinja template of ``README.md``."""

_LAYOUTS = {
    "timm": """\
import timm

model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True)  # labels: model.pretrained_cfg["label_names"]""",
    "transformers": """\
from transformers import AutoModel, AutoImageProcessor, AutoTokenizer

model = AutoModel.from_pretrained("OWNER/NAME")  # with the trained scale
images, texts = AutoImageProcessor.from_pretrained("OWNER/NAME"), AutoTokenizer.from_pretrained("OWNER/NAME")""",
    "open_clip": """\
import open_clip

model, transform = open_clip.create_model_from_pretrained("hf-hub:OWNER/NAME")  # with the trained scale
tokenizer = open_clip.get_tokenizer("hf-hub:OWNER/NAME")""",
    "peft": """\
from peft import PeftModel
from transformers import AutoModel

model = PeftModel.from_pretrained(AutoModel.from_pretrained("BASE"), "OWNER/NAME")""",
}
"""How other libraries load their layouts; for folders instead of the hub see ``docs/guides/export.md``."""

_DEVICES = {
    "executorch": """\
from executorch.runtime import Runtime

method = Runtime.get().load_program("model.pte").load_method("forward")  # or image.pte, text.pte""",
    "coreml": """\
import coremltools

model = coremltools.models.MLModel("model.mlpackage")  # or image.mlpackage, text.mlpackage; predicts on macOS""",
}
"""How runtimes that see one image at a time load a file."""

_WIDGET_IMAGE = "https://huggingface.co/datasets/mishig/sample_images/resolve/main/cat-dog-music.png"

_RESIZING = {
    "crop": ("short side", "cropped"),
    "squash": ("both sides", "cropped"),
    "pad": ("long side", "cropped, with grey borders"),
}


def write_card(
    path: Path, files: Run, metadata: Mapping[str, Any], kind: str, forms: Sequence[Form], split: str
) -> None:
    """Write the model card. What the run's files do not record is left out, or named as missing."""
    from huggingface_hub import ModelCard

    from datamodules.loading.transforms import scaled_side
    from experiments.export.parity import parity_table

    found = _scores(files, metadata["checkpoint"])
    record, image = files.record, metadata["image"]
    data = _part(record, "data")
    commands = dict.fromkeys(str(stage["command"]) for stage in files.stages if stage.get("command"))
    card = ModelCard.from_template(
        _card_data(data, metadata, kind, found),
        template_str=_CARD,
        meta=metadata,
        kind=kind,
        layouts=_LAYOUTS,
        devices=_DEVICES,
        unmeasured=next((form.unmeasured for form in forms if form.unmeasured), ""),
        image=image,
        parameters=_part(record, "model").get("parameters"),
        resizing=_RESIZING[image.get("resize", "crop")],
        scaled_side=scaled_side(image),
        results="\n\n".join(
            table.markdown() for table in summary_tables([row for rows in found.values() for row in rows])
        ),
        split=split,
        forms=parity_table(forms).markdown(),
        data=data and {**data, **{key: _part(data, key) for key in ("samples", "groups", "unseen")}},
        seed=record.get("seed", "not recorded"),
        git=_part(record, "git"),
        parent="/".join(Path(str(record.get("parent", ""))).parts[-4:]),
        commands=[_without_folders(command) for command in commands],
        packages=_part(record, "packages"),
    )
    card.save(path)


def _card_data(
    data: Mapping[str, Any], metadata: Mapping[str, Any], kind: str, found: Mapping[str, list[TaskSummary]]
) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    task = "zero-shot-image-classification" if metadata["text"] else "image-classification"
    name = str(data.get("data", "unknown"))
    results = [
        EvalResult(
            task_type=task,
            dataset_type=name.lower(),
            dataset_name=name,
            # Of two results of one data set the hub keeps the tasks apart by this only.
            dataset_config=row.task,
            dataset_split=split,
            metric_type="f1" if metric == "f1_macro" else metric,
            metric_name=heading(metric),
            metric_value=round(value, 4),
        )
        for split, rows in found.items()
        for row in rows
        for metric, value in ((name, score.value) for name, score in row.scores.items())
        if (metric not in ("f1_weighted", "top3_accuracy")) and not math.isnan(value)
    ]
    tags = ["vitrail", kind, *({"image-feature-extraction"} if metadata["text"] else ())]
    return ModelCardData(
        library_name=kind if kind in _LAYOUTS else "vitrail",
        pipeline_tag=task,
        tags=tags,
        model_name=metadata["name"],
        eval_results=results or None,
        widget=[_widget(metadata)],
    )


def _widget(metadata: Mapping[str, Any]) -> dict[str, str]:
    """An example for the hub's page to try the model on, with the model's own labels."""
    labels = ", ".join(next(iter(metadata["tasks"].values()), []))
    wanted = {"candidate_labels": labels} if metadata["text"] and labels else {}
    return {"src": _WIDGET_IMAGE, "example_title": metadata["name"], **wanted}


def _scores(files: Run, checkpoint: str) -> dict[str, list[TaskSummary]]:
    """Return the summaries of the splits that the run has predictions of, made by the checkpoint that is exported.

    A record that does not say which checkpoint was tested is taken to mean the best one.
    """
    found: dict[str, list[TaskSummary]] = {}
    for split in ("test", "val"):
        if (files.predicted_by(split) or "best") != checkpoint:
            continue
        if split in files.splits and (predictions := files.predictions(split)) is not None:
            train = train_targets_of(files, predictions.tasks)
            found[split] = summarise(predictions, train, files.name, split)
    return found


def _without_folders(command: str) -> str:
    """Return a command without the names of this machine's folders, which are not for publication."""
    return re.sub(r"(?<=[\s='\"])/(?:[^\s/'\"]+/)+", "…/", command)


def _part(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = values.get(key)
    return part if isinstance(part, dict) else {}


def check_card(path: Path) -> None:
    """Refuse a card that the hub would not take.

    Raises:
        UserError: The line names what is wrong with it.
    """
    from huggingface_hub import ModelCard

    try:
        ModelCard.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not a model card ({error}); export again") from error


_WAIT = 5.0
"""Seconds within which the hub must answer."""


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
    """Upload an export in one commit and print its address.

    Raises:
        UserError: if the folder is no finished export, or the hub does not take it.
    """
    from huggingface_hub import HfApi

    folder, repository = options.folder, options.repo
    summary_of(folder)
    check_card(folder / "README.md")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--repo: must be owner/name on the hub; got {repository!r}")
    _check_reachable(repository)
    api = HfApi()
    try:
        api.create_repo(repository, private=not options.public, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=options.message)
    except Exception as error:
        raise UserError(
            f"--repo {repository}: the hub does not take it ({first_line(error)}); log in with `hf auth login`, or "
            "set HF_TOKEN to a token that may write"
        ) from error
    sys.stdout.write(f"{commit.commit_url}\n")


def load(name: str | Path) -> VisionTask | Model:
    """Load an export as a callable: a task for safetensors, ``predict_onnx.Model`` for ONNX and OpenVINO.

    No code comes with it: weights are plain tensors, and the graph is run by ONNX Runtime or OpenVINO.

    Args:
        name: folder that ``export`` wrote, or owner and name on the hub.

    Raises:
        UserError: if it cannot be had, or is in neither of these formats.
    """
    folder = Path(name) if Path(name).is_dir() else Run.from_hub(str(name)).path
    kind = str(summary_of(folder).get("format"))
    if kind == "safetensors":
        from experiments.export.weights import read_weights

        return read_weights(folder)
    if kind.startswith(("onnx", "openvino")):
        from experiments.export.predict_onnx import Model, PredictError

        try:
            return Model(folder)
        except PredictError as error:
            raise UserError(str(error)) from error
    if kind in _LAYOUTS:
        raise UserError(f"{name}: is in the layout of {kind}; load it as its card says")
    if kind.startswith(tuple(_DEVICES)):
        raise UserError(f"{name}: is in the format {kind}, for devices; load its files as its card says")
    raise UserError(f"{name}: is in the format {kind}; torch.export.load reads it, if you trust who made it")


def summary_of(folder: Path) -> dict[str, Any]:
    """Read ``export.json`` of a folder and compare the files with it.

    Raises:
        UserError: if the folder is no finished export, or its files are not those that were exported.
    """
    from vitrail.files import file_sha256

    path = folder / Run.EXPORT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in found["files"] if not (folder / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: is not an export ({Run.EXPORT} is missing or damaged); run `export` first"
        ) from error
    if missing:
        raise UserError(f"{folder}: lacks {', '.join(missing)}; export again, or fetch the whole folder")
    recorded: dict[str, str] = found.get("sha256", {})  # older versions recorded none
    if changed := [name for name, digest in recorded.items() if file_sha256(folder / name) != digest]:
        raise UserError(f"{folder}: {', '.join(changed)} changed since the export (SHA-256 differs); export again")
    return dict(found)


def _check_reachable(name: str) -> None:
    from huggingface_hub import constants

    from lightning_modules.encoders.weights import reachable

    if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT, _WAIT):
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no answer from {constants.ENDPOINT}"
        raise UserError(f"{name}: the hub cannot be reached ({cause}); connect to the network, or use a local folder")
