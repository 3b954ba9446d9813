"""The graphs of a trained task: one for a classifier, one a tower for a dual encoder, normalisation inside.

A graph takes uint8 images ``(B, 3, S, S)``, or token ids, in batches of any size, and outputs what the task's own
``predict_step`` returns, under its names: ``logits_<task>``, ``image_embedding`` and ``text_embedding``; where unknown
images are recognised by them, also the backbone's ``image_features``. Runners make exported files functions from arrays
to arrays, so that all formats are compared and timed in the same way.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch._inductor.config
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ExportGraphSignature

from lightning_modules.base import VisionTask
from lightning_modules.classification import ClassificationTask
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.few_shot import CoCoOp
from vitrail.errors import UserError, first_line
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram


LOGITS = "logits_"
IMAGE_EMBEDDING, TEXT_EMBEDDING, IMAGE_FEATURES = "image_embedding", "text_embedding", "image_features"
MAX_BATCH = 4096

_EXAMPLES = ["a photo", "a photo of several things that stand next to each other"]


@dataclass(frozen=True)
class Tower:
    """One graph to be made.

    Attributes:
        name: of its file: ``model``, ``image`` or ``text``.
        module: its ``forward`` takes the inputs in their order and returns a tuple in the order of ``outputs``.
        inputs: an example of each, with a batch of two.
        dynamic: the dimensions of each input that may have any length, with their bounds.
        outputs: their names.
        pad_id: that texts are padded with.
    """

    name: str
    module: nn.Module
    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, dict[int, Dim]]
    outputs: list[str]
    pad_id: int = 0


def towers_of(task: VisionTask, *, features: bool = False) -> list[Tower]:
    """Return the graphs that a task consists of, low-rank adapters merged into the weights that they adapt.

    Args:
        task: with its weights.
        features: whether the image backbone's features are an output as well.

    Raises:
        UserError: It is neither a classifier nor a dual encoder.
    """
    if isinstance(task, ClassificationTask):
        return [_image_tower("model", _Classifier(merged(task), features=features), task, list(task.tasks))]
    if isinstance(task, DualEncoder):
        whole = merged(task)
        tasks = [LABEL_TASK] if task.tasks else []
        image = _ImageTower(whole, features=features)
        return [_image_tower("image", image, task, tasks), _text_tower(_TextTower(whole), task)]
    raise UserError(
        f"export: a {type(task).__name__} is not made of single graphs; classifiers and dual encoders can be exported"
    )


def graph_of(tower: Tower) -> ExportedProgram:
    """Export the graph by ``torch.export``.

    Raises:
        UserError: The network's code cannot be traced, or takes more than one graph.
    """
    if any(isinstance(module, CoCoOp) for module in tower.module.modules()):
        raise UserError(
            "export: cocoop encodes texts for each image, which is no single graph; choose --format safetensors, or "
            "train coop instead"
        )
    try:
        with torch.no_grad(), quiet():
            shapes = tuple(tower.dynamic.values()) if any(tower.dynamic.values()) else None
            program = torch.export.export(tower.module, tuple(tower.inputs.values()), dynamic_shapes=shapes)
    except Exception as error:
        raise UserError(
            f"export: no graph can be made of the {tower.name} network ({first_line(error)}); --format safetensors "
            "keeps the weights alone"
        ) from error
    return without_unused(program)


def without_unused(program: ExportedProgram) -> ExportedProgram:
    """Return the graph without the weights that nothing in it uses, such as those of the other tower."""
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    unused = {node.name for node in program.graph.nodes if node.op == "placeholder" and not node.users} & held.keys()
    for node in list(program.graph.nodes):
        # Source lines: half of a small file, with the names of this machine's folders.
        node.meta.pop("stack_trace", None)
        if node.name in unused:
            program.graph.erase_node(node)
    inputs = [one for one in signature.input_specs if getattr(one.arg, "name", None) not in unused]
    kept = {target for name, target in held.items() if name not in unused}
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=ExportGraphSignature(inputs, signature.output_specs),
        state_dict={name: value for name, value in program.state_dict.items() if name in kept},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def write_onnx(
    program: ExportedProgram, tower: Tower, path: Path, metadata: dict[str, str], opset: int | None = None
) -> None:
    """Write a graph as ONNX, with metadata inside the file.

    Args:
        program: of the tower.
        tower: that it was made of, for the names of inputs and outputs.
        path: of the file.
        metadata: strings by key.
        opset: version of ONNX's operators; by default the one that PyTorch takes.

    Raises:
        UserError: ONNX has no operator for something in the graph.
    """
    try:
        with quiet():
            made: ONNXProgram | None = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(tower.inputs),
                output_names=tower.outputs,
                dynamic_shapes=tuple(tower.dynamic.values()),  # for the names of the dimensions
                optimize=True,
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:
        raise UserError(
            f"export: ONNX cannot represent the {tower.name} network ({first_line(error)}); --format torch_export can"
        ) from error
    assert made is not None
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    made.model.metadata_props.update(metadata)
    made.save(path)


def write_torch_export(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """Write a graph in PyTorch's own format, which ``torch.export.load`` reads."""
    with quiet():
        torch.export.save(program, path, extra_files=dict(metadata))


