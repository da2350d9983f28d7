"""The command `finebits`, also as `python -m finebits`: nothing that could lie in the current folder is imported before it is off the path."""

from __future__ import annotations

import sys

from finebits.process import leave_here


def main() -> int:
    """Run the command of this command line; the exit code."""
    leave_here()
    from finebits.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
