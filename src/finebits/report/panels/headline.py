"""The figures at the head of the page."""

from __future__ import annotations

from finebits.report import results, tables
from finebits.report.cells import number, percent, signed, size
from finebits.report.folder import Folder
from finebits.report.panels.base import Tile
from finebits.report.panels.memory import reserve


def tiles(run: Folder) -> list[Tile]:
    plan, shown = run.plan, list[Tile]()
    if plan.budget is not None:
        below = tables.stated(plan).partition(", ")[2] or "for every phase"
        below += f"; plans stay below {size(plan.budget - reserve(plan))}" if reserve(plan) else ""
        shown.append(Tile("memory budget", size(plan.budget), below))
    memory = run.memory.get(run.main)
    measured = memory.get("measured_peak") if memory else None
    if measured is not None:
        planned = sum(memory["planned"].values()) if memory else 0
        over = plan.budget is not None and measured > plan.budget
        deviation = f"planned {size(planned)}, {signed(results.deviation(planned, measured))}"
        shown.append(
            Tile("training peak, measured", size(measured), deviation + (", over the budget" if over else ""), "bad" if over else "good")
        )
    elif plan.memory:
        over = plan.budget is not None and plan.peak > plan.budget
        share = f"{percent(plan.peak / plan.budget)} of the budget" if plan.budget else ""
        shown.append(Tile("training peak, planned", size(plan.peak), share, "bad" if over else ""))
    matrices = tables.matrices(plan)
    average = tables.average_bits(matrices)
    chosen = len({m.format for m in matrices})
    below = f"{len(matrices)} matrices in {chosen} format{'' if chosen == 1 else 's'}"
    shown.append(Tile("bits per linear weight", tables.bits(average), below))
    loss = _before_after(run)
    if loss:
        shown.append(loss)
    if run.export:
        verdicts = [t.get("verdict") or "not verified" for t in results.checks(run.export)]
        failed, checked = "fail" in verdicts, "not verified" not in verdicts
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        verdict = "failed" if failed else "passed" if checked else "not done"
        shown.append(Tile("export verification", verdict, counts, "bad" if failed else "good" if checked else ""))
    return shown


def _before_after(run: Folder) -> Tile | None:
    entries = {e["key"]: e for e in (run.evaluation or {}).get("entries", ())}
    before = entries.get("full") or next((e for e in entries.values() if e["stage"] == "start"), None)
    after = entries.get(run.main) or next((e for e in entries.values() if e["stage"] == "tuned"), None)
    if before is None or after is None or before.get("loss") is None or after.get("loss") is None:
        return None
    value = f"{number(before['loss'], 3)} → {number(after['loss'], 3)}"
    return Tile("held-out loss", value, f"{before['name']} → {after['name']}", "good" if after["loss"] < before["loss"] else "bad")
