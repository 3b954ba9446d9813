"""Sections of a report that say what was run: stages, configuration, environment and data, all read from the run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from evaluation.html_page import Section
from vitrail.runs import CONFIG, RunFiles

SETTINGS = ("seed_everything", "model", "data", "trainer.max_epochs", "trainer.callbacks", "checkpoint.monitor")
"""Keys of the configuration that the table has; the folded text has all."""


def run_section(files: RunFiles) -> Section:
    """What was done when, and everything that is missing or went wrong."""
    import pandas as pd

    rows = [
        {
            "stage": stage.get("stage", ""),
            "started": str(stage.get("started", ""))[:19],
            "minutes": stage_minutes(stage),
            "ended": stage.get("exit", ""),
            "epochs done": "" if stage.get("epochs") is None else str(stage["epochs"]),
            "best on validation": _best(stage),
        }
        for stage in files.stages
    ]
    says = [f"`{command}`" for command in dict.fromkeys(str(stage.get("command", "")) for stage in files.stages)]
    tables = {"stages": pd.DataFrame(rows)} if rows else {}
    return Section("Run", says=[said for said in says if said != "``"], tables=tables, missing=list(files.missing))


def configuration_section(files: RunFiles) -> Section:
    """The settings that matter as a table, and the whole file folded away."""
    import pandas as pd

    flat = flattened(files.config)
    chosen = {
        key.replace(".init_args", "").replace(".class_path", ""): value
        for start in SETTINGS
        for key, value in flat.items()
        if value not in (None, "") and (key == start or key.startswith(f"{start}."))
    }
    if not flat:
        return Section("Configuration", missing=[f"There is no usable {CONFIG} in the run directory."])
    table = pd.DataFrame({"setting": list(chosen), "value": [str(value) for value in chosen.values()]})
    text = (files.path / CONFIG).read_text(encoding="utf-8", errors="replace")
    return Section("Configuration", tables={"settings": table} if len(table) else {}, texts={f"all of {CONFIG}": text})


def environment_section(files: RunFiles) -> Section:
    """Revision, versions, seed and hardware."""
    import pandas as pd

    record = files.record
    if not record:
        return Section("Environment", missing=["Without run.json nothing is known of revision, versions and hardware."])
    git = record.get("git")
    facts: dict[str, Any] = {"seed": record.get("seed")}
    missing = []
    if isinstance(git, dict):
        facts |= {"git revision": git.get("revision"), "files changed since": git.get("changed_files")}
        if git.get("changed_files"):
            missing.append(
                f"The source had {git['changed_files']} changed files: the revision alone does not reproduce this run."
            )
    else:
        missing.append("The revision of the source is not known: the run was not made in a checkout.")
    facts |= {"python": record.get("python"), **_mapping(record.get("packages"))}
    facts |= {"processes": record.get("processes"), **flattened(_mapping(record.get("hardware")))}
    facts |= {f"model {key}": value for key, value in _mapping(record.get("model")).items()}
    told = {key: _told(value) for key, value in facts.items() if value is not None}
    table = pd.DataFrame({"what": list(told), "value": list(told.values())})
    return Section("Environment", tables={"environment": table} if told else {}, missing=missing)


def data_section(files: RunFiles) -> Section:
    """What the run saw of the data."""
    import pandas as pd

    data = _mapping(files.record.get("data"))
    if not data:
        return Section("Data", missing=["The run record does not say which data were seen (run.json, key data)."])
    samples, groups = _mapping(data.get("samples")), _mapping(data.get("groups"))
    splits = pd.DataFrame(
        {
            "split": list(samples),
            "samples": list(samples.values()),
            "groups": [groups.get(split, "") for split in samples],
        }
    )
    missing: list[str] = []
    fingerprint = str(data.get("fingerprint") or "")[:12] or "not recorded"
    says = [f"{data.get('data', '')}, {data.get('origin', '')}, fingerprint {fingerprint}."]
    if isinstance(data.get("unseen"), dict):
        says.append(_unseen(_mapping(data["unseen"])))
    else:
        missing.append("The run record does not say which values training never saw.")
    says += _doubts(data)
    skipped = data.get("skipped")
    if isinstance(skipped, list):
        says.append(f"Pictures left out because they cannot be read: {len(skipped)}.")
    else:
        missing.append("The run record does not say whether pictures were left out.")
    tables = {"data_splits": splits}
    if skipped:
        tables["skipped_pictures"] = pd.DataFrame(skipped)
    return Section("Data", says=says, tables=tables, missing=missing)


def stage_minutes(stage: Mapping[str, Any]) -> float:
    """How long a stage took, in minutes; NaN where its end is not known."""
    try:
        started, ended = (datetime.fromisoformat(str(stage[key])) for key in ("started", "ended"))
    except (KeyError, ValueError):
        return float("nan")
    return (ended - started).total_seconds() / 60


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings and of lists of mappings by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            flat |= flattened({str(place): item for place, item in enumerate(value)}, f"{key}.")
        elif isinstance(value, dict) and value:
            flat |= flattened(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def _unseen(unseen: Mapping[str, Any]) -> str:
    found = [
        f"{task} {value!r} ({count} samples)"
        for task, values in unseen.items()
        for value, count in _mapping(values).items()
    ]
    if not found:
        return "Every value of every label that is tested occurs in training."
    return f"Values that training never saw, left out as unknown: {', '.join(found)}."


def _doubts(data: Mapping[str, Any]) -> list[str]:
    """What the record says of missing values, contradicting images and what was left out; runs of old say nothing."""
    notes = data.get("notes")
    says = [str(note) for note in notes] if isinstance(notes, list) else []
    texts = [
        f"{column} {text!r} ({count} samples)"
        for column, counts in _mapping(data.get("missing")).items()
        for text, count in _mapping(counts).items()
    ]
    if texts:
        says.append(f"Counted as unknown (checks.missing): {', '.join(texts)}.")
    identical = _mapping(data.get("identical"))
    repeated = [f"{split} {count}" for split, count in _mapping(identical.get("repeated")).items() if count]
    if repeated:
        says.append(f"Images that repeat another one of their split: {', '.join(repeated)}.")
    conflicts = [f"{column} {count}" for column, count in _mapping(identical.get("conflicts")).items()]
    if conflicts:
        says.append(f"Identical images that the data contradict themselves about: {', '.join(conflicts)}.")
    return says


def _best(stage: Mapping[str, Any]) -> str:
    best = _mapping(stage.get("best"))
    if not isinstance(best.get("score"), (int, float)):
        return ""
    return f"{best.get('monitor', '')} {best['score']:.4f}"


def _told(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
