"""``python -m datamodules COMMAND``; the commands are in ``vitrail.programs``."""

import sys
from collections.abc import Sequence

from vitrail import programs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    return programs.main("datamodules", arguments)


if __name__ == "__main__":
    sys.exit(main())
