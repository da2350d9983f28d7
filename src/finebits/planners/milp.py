"""The multiple-choice knapsack as an integer program: exact, with side constraints.  Sinha and Zoltners, Operations Research 27(3), 1979.

    min Σ c_ij x_ij    s.t.    Σ_j x_ij = 1,    Σ b_ij x_ij ≤ B,    and, where asked for:

    ties        modules of one block whose names end in one group of `ties` have one format (kernels that fuse q, k and v need it)
    formats     at most so many formats in the whole plan (a matrix that stays dense has none)
    serve       Σ of the options' bytes in the exported model stays within a second budget
    overhead    Σ of the scales' bytes is at most this share of the codes' bytes
    latency     Σ of the options' seconds

Deviations: solved by HiGHS's branch and bound, not by the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from finebits.errors import Invalid
from finebits.plan.base import Option
from finebits.plan.planner import Menu, Planner, Solution
from finebits.planners._highs import Limit, Sides, solve
from finebits.sizes import show


@dataclass(frozen=True)
class MILP(Planner):
    """Exact to within the relative `gap`; after `seconds` the best choice found is given, and says so. Needs the extra milp.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"a": [fb.Option(few, 10, 5.0), fb.Option(many, 20, 1.0)], "b": [fb.Option(few, 10, 3.0), fb.Option(many, 20, 2.5)]}
    >>> {name: o.bytes for name, o in fb.MILP()(menu, 30).items()}
    {'a': 20, 'b': 10}
    >>> {name: o.bytes for name, o in fb.MILP(formats=1)(menu, 30).items()}  # one format for all
    {'a': 10, 'b': 10}
    """

    ties: tuple[tuple[str, ...], ...] = ()
    formats: int | None = None
    serve: int | None = None
    overhead: float | None = None
    latency: float | None = None
    gap: float = 0.0
    seconds: float = 60.0
    exact: ClassVar[bool] = True
    honours: ClassVar[frozenset[str]] = frozenset({"fixed", "head", "ranks", "serve", "latency"})
    widens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.formats is not None and self.formats < 1:
            raise Invalid(f"a plan has at least one format, and formats={self.formats} came")
        if self.overhead is not None and not self.overhead >= 0:
            raise Invalid(f"overhead is the share of scales in the codes' bytes, such as 0.05, and {self.overhead} came")

    @property
    def asks(self) -> frozenset[str]:
        limits = {"serve": self.serve, "latency": self.latency, "overhead": self.overhead, "weight": self.overhead}
        return frozenset(name for name, most in limits.items() if most is not None)

    def __call__(self, menu: Menu, budget: int) -> Solution:
        """Raises Infeasible where the budget is too small, Invalid where the side constraints leave nothing or an option lacks what one of
        them counts."""
        limits = []
        for name, most in (("serve", self.serve), ("latency", self.latency)):
            if most is not None:
                label = f"{show(most)} in the exported model" if name == "serve" else f"{most:g} s"
                limits.append(Limit(lambda o, name=name: _more(o, name), float(most), label))
        if self.overhead is not None:
            share = self.overhead
            limits.append(Limit(lambda o: _excess(o, share), 0.0, f"{share:.3g} of overhead"))
        return solve(menu, budget, Sides(tuple(limits), tied_modules(menu, self.ties), self.formats), self.gap, self.seconds)


def _excess(option: Option, share: float) -> float:
    """Bytes of scales beyond the share of the codes; a matrix that stays dense has neither."""
    if option.spec.format is None:
        return 0.0
    return (1 + share) * _more(option, "overhead") - share * _more(option, "weight")


def _more(option: Option, name: str) -> float:
    if name not in option.more:
        raise Invalid(f"a limit on {name} needs menus that say it (Option.more), and {option.spec.format} does not")
    return float(option.more[name])


def tied_modules(menu: Menu, ties: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The groups of modules that `ties` means: names that differ in their last part alone, that part being in one group of endings.

    Raises ValueError where an ending occurs in no module.

    >>> tied_modules({"0.q": [], "0.k": [], "1.q": [], "1.k": [], "1.o": []}, [["q", "k"]])
    (('0.k', '0.q'), ('1.k', '1.q'))
    """
    groups: dict[tuple[int, str], list[str]] = {}
    for i, endings in enumerate(ties):
        for ending in endings:
            if not any(name.rpartition(".")[2] == ending for name in menu):
                raise Invalid(f"ties names {ending}, and no module of the plan ends so")
        for name in menu:
            parent, _, last = name.rpartition(".")
            if last in endings:
                groups.setdefault((i, parent), []).append(name)
    return tuple(tuple(sorted(g)) for g in groups.values() if len(g) > 1)
