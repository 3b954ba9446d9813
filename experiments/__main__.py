"""``python -m experiments {fit,validate,test,predict} --config experiments/….yaml``."""

import sys

from experiments.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
