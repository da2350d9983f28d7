"""Which model to buy with a budget: the larger one at fewer bits, or the smaller one at more.

Losses of different models cannot be compared from shapes and weights, so this rests on a rule of thumb and says so:

    effective parameters = Σ n_i · max(0, 1 − c·ε_i),     c = 10

with n_i the weights of a matrix, ε_i the relative squared error of its format before training, and everything that stays dense counted whole.
c is not fitted to any model: it is chosen so that for equal bytes about 4 bits a weight are worth most, as Dettmers & Zettlemoyer found over
many models ("The case for 4-bit precision: k-bit inference scaling laws", ICML 2023, arXiv:2212.09720v2); with the errors of NF formats any c
from 7 to 50 does that. Quality of training data, and how much of the error fine-tuning mends, are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finebits.plan.base import Infeasible, Plan

FACTOR = 10.0
CLOSE = 0.85  # the second is this near to the first: too close to call


@dataclass(frozen=True)
class Offer:
    """One model within the budget: what it would be, or the smallest budget that it needs."""

    model: str
    parameters: int
    effective: float | None = None  # None: it does not fit
    bits: float | None = None
    peak: int | None = None
    smallest: int | None = None
    measured: bool = False  # were the errors measured on its weights?
    levers: str = ""


def offer(model: str, parameters: int, found: Plan | Infeasible, levers: str = "") -> Offer:
    """The offer of a plan, or of its refusal. Errors must be plain relative ones: the plan's objective is "weight"."""
    if isinstance(found, Infeasible):
        return Offer(model, parameters, smallest=found.smallest)
    sizes = {name: math.prod(c["shape"]) for name, c in found.costs.items()}
    lost = sum(n * min(1.0, FACTOR * found.costs[name]["loss"]) for name, n in sizes.items())
    bits = 8 * found.memory["linear weights"] / sum(n for name, n in sizes.items() if not found.costs[name].get("head"))
    return Offer(model, parameters, parameters - lost, bits, found.peak, measured=bool(found.solver.get("measured")), levers=levers)


def ranked(offers: Sequence[Offer]) -> list[Offer]:
    """The best buy first; what does not fit last, the nearest of those first."""
    return sorted(offers, key=lambda o: (o.effective is None, -(o.effective or 0.0), o.smallest or 0))


def verdict(offers: Sequence[Offer]) -> str:
    """What the planner says of ranked offers, in a sentence."""
    fit = [o for o in offers if o.effective is not None]
    if not fit:
        return "none of them fits"
    first = fit[0]
    if len(fit) == 1:
        return f"{first.model} is the only one that fits"
    second = fit[1]
    assert first.effective is not None and second.effective is not None and first.bits is not None and second.bits is not None
    if second.effective > CLOSE * first.effective:
        return f"too close to call between {first.model} at {first.bits:.1f} bits and {second.model} at {second.bits:.1f}: tune both and compare"
    if first.parameters < max(o.parameters for o in fit):
        larger = max(fit, key=lambda o: o.parameters)
        return f"the smaller model is the better buy: {first.model} at {first.bits:.1f} bits, not {larger.model} at {larger.bits:.1f}"
    return f"the larger model is the better buy: {first.model}, even at {first.bits:.1f} bits"
