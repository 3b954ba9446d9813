"""Experiment files: reading and merging them, the same for every command."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import yaml
from jsonargparse import set_dumper, set_loader

try:  # of libyaml, eight times as fast; PyYAML's own wheels have it
    from yaml import CSafeDumper as SafeDumper
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeDumper, SafeLoader  # type: ignore[assignment]

from vitrail.errors import UserError

_SEED_KEYS = ("data.init_args.seed", "data.seed")
_PARTS = ("data", "model", "trainer")
_FILES = (".yaml", ".yml", ".json")
_FORMER_MODULES = {
    "callbacks.backbone_unfreezing": "callbacks.finetuning",
    "callbacks.class_report": "callbacks.confusion",
    "callbacks.confusion_matrix": "callbacks.confusion",
    "callbacks.embedding_export": "callbacks.gallery_writer",
    "callbacks.monitored_metrics": "callbacks.guards",
    "callbacks.non_finite_loss": "callbacks.guards",
    "callbacks.start_weights": "callbacks.finetuning",
    "datamodules.picture_folder": "datamodules.image_folder",
    "datamodules.streamed_images": "datamodules.streaming",
    "experiments.loggers": "experiments.train.loggers",
    "experiments.metrics_log": "experiments.train.loggers",
    "lightning_modules.classifier": "lightning_modules.classification",
    "lightning_modules.multitask": "lightning_modules.classification",
    "lightning_modules.sharding": "lightning_modules.distributed",
}
"""Modules of version 0.1 that runs and experiment files may name, and their present names."""

_OPTIONS = ("answers", "logit_scale", "memory", "optim_options")
"""Arguments of models that are dataclasses; their default was null in version 0.1."""

_NOW_OPTIONS = {"label_smoothing": "loss_options", "class_weighting": "loss_options", "questions": "answers"}
"""Arguments of classifiers until version 0.2 that are among these options now."""

_CLASSIFIERS = ("", "ImageClassifier", "MultiTaskClassifier", "GenerativeClassifier")

_STRING = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"


class FullNames:
    """Mixin of argument parsers without abbreviated options: ``--loader.batch 3`` must not mean ``batch_size``.

    jsonargparse builds parsers of nested options from the outer parser's class, without its arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})


