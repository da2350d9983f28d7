"""What is in memory beside the planned weights, and the levers that move it.

A lever is a setting of training that changes what it holds and not what it learns: micro-batch and accumulation (the same effective batch),
checkpointing, tokens a chunk of the loss, the optimizer's state in 8 bits, and on a device with memory of its own embeddings that stay in the
host's. The output head in 8 bits is one too, and a matrix of the menu (marked in `plan.costs`) where it may be chosen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finebits.errors import Invalid
from finebits.optim import base as optimizers
from finebits.plan import memory
from finebits.plan.base import Option, Plan
from finebits.plan.knapsack import Menu, smallest
from finebits.plan.memory import Geometry, Trained

PULLS = ("micro_batch", "checkpointing", "loss_chunk", "optim", "head", "embeddings")
TRAINING = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "loss_chunk", "optim")
CHANGED = (*TRAINING, "embeddings")
LEAST_CHUNK = 32

# Rough: they put levers into an order and predict no time. Checkpointing computes the forward pass again, a third of a step's work.
SLOWER = {"checkpointing": 1.33, "halved micro-batch": 1.02, "halved chunk": 1.01, "optim": 1.01, "embeddings": 1.01}

Levers = dict[str, Any]
Rates = tuple[float, float]  # bytes of the training peak that a trained number takes, and a frozen one


@dataclass(frozen=True)
class Around:
    """The rest of the model, the adapters, and the bytes of the weights were they dense.

    With `varied`, ranks are chosen with the bits: what adapters hold is then the options' own (`Option.more`), `trained` holds the largest
    rank alone, and nothing is counted twice. `serve` is a second budget in bytes, of the tuned model as it is saved. `compared` are the further
    runs of the job that are planned for, `left_out` the phases that the job does without.
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

    def phases(self, weights: int, head: int, levers: Mapping[str, Any], trained: Trained, seen: Any = None) -> dict[str, int]:
        """Peaks of the phases beside training, with so many bytes of planned weights: those around it, and training of the further runs that
        hold more than the plan's own. `head` are the bytes of a planned head without a format,
        `seen` the statistics of the start as the memory model counts them."""
        found = memory.rows(self.geometry, weights, self.dense, trained, levers, seen)
        if "lora16" in self.compared:
            found["lora16"] = sum(memory.terms(self.geometry, self.dense + head, trained, levers).values())
        return {phase: held for phase, held in found.items() if phase not in self.left_out}

    def budget(self, need: int) -> int:
        """The budget of a job that takes `need` bytes, what stays free included."""
        return need if not self.reserve else int(need / (1 - self.reserve)) + 1

    def rest(self, levers: Mapping[str, Any], trained: Trained | None = None) -> int:
        """The training peak less the planned weights."""
        return sum(memory.terms(self.geometry, 0, trained or self.trained, levers).values())

    def apart(self, levers: Mapping[str, Any]) -> int:
        """Bytes of the saved model beside planned matrices and adapters."""
        g = self.geometry
        return (g.embeddings + g.head + g.other) * memory.WIDTHS[levers["dtype"]]

    def chosen(self, picked: Mapping[str, Option]) -> Trained:
        """What the adapters of a choice hold."""
        if not self.varied:
            return self.trained
        trained, frozen = (int(sum(o.more[k] for o in picked.values())) for k in ("trained", "frozen"))
        return Trained(trained, frozen, max((getattr(o.spec.adapter, "rank", 0) for o in picked.values()), default=0))

    def least_trained(self, menu: Menu) -> Trained:
        """The least that the adapters of any choice hold."""
        if not self.varied:
            return self.trained
        trained, frozen = (sum(int(min(o.more[k] for o in options)) for options in menu.values()) for k in ("trained", "frozen"))
        return Trained(trained, frozen, self.trained.rank)

    def peak(self, picked: Mapping[str, Option], levers: Mapping[str, Any]) -> int:
        """The training peak of a choice."""
        return sum(o.bytes for o in picked.values()) + self.rest(levers, self.chosen(picked))

    def rates(self, menu: Menu, levers: Mapping[str, Any]) -> tuple[Rates, int]:
        """What an option's adapter adds to the peak, and the peak without weights and varied adapters: for planners, whose options add up.

        The peak is the largest of four moments, each affine in the numbers trained: a convex function, and its chord between the least and the
        most that the menu can train never lies below it.
        """
        if not self.varied:
            return (0.0, 0.0), self.rest(levers)
        at = lambda t, f: self.rest(levers, Trained(t, f, self.trained.rank))  # noqa: E731
        low, high = (sum(int(pick(o.more["trained"] for o in v)) for v in menu.values()) for pick in (min, max))
        each = (at(high, 0) - at(low, 0)) / (high - low) if high > low else 0.0
        frozen = 0.0
        if any(o.more["frozen"] for v in menu.values() for o in v):
            many = self.geometry.layers << 10
            moments = [memory.moments(self.geometry, 0, Trained(0, f, self.trained.rank), levers) for f in (0, many)]
            frozen = max(sum(moments[1][k].values()) - sum(moments[0][k].values()) for k in moments[0]) / many
        return (each, frozen), at(low, 0) - math.floor(each * low) + self.geometry.layers  # a block's share is rounded down

    def held(self, menu: Menu, rates: Rates) -> Menu:
        """The menu with all that an option adds to the training peak for its bytes."""
        if not self.varied:
            return menu
        own = lambda o: o.bytes + math.ceil(rates[0] * o.more["trained"] + rates[1] * o.more["frozen"])  # noqa: E731
        return {name: [replace(o, bytes=own(o)) for o in options] for name, options in menu.items()}

    def least(self, menu: Menu, levers: Mapping[str, Any]) -> int:
        """The smallest training peak of a menu with these levers."""
        rates, rest = self.rates(menu, levers)
        return smallest(self.held(menu, rates)) + rest

    def most(self, menu: Menu, levers: Mapping[str, Any]) -> int:
        """The largest one."""
        rates, rest = self.rates(menu, levers)
        return sum(max(o.bytes for o in options) for options in self.held(menu, rates).values()) + rest

    def to_json(self) -> dict[str, Any]:
        held = {"geometry": self.geometry.to_json(), "trained": self.trained.to_json()}
        held |= {"dense": self.dense, "reserve": self.reserve, "pulls": list(self.pulls)}
        held |= {k: list(v) for k, v in (("compared", self.compared), ("left_out", self.left_out)) if v}
        return held | ({"varied": True} if self.varied else {}) | ({} if self.serve is None else {"serve": self.serve})

    @classmethod
    def of(cls, plan: Plan) -> Around:
        """The inverse, from `plan.sizes`. Raises ValueError if the plan was written without them."""
        held = plan.sizes
        if not held:
            raise Invalid("this plan does not hold the sizes of its model (an older plan, or one written by hand): plan again")
        try:
            geometry = Geometry.of(held["geometry"])
        except (KeyError, TypeError):
            raise Invalid("this plan was made by another version of finebits, which counted memory otherwise: plan again") from None
        whole = geometry, Trained(**held["trained"]), held["dense"], held["reserve"], tuple(held["pulls"])
        runs = tuple(held.get("compared", ())), tuple(held.get("left_out", ()))
        return cls(*whole, held.get("varied", False), held.get("serve"), *runs)


