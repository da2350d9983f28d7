"""The multiple-choice knapsack as an integer program, solved by HiGHS (the extra milp): exact, and open to side constraints.

    min Σ c_ij x_ij    s.t.    Σ_j x_ij = 1 for every module i,    Σ b_ij x_ij ≤ B,    x binary

`Sides` adds rows: further limits Σ r_ij x_ij ≤ R, modules that share a format, and a binary y_f for every format in use, Σ y_f ≤ n.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from finebits.errors import Failed, Invalid, OutOfTime
from finebits.plan.base import Infeasible, Option
from finebits.plan.knapsack import check, hull, ladders, total
from finebits.plan.planner import Menu, Solution
from finebits.sizes import show

NORM = 1000.0  # what losses are scaled to, as a vector: far above the solver's tolerances


class Contradiction(Invalid):
    """Side constraints that no choice keeps, whatever the budget."""

    code = 2


class Limit(NamedTuple):
    """Σ of `weight` over the chosen options stays at or below `most`; `label` names it in messages."""

    weight: Callable[[Option], float]
    most: float
    label: str


class Sides(NamedTuple):
    """What a choice must keep to beside its bytes: further limits, groups of modules with one format, at most so many formats."""

    limits: tuple[Limit, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    formats: int | None = None

    def __bool__(self) -> bool:
        return bool(self.limits or self.groups or self.formats is not None)


class Constraints:
    """Linear constraints, gathered."""

    def __init__(self) -> None:
        self.index: list[np.ndarray] = []
        self.value: list[np.ndarray] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, index: Sequence[int] | np.ndarray, value: Sequence[float] | np.ndarray | float, low: float, high: float) -> None:
        index = np.asarray(index, dtype=np.int32)
        self.index.append(index)
        self.value.append(np.broadcast_to(np.asarray(value, dtype=np.float64), index.shape))
        self.low.append(low)
        self.high.append(high)


def available() -> bool:
    """Is the package there?"""
    return importlib.util.find_spec("highspy") is not None


def solve(menu: Menu, budget: int, sides: Sides = Sides(), gap: float = 0.0, seconds: float = 60.0) -> Solution:
    """The choice with the least loss, to within the relative `gap`. Raises Infeasible with the least number of bytes that would do,
    Contradiction where no budget would, TimeoutError where `seconds` found nothing."""
    check(menu, None if sides else budget)
    if not menu:
        return Solution({}, 0.0)
    options = _options(menu, bool(sides))
    start = hull(menu, budget) if not sides else None
    room = float(budget)
    for _ in range(8):
        solution = _run(options, [o.loss for _, o in options], _bytes(options, room), sides, gap, seconds, start)
        if solution is None:
            break
        choice, bound, complete = solution
        over = total(choice)[0] - budget
        if over <= 0:
            return Solution({name: choice[name] for name in menu}, bound, complete)
        room -= over  # the solver counts in floats, and so may miss by less than its tolerance
    least = _run(options, [float(o.bytes) for _, o in options], None, sides, 0.0, seconds, None)
    if least is None:
        labels = [limit.label for limit in sides.limits]
        labels += ["tied formats"] * bool(sides.groups) + [f"at most {sides.formats} formats"] * (sides.formats is not None)
        raise Contradiction(f"no choice keeps to {' and '.join(labels)}, whatever the budget: loosen one of them or offer more candidates")
    size = total(least[0])[0]
    raise Infeasible(f"the smallest choice that keeps to the side constraints holds {show(size)}, and {show(budget)} are left", size)


def _options(menu: Menu, all_of_them: bool) -> list[tuple[str, Option]]:
    """The columns. Without side constraints, an option that is no better than a smaller one cannot be chosen and is left out."""
    if all_of_them:
        return [(name, o) for name in sorted(menu) for o in menu[name]]
    return [(r.name, menu[r.name][int(j)]) for r in ladders(menu) for j in r.options]


def _bytes(options: Sequence[tuple[str, Option]], room: float) -> Limit:
    return Limit(lambda o: float(o.bytes), room, "budget")


def _run(
    options: Sequence[tuple[str, Option]],
    cost: Sequence[float],
    budget: Limit | None,
    sides: Sides,
    gap: float,
    seconds: float,
    start: dict[str, Option] | None,
) -> tuple[dict[str, Option], float, bool] | None:
    """One call of the solver; None where nothing is feasible."""
    constraints, names = Constraints(), np.array([name for name, _ in options])
    first = np.flatnonzero(np.concatenate(([True], names[1:] != names[:-1])))
    ends = [*first[1:].tolist(), len(options)]
    columns = {str(names[a]): range(a, b) for a, b in zip(first.tolist(), ends, strict=True)}
    for span in columns.values():
        constraints.add(span, 1.0, 1.0, 1.0)
    for limit in (*sides.limits, *([budget] if budget else [])):
        weight = np.array([limit.weight(o) for _, o in options], dtype=np.float64)
        unit = float(np.abs(weight).max()) or 1.0
        constraints.add(range(len(options)), weight / unit, -math.inf, limit.most / unit)
    formats = sorted({o.spec.format for _, o in options} - {None}, key=repr) if sides.formats is not None else []
    _tie(constraints, options, columns, sides)
    for f, format in enumerate(formats):
        for span in columns.values():
            same = [j for j in span if options[j][1].spec.format == format]
            if same:
                constraints.add([*same, len(options) + f], [1.0] * len(same) + [-1.0], -math.inf, 0.0)
    if formats:
        constraints.add(range(len(options), len(options) + len(formats)), 1.0, -math.inf, float(sides.formats or 0))
    c = np.concatenate((np.asarray(cost, dtype=np.float64), np.zeros(len(formats))))
    scale = NORM / (float(np.linalg.norm(c)) or 1.0)
    known = None
    if start is not None:
        known = np.array([float(start[name] is o) for name, o in options])
    solution = _highs(c * scale, constraints, gap, seconds, known)
    if solution is None:
        return None
    x, bound, complete = solution
    picked = {name: options[max(span, key=lambda j: x[j])][1] for name, span in columns.items()}
    return picked, bound / scale, complete


def _tie(constraints: Constraints, options: Sequence[tuple[str, Option]], columns: dict[str, range], sides: Sides) -> None:
    """Modules of a group pick one format: Σ over its options is the same in each of them."""
    for group in sides.groups:
        by_format: list[dict[Hashable, list[int]]] = []
        for name in group:
            of_module: dict[Hashable, list[int]] = {}
            for j in columns[name]:
                of_module.setdefault(options[j][1].spec.format, []).append(j)
            by_format.append(of_module)
        for format in sorted(set().union(*by_format), key=repr):
            for one, other in zip(by_format, by_format[1:]):
                a, b = one.get(format, []), other.get(format, [])
                constraints.add([*a, *b], [1.0] * len(a) + [-1.0] * len(b), 0.0, 0.0)


def _highs(
    cost: np.ndarray, constraints: Constraints, gap: float, seconds: float, start: np.ndarray | None
) -> tuple[np.ndarray, float, bool] | None:
    """min cost·x over binary x under the rows: x, a bound on the minimum, and whether it was reached within the gap."""
    import highspy

    n = len(cost)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n, len(constraints.low)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, np.zeros(n), np.ones(n)
    lp.row_lower_, lp.row_upper_ = np.array(constraints.low), np.array(constraints.high)
    lp.integrality_ = [highspy.HighsVarType.kInteger] * n
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.concatenate(([0], np.cumsum([len(i) for i in constraints.index]))).astype(np.int32)
    lp.a_matrix_.index_ = np.concatenate(constraints.index)
    lp.a_matrix_.value_ = np.concatenate(constraints.value)
    solver: Any = highspy.Highs()
    settings = {"output_flag": False, "mip_rel_gap": gap, "mip_abs_gap": 1e-9, "time_limit": seconds, "threads": 1, "random_seed": 0}
    for key, value in (settings | {"mip_feasibility_tolerance": 1e-9, "primal_feasibility_tolerance": 1e-9}).items():
        solver.setOptionValue(key, value)
    solver.passModel(lp)
    if start is not None:
        guess = highspy.HighsSolution()
        guess.col_value = start.tolist()
        solver.setSolution(guess)
    solver.run()
    status, info = solver.getModelStatus(), solver.getInfo()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None
    if not math.isfinite(info.objective_function_value) or info.primal_solution_status != 2:
        if status == highspy.HighsModelStatus.kTimeLimit:
            raise OutOfTime(f"the integer program found no choice in {seconds:g} s: give it more time, or use lagrange")
        raise Failed(f"HiGHS stopped without a choice: {solver.modelStatusToString(status)}")
    x = np.array(solver.getSolution().col_value)
    return x, float(info.mip_dual_bound), status == highspy.HighsModelStatus.kOptimal
