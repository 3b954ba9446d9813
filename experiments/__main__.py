"""``python -m experiments {fit,validate,test,predict} --config experiments/….yaml``."""

import os
import sys

# Before torch is imported: its threads would else spin while they wait for each other, and where other processes want
# the same cores each small operation takes many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from experiments.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
