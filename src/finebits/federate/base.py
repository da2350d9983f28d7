"""What an aggregator is: the tensors that clients have trained -> where the next round starts.

Clients hold one frozen base, perhaps quantized, and train the tensors of an adapter over it, {module: {"A": …, "B": …}}. What is meant by their
mean is ΔW* = Σ pₖ sₖ·Bₖ Aₖ with pₖ = nₖ/Σn of their numbers of examples; the mean of factors (Σ pₖ Bₖ)(Σ pₖ Aₖ) misses it by the covariance
Σ pₖ (Bₖ − B̄)(Aₖ − Ā). What of ΔW* no adapter of one rank holds is the residual: two factors that lie, frozen, over a base whose numbers nobody
touches. It is never put into the base, so that a quantized one keeps its codes whatever the rounds bring.

Sums are taken in float64 and rounded once.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.errors import Invalid
from finebits.merging.base import Factors
from finebits.merging.svd import shortened
from finebits.rules.base import Rule

Tensors = Mapping[str, Params]  # module -> its tensors by their names in the adapter
NONE: Tensors = types.MappingProxyType({})


class Sent(NamedTuple):
    """What a client sends: the tensors that it has trained, the number of its examples, and the s of its s·B A.

    >>> Sent({"q_proj": {"A": torch.ones(2, 4), "B": torch.ones(3, 2)}}, examples=10).rank
    2
    """

    tensors: Tensors
    examples: int
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(_rank(p) for p in self.tensors.values())


class Server(NamedTuple):
    """What the server holds between two rounds: the tensors that clients start from (none: each draws its own anew), and the residual, factors
    B (m, k) and A (k, n) by module with every scale in them.

    >>> Server({"q_proj": {"B": torch.ones(3, 2)}}).residual
    mappingproxy({})
    """

    tensors: Tensors
    residual: Tensors = NONE


class Aggregated(NamedTuple):
    """The server after a round, and the tensors that every client is sent of it."""

    server: Server
    down: Tensors


class Aggregator(Protocol):
    """A frozen dataclass of hyper-parameters: a pure function of the server and of what the clients sent, in the clients' order."""

    @property
    def adapter(self) -> str:
        """The adapter that clients train, by its name in finebits list --shape adapters."""
        ...

    @property
    def init(self) -> str | None:
        """How it starts where a recipe does not say; None as the recipe has it."""
        ...

    @property
    def sends(self) -> tuple[str, ...]:
        """Its tensors that clients train, and send."""
        ...

    @property
    def linear(self) -> bool:
        """Is the result the mean of what was sent, and nothing else of it? Then one client moves it by its share and no further."""
        ...

    @property
    def ranks(self) -> bool:
        """May clients train adapters of different ranks?"""
        ...

    @property
    def cuts(self) -> bool:
        """Is a client of a lower rank sent its own part alone?"""
        ...

    def rules(self) -> tuple[Rule, ...]:
        """What acts on a client's training."""
        ...

    def kept(self, start: Tensors, trained: Tensors) -> Tensors:
        """What a client sends of what it has trained, from where."""
        ...

    def __call__(self, server: Server, sent: Sequence[Sent]) -> Aggregated: ...


class Usual:
    """LoRAs of one rank, trained and sent as they are, whose factors are averaged. Abstract."""

    adapter: ClassVar[str] = "lora"
    init: ClassVar[str | None] = None
    sends: ClassVar[tuple[str, ...]] = ("A", "B")
    linear: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    cuts: ClassVar[bool] = False

    def rules(self) -> tuple[Rule, ...]:
        return ()

    def kept(self, start: Tensors, trained: Tensors) -> Tensors:
        return trained

    def __call__(self, server: Server, sent: Sequence[Sent]) -> Aggregated:
        check(self, sent)
        averaged = mean(sent, shares(sent))
        return Aggregated(Server(averaged, server.residual), averaged)


def shares(sent: Sequence[Sent]) -> list[float]:
    """pₖ = nₖ / Σ n.

    >>> shares([Sent({}, 1), Sent({}, 3)])
    [0.25, 0.75]
    """
    total = sum(s.examples for s in sent)
    return [s.examples / total for s in sent]


def mean(sent: Sequence[Sent], p: Sequence[float]) -> Tensors:
    """Σ pₖ tₖ of every tensor.

    >>> one, two = (Sent({"q": {"B": torch.full((1, 1), v)}}, 1) for v in (1.0, 4.0))
    >>> mean([one, two], [0.5, 0.5])["q"]["B"]
    tensor([[2.5000]])
    """
    added = lambda of: sum((w * of(s).double() for s, w in zip(sent, p, strict=True)), torch.zeros(())).float()  # noqa: E731
    first = sent[0].tensors
    return {name: {k: added(lambda s, name=name, k=k: s.tensors[name][k]) for k in p_} for name, p_ in first.items()}


def by_module(sent: Sequence[Sent], make: Callable[[str], Params]) -> Tensors:
    """What `make` gives for every module that was trained."""
    return {name: make(name) for name in sent[0].tensors}