def variants(levers: Levers, pulls: Sequence[str]) -> Iterator[tuple[float, Levers]]:
    """(how much slower, levers) for every combination of what may be pulled; the levers as they are come first."""
    batch, passes = levers["per_device_train_batch_size"], levers["gradient_accumulation_steps"]
    chunks, batches = [levers["loss_chunk"]], [batch]
    while "micro_batch" in pulls and batches[-1] % 2 == 0:
        batches.append(batches[-1] // 2)
    while "loss_chunk" in pulls and chunks[-1] // 2 >= LEAST_CHUNK:
        chunks.append(chunks[-1] // 2)
    kept = [levers["gradient_checkpointing"]]
    kept += [True] if "checkpointing" in pulls and not kept[0] else []
    optims = [levers.get("optim", "adamw_torch")]
    smaller = optimizers.named(optims[0]).smaller if "optim" in pulls else None
    optims += [s.hf for s in [optimizers.named(smaller)] if levers["device"] in s.devices] if smaller else []
    places = [levers.get("embeddings", "device")]
    places += ["cpu"] if "embeddings" in pulls and levers["device"] != "cpu" and places[0] == "device" else []
    for i, b in enumerate(batches):
        for j, chunk in enumerate(chunks):
            for checkpointing in kept:
                for (k, optim), (n, place) in itertools.product(enumerate(optims), enumerate(places)):
                    slower = SLOWER["halved micro-batch"] ** i * SLOWER["halved chunk"] ** j * SLOWER["optim"] ** k
                    slower *= (SLOWER["checkpointing"] if checkpointing else 1.0) * SLOWER["embeddings"] ** n
                    changed = {"per_device_train_batch_size": b, "gradient_accumulation_steps": passes * (batch // b)}
                    changed |= {"loss_chunk": chunk, "gradient_checkpointing": checkpointing, "optim": optim, "embeddings": place}
                    yield slower, levers | changed


def said(levers: Mapping[str, Any]) -> str:
    """The levers that may be pulled, in words."""
    parts = [f"micro-batch {levers['per_device_train_batch_size']} x {levers['gradient_accumulation_steps']}"]
    parts += ["checkpointing" if levers["gradient_checkpointing"] else "no checkpointing", f"loss chunk {levers['loss_chunk']}"]
    parts += [kind.said for kind in [optimizers.named(levers.get("optim", "adamw_torch"))] if kind.said]
    return ", ".join(parts + (["embeddings on the CPU"] if levers.get("embeddings") == "cpu" else []))
