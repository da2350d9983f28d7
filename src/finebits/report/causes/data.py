"""Causes that the rows show."""

from __future__ import annotations

from finebits.report.causes.base import Case, Cause
from finebits.report.cells import count, percent

LEAST = 20  # held-out rows, as evaluate.heldout has it: fewer give no interval
FEW = 0.02  # of the tokens: when fewer are trained, next to nothing is
LOST = 0.05  # of the rows: when more are cut, it matters


def untrained(case: Case) -> Cause | None:
    """Labels are masked away, all or nearly."""
    finding, data = case.problem("no_trained_token", "truncated_away"), case.run.data
    if finding is not None:
        return Cause(
            "untrained",
            "fail",
            "rows teach nothing: none of their tokens is trained",
            finding["message"],
            finding.get("fix") or "mend them",
        )
    tokens, trained = data.get("tokens") or 0, data.get("trained_tokens")
    empty = [e for e in case.steps if e.get("tokens") == 0]
    if empty:
        evidence = f"{len(empty)} of {len(case.steps)} steps saw no trained token, the first of them step {empty[0]['step']}"
        return Cause("untrained", "fail", "rows teach nothing: none of their tokens is trained", evidence, "see finebits data preview")
    if trained is None or not tokens or trained > FEW * tokens:
        return None
    evidence = f"{count(trained)} of {count(tokens)} tokens are trained ({percent(trained / tokens)})"
    way = "see finebits data preview: is data.assistant_only_loss meant, and do answers follow what they answer?"
    return Cause("untrained", "warn", "nearly every token is masked", evidence, way)


def unended(case: Case) -> Cause | None:
    """The model is not taught to stop, or is asked otherwise than it is taught."""
    finding = case.problem("end_of_turn", "never_stops", "template", "generation_prompt")
    if finding is None:
        return None
    asked = finding["kind"] == "generation_prompt"
    what = "the chat template asks otherwise than it teaches" if asked else "the token that ends an answer is not trained"
    sure = "fail" if finding.get("level") == "fail" else "warn"
    return Cause("template", sure, what, finding["message"], finding.get("fix") or "use another chat template")


def truncated(case: Case) -> Cause | None:
    """Answers are cut."""
    data = case.run.data
    cut, rows = data.get("truncated") or 0, data.get("rows") or 0
    if not rows or cut <= LOST * rows:
        return None
    finding, longest = case.problem("truncated"), (data.get("lengths") or {}).get("max")
    evidence = (
        finding["message"]
        if finding is not None
        else f"{count(cut)} of {count(rows)} rows are cut at {count(data.get('max_length'))} tokens"
    )
    way = f"raise data.max_length ({count(longest)} holds the longest row)" if longest else "raise data.max_length"
    return Cause("truncated", "warn", "many rows lose the end of their answer", evidence, way)


def few_held_out(case: Case) -> Cause | None:
    """No interval, so no verdict."""
    rows = case.run.evaluation.get("rows") or (case.run.about.get("data") or {}).get("held_out")
    if rows is None or rows >= LEAST:
        return None
    way = f"name a file with {LEAST} rows or more (data.held_out.path), raise data.test_split_size, or leave evaluation.limit out"
    return Cause("few_held_out", "warn", "too few rows are held out to tell models apart", f"{rows} held-out rows give no interval", way)


def duplicates(case: Case) -> Cause | None:
    """Rows that come more than once, and held-out rows that are trained on."""
    data = case.run.about.get("data") or {}
    rows, repeated, known = (data.get(key) or 0 for key in ("rows", "repeated", "known"))
    if not known and repeated <= LOST * rows:
        return None
    said = [f"{count(repeated)} of {count(rows)} training rows repeat an earlier one"] if repeated else []
    said += [f"{count(known)} of {count(data.get('held_out'))} held-out rows are trained on"] if known else []
    what = "held-out rows are trained on, so that scores flatter" if known else "training rows are repeated"
    return Cause("duplicates", "warn", what, "; ".join(said), "leave the repeated rows out of data.datasets")


RULES = (untrained, unended, truncated, few_held_out, duplicates)
