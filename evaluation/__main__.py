"""``python -m evaluation COMMAND``; the commands are in ``vitrail.programs``."""

import sys
from functools import partial

from vitrail import programs

main = partial(programs.main, "evaluation")

if __name__ == "__main__":
    sys.exit(main())
