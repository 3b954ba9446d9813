"""The networks of a task compiled by ``torch.compile``, in place."""

from __future__ import annotations

from typing import Literal, Protocol, get_args, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from datamodules.schema import UserError

Backend = Literal["inductor", "cudagraphs", "aot_eager", "eager"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@runtime_checkable
class HasBackbones(Protocol):
    """A task that names its networks; ``lightning_modules.base.VisionTask`` does."""

    @property
    def backbones(self) -> dict[str, nn.Module]:
        """The networks by name."""


class CompileModel(Callback):
    """Compiles the backbones of a task (``torch.compile``) before the first batch; heads and losses stay as they are.

    Checkpoints are those of the same model without this callback, in both directions: modules are compiled in place, so
    the names of the weights do not change. The first batches take a while, and so does the first batch of another
    shape, such as the last one of an epoch; ``dynamic: true`` compiles once for all shapes.

    Args:
        backend: of torch's: ``inductor`` needs a C++ compiler on CPUs and Triton on GPUs; ``aot_eager`` and ``eager``
            need nothing and gain nothing, they tell where a problem lies.
        mode: what ``inductor`` spends on finding fast programs.
        dynamic: one program for all shapes; by default torch decides when it sees the second shape.

    Raises:
        UserError: if backend or mode are unknown or do not go together.
    """

    def __init__(self, backend: Backend = "inductor", mode: Mode = "default", dynamic: bool | None = None) -> None:
        for name, value, known in (("backend", backend, get_args(Backend)), ("mode", mode, get_args(Mode))):
            if value not in known:
                raise UserError(f"CompileModel.{name}: {value!r} is unknown; choose one of {', '.join(known)}")
        if mode != "default" and backend != "inductor":
            raise UserError(f"CompileModel.mode: {mode} is for the backend inductor, not {backend}; leave it out")
        self.backend = backend
        self.mode = mode
        self.dynamic = dynamic
        self._compiled: set[int] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compile, once for all stages.

        Raises:
            UserError: if the task names no networks.
        """
        if not isinstance(pl_module, HasBackbones):
            raise UserError(f"CompileModel: {type(pl_module).__name__} names no backbones; leave the callback out")
        for backbone in pl_module.backbones.values():
            if id(backbone) not in self._compiled:
                mode = None if self.mode == "default" else self.mode
                backbone.compile(backend=self.backend, mode=mode, dynamic=self.dynamic)
                self._compiled.add(id(backbone))
