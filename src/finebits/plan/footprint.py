"""What a job takes in memory beside the planned weights, and with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from finebits.errors import Invalid
from finebits.plan import memory
from finebits.plan.base import Option, Plan
from finebits.plan.cost import SERVED
from finebits.plan.knapsack import smallest
from finebits.plan.levers import Counted, Levers, Start, Workload
from finebits.plan.memory import Geometry, Trained
from finebits.plan.planner import Menu


class Pool(NamedTuple):
    """What a server keeps beside the tuned model: pages of so many bytes, those of its own adapter and of others of this rank, and those of keys
    and values of tokens."""

    page: int
    adapters: int
    rank: int
    adapter_pages: int
    tokens: int
    cache_pages: int

    @property
    def bytes(self) -> int:
        return self.page * (self.adapter_pages + self.cache_pages)


Rates = tuple[float, float]  # bytes of the training peak that a trained number takes, and a frozen one


@dataclass(frozen=True)
class Footprint:
    """The rest of the model, the adapters, and the bytes of the weights were they dense.

    With `varied`, ranks are chosen with the bits: what adapters hold is then the options' own (`Option.more`), `trained` holds the largest
    rank alone, and nothing is counted twice. `serve` is a second budget in bytes, of the tuned model as it is saved and of the `pool` that it
    is served with, where it has one. `compared` are the further runs of the job that are planned for, `left_out` the phases that the job does
    without; `counted` and `start` are the plan's own.
    """

    geometry: Geometry
    trained: Trained
    dense: int
    reserve: float = 0.0  # share of the budget that stays free
    pulls: tuple[str, ...] = ()  # levers that may be pulled
    varied: bool = False
    serve: int | None = None
    compared: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    beside: int = 0  # numbers of adapters over what is no matrix, which are saved with those of the options
    counted: Counted = Counted()
    start: Start = Start()
    pool: Pool | None = None

    def work(self, levers: Levers) -> Workload:
        """What is run with these levers."""
        return Workload(levers, self.counted, self.start)

    def phases(self, weights: int, head: int, levers: Levers, trained: Trained, swept: memory.Swept | None = None) -> dict[str, int]:
        """Peaks of the phases beside training, with so many bytes of planned weights: those around it, and training of the further runs that
        hold more than the plan's own. `head` are the bytes of a planned head without a format,
        `swept` the statistics of the start as the memory model counts them."""
        g = replace(self.geometry, taught=0) if "full" in self.left_out else self.geometry  # nothing to score against
        peaks = memory.phases(g, weights, self.dense, trained, self.work(levers), swept)
        if "lora16" in self.compared:
            whole = self.dense + head + self.geometry.packed * levers.width
            peaks["lora16"] = sum(memory.terms(self.geometry, whole, trained, self.work(levers)).values())
        return {phase: peak for phase, peak in peaks.items() if phase not in self.left_out}

    def budget(self, need: int) -> int:
        """The budget of a job that takes `need` bytes, what stays free included."""
        return need if not self.reserve else int(need / (1 - self.reserve)) + 1

    def rest(self, levers: Levers, trained: Trained | None = None) -> int:
        """The training peak less the planned weights."""
        return sum(memory.terms(self.geometry, 0, trained or self.trained, self.work(levers)).values())

    def saved_beside(self, levers: Levers) -> int:
        """Bytes of the saved model beside planned matrices and adapters, less what these hold again: that is saved once."""
        g = self.geometry
        return (g.embeddings + g.head + g.other) * levers.width + SERVED * (self.beside - self.trained.again)

    def served_beside(self, levers: Levers) -> int:
        """Those, and the bytes of the pool: all of the second budget that is not planned matrices and adapters."""
        return self.saved_beside(levers) + (self.pool.bytes if self.pool else 0)

    def chosen(self, picked: Mapping[str, Option]) -> Trained:
        """What the adapters of a choice hold."""
        if not self.varied:
            return self.trained
        trained, frozen = (int(sum(o.more[k] for o in picked.values())) for k in ("trained", "frozen"))
        return self.with_options(trained, frozen, max((o.spec.adapter.rank if o.spec.adapter else 0 for o in picked.values()), default=0))

    def least_trained(self, menu: Menu) -> Trained:
        """The least that the adapters of any choice hold."""
        if not self.varied:
            return self.trained
        trained, frozen = (sum(int(min(o.more[k] for o in options)) for options in menu.values()) for k in ("trained", "frozen"))
        return self.with_options(trained, frozen, self.trained.rank)

    def with_options(self, trained: int, frozen: int, rank: int) -> Trained:
        """What options hold, and what there is beside them."""
        return replace(self.trained, trained=self.trained.trained + trained, frozen=self.trained.frozen + frozen, rank=rank)

    def peak(self, picked: Mapping[str, Option], levers: Levers) -> int:
        """The training peak of a choice."""
        return sum(o.bytes for o in picked.values()) + self.rest(levers, self.chosen(picked))

    def rates(self, menu: Menu, levers: Levers) -> tuple[Rates, int]:
        """What an option's adapter adds to the peak, and the peak without weights and varied adapters: for planners, whose options add up.

        The peak is the largest of four moments, each affine in the numbers trained: a convex function, and its chord between the least and the
        most that the menu can train never lies below it.
        """
        if not self.varied:
            return (0.0, 0.0), self.rest(levers)
        at = lambda t, f: self.rest(levers, self.with_options(t, f, self.trained.rank))  # noqa: E731
        low, high = (sum(int(pick(o.more["trained"] for o in v)) for v in menu.values()) for pick in (min, max))
        each = (at(high, 0) - at(low, 0)) / (high - low) if high > low else 0.0
        frozen = 0.0
        if any(o.more["frozen"] for v in menu.values() for o in v):
            many = self.geometry.layers << 10
            moments = [memory.moments(self.geometry, 0, self.with_options(0, f, self.trained.rank), self.work(levers)) for f in (0, many)]
            frozen = max(sum(moments[1][k].values()) - sum(moments[0][k].values()) for k in moments[0]) / many
        return (each, frozen), at(low, 0) - math.floor(each * low) + self.geometry.layers  # a block's share is rounded down

    def costed(self, menu: Menu, rates: Rates) -> Menu:
        """The menu with all that an option adds to the training peak for its bytes."""
        if not self.varied:
            return menu
        own = lambda o: o.bytes + math.ceil(rates[0] * o.more["trained"] + rates[1] * o.more["frozen"])  # noqa: E731
        return {name: [replace(o, bytes=own(o)) for o in options] for name, options in menu.items()}

    def least(self, menu: Menu, levers: Levers) -> int:
        """The smallest training peak of a menu with these levers."""
        rates, rest = self.rates(menu, levers)
        return smallest(self.costed(menu, rates)) + rest

    def most(self, menu: Menu, levers: Levers) -> int:
        """The largest one."""
        rates, rest = self.rates(menu, levers)
        return sum(max(o.bytes for o in options) for options in self.costed(menu, rates).values()) + rest

    def to_json(self) -> dict[str, Any]:
        data = {"geometry": self.geometry.to_json(), "trained": self.trained.to_json()}
        data |= {"dense": self.dense, "reserve": self.reserve, "pulls": list(self.pulls)}
        data |= {k: list(v) for k, v in (("compared", self.compared), ("left_out", self.left_out)) if v}
        data |= {"beside": self.beside} if self.beside else {}
        data |= {"pool": self.pool._asdict()} if self.pool else {}
        return data | ({"varied": True} if self.varied else {}) | ({} if self.serve is None else {"serve": self.serve})

    @classmethod
    def of(cls, plan: Plan) -> Footprint:
        """The inverse, from `plan.sizes` and what the plan counted. Raises ValueError if the plan was written without them."""
        sizes = plan.sizes
        if not sizes:
            raise Invalid("this plan does not hold the sizes of its model (an older plan, or one written by hand): plan again")
        try:
            geometry = Geometry.of(sizes["geometry"])
        except (KeyError, TypeError):
            raise Invalid("this plan was made by another version of finebits, which counted memory otherwise: plan again") from None
        required = geometry, Trained(**sizes["trained"]), sizes["dense"], sizes["reserve"], tuple(sizes["pulls"])
        runs = tuple(sizes.get("compared", ())), tuple(sizes.get("left_out", ()))
        pool = Pool(**sizes["pool"]) if "pool" in sizes else None
        return cls(*required, sizes.get("varied", False), sizes.get("serve"), *runs, sizes.get("beside", 0), plan.counted, plan.start, pool)
