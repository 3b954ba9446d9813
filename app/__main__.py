"""``python -m app``: the web application over trained runs and galleries."""

import sys
from collections.abc import Sequence

from vitrail import programs


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C and return the exit code, 130 after that."""
    return programs.main("app", arguments)


if __name__ == "__main__":
    sys.exit(main())