class _Loader(SafeLoader):
    """Scalars as in YAML 1.2: ``on``, ``off``, ``yes``, ``no``, dates and ``001`` are strings, ``1e-4`` is a number.

    Keys are strings, and a key that occurs twice in one mapping is refused.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader's, with keys as strings."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                key.tag = _STRING
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} occurs twice in one mapping; remove one", key.start_mark
                    )
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*)?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*\.(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


class _Dumper(SafeDumper):
    """Quotes strings that YAML 1.1 or 1.2 would parse as something else, such as ``1e3``."""


_Dumper.yaml_implicit_resolvers = {
    first: list(known) for first, known in yaml.SafeDumper.yaml_implicit_resolvers.items()
}
for _first_letter, _known in _Loader.yaml_implicit_resolvers.items():
    _Dumper.yaml_implicit_resolvers.setdefault(_first_letter, []).extend(_known)


def load_yaml(text: str, below: Sequence[str] = ()) -> Any:
    """Parse YAML; scalars in string arguments of ``data:`` stay strings, as in ``aliases: {lamp: {off: 0}}``.

    Args:
        text: YAML.
        below: keys to nest the content below, the outermost first.

    Raises:
        yaml.YAMLError: the text is no YAML.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        for key in reversed(below):
            node = yaml.MappingNode("tag:yaml.org,2002:map", [(yaml.ScalarNode(_STRING, key), node)])
        _keep_texts(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def dump_yaml(content: Mapping[str, Any], *, one_line: bool = False) -> str:
    """YAML that ``load_yaml`` and other readers parse alike."""
    text = yaml.dump(
        dict(content), Dumper=_Dumper, default_flow_style=one_line, sort_keys=False, allow_unicode=True, width=1 << 30
    )
    return text.strip() if one_line else text


def load_dumped(text: str) -> Any:
    """Parse what ``dump_yaml`` has written, as any reader of YAML does."""
    return yaml.load(text, Loader=SafeLoader)


def _load_value(text: str) -> Any:
    """Parse a value for jsonargparse; a flow mapping without values, ``{a, b}``, is a string."""
    value = load_yaml(text)
    bare = isinstance(value, dict) and value and ":" not in text and all(entry is None for entry in value.values())
    return text if bare else value


set_loader("yaml", _load_value, exceptions=(yaml.YAMLError,))
set_dumper("yaml", dump_yaml)


def one_config(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Merge all experiment files among the arguments of ``fit`` and the like into one.

    Args:
        args: the subcommand and its arguments.

    Returns:
        Arguments with at most one ``--config``, a YAML text in front of all flags, which override it; and the names of
        the files.

    Raises:
        UserError: a file cannot be read.
    """
    names, rest = split_configs(args)
    if not names:
        return list(rest), names
    content = read_experiments(names)
    rest = _current_flags(rest, content)
    return [*rest[:1], "--config", dump_yaml(content, one_line=True), *rest[1:]], names


def _current_flags(args: Sequence[str], content: Mapping[str, Any]) -> list[str]:
    """Write flags of arguments that are options now, ``--model.label_smoothing 0.1``, as those of the options."""
    model = content.get("model")
    if not (isinstance(model, dict) and _is_classifier(str(model.get("class_path", "")))):
        return list(args)
    names = "|".join(_NOW_OPTIONS)
    pattern = re.compile(rf"(--model\.(?:init_args\.)?)({names})(?=[.=]|$)")
    return [pattern.sub(lambda found: f"{found[1]}{_NOW_OPTIONS[found[2]]}.{found[2]}", one, count=1) for one in args]


def _is_classifier(class_path: str) -> bool:
    module, _, name = class_path.rpartition(".")
    return name in _CLASSIFIERS and module.partition(".")[0] in ("", "lightning_modules")


def split_configs(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into experiment files and the others, with string arguments of ``data`` quoted.

    Raises:
        UserError: an argument sets the seed of the data alone.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("-c", "--config", action="append", default=[])
    known, rest = files.parse_known_args(list(args))
    for place, argument in enumerate(rest):
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--data.") or not (equals or place + 1 < len(rest)):
            continue
        if key in _SEED_KEYS:
            raise _own_seed(f"--{key}")
        if key.removeprefix("data.").removeprefix("init_args.").partition(".")[0] in text_arguments():
            quoted = _as_written(value if equals else rest[place + 1])
            rest[place + (not equals)] = f"--{key}={quoted}" if equals else quoted
    return known.config, rest


def read_experiments(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Read and merge experiment files; later ones override earlier ones key by key (see ``merged``).

    Raises:
        UserError: a file cannot be read, or sets the seed of the data alone.
    """
    content: dict[str, Any] = {}
    for path in paths:
        content = merged(content, read_experiment(path))
    content = {key: value for key, value in content.items() if value is not None or key not in ("data", "model")}
    arguments = content["data"].get("init_args") if isinstance(content.get("data"), dict) else None
    if isinstance(arguments, dict):
        if "seed" in arguments:
            raise _own_seed(f"--config {paths[-1]}: {_SEED_KEYS[0]}")
        # null resets to the default; runs of version 0.1 wrote it for groups of options that were not given.
        content["data"] = {
            **content["data"],
            "init_args": {key: value for key, value in arguments.items() if value is not None},
        }
    return content


def read_experiment(path: str | Path) -> dict[str, Any]:
    """Read an experiment file or an overlay, in its present form.

    ``data:``, ``model:`` and ``trainer:`` may be relative paths of further files; the first two may be class paths.

    Raises:
        UserError: the file cannot be read, is no YAML or has no keys.
    """
    content = _read(path)
    for key in [key for key in content if "." in key]:
        # As for the parser, `trainer.max_epochs: 3` is `trainer: {max_epochs: 3}`.
        content = merged(content, _nested(key.split("."), content.pop(key)))
    for key, value in content.items():
        if key not in _PARTS or not isinstance(value, str):
            continue
        if value.endswith(_FILES) and (part := Path(path).parent / value).is_file():
            content[key] = _read(part)
        elif key != "trainer":
            content[key] = {"class_path": value}
    content = {key: _with_present_classes(value) for key, value in content.items()}
    model = content.get("model")
    if isinstance(model, dict) and isinstance(arguments := model.get("init_args"), dict):
        content["model"] = {**model, "init_args": _current_arguments(str(model.get("class_path", "")), arguments)}
    return content


def _current_arguments(class_path: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a model's arguments of earlier versions.

    ``temperature`` is ``logit_scale``, null options are defaults, and some arguments are options.
    """
    found = {name: value for name, value in arguments.items() if value is not None or name not in _OPTIONS}
    scale = found.get("temperature")
    if class_path.endswith("DualEncoder") or (not class_path and isinstance(scale, dict)):
        found.pop("temperature", None)
        if scale:
            found["logit_scale"] = {"trainable" if key == "learned" else key: value for key, value in scale.items()}
    for name in _NOW_OPTIONS.keys() & found if _is_classifier(class_path) else ():
        group = _NOW_OPTIONS[name]
        found[group] = {name: found.pop(name), **(found.get(group) or {})}
    return found


def current_class_path(class_path: str) -> str:
    """Return the present path of a class of version 0.1; other class paths are returned unchanged.

    Example:
        >>> current_class_path("lightning_modules.multitask.MultiTaskClassifier")
        'lightning_modules.classification.MultiTaskClassifier'
    """
    module, _, name = class_path.rpartition(".")
    name = "UnlabeledFolder" if name == "PictureFolder" else name
    module = _FORMER_MODULES.get(module, module)
    return f"{module}.{name}" if module else name


def _with_present_classes(content: Any) -> Any:
    if isinstance(content, list):
        return [_with_present_classes(item) for item in content]
    if not isinstance(content, dict):
        return content
    return {
        key: current_class_path(value)
        if key == "class_path" and isinstance(value, str)
        else _with_present_classes(value)
        for key, value in content.items()
    }


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if keys[1:] else value}


def _read(path: str | Path) -> dict[str, Any]:
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        content = _inline(str(path))
        if content is None:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UserError(f"--config {path}: {reason}; give an experiment's YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: holds no keys; give an experiment's YAML file")
    return content


def _inline(text: str) -> dict[str, Any] | None:
    """The mapping given inline instead of a file's name; None for a name."""
    try:
        content = load_yaml(text)
    except yaml.YAMLError:
        return None
    return content if isinstance(content, dict) else None


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the second mapping into the first, key by key.

    Lists are replaced, ``key+:`` appends to one, and another class does not inherit the arguments of the first. In an
    argument's options (``split: {seed: null}``) ``null`` removes the key, elsewhere it is a value.
    """
    return _merged(first, second, "section")


def _merged(
    first: Mapping[str, Any], second: Mapping[str, Any], level: Literal["section", "arguments", "options"]
) -> dict[str, Any]:
    if "class_path" in first and not _same_class(first["class_path"], second.get("class_path")):
        return dict(second)
    both = dict(first)
    for key, value in second.items():
        whole = key.removesuffix("+")
        if whole != key and isinstance(listed := both.get(whole, both.get(key)), list):
            both[whole if whole in both else key] = [*listed, *(value if isinstance(value, list) else [value])]
            continue
        below = first.get(key)
        if level == "options" and value is None:
            both.pop(key, None)
        elif isinstance(value, dict) and isinstance(below, dict):
            if key == "init_args":
                both[key] = _merged(below, value, "arguments")
            else:
                both[key] = _merged(
                    below, value, "section" if level == "section" or "class_path" in below else "options"
                )
        else:
            both[key] = value
    return both


def _same_class(first: object, second: object) -> bool:
    """Whether two class paths name one class; the second may be missing, and either may be the bare class name."""
    if second is None or first == second:
        return True
    short, long = sorted((str(first), str(second)), key=lambda path: path.count("."))
    return "." not in short and short == long.rpartition(".")[2]


def _own_seed(where: str) -> UserError:
    return UserError(f"{where}: is always the seed of the whole run; set seed_everything instead")


def _keep_texts(node: yaml.Node) -> None:
    """Tag scalars below string arguments of every ``data:`` as strings."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _keep_texts(item)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        arguments = [v for k, v in _entries(value) if k == "init_args"] if key.value == "data" else []
        for name, below in (entry for part in arguments for entry in _entries(part)):
            if name in text_arguments():
                _as_text(below)
        _keep_texts(value)


def _entries(node: yaml.Node) -> list[tuple[str, yaml.Node]]:
    return [(str(key.value), value) for key, value in node.value] if isinstance(node, yaml.MappingNode) else []


def _as_text(node: yaml.Node, *, in_list: bool = False) -> None:
    """Tag every scalar as a string, except ``null`` outside of lists."""
    if isinstance(node, yaml.ScalarNode):
        if in_list or node.tag != _NULL:
            node.tag = _STRING
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _as_text(item, in_list=True)
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            _as_text(value)


def _as_written(text: str) -> str:
    """Quote the strings in a flag's list or mapping; return other values unchanged."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.CollectionNode):
            return text
        _as_text(node)
        content = loader.construct_document(node)
    except yaml.YAMLError:
        return text  # the parser reports the error
    quoted = yaml.dump(content, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=1 << 30)
    return quoted.strip()


@functools.cache
def text_arguments() -> frozenset[str]:
    """Arguments of the DataModules that consist of strings only, such as aliases and column names."""
    # By name: the core imports no other package of ours.
    datamodules = importlib.import_module("datamodules")
    known: dict[str, bool] = {}
    for name in datamodules.__all__:
        kind = getattr(datamodules, name)
        if inspect.isclass(kind) and hasattr(kind, "train_dataloader"):
            for key, hint in get_type_hints(kind.__init__).items():
                known[key] = known.get(key, True) and _is_text(hint)
    return frozenset(key for key, is_text in known.items() if is_text and key != "return")


def _is_text(hint: Any) -> bool:
    if hint in (str, type(None)):
        return True
    if is_typeddict(hint):
        return all(_is_text(value) for value in get_type_hints(hint).values())
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return all(_is_text(hints[option.name]) for option in fields(hint))
    if get_origin(hint) is Literal:
        return all(isinstance(value, str) for value in get_args(hint))
    is_container = get_origin(hint) in (list, dict, Union, types.UnionType)
    return is_container and all(_is_text(part) for part in get_args(hint))
