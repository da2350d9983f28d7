"""What adapters are unless they say otherwise, and what low-rank ones share: rank and alpha, the scale between them, and the weight that L R is
added to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from finebits.adapters._product import product
from finebits.adapters.base import Form, Layer, Params, Place, Role, check_scale, complete
from finebits.qtensor import dense
from finebits.stats.base import Statistic


class Usual(ABC):
    """Trained whole, born by itself, of no rank, with nothing drawn anew from a seed and nothing that hosts hold together. Abstract."""

    own: ClassVar[str] = "zeros"
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})
    frozen: ClassVar[frozenset[str]] = frozenset()
    shared: ClassVar[frozenset[str]] = frozenset()
    kept: ClassVar[frozenset[str]] = frozenset()
    form: ClassVar[Form] = "weight"
    over: ClassVar[Place] = "matrix"
    roles: ClassVar[frozenset[Role] | None] = None
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    drops: ClassVar[bool] = True
    itself: ClassVar[bool] = False

    def in_role(self, roles: frozenset[Role]) -> Any:
        return self

    def at(self, module: str) -> Any:
        return self

    def packed(self, p: Params) -> Params:
        return p

    def unpacked(self, p: Params, m: int, n: int) -> Params:
        return p

    def buffers(self, base: Any, gen: Generator) -> Params:
        return {}

    def bias(self, p: Params, b: Tensor | None) -> Tensor | None:
        return b

    @abstractmethod
    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        """Of all tensors over an (m, n) weight."""

    def size(self, m: int, n: int) -> int:
        return self._count(m, n, lambda k: k not in self.frozen)

    def stored(self, m: int, n: int) -> int:
        return self._count(m, n, lambda k: k in self.frozen)

    def common(self, m: int, n: int) -> tuple[int, int]:
        trained, still = self.shared - self.frozen, self.shared & self.frozen
        return self._count(m, n, lambda k: k in trained), self._count(m, n, lambda k: k in still)

    def _count(self, m: int, n: int, wanted: Callable[[str], bool]) -> int:
        return sum(math.prod(shape) for k, shape in self.shapes(m, n).items() if wanted(k))


class Product(Usual):
    """An update that is one product. Abstract."""

    form: ClassVar[Form] = "product"

    @abstractmethod
    def lowrank(self, p: Params) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
        """The update as a plain product L R: what exporters write."""

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        L, R = self.lowrank(p)
        return dense(W) + L @ R

    def rows(self, p: Params, ids: Int[Tensor, "*t"], E: Float[Tensor, "*t n"]) -> Float[Tensor, "*t n"]:
        L, R = self.lowrank(p)
        return E + F.embedding(ids, L) @ R


class Scaled(Usual):
    """An update of rank `rank` in front of which stands s. Abstract."""

    rank: int
    alpha: float
    admits: ClassVar[frozenset[str] | None] = None

    def __post_init__(self) -> None:
        check_scale(self.rank, self.alpha)

    @property
    def s(self) -> float:
        """The factor in front of the product: α/r."""
        return self.alpha / self.rank


class LowRank(Scaled, Product):
    """A product in front of which stands s. Abstract."""


class Pair(LowRank):
    """s·B A, born with B = 0 and A uniform in ±1/√n. Abstract."""

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        A = (torch.rand(self.rank, n, generator=gen) * 2 - 1) / math.sqrt(n)
        return complete({"A": A, "B": torch.zeros(m, self.rank)}, start, type(self).__name__)

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        return product(x, p["A"], p["B"], self.s, base)

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        return self.s * p["B"], p["A"]

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank)}
