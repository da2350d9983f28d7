"""Causes that losses, gradients and scores show."""

from __future__ import annotations

import math

from finebits.report.causes.base import Case, Cause, median
from finebits.report.cells import number, percent
from finebits.runfolder import FULL

RISE = 1.2  # the end over the start, from which the loss is said to rise
SPIKE = 3.0  # a step over the median of those around it,
ABOVE = 0.5  # and by so many nats at least, so that small losses may wander
AROUND = 5  # steps to either side that a spike is seen against
FLAT = 0.02  # of the loss at the start: less gained than this is nothing gained,
CALM = 30  # in a run of so many steps or more
OVER = 0.05  # of the lowest held-out loss: risen by more than this since then
CUT = 0.9  # of the steps: cut in more than these is cut always
FAR = 0.25  # of the unquantized model's loss: a start further off than this has lost a lot to its bits


def not_finite(case: Case) -> Cause | None:
    """The loss became NaN or infinite."""
    lost = [s for s, v in case.losses if not math.isfinite(v)]
    said = [e["name"] for e in case.run.events if e.get("event") == "phase" and "not finite" in str(e.get("name"))]
    if not lost and not said:
        return None
    evidence = f"not finite at step {lost[0]} of {case.losses[-1][0]}" if lost else said[-1]
    return Cause("not_finite", "fail", "training diverged", evidence, _lower(case))


def rising(case: Case) -> Cause | None:
    """The training loss ended above where it began."""
    ends = case.ends()
    if ends is None or ends[1] <= RISE * ends[0] or ends[1] <= ends[0] + 0.1:
        return None
    evidence = f"training loss {number(ends[0], 3)} at the beginning and {number(ends[1], 3)} at the end"
    return Cause("rising", "fail", "the learning rate is too high", evidence, _lower(case))


def spikes(case: Case) -> Cause | None:
    """Single steps whose loss leaps."""
    values, found = case.finite, []
    for i, (step, v) in enumerate(values):
        near = [w for _, w in (*values[max(i - AROUND, 0) : i], *values[i + 1 : i + 1 + AROUND])]
        if len(near) >= AROUND and v > SPIKE * median(near) and v > median(near) + ABOVE:
            found.append((step, v, median(near)))
    if not found:
        return None
    step, v, usual = max(found, key=lambda f: f[1] / f[2])
    steps = f"{len(found)} step{'' if len(found) == 1 else 's'}"
    evidence = f"{steps} of {len(values)}; step {step} has {number(v, 2)} where those around it have {number(usual, 2)}"
    way = "look at the rows of that step; warm up longer (training.warmup_steps), or " + _lower(case)
    return Cause("spikes", "warn", "the loss leaps", evidence, way)


def flat(case: Case) -> Cause | None:
    """Nothing was learned in a run that was long enough to."""
    ends, scores = case.ends(), case.held
    if ends is None or len(case.finite) < CALM or abs(ends[1] - ends[0]) > FLAT * abs(ends[0]):
        return None
    if len(scores) > 1 and scores[-1][1] < (1 - FLAT) * scores[0][1]:
        return None  # the held-out rows show what noise hides
    rate = case.setting("training.learning_rate")
    evidence = f"training loss {number(ends[0], 3)} at the beginning and {number(ends[1], 3)} at the end of {len(case.finite)} steps"
    evidence += f", at a learning rate of {rate:g}" if rate else ""
    return Cause(
        "flat", "warn", "the learning rate is too low, or nothing is left to learn", evidence, "raise training.learning_rate to 3x"
    )


def overfitted(case: Case) -> Cause | None:
    """The training loss fell, and the held-out loss rose after its lowest."""
    ends, scores = case.ends(), case.held
    if ends is None or len(scores) < 2 or ends[1] >= ends[0]:
        return None
    step, best = min(scores, key=lambda s: s[1])
    last = scores[-1][1]
    if last <= best * (1 + OVER):
        return None
    evidence = (
        f"training loss {number(ends[0], 3)} to {number(ends[1], 3)}, held-out loss {number(best, 3)} at step {step} and {number(last, 3)}"
    )
    earlier = "fewer epochs" if step == 0 else f"training.max_steps={step}"
    way = f"stop earlier ({earlier}), lower the rank or the learning rate, or get more rows"
    return Cause("overfitted", "warn", "the model learns its rows by heart", evidence + " at the end", way)


def clipped(case: Case) -> Cause | None:
    """Every gradient was cut."""
    most = case.setting("training.max_grad_norm")
    if not most or len(case.norms) < CALM // 3:
        return None
    cut = [n for n in case.norms if n > most]
    if len(cut) <= CUT * len(case.norms):
        return None
    evidence = f"{percent(len(cut) / len(case.norms), 0)} of {len(case.norms)} gradients are longer than training.max_grad_norm {most:g}"
    way = f"raise training.max_grad_norm above {number(median(case.norms), 1)}, which is their median, or warm up longer"
    return Cause(
        "clipped",
        "warn",
        "all gradients are cut, so that steps have one length",
        evidence + f", the median {number(median(case.norms), 1)}",
        way,
    )


def far_start(case: Case) -> Cause | None:
    """Quantization alone cost more than training should have to win back."""
    full, start, tuned = (case.entry(k) for k in (FULL, f"{case.run.main}_start", case.run.main))
    if full is None or start is None or not full.get("loss") or start.get("loss") is None:
        return None
    lost = start["loss"] / full["loss"] - 1
    if lost <= FAR:
        return None
    bits = "" if case.run.bits is None else f" at {case.run.bits:.2f} bits"
    evidence = (
        f"held-out loss {number(full['loss'], 3)} unquantized and {number(start['loss'], 3)} at the start{bits} ({percent(lost, 0)} more)"
    )
    behind = tuned is not None and tuned.get("loss") is not None and tuned["loss"] > full["loss"]
    evidence += f", {number(tuned['loss'], 3)} tuned" if behind and tuned is not None else ""
    way = "raise budget.memory, add wider formats to quantization.candidates, or take a better start (quantizer: gptq, init: qera, refine: apiq)"
    return Cause("far_start", "warn" if behind else "info", "the bits are too few for this start", evidence, way)


def worse(case: Case) -> Cause | None:
    """Training made the held-out loss worse, beyond its interval."""
    start, tuned = case.entry(f"{case.run.main}_start"), case.entry(case.run.main)
    if start is None or tuned is None or start.get("loss") is None or tuned.get("loss") is None:
        return None
    high = ((start.get("intervals") or {}).get("loss") or (None, None))[1]
    low = ((tuned.get("intervals") or {}).get("loss") or (None, None))[0]
    if high is None or low is None or low <= high:
        return None
    evidence = f"held-out loss {number(start['loss'], 3)} before and {number(tuned['loss'], 3)} after, intervals apart"
    way = "see that held-out rows look like the training rows (finebits data preview), and " + _lower(case)
    return Cause("worse", "fail", "training made the model worse on the held-out rows", evidence, way)


def _lower(case: Case) -> str:
    rate = case.setting("training.learning_rate")
    way = f"lower training.learning_rate ({rate:g}) to {rate / 3:.2g}" if rate else "lower training.learning_rate"
    return way + (", or set training.max_grad_norm to 1" if case.setting("training.max_grad_norm") == 0 else "")


RULES = (not_finite, rising, spikes, flat, overfitted, worse, far_start, clipped)