class _Classifier(nn.Module):
    """Logits of each task, then the features at unit length, as ``predict_step`` returns them, and as they are."""

    def __init__(self, task: ClassificationTask, *, features: bool) -> None:
        super().__init__()
        self.task, self.features = task, features

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.task.encoder(image)
        logits = [values.float() for values in self.task.classify(features).values()]
        own = (features.float(),) if self.features else ()
        return (*logits, F.normalize(features.float(), dim=-1), *own)


class _ImageTower(nn.Module):
    """Zero-shot logits, where there are classes, then the image's embedding, and the features before the projection.

    The embeddings of the classes' prompts and the scale are constants of the graph.
    """

    classes: torch.Tensor

    def __init__(self, task: DualEncoder, *, features: bool) -> None:
        super().__init__()
        self.task, self.features = task, features
        if task.tasks and task.few_shot is None:
            with torch.no_grad():
                self.register_buffer("classes", (task.objective.logit_scale()[0] * task.class_embeddings()).clone())

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.task.image_features(image)
        embedding = F.normalize(self.task.towers.project("image", features).float(), dim=-1)
        own = (features.float(),) if self.features else ()
        if self.task.few_shot is not None:
            return self.task.classify(embedding), embedding, *own
        logits = (embedding @ self.classes.to(embedding.dtype).T,) if self.task.tasks else ()
        return *logits, embedding, *own


class _TextTower(nn.Module):
    def __init__(self, task: DualEncoder) -> None:
        super().__init__()
        self.task = task

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.task.towers.encode_text({"input_ids": input_ids, "attention_mask": attention_mask})
        return (F.normalize(features.float(), dim=-1),)


def _image_tower(name: str, module: _Classifier | _ImageTower, task: VisionTask, tasks: list[str]) -> Tower:
    size = int(task.input_options["size"])
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    outputs = [*(f"{LOGITS}{one}" for one in tasks), IMAGE_EMBEDDING, *([IMAGE_FEATURES] if module.features else [])]
    return Tower(name, module.eval(), {"image": image}, {"image": {0: _batch()}}, outputs)


def _text_tower(module: nn.Module, task: DualEncoder) -> Tower:
    tokenizer = task.towers.tokenizer
    if tokenizer is None:
        raise UserError("export: the text tower has no tokenizer; export a run that was trained")
    tokens: dict[str, torch.Tensor] = {**tokenizer(_EXAMPLES)}  # type: ignore[dict-item]  # all of its values are
    shapes: dict[int, Dim] = {0: _batch()}
    if not tokenizer.state["fixed_length"]:
        shapes[1] = Dim("length", min=2, max=tokenizer.state["max_length"])
    pad_id = int(tokenizer.state["pad_id"])
    return Tower("text", module.eval(), tokens, dict.fromkeys(tokens, shapes), [TEXT_EMBEDDING], pad_id)


def _batch() -> Dim:
    return Dim("batch", min=1, max=MAX_BATCH)


def merged(task: Any) -> Any:
    """Return a task with its low-rank adapters merged into the weights: itself if it has none."""
    if not any(hasattr(module, "lora_A") for module in task.modules()):
        return task
    whole = copy.deepcopy(task)
    for module in whole.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    return whole


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters log for their own developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


Arrays = dict[str, NDArray[Any]]
Runner = Callable[[Mapping[str, NDArray[Any]]], Arrays]
"""From a tower's inputs by name to its outputs by name."""


def program_runner(path: Path, tower: Tower, *, compiled: bool = False) -> Runner:
    """Run a file of ``torch.export``.

    Args:
        path: of the file.
        tower: that it was made of, for the names of its outputs.
        compiled: by inductor, as it should be where speed matters; the first batch of each size takes long.
    """
    # It makes the operators of eight-bit graphs known.
    import_module("torch.ao.quantization.fx._decomposed")
    module: Any = torch.export.load(path).module()
    if not compiled:
        return module_runner(tower, module)
    run = module_runner(tower, torch.compile(module, dynamic=False))

    def run_compiled(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        # Weights become constants that are packed for the kernels once, without which eight bits do not compile. The
        # compiler asks for it when it sees a size for the first time, and not by its own options but globally.
        with torch._inductor.config.patch(freezing=True):
            return run(inputs)

    return run_compiled


def onnx_runner(path: Path) -> Runner:
    """Run a file of ONNX by ONNX Runtime on the CPU, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin while they wait would slow down the next measurement.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wanted = [one.name for one in session.get_inputs()]
    names = [one.name for one in session.get_outputs()]

    def run(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return dict(zip(names, session.run(names, {name: inputs[name] for name in wanted}), strict=True))

    return run


def module_runner(tower: Tower, module: Any = None) -> Runner:
    """Run a module in PyTorch, by default the tower's own."""
    chosen = tower.module if module is None else module  # a compiled module has no truth value

    def run(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        with torch.no_grad():
            tensors = (torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in tower.inputs)
            found = chosen(*tensors)
        return {name: values.numpy() for name, values in zip(tower.outputs, found, strict=True)}

    return run
