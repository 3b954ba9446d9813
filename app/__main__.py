"""``python -m app``: the web application over trained runs and galleries."""

import sys
from functools import partial

from vitrail import programs

main = partial(programs.main, "app")

if __name__ == "__main__":
    sys.exit(main())
