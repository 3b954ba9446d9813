"""The networks of a task compiled by ``torch.compile``, in place."""

from __future__ import annotations

from typing import Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.base import VisionTask
from vitrail.errors import UserError

Backend = Literal["inductor", "cudagraphs", "aot_eager", "eager"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class CompileModel(Callback):
    """Compiles the networks of a task (``torch.compile``) before the first batch; heads and losses stay as they are.

    These are the backbone of a classifier, both towers of a dual encoder, the vision tower and the language model of a
    generative classifier, and all of these of an ensemble's members.

    Checkpoints are those of the same model without this callback, in both directions: modules are compiled in place, so
    the names of the weights do not change. The first batches take a while, and so does the first batch of another
    shape, such as the last one of an epoch; ``dynamic: true`` compiles once for all shapes.

    Args:
        backend: of torch's: ``inductor`` needs a C++ compiler on CPUs and Triton on GPUs; ``aot_eager`` and ``eager``
            need nothing and gain nothing, and show where a problem lies.
        mode: what ``inductor`` spends on finding fast programs.
        dynamic: one program for all shapes; by default torch decides at the second shape.

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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile before the first batch: only now every task has made its networks."""
        self._compile(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile where nothing has been trained."""
        self._compile(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def _compile(self, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, VisionTask):
            raise UserError(
                f"CompileModel: {type(pl_module).__name__} lists no networks to compile; leave the callback out"
            )
        for network in pl_module.compilable_networks:
            if id(network) not in self._compiled:
                mode = None if self.mode == "default" else self.mode
                network.compile(backend=self.backend, mode=mode, dynamic=self.dynamic)
                self._compiled.add(id(network))
