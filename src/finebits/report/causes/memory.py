"""Causes that memory and the record show."""

from __future__ import annotations

from finebits.report.causes.base import Case, Cause
from finebits.report.cells import signed, size
from finebits.runfolder import FAILED, INTERRUPTED, KILLED, RECIPE

OVER = 0.05  # of the plan: measured this much above it is worth a word
MEMORY_OUT = 5  # exit code


def out_of_memory(case: Case) -> Cause | None:
    """The last session ended for want of memory."""
    last = (case.run.record.get("sessions") or ({},))[-1]
    if case.run.status != FAILED or last.get("exit") != MEMORY_OUT:
        return None
    budget = case.run.plan.get("budget")
    evidence = str(last.get("said") or "exit code 5") + (f"; the budget is {size(budget)}" if budget else "")
    return Cause("out_of_memory", "fail", "memory ran out", evidence, "close what else runs, or plan with a smaller budget.memory")


def over_plan(case: Case) -> Cause | None:
    """The peak was above the plan, or a phase above the budget."""
    planned, measured, budget = case.run.planned, case.run.measured, case.run.plan.get("budget")
    said = []
    if planned and measured is not None and measured > (1 + OVER) * planned:
        said.append(f"training peak {size(measured)}, planned {size(planned)} ({signed(measured / planned - 1)})")
    if budget is not None:
        phases = {"training": measured} | {row["phase"]: row["measured"] for row in case.run.memory.get("rows") or ()}
        beyond = [f"{phase} by {size(peak - budget)}" for phase, peak in phases.items() if peak is not None and peak > budget]
        said += [f"beyond the budget of {size(budget)}: {', '.join(beyond)}"] if beyond else []
    if not said:
        return None
    way = "plan with finebits plan --probe, which measures the worst batches first; or raise budget.reserve"
    return Cause("over_plan", "warn", "more memory was taken than planned", "; ".join(said), way)


def unfinished(case: Case) -> Cause | None:
    """The run did not come to its end."""
    if case.run.status not in (FAILED, INTERRUPTED, KILLED, "unfinished"):
        return None
    last = (case.run.record.get("sessions") or ({},))[-1]
    if last.get("exit") == MEMORY_OUT:
        return None  # out_of_memory says it
    at = "" if case.run.steps is None else f" at step {case.run.steps[0]} of {case.run.steps[1]}"
    said = f": {last['said']}" if last.get("said") and case.run.status == FAILED else ""
    words = {KILLED: "it ended without a word: killed by the system or by hand, or the machine went down"}
    evidence = words.get(case.run.status, f"it {case.run.status}" if case.run.status == FAILED else f"it is {case.run.status}") + at + said
    sure = "fail" if case.run.status == FAILED else "warn"
    return Cause("unfinished", sure, "the run is not complete", evidence, f"finebits train {case.run.path / RECIPE} --resume")


RULES = (out_of_memory, over_plan, unfinished)