def stacked(sent: Sequence[Sent], p: Sequence[float], name: str) -> Factors:
    """Σ pₖ sₖ·Bₖ Aₖ of one module, exactly: [B₁ … B_K] and [p₁s₁·A₁; …].

    >>> one = Sent({"q": {"A": torch.ones(1, 2), "B": torch.ones(2, 1)}}, 1, scale=2.0)
    >>> stacked([one, one], [0.5, 0.5], "q").rank
    2
    """
    B = torch.cat([s.tensors[name]["B"] for s in sent], 1)
    return Factors(B, torch.cat([(w * s.scale * s.tensors[name]["A"].double()).float() for s, w in zip(sent, p, strict=True)]))


def laid(residual: Tensors, new: Tensors, cap: int | None = None) -> Tensors:
    """The residual with another over it: side by side, and where that takes more rank than the matrix has, or than `cap`, in its best triples.

    >>> unit = {"q": {"B": torch.tensor([[1.0], [0.0]]), "A": torch.tensor([[3.0, 0.0]])}}
    >>> both = laid(laid(unit, unit), unit)["q"]
    >>> both["B"].shape, (both["B"] @ both["A"]).round().abs()  # three terms of rank 1 over a 2 x 2 matrix
    (torch.Size([2, 2]), tensor([[9., 0.],
            [0., 0.]]))
    """
    made = dict(residual)
    for name, p in new.items():
        old = residual.get(name)
        B = p["B"] if old is None else torch.cat([old["B"], p["B"]], 1)
        A = p["A"] if old is None else torch.cat([old["A"], p["A"]])
        most = min(B.shape[0], A.shape[1], cap or B.shape[1])
        if B.shape[1] > most:
            B, A, _ = shortened(Factors(B, A), rank=most)[0]
        made[name] = {"B": B, "A": A}
    return made


def cut(tensors: Tensors, rank: int) -> Tensors:
    """The first `rank` rows of A and columns of B; what has no more is left.

    >>> part = cut({"q": {"A": torch.ones(4, 3), "B": torch.ones(2, 4)}}, 1)["q"]
    >>> tuple(part["A"].shape), tuple(part["B"].shape)
    ((1, 3), (2, 1))
    """
    part = {"A": lambda t: t[:rank], "B": lambda t: t[:, :rank], "R": lambda t: t[:rank, :rank]}
    return {name: {k: part[k](t) for k, t in p.items()} for name, p in tensors.items()}


def nbytes(tensors: Tensors) -> int:
    """Of all tensors, as they are sent.

    >>> nbytes({"q": {"A": torch.ones(4, 3), "B": torch.ones(2, 4)}})
    80
    """
    return sum(t.numel() * t.element_size() for p in tensors.values() for t in p.values())


def check(aggregator: Any, sent: Sequence[Sent]) -> None:
    """Raise Invalid unless something was sent, and every client's tensors are those that are to be averaged: of the same modules, names and
    shapes (but for ranks, where these may differ), finite, and of one scale where factors are averaged.

    >>> from finebits.federate.fedavg import FedAvg
    >>> check(FedAvg(), [Sent({"q": {"A": torch.ones(1, 2)}}, 1)])
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: FedAvg averages A and B, and client 0 of the round sent A of q
    """
    who, wanted = type(aggregator).__name__, aggregator.sends
    if not sent:
        raise Invalid(f"{who} has nothing to aggregate: no client sent anything in this round")
    for i, s in enumerate(sent):
        if s.examples < 1:
            raise Invalid(f"client {i} of the round says that it has {s.examples} examples; at least 1 is wanted")
        if s.tensors.keys() != sent[0].tensors.keys():
            odd = sorted(s.tensors.keys() ^ sent[0].tensors.keys())[0]
            raise Invalid(f"client {i} of the round and client 0 trained other modules: one of them lacks {odd}")
        for name, p in s.tensors.items():
            if p.keys() != set(wanted):
                raise Invalid(f"{who} averages {' and '.join(wanted)}, and client {i} of the round sent {' and '.join(p)} of {name}")
            for k, t in p.items():
                theirs = sent[0].tensors[name][k].shape
                free = {"A": 0, "B": 1}.get(k) if aggregator.ranks else None
                if t.ndim != 2 or any(a != b for d, (a, b) in enumerate(zip(t.shape, theirs, strict=False)) if d != free):
                    more = "" if aggregator.ranks else ": clients of different ranks are for flora and hetlora"
                    raise Invalid(f"{k} of {name} is {tuple(t.shape)} from client {i} of the round and {tuple(theirs)} from client 0{more}")
                if not bool(t.isfinite().all()):
                    raise Invalid(f"client {i} of the round sent {k} of {name} with numbers that are not finite: leave it out of the round")
        if not math.isclose(s.scale, sent[0].scale) and not exact_in_scale(aggregator):
            raise Invalid(
                f"{who} averages factors, and clients have scales s of {sent[0].scale:g} and {s.scale:g}: give them one, or take flora"
            )


def exact_in_scale(aggregator: Any) -> bool:
    """Does it take every client's own scale into the product? What starts clients anew does."""
    return aggregator.ranks and not aggregator.cuts


def frobenius(B: Float[Tensor, "m r"], A: Float[Tensor, "r n"]) -> float:
    """‖B A‖, of r × r matrices.

    >>> frobenius(torch.ones(3, 1), torch.ones(1, 3))
    3.0
    """
    return math.sqrt(max(float(((B.double().mT @ B.double()) * (A.double() @ A.double().mT)).sum()), 0.0))


def _rank(p: Params) -> int:
    return p["A"].shape[0] if "A" in p else next(iter(p.values())).shape[1]
