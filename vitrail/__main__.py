"""``vitrail COMMAND``: the commands of all programs."""

import sys
from functools import partial

from vitrail import programs

main = partial(programs.main, "vitrail")

if __name__ == "__main__":
    sys.exit(main())
