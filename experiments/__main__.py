"""``python -m experiments {fit,validate,test,predict} --config experiments/….yaml``."""

import os
import sys

from experiments.allocator import keep_freed_memory

# Before torch is imported: its threads would else spin while they wait for each other, and where other processes want
# the same cores each small operation takes many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
keep_freed_memory()

from experiments.cli import main  # noqa: E402 -- after what it must find

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
