"""A process that begins with all that this one has imported: what takes an own process, and no new interpreter, is shown in seconds less."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable


def forked(run: Callable[[], object]) -> int:
    """Run this in a copy of the process; its exit code, which is the negative of the signal that has ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other threads, from Python 3.12 on: none of them holds what a copy would wait for
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
