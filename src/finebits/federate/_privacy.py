"""Differential privacy of clients: what each sends is clipped where it is averaged, noise is added to the sum, and an accountant says what it
comes to.

Clients are what is protected: two runs are neighbours if one has a client more. With q the chance of a client to take part, K clients and
updates uₖ = what was sent − what it started from, as one vector over all tensors (McMahan et al., ICLR 2018, arXiv:1710.06963):

    start + (Σ min(1, C/‖uₖ‖)·uₖ + N(0, (zC)² I)) / (qK)

All clients weigh alike and the divisor is fixed, whoever took part or fell out: one client moves the sum by C at most. Rounds are composed in
Rényi differential privacy of the sampled Gaussian mechanism (Mironov, Talwar, Zhang, 2019, arXiv:1908.10530), integer orders a:

    RDP(a) = 1/(a−1) · log Σ_{k≤a} C(a,k) (1−q)^{a−k} q^k exp(k(k−1)/(2z²)),
    ε = min_a  T·RDP(a) + log((a−1)/a) − (log δ + log a)/(a−1)        (Balle et al., AISTATS 2020, arXiv:1905.09982)

The noise is drawn from the run's seed, so that rounds can be made again: whoever knows the seed knows the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from finebits.errors import Invalid
from finebits.federate.base import Aggregated, Sent, Server, Tensors, check

ORDERS = range(2, 257)


class Privacy(NamedTuple):
    """C, the longest update of a client; z, the noise in multiples of C; and the chance q of a client to take part.

    >>> Privacy(clip=1.0, noise=2.0).std(clients=10)  # of every number of the mean
    0.2
    """

    clip: float
    noise: float
    q: float = 1.0

    def std(self, clients: int) -> float:
        return self.noise * self.clip / (self.q * clients)


def checked(aggregator: Any, privacy: Privacy) -> None:
    """Raise Invalid where noise on the mean would not cover what the aggregator gives away.

    >>> from finebits.federate.flora import FLoRA
    >>> checked(FLoRA(), Privacy(1.0, 1.0))
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: FLoRA tells more of a client than its share of a mean does: take fedavg, ffa_lora or fed_sb
    """
    if not (privacy.clip > 0 and privacy.noise >= 0 and 0 < privacy.q <= 1):
        raise Invalid(f"clip is {privacy.clip}, noise {privacy.noise}, the share of clients {privacy.q}: the first and last are above 0")
    if not aggregator.linear:
        raise Invalid(f"{type(aggregator).__name__} tells more of a client than its share of a mean does: take fedavg, ffa_lora or fed_sb")


def clipped(start: Tensors, sent: Tensors, clip: float) -> tuple[dict[str, dict[str, Tensor]], float]:
    """(min(1, C/‖u‖)·u for u = sent − start over all tensors together, float64; ‖u‖).

    >>> u, norm = clipped({"q": {"R": torch.zeros(1, 2)}}, {"q": {"R": torch.tensor([[3.0, 4.0]])}}, clip=1.0)
    >>> u["q"]["R"], norm
    (tensor([[0.6000, 0.8000]], dtype=torch.float64), 5.0)
    """
    u = {name: {k: t.double() - start[name][k].double() for k, t in p.items()} for name, p in sent.items()}
    norm = math.sqrt(sum(float(t.square().sum()) for p in u.values() for t in p.values()))
    by = min(1.0, clip / norm) if norm > 0 else 1.0
    return {name: {k: by * t for k, t in p.items()} for name, p in u.items()}, norm


def private(aggregator: Any, server: Server, sent: Sequence[Sent], privacy: Privacy, clients: int, gen: Generator) -> Aggregated:
    """The mean of clipped updates with noise, in place of what the aggregator makes of them. Raises Invalid as `checked` does.

    >>> from finebits.federate.fedavg import FedAvg
    >>> start = {"q": {"A": torch.zeros(1, 1), "B": torch.zeros(1, 1)}}
    >>> one = Sent({"q": {"A": torch.full((1, 1), 3.0), "B": torch.full((1, 1), 4.0)}}, 100)
    >>> private(FedAvg(), Server(start), [one], Privacy(1.0, 0.0), clients=2, gen=torch.Generator()).server.tensors["q"]["B"]  # .8 / 2
    tensor([[0.4000]])
    """
    checked(aggregator, privacy)
    if sent:
        check(aggregator, sent)
    updates = [clipped(server.tensors, s.tensors, privacy.clip)[0] for s in sent]
    std = privacy.std(clients)

    def moved(name: str, k: str, t: Tensor) -> Tensor:
        total = sum((u[name][k] for u in updates), torch.zeros(t.shape, dtype=torch.float64))
        noise = std * torch.randn(t.shape, generator=gen, dtype=torch.float64)
        return (t.double() + total / (privacy.q * clients) + noise).float()

    made = {name: {k: moved(name, k, t) for k, t in p.items()} for name, p in server.tensors.items()}
    return Aggregated(Server(made, server.residual), made)


def rdp(order: int, noise: float, q: float) -> float:
    """Rényi divergence of this order of one round.

    >>> rdp(2, noise=1.0, q=1.0)  # a/(2z²)
    1.0
    """
    if q == 0:
        return 0.0
    if q == 1:
        return order / (2 * noise**2)
    log = [
        math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * noise**2)
        for k in range(order + 1)
    ]  # fmt: skip
    most = max(log)
    return (most + math.log(sum(math.exp(v - most) for v in log))) / (order - 1)


def epsilon(noise: float, rounds: int, delta: float, q: float = 1.0) -> float:
    """ε of (ε, δ) after so many rounds; infinite without noise.

    >>> round(epsilon(noise=10.0, rounds=100, delta=1e-5), 2)
    4.75
    """
    if not 0 < delta < 1:
        raise Invalid(f"delta is {delta}; it is a chance, far below 1 over the number of clients")
    if noise == 0:
        return math.inf
    bounds = (rounds * rdp(a, noise, q) + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in ORDERS)
    return max(min(bounds), 0.0)


def noise_for(wanted: float, rounds: int, delta: float, q: float = 1.0) -> float:
    """The least noise, to a thousandth, with which so many rounds come to ε at most.

    >>> z = noise_for(3.0, rounds=10, delta=1e-5)
    >>> epsilon(z, 10, 1e-5) <= 3.0 < epsilon(0.99 * z, 10, 1e-5)
    True
    """
    if not wanted > 0:
        raise Invalid(f"epsilon is {wanted}; it must be positive")
    low, high = 0.0, 1.0
    while epsilon(high, rounds, delta, q) > wanted:
        low, high = high, 2 * high
        if high > 1e6:
            raise Invalid(f"no noise brings {rounds} rounds to epsilon {wanted:g} at delta {delta:g} by orders up to {ORDERS[-1]}")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if epsilon(middle, rounds, delta, q) > wanted else (low, middle)
    return high
