"""Laws of a planner: a pure function of a menu and a budget."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import finebits as fb
from finebits.plan.base import Infeasible, Option, Spec
from finebits.plan.knapsack import dual_bound, smallest, total
from finebits.plan.planner import FEATURES, Planner
from finebits.planners.uniform import Uniform
from variants import methods, variants

PLANNERS = [
    p for cls in methods("planners") for p in variants(cls) if getattr(p, "by", "") != "heuristic"
]  # a rule of thumb promises nothing
SPECS = [Spec(format=fb.Int(b, block=block)) for block in (32, 64) for b in (2, 3, 4, 8)]
every = pytest.mark.parametrize("planner", PLANNERS, ids=str)
honest = pytest.mark.parametrize(("planner", "feature"), [(p, f) for p in PLANNERS for f in sorted(p.honours)], ids=str)
Menu = dict[str, list[Option]]


@st.composite
def menus(draw: Any, modules: int = 4) -> Menu:
    """Menus that every module can share, with prices and losses in no particular order."""
    specs = SPECS[: draw(st.integers(1, 5))]
    size, loss = st.integers(1, 60), st.integers(0, 1000).map(lambda v: v / 8)
    return {f"m{i}": [Option(s, draw(size), draw(loss)) for s in specs] for i in range(draw(st.integers(1, modules)))}


@st.composite
def falling(draw: Any) -> Menu:
    """Menus as formats make them: more bytes, less loss."""
    found = {}
    for i in range(draw(st.integers(1, 5))):
        scale, size = draw(st.integers(1, 400)), draw(st.integers(1, 9))
        found[f"m{i}"] = [Option(Spec(format=fb.Int(b)), size * b, scale * 4.0**-b) for b in (2, 3, 4, 8)]
    return found


def allowed(planner: Any, menu: Menu) -> list[dict[str, Option]]:
    """Every choice that the planner looks for."""
    every = [dict(zip(menu, picked, strict=True)) for picked in itertools.product(*menu.values())]
    return [c for c in every if not isinstance(planner, Uniform) or len({o.spec for o in c.values()}) == 1]


def best(planner: Any, menu: Menu, budget: int) -> float:
    return min((total(c)[1] for c in allowed(planner, menu) if total(c)[0] <= budget), default=float("inf"))


def promised(planner: Any, menu: Menu, budget: int) -> float:
    """The most that a planner may lose to brute force: nothing if it is exact or uniform, else its own dual gap."""
    if isinstance(planner, Uniform) or getattr(planner, "exact", False) or getattr(planner, "by", "") == "exact":
        return 0.0
    return total(planner(menu, budget))[1] - dual_bound(menu, budget)


@honest
def test_it_keeps_to_what_it_says(planner: Any, feature: str) -> None:
    """A module of one format, a head with candidates of its own, adapters of several ranks, and limits on what is saved and on time: with each
    that a planner says it honours, its choice is a legal one within every budget that brute force can meet."""
    adapters = [fb.LoRA(rank=1), fb.LoRA(rank=2)] if feature == "ranks" else [None]
    more = lambda i, j: {"serve": 3.0 * (i + 1) * (j + 1), "latency": 5.0 - j + i, "weight": 9.0, "overhead": 1.0}  # noqa: E731
    menu = {
        f"m{i}": [Option(Spec(s.format, adapter=a), (i + 2) * (j + 1) + k, 90.0 / (j + 1) / (i + 1) - k, more(i, j + k))
                  for j, s in enumerate(SPECS[:3]) for k, a in enumerate(adapters)]
        for i in range(3)
    }  # fmt: skip
    if feature == "fixed":
        menu["m0"] = [Option(Spec(fb.Int(8, block=16)), 30, 0.5, more(0, 0))]
    if feature == "head":
        menu["m0"] = [Option(Spec(f), size, loss, more(0, 0)) for f, size, loss in ((None, 16, 0.0), (fb.Int(8), 8, 0.1))]
    limit = {"serve": 24.0, "latency": 13.0}.get(feature)
    if limit is not None:
        planner = dataclasses.replace(planner, **{feature: int(limit)})
        assert feature in planner.asks
    kept = [c for c in allowed(planner, menu) if limit is None or sum(o.more[feature] for o in c.values()) <= limit]
    for budget in range(min(total(c)[0] for c in kept), 60, 9):
        choice = planner(menu, budget)
        assert choice in kept and total(choice)[0] <= budget
        assert (
            total(choice)[1]
            <= min(total(c)[1] for c in kept if total(c)[0] <= budget) + (0 if limit else promised(planner, menu, budget)) + 1e-9
        )


@every
def test_what_it_says_of_itself(planner: Any) -> None:
    assert isinstance(planner, Planner) and planner.honours <= set(FEATURES)
    assert bool(planner.because) == (not {"fixed", "head", "ranks"} <= planner.honours)
    menu = {f"m{i}": [Option(s, (i + 2) * (j + 1), 100.0 / (1 + (i * j) % 3)) for j, s in enumerate(SPECS)] for i in range(4)}
    if planner.minimises:
        assert {k: o.loss for k, o in planner(menu, 10**9).items()} == {k: min(o.loss for o in v) for k, v in menu.items()}
    solution = planner(menu, 60)
    assert solution.bound <= solution.loss + 1e-9 and solution.complete
    if planner.exact and not isinstance(planner, Uniform):
        assert solution.loss == pytest.approx(best(planner, menu, 60))


def test_folder_is_not_empty() -> None:
    assert methods("planners")


@given(st.sampled_from(PLANNERS), menus(), st.integers(0, 260))
def test_never_over_budget_and_as_good_as_promised(planner: Any, menu: Menu, budget: int) -> None:
    before = copy.deepcopy(menu)
    optimum = best(planner, menu, budget)
    if optimum == float("inf"):
        with pytest.raises(Infeasible) as e:
            planner(menu, budget)
        least = min(total(c)[0] for c in allowed(planner, menu))
        assert e.value.smallest == least
        planner(menu, least)
    else:
        choice = planner(menu, budget)
        size, loss = total(choice)
        assert choice.keys() == menu.keys() and all(o in menu[name] for name, o in choice.items())
        assert size <= budget
        assert optimum - 1e-9 <= loss <= optimum + promised(planner, menu, budget) + 1e-9
    assert menu == before


@given(menus(), st.integers(0, 260))
def test_the_certificate_is_a_bound(menu: Menu, budget: int) -> None:
    if budget >= smallest(menu):
        assert dual_bound(menu, budget) <= best(None, menu, budget) + 1e-9


@given(st.sampled_from(PLANNERS), falling())
def test_more_budget_never_hurts(planner: Any, menu: Menu) -> None:
    losses = []
    for budget in range(smallest(menu), 1 + sum(max(o.bytes for o in options) for options in menu.values())):
        losses.append(total(planner(menu, budget))[1])
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses))
    assert losses[-1] == pytest.approx(best(planner, menu, 10**9))


@given(falling(), st.floats(0, 1))
def test_the_gap_of_a_default_plan_is_less_than_one_module(menu: Menu, share: float) -> None:
    low, high = smallest(menu), sum(max(o.bytes for o in options) for options in menu.values())
    budget = int(low + share * (high - low))
    span = max(max(o.loss for o in options) - min(o.loss for o in options) for options in menu.values())
    for planner in PLANNERS:
        if not isinstance(planner, Uniform):
            assert total(planner(menu, budget))[1] - best(planner, menu, budget) <= span + 1e-9
            assert total(planner(menu, budget))[1] <= best(Uniform(), menu, budget) + 1e-9


@every
def test_the_order_of_the_menu_does_not_matter(planner: Any) -> None:
    menu = {f"m{i}": [Option(s, (i + 2) * (j + 1), 100.0 / (j + 1) / (i + 1)) for j, s in enumerate(SPECS)] for i in range(5)}
    turned = {name: options[::-1] for name, options in reversed(menu.items())}
    for budget in range(smallest(menu), 160, 7):
        assert total(planner(menu, budget)) == pytest.approx(total(planner(turned, budget)))


@every
def test_a_module_without_options_is_named(planner: Any) -> None:
    with pytest.raises(ValueError, match="m1"):
        planner({"m0": [Option(SPECS[0], 1, 1.0)], "m1": []}, 10)


@every
def test_too_little_says_how_much_is_needed(planner: Any) -> None:
    menu = {name: [Option(SPECS[0], 1000, 1.0), Option(SPECS[1], 2000, 0.5)] for name in "abc"}
    with pytest.raises(Infeasible) as e:
        planner(menu, 2999)
    assert e.value.smallest == 3000 and e.value.code == 3
    assert total(planner(menu, 3000))[0] == 3000


@every
def test_an_empty_menu_is_an_empty_plan(planner: Any) -> None:
    assert planner({}, 0) == {}
