"""``python -m experiments {fit,validate,test,predict} --config experiments/….yaml``, and what is no training.

These are ``sweep``, ``ablate``, ``export`` and ``push_to_hub``, each with a ``--help`` of its own.
"""

import os
import sys

from vitrail.errors import run_program
from vitrail.runtime import keep_freed_memory

# Before torch is imported: its threads would else spin while they wait for each other, and where other processes want
# the same cores each small operation takes many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
keep_freed_memory()


def _main(args: list[str]) -> int:
    if args[:1] == ["sweep"]:
        # It trains nothing itself, so it needs none of what training needs.
        from experiments.launch.sweep import main as sweep

        return sweep(args[1:])
    if args[:1] == ["ablate"]:
        from experiments.launch.ablation import main as ablate

        return ablate(args[1:])
    if args[:1] == ["export"]:
        from experiments.export import main as export

        return export(args[1:])
    if args[:1] == ["push_to_hub"]:
        from experiments.export.hub import main as push_to_hub

        return push_to_hub(args[1:])
    from experiments.train.cli import main

    return main(args)


if __name__ == "__main__":
    sys.exit(run_program(lambda: _main(sys.argv[1:])))
