"""What low-rank adapters share: rank and alpha, the scale between them, and the weight that L R is added to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters.base import Layer, Params, check_scale
from finebits.qtensor import dense


class Scaled:
    """An update of rank `rank` in front of which stands s, with nothing that is drawn anew from a seed. Abstract."""

    rank: int
    alpha: float
    admits: ClassVar[frozenset[str] | None] = None
    product: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_scale(self.rank, self.alpha)

    @property
    def s(self) -> float:
        """The factor in front of the product: α/r."""
        return self.alpha / self.rank

    def buffers(self, base: Layer, gen: Generator) -> Params:
        return {}


class LowRank(Scaled, ABC):
    """An update that is one product. Abstract."""

    product: ClassVar[bool] = True

    @abstractmethod
    def lowrank(self, p: Params) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
        """The update as a plain product L R: what exporters write."""

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        L, R = self.lowrank(p)
        return dense(W) + L @ R
