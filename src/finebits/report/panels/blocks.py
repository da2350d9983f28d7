"""Block sizes as the rules chose them, and what was tried before the plan was settled."""

from __future__ import annotations

from finebits.report import why
from finebits.report.folder import Folder
from finebits.report.panels.base import Block, Panel


def panel(run: Folder) -> Panel | None:
    sizes, tried = why.sizes_table(run.plan), why.trials_table(run.plan)
    blocks = []
    if sizes is not None:
        rules = "; ".join(why.rules(run.plan))
        blocks.append(Block(head="Block sizes", note=f"{rules[0].upper()}{rules[1:]}.", tables=[sizes], open=True, half=tried is not None))
    if tried is not None:
        note = "Each was quantized and measured on calibration rows; the one with the least KL was taken. In brackets: one standard error."
        blocks.append(Block(head="What was tried", note=note, tables=[tried], open=True, half=sizes is not None))
    if sizes is not None:
        blocks.append(Block(tables=[why.blocks_table(run.plan)]))
    return Panel("blocks", "Blocks, and what was tried" if sizes else "What was tried", blocks) if blocks else None
