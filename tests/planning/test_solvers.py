"""Solvers beyond their laws: side constraints, two budgets, the whole frontier, measured losses, and menus that are not small."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import finebits as fb
from finebits.plan.base import Infeasible, Option, Spec
from finebits.plan.kl_curve import Point, fit
from finebits.plan.knapsack import dual_bound, frontier, smallest, total
from finebits.planners import _highs
from finebits.planners._trials import refine
from finebits.planners.ada_quant_ip import AdaQuantIP, cheapest, profiled, target
from finebits.planners.milp import MILP, tied_modules

FORMATS = [fb.NF(b, block=k) for b in (2, 3, 4) for k in (32, 64)]
Menu = dict[str, list[Option]]


def menu(names: list[str], seed: int = 0) -> Menu:
    """Options as formats make them, with every resource that a planner may count."""
    rng = random.Random(seed)
    found = {}
    for name in names:
        n, u = rng.randint(20, 90), rng.lognormvariate(0, 1.5)
        found[name] = []
        for f in FORMATS:
            codes, scales = n * f.bits, n * 64 // int(f.block)
            more = {"weight": codes + scales, "overhead": scales, "serve": codes + scales + rng.randint(0, 9), "latency": n / f.bits}
            loss = u * 4.0**-f.bits * (1 + int(f.block) / 256) * rng.uniform(0.9, 1.1)
            found[name].append(Option(Spec(format=f), codes + scales, loss, more))
    return found


BLOCK = ["layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.k_proj"]


def brute(made: Menu, budget: int, keeps: Any) -> float:
    every = (dict(zip(made, picked, strict=True)) for picked in itertools.product(*made.values()))
    return min(total(c)[1] for c in every if total(c)[0] <= budget and keeps(c))


def formats(choice: dict[str, Option]) -> set:
    return {o.spec.format for o in choice.values()}


def summed(choice: dict[str, Option], what: str) -> float:
    return sum(o.more[what] for o in choice.values())


def one_format(choice: dict[str, Option]) -> bool:
    return all(len({o.spec.format for n, o in choice.items() if n.startswith(f"layers.{i}.")}) == 1 for i in (0, 1))


SIDES = {
    "tied": (MILP(ties=(("q_proj", "k_proj", "v_proj"),)), one_format),
    "two formats": (MILP(formats=2), lambda c: len(formats(c)) <= 2),
    "overhead": (MILP(overhead=0.3), lambda c: summed(c, "overhead") <= 0.3 * (summed(c, "weight") - summed(c, "overhead")) + 1e-9),
    "latency": (MILP(latency=90.0), lambda c: summed(c, "latency") <= 90),
    "serve": (MILP(serve=1010), lambda c: summed(c, "serve") <= 1010),
    "AdaQuant": (AdaQuantIP(latency=90.0), lambda c: summed(c, "latency") <= 90),
}


@pytest.mark.parametrize("which", SIDES)
def test_side_constraints_equal_brute_force(which: str) -> None:
    planner, keeps = SIDES[which]
    binding = 0
    for seed in range(3):
        made = menu(BLOCK, seed)
        low, high = smallest(made), sum(max(o.bytes for o in options) for options in made.values())
        for share in (0.35, 0.7):
            budget = int(low + share * (high - low))
            try:
                best = brute(made, budget, keeps)
            except ValueError:
                with pytest.raises(ValueError):
                    planner(made, budget)
                continue
            choice = planner(made, budget)
            assert keeps(choice) and total(choice)[0] <= budget and total(choice)[1] == pytest.approx(best, rel=1e-9)
            binding += total(choice)[1] > total(MILP()(made, budget))[1] + 1e-12
    assert binding, "none of these menus tests the constraint"


def test_sides_that_leave_nothing_say_so() -> None:
    made = menu(BLOCK[:2])
    with pytest.raises(ValueError, match="no choice keeps to 0.001 of overhead"):
        MILP(overhead=0.001)(made, 10**6)
    with pytest.raises(Infeasible, match="the smallest choice that keeps to the side constraints") as caught:
        MILP(overhead=0.3)(made, smallest(made))
    assert total(MILP(overhead=0.3)(made, caught.value.smallest))[0] == caught.value.smallest
    with pytest.raises(ValueError, match="ties names w_proj, and no module"):
        MILP(ties=(("q_proj", "w_proj"),))(made, 10**6)
    bare = {name: [Option(o.spec, o.bytes, o.loss) for o in options] for name, options in made.items()}
    with pytest.raises(ValueError, match="a limit on serve needs menus that say it"):
        MILP(serve=100)(bare, 10**6)
    with pytest.raises(ValueError, match="Option.more\\['latency'\\]"):
        AdaQuantIP(latency=1.0)(bare, 10**6)
    assert tied_modules(made, (("q_proj", "k_proj"),)) == (("layers.0.k_proj", "layers.0.q_proj"),)
    disjoint = {"a.q": made[BLOCK[0]][:1], "a.k": made[BLOCK[1]][1:2]}
    with pytest.raises(ValueError, match="no choice keeps to tied formats"):
        MILP(ties=(("q", "k"),))(disjoint, 10**6)


@given(st.integers(0, 50), st.floats(0, 1))
def test_three_solvers_agree(seed: int, share: float) -> None:
    made = menu([f"m{i}" for i in range(9)], seed)
    low, high = smallest(made), sum(max(o.bytes for o in options) for options in made.values())
    budget = int(low + share * (high - low))
    exact, dp, near = (p(made, budget) for p in (MILP(), fb.DP(), fb.Lagrange()))
    assert total(exact)[1] == pytest.approx(total(dp)[1], rel=1e-9)
    assert dual_bound(made, budget) - 1e-12 <= total(dp)[1] <= total(near)[1] + 1e-12
    solved = _highs.solve(made, budget)
    assert solved.complete and solved.bound == pytest.approx(total(dp)[1], rel=1e-6)


@given(st.integers(0, 30))
def test_more_budget_never_hurts_on_menus_of_many_formats(seed: int) -> None:
    made = menu([f"m{i}" for i in range(7)], seed)
    low, high = smallest(made), sum(max(o.bytes for o in options) for options in made.values())
    losses = [total(fb.Lagrange()(made, budget))[1] for budget in range(low, high + 1, 7)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses))


def test_the_frontier_holds_every_budget() -> None:
    made = menu([f"m{i}" for i in range(4)])
    front = frontier(made)
    assert (front.bytes[1:] > front.bytes[:-1]).all() and (front.loss[1:] < front.loss[:-1]).all()
    for i in range(0, len(front.bytes), 7):
        assert total(front.pick(i)) == (front.bytes[i], pytest.approx(front.loss[i]))
        assert total(fb.DP()(made, int(front.bytes[i])))[1] == pytest.approx(front.loss[i])
    with pytest.raises(ValueError, match="more than 5 partial choices"):
        fb.DP(states=5)(made, 10**6)


def test_the_cheapest_choice_for_a_loss() -> None:
    made = menu([f"m{i}" for i in range(5)])
    front = frontier(made)
    for limit in (front.loss[-1] * 1.01, front.loss[-1] * 2, front.loss[0] * 0.7):
        choice = cheapest(made, limit)
        assert total(choice)[1] <= limit
        assert total(fb.DP()(made, total(choice)[0] - 1))[1] > limit
    with pytest.raises(ValueError, match="the best loses"):
        cheapest(made, 1e-9)
    assert target(1000, 0.25) == 1000 and target(1000, 0.13) == 520


def test_measured_losses_and_refinement() -> None:
    """Two modules that only hurt together: profiles of one at a time do not see it, a walk by the measured loss does."""
    made = menu(["a", "b", "c"], 3)
    best = {name: options[-2] for name, options in made.items()}
    calls = []

    def measure(choice: Any) -> float:
        calls.append(choice)
        small = [n for n in ("a", "b") if choice[n].spec.format.bits == 2]
        return sum(o.loss for o in choice.values()) + 5.0 * (len(small) == 2)

    seen = profiled(made, best, measure)
    assert len(calls) == 1 + 3 * (len(FORMATS) - 1)
    for name in made:
        for o, p in zip(made[name], seen[name], strict=True):
            assert (
                p.loss == pytest.approx(max(o.loss - best[name].loss, 1e-6 if o != best[name] else 1e-6), abs=2e-6) and p.bytes == o.bytes
            )
    both = {n: next(o for o in made[n] if o.spec.format == fb.NF(2, block=64)) for n in ("a", "b")} | {"c": made["c"][-1]}
    budget = total(both)[0] + 100
    walked, loss = refine(both, made, budget, measure, rounds=3)
    assert loss < measure(both) - 4 and total(walked)[0] <= budget and loss == pytest.approx(measure(walked))


def test_a_prediction_is_an_interval() -> None:
    curve = fit([Point(0.1, 0.2), Point(1.0, 2.0), Point(10.0, 20.0)])
    assert curve.b == pytest.approx(1) and curve(3.0) == pytest.approx((6.0, 6.0, 6.0))
    noisy = fit([Point(0.1, 0.2, 0.1), Point(1.0, 2.0, 0.1), Point(10.0, 20.0, 0.1)])
    low, best, high = noisy(3.0)
    assert low < best < high and best == pytest.approx(6.0) and noisy(1000.0)[2] / noisy(1000.0)[1] > high / best
    assert noisy(0.0) == (0.0, 0.0, 0.0)
    two = fit([Point(0.1, 0.2, 0.1), Point(1.0, 2.5, 0.1)])
    assert two(0.5)[2] / two(0.5)[1] > high / best
    with pytest.raises(ValueError, match="needs two evaluated variants"):
        fit([Point(1.0, 2.0), Point(1.0, 3.0)])
    with pytest.raises(ValueError, match="use another"):
        fit([Point(1.0, 2.0), Point(2.0, 1.0)])


def test_a_prediction_covers_what_it_says() -> None:
    """Lines with noise: the interval from three variants covers about 80 % of new ones."""
    rng, hits = random.Random(1), 0
    for _ in range(400):
        noise = lambda: rng.gauss(0, 0.2)  # noqa: E731
        xs = [0.1, 0.5, 3.0, 1.3]
        ys = [2.0 * x**1.4 * 2.718281828 ** noise() for x in xs]
        low, _, high = fit([Point(x, y) for x, y in zip(xs[:3], ys[:3], strict=True)])(xs[3])
        hits += low <= ys[3] <= high
    assert 0.74 <= hits / 400 <= 0.86
