"""What was exported, and whether it does what was trained."""

from __future__ import annotations

from finebits.report import cells, tables
from finebits.report.cells import count
from finebits.report.folder import Folder
from finebits.report.panels.base import Block, Panel
from finebits.report.text import requantized


def panel(run: Folder) -> Panel | None:
    if not run.export:
        return None
    paths = [(t["name"], t.get("path") or cells.ABSENT) for t in run.export["targets"]]
    verified = any(t.get("verdict") for t in run.export["targets"])
    over = f"{count(run.export.get('rows'))} held-out rows. What is held to: {tables.held_to(run.export)}"
    lead = f"Loaded again from disk and compared with the trained model on {over}." if verified else "Written and not verified."
    anew = next((t["requantized"] for t in run.export["targets"] if "requantized" in t), None)
    lead += "" if anew is None else " " + " ".join(requantized(anew))
    return Panel("export", "Export verification", [Block(tables=[tables.export_table(run.export)], facts=paths, open=True)], lead)
