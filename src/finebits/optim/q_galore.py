"""Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients.  Zhang et al., 2024.  arXiv:2407.08296v1.
Use it in place of galore over weights of 8 bits that train without a dense copy, or where the time of its searches counts.

As GaLore, but that P is held in 4 bits (groups of 256, the least and largest of a group and zero on the grid), and that each weight has a
gap T of its own. Each search compares the new basis P with the last one, P':

    c = ‖P'ᵀ P‖² / r,    T ← 2 T where the mean of the last five is 0.4 or more        (section 3.2)

The weights are trained where they are, in codes of 8 bits rounded at random without bias: that is what an adapter of kind full does with a
weight in codes, and no part of an optimizer.

Deviations: c is the overlap of two subspaces, corrected for chance, (c − r/s) / (1 − r/s): the authors' code takes the cosine of the first
vectors, which the sign of a vector turns. T counts from the last search, and ends at `longest`. Codes are packed, two a byte; the authors'
code has one a byte. P is found as galore's is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits import registry
from finebits.errors import Invalid
from finebits.formats.base import Format
from finebits.optim._projected import Search, Transformed, due, leading, project, proxy, thin
from finebits.optim._shell import State, Thin
from finebits.optim.base import Optimizer
from finebits.qtensor import QTensor
from finebits.quantizers._family import plain

GROUP = 256  # numbers of P under one scale


@dataclass(frozen=True)
class QGaLore(Transformed):
    """`bits` of P, or None for float32; `gap`, the first T, is doubled where `queue` overlaps are `threshold` in the mean, and then these begin
    anew, unless `clear` is false. All else is as in GaLore; `inner` has moments of 8 bits, as in the paper (torchao's).

    >>> QGaLore(rank=8, inner="adamw").matrix(64, 96)  # bytes: moments of 8 x 96, a basis of 64 x 8 in 4 bits, five overlaps
    6430
    >>> W = torch.nn.Parameter(torch.zeros(2, 3))
    >>> W.grad = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    >>> QGaLore(rank=1, scale=1.0, inner="sgd").make([W], lr=1.0).step()
    >>> W.data.round(decimals=3)
    tensor([[ 0.,  0.,  0.],
            [-1., -2., -3.]])
    """

    rank: int = 128
    gap: int = 200
    scale: float = 0.25
    bits: int | None = 4
    threshold: float = 0.4
    queue: int = 5
    clear: bool = True
    longest: int = 10_000
    search: Search = "randomised"
    inner: str | Optimizer = "adamw_torch_8bit"
    layerwise: bool = False
    label: ClassVar[str] = "Q-GaLore"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queue < 1 or self.longest < self.gap:
            raise Invalid(
                f"QGaLore needs a queue of 1 or more and longest of gap or more; got {self.queue}, {self.longest} and a gap of {self.gap}"
            )
        self.format  # what no format of integers has is refused by it

    @property
    def format(self) -> Format | None:
        """How P is held, as one row."""
        if self.bits is None:
            return None
        return registry.load("formats", "int")(self.bits, block=GROUP, symmetric=False, variant="integer")

    def before(self, G: Float[Tensor, "m n"], state: State) -> Tensor:
        if self.rank < min(G.shape) and due(G, state, state.get("gap", self.gap), "P" if self.bits is None else "P.codes"):
            old = self.held(min(G.shape), state)
            new = leading(G, self.rank, self.search, old, state)
            self.adapt(old, new, state)
            state |= {"P": new} if self.format is None else {f"P.{k}": v for k, v in plain(new.reshape(1, -1), self.format).parts.items()}
        state["decoded"] = self.held(min(G.shape), state)  # until `after`
        return project(G, state["decoded"])

    def after(self, N: Tensor, G: Float[Tensor, "m n"], state: State) -> Float[Tensor, "m n"] | Thin:
        return thin(N, state.pop("decoded"), G, self.scale)

    def held(self, s: int, state: State) -> Float[Tensor, "s r"] | None:
        """P as it is decoded; None where there is none."""
        if self.format is None or "P.codes" not in state:
            return state.get("P")
        parts = {k.removeprefix("P."): v for k, v in state.items() if k.startswith("P.")}
        return QTensor(parts, self.format, (1, s * self.rank)).dequantize().reshape(s, self.rank)

    def adapt(self, old: Tensor | None, new: Float[Tensor, "s r"], state: State) -> None:
        """Take note of the overlap, and look more seldom where bases stay."""
        if old is None:
            state |= {"gap": self.gap, "overlaps": torch.zeros(self.queue), "noted": 0}
            return
        chance = self.rank / len(new)
        state["overlaps"][state["noted"] % self.queue] = (float((old.mT @ new).square().sum()) / self.rank - chance) / (1 - chance)
        state["noted"] += 1
        if state["noted"] >= self.queue and float(state["overlaps"].mean()) >= self.threshold:
            state["gap"] = min(2 * state["gap"], self.longest)
            state["noted"] = 0 if self.clear else state["noted"]

    def matrix(self, m: int, n: int) -> int:
        inner, numbers = self.within.matrix(*proxy(m, n, self.rank)), min(m, n) * self.rank
        if self.rank >= min(m, n):
            return inner
        return inner + 4 * self.queue + (4 * numbers if self.format is None else self.format.storage_bits(1, numbers) // 8)
