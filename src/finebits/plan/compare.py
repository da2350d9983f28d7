"""Which model to buy with a budget: the larger one at fewer bits, or the smaller one at more.

Where a plan's losses are nats (the objectives fisher and kl, which read weights and rows), the models' own losses on the same text are compared
as they are predicted to be before training, in nats a byte of text, since tokens of different models hold different amounts of it:

    (full-precision loss + KL of the plan) · trained tokens / bytes of trained text

with the KL that was measured of the chosen bits, or fitted, or for fisher its second-order estimate. Else losses of different models cannot be
compared, and this rests on a rule of thumb and says so:

    effective parameters = Σ n_i · max(0, 1 − c·ε_i),     c = 10

with n_i the weights of a matrix, ε_i the relative squared error of its format before training, and everything that stays dense counted whole.
c is not fitted to any model: it is chosen so that for equal bytes about 4 bits a weight are worth most, as Dettmers & Zettlemoyer found over
many models ("The case for 4-bit precision: k-bit inference scaling laws", ICML 2023, arXiv:2212.09720v2); with the errors of NF formats any c
from 7 to 50 does that. ε_i is measured under the plan's objective (weight or output), or it is that of normal data. Quality of training data,
and how much of the error fine-tuning mends, are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from finebits.plan.base import Infeasible, Plan, at_end

FACTOR = 10.0
CLOSE = 0.85  # the second is this near to the first: too close to call


@dataclass(frozen=True)
class ModelChoice:
    """One model within the budget: what it would be, or the smallest budget that it needs."""

    model: str
    parameters: int
    effective: float | None = None  # None: it does not fit
    bits: float | None = None
    peak: int | None = None
    smallest: int | None = None
    measured: bool = False  # were the errors measured on its weights?
    levers: str = ""
    basis: str = ""  # what it is judged by, in words
    predicted: tuple[float, float, float] | None = None  # low end, best guess and high end of the loss before training, nats a byte


class Text(NamedTuple):
    """What the unquantized model loses on the rows: nats a trained token, trained tokens, and bytes of the text that they are.

    >>> text = Text(loss=2.0, tokens=100, bytes=400)
    >>> text.loss * text.tokens / text.bytes  # nats a byte, which models of different tokens have in common
    0.5
    """

    loss: float
    tokens: int
    bytes: int


def model_choice(
    model: str,
    parameters: int,
    outcome: Plan | Infeasible,
    levers: str = "",
    text: Text | None = None,
    typical: Mapping[str, float] | None = None,
) -> ModelChoice:
    """The choice of a plan, or of its refusal. A plan whose losses are nats comes with the `text` that they are about, and with the `typical`
    relative error of every matrix under its format.

    >>> model_choice("8B", 8000, fb.Infeasible("Does not fit: …", smallest=5 << 30)).smallest
    5368709120
    """
    if isinstance(outcome, Infeasible):
        return ModelChoice(model, parameters, smallest=outcome.smallest)
    measured, objective = bool(outcome.solver.get("measured")), str(outcome.solver.get("objective"))
    sizes = {name: math.prod(c["shape"]) for name, c in outcome.costs.items()}
    errors = typical or {name: c["loss"] for name, c in outcome.costs.items()}
    lost = sum(n * min(1.0, FACTOR * errors[name]) for name, n in sizes.items())
    bits = 8 * outcome.memory["linear weights"] / sum(n for name, n in sizes.items() if at_end(outcome.costs[name]) is None)
    if text is None:
        basis = f"rule of thumb on measured {objective} errors" if measured else "rule of thumb on typical errors: weights not read"
    else:
        basis = {"kl": "measured loss + predicted KL", "fisher": "measured loss + Fisher estimate of the KL"}[objective]
    return ModelChoice(
        model, parameters, parameters - lost, bits, outcome.peak, None, measured, levers, basis, text and _predicted(outcome, text)
    )


def _predicted(plan: Plan, text: Text) -> tuple[float, float, float]:
    """Nats a byte. The interval is that of the fitted curve; what was measured of the chosen bits stands in its middle."""
    kl = plan.solver.get("kl")
    low, best, high = kl["interval"] if kl else (plan.solver["loss"],) * 3
    best = kl.get("measured", best) if kl else best
    low, best, high = ((text.loss + v) * text.tokens / text.bytes for v in (min(low, best), best, max(high, best)))
    return low, best, high


def comparable(offers: Sequence[ModelChoice]) -> bool:
    """Have all that fit a predicted loss? Then it decides, else the rule of thumb does, for all of them.

    >>> comparable([ModelChoice("8B", 8000, 7000.0, predicted=(0.9, 1.0, 1.1)), ModelChoice("3B", 3000, smallest=5 << 30)])
    True
    """
    return all(o.predicted is not None for o in offers if o.effective is not None)


def ranked(offers: Sequence[ModelChoice]) -> list[ModelChoice]:
    """The best buy first; what does not fit last, the nearest of those first.

    >>> offers = [ModelChoice("70B", 70000, smallest=40 << 30), ModelChoice("3B", 3000, 2900.0), ModelChoice("8B", 8000, 7000.0)]
    >>> [offer.model for offer in ranked(offers)]
    ['8B', '3B', '70B']
    """
    same = comparable(offers)
    worth = lambda o: o.predicted[1] if same and o.predicted else -(o.effective or 0.0)  # noqa: E731
    return sorted(offers, key=lambda o: (o.effective is None, worth(o), o.smallest or 0))


def verdict(offers: Sequence[ModelChoice]) -> str:
    """What the planner says of ranked offers, in a sentence.

    >>> verdict([ModelChoice("8B", 8000, 7000.0, bits=3.1), ModelChoice("3B", 3000, 2900.0, bits=8.0)])
    'the larger model is the better buy: 8B, even at 3.1 bits'
    """
    fit = [o for o in offers if o.effective is not None]
    if not fit:
        return "none of them fits"
    first = fit[0]
    if len(fit) == 1:
        return f"{first.model} is the only one that fits"
    second = fit[1]
    assert first.effective is not None and second.effective is not None and first.bits is not None and second.bits is not None
    if comparable(offers) and first.predicted and second.predicted:
        close = second.predicted[0] <= first.predicted[2]
    else:
        close = second.effective > CLOSE * first.effective
    if close:
        return f"too close to call between {first.model} at {first.bits:.1f} bits and {second.model} at {second.bits:.1f}: tune both and compare"
    if first.parameters < max(o.parameters for o in fit):
        larger = max(fit, key=lambda o: o.parameters)
        return f"the smaller model is the better buy: {first.model} at {first.bits:.1f} bits, not {larger.model} at {larger.bits:.1f}"
    return f"the larger model is the better buy: {first.model}, even at {first.bits:.1f} bits"
