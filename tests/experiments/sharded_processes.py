"""Training under torchrun, with sharded weights (FSDP) and with whole ones; started by ``test_several_processes.py``.

Not in forks as the rest, where sharding on CPUs crashed inside torch (2.15, gloo) now and then; in processes of its own
it never did.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from tests.experiments.several_processes import TRAINED, through_the_command_line, train_sharded

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for task_name in TRAINED:
        train_sharded(task_name, root, root / "2" / f"{task_name}-sharded", 2)
    for overlay in ("ddp", "fsdp"):
        # Passed on to the ranks that one command starts; here one process runs two commands.
        os.environ.pop("VITRAIL_RUN_DIRECTORY", None)
        through_the_command_line(root, overlay)
