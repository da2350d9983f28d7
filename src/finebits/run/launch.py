"""One stage of a job in several processes: `python -m finebits.run.launch FOLDER STAGE DEVICE WORDS…`, the words as accelerate takes them."""

from __future__ import annotations

import os
import sys

from finebits.process import tied
from finebits.progress import alive


def main(folder: str, stage: str, device: str, *words: str) -> int:
    """Exit code of the processes."""
    with alive("starting processes", at_once=True):
        from finebits.interop import launching
    return launching.launch(words, device, [folder, stage])


if __name__ == "__main__":
    tied()
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
