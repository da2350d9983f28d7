"""What the model answered before and after."""

from __future__ import annotations

from typing import Any

from finebits.report.folder import Folder
from finebits.report.panels.base import LONGEST, Block, Panel

SAMPLES = 12  # rows shown


def panel(run: Folder) -> Panel | None:
    if not run.samples:
        return None
    shown = [{k: _cut(s.get(k)) for k in ("prompt", "reference", "before", "after")} for s in run.samples[:SAMPLES]]
    lead = f"The first {len(shown)} of {len(run.samples)}." if len(run.samples) > len(shown) else ""
    return Panel("samples", "Samples before and after", [Block(samples=shown)], lead)


def _cut(answer: Any) -> str | None:
    if answer is None:
        return None
    answer = str(answer)
    return answer if len(answer) <= LONGEST else f"{answer[:LONGEST]} … ({len(answer) - LONGEST:,} more characters)"
