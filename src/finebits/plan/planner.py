"""What a planner is: a pure function of a menu (module -> priced options) and a budget. It knows no model.

Beside the call it says what it can. Whoever makes a plan asks these traits, never which planner it is; the laws measure them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from finebits.plan.base import Option

Menu = Mapping[str, Sequence[Option]]
FEATURES = ("fixed", "head", "ranks", "serve", "latency")


class Solution(dict[str, Option]):
    """A choice by module, and its proof: no choice that the planner may make loses less than `bound`. `complete` is False where the time was
    up before the planner had seen that it can do no better.

    >>> found = Solution({"q_proj": Option(fb.Spec(fb.NF(4)), 20, 1.0)}, bound=0.9)
    >>> found["q_proj"].bytes, found.loss, found.complete
    (20, 1.0, True)
    """

    def __init__(self, choice: Mapping[str, Option], bound: float, complete: bool = True) -> None:
        super().__init__(choice)
        self.bound, self.complete = bound, complete

    @property
    def loss(self) -> float:
        """What the choice loses in all."""
        return sum(o.loss for o in self.values())


@runtime_checkable
class Planner(Protocol):
    """A frozen dataclass of settings with this call. Raises Infeasible if nothing fits.

    `honours` says which FEATURES of a menu or a plan it keeps to: modules of one given format ("fixed"), a head or embeddings, whose candidates
    are their own ("head"), adapters of several ranks ("ranks"), a limit on what is saved, as its setting `serve` ("serve"), a limit on time
    ("latency").
    `because` says what it does instead, and `deputy` names the planner that takes its place where a limit on what is saved is to be kept.
    """

    honours: ClassVar[frozenset[str]] = frozenset({"fixed", "head", "ranks"})
    because: ClassVar[str] = ""
    deputy: ClassVar[str] = ""
    exact: ClassVar[bool] = False  # is no choice that it may make better than its own?
    minimises: ClassVar[bool] = False  # where nothing is limited, does every module get what loses least there?
    widens: ClassVar[bool] = False  # may it be asked what wider formats than those on offer would do?
    tunes_blocks: ClassVar[bool] = False  # does it choose among blocks of a width, which begin anew with every head?
    trials: int = 0  # how many modules have their `neighbours` measured, beside its own choice

    @property
    def asks(self) -> frozenset[str]:
        """What options must say beside their bytes and losses (`Option.more`)."""
        return frozenset()

    def __call__(self, menu: Menu, budget: int) -> Solution: ...

    def neighbours(self, menu: Menu, budget: int, choice: Mapping[str, Option]) -> list[tuple[str, dict[str, Option]]]:
        """Choices near `choice` that are worth a trial, by name."""
        return []

    def explained(self, menu: Menu, choice: Mapping[str, Option], budget: int) -> dict[str, Any]:
        """Why a choice is what it is, as data for the plan's reader."""
        return {}
