"""Training with weights that are shared out (FSDP); started by ``test_several_processes.py`` with torchrun.

Not in forks as the rest, where sharding on CPUs crashed inside torch (2.15, gloo) now and then; in processes of its own
it never did.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from tests.experiments.several_processes import SHARDED, through_the_command_line, train_sharded

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for task_name in SHARDED:
        train_sharded(task_name, root, root / "2" / f"{task_name}-sharded", 2)
    through_the_command_line(root, "fsdp")
