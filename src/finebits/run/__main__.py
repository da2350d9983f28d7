"""One stage of a job: `python -m finebits.run FOLDER STAGE`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from typing import TYPE_CHECKING

from finebits.messages import explain
from finebits.process import first, interrupt, stoppable, tied
from finebits.progress import alive

if TYPE_CHECKING:
    from finebits.run.stage import Stage
    from finebits.runfolder import RunFolder


def main(folder: str, text: str) -> int:
    """Exit code. While it works (and imports torch, first of all), it is never silent for long, and whatever goes wrong is told in a
    sentence."""
    with alive(f"{json.loads(text)['run']}: starting", at_once=True) if first() else contextlib.nullcontext():
        try:
            from finebits.run.stage import Stage
            from finebits.runfolder import RunFolder

            make(RunFolder(folder), Stage.read(text))
            return 0
        except BaseException as e:
            message = explain(e)
            print(message.text, file=sys.stderr)
            return message.code


def make(folder: RunFolder, stage: Stage) -> None:
    """The stage, here."""
    from finebits.run.part import Part
    from finebits.run.stage import QLORA

    part = Part(folder, stage)
    if stage.run == QLORA:
        from finebits.run.peer import peer

        peer(part, stage.kind == "start")
    elif stage.kind in ("full", "start"):
        from finebits.run import start

        start.full(part) if stage.kind == "full" else start.begin(part)
    elif stage.kind == "probe":
        from finebits.run.probe import probe

        probe(part)
    elif stage.kind == "export":
        from finebits.run.ship import ship

        ship(part, stage)
    else:
        from finebits.run.tune import tune

        tune(part, stage.resume)


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # what libraries say to one another of their next versions
    with stoppable(interrupt):
        tied()
        code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written; taking the interpreter down piece by piece is seconds of silence
