"""An adapter that is applied and never trained: what an initialiser took out of a base that it may not touch.

A base that is quantized already keeps its codes; the move −L R lies over them as a frozen term, and the trained adapter over that.
Dropout passes it by: it is a part of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters.base import Form, Layer, Params, Place, Role, identity
from finebits.errors import Invalid


@dataclass(frozen=True)
class Frozen:
    """`inner` with tensors that stay as they were given."""

    inner: Any

    @property
    def own(self) -> str:
        return "zeros"

    @property
    def admits(self) -> frozenset[str]:
        """None: it is given whole."""
        return frozenset()

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def form(self) -> Form:
        return self.inner.form

    @property
    def over(self) -> Place:
        return self.inner.over

    @property
    def shared(self) -> frozenset[str]:
        """None: a term is one weight's own."""
        return frozenset()

    @property
    def itself(self) -> bool:
        return False

    @property
    def roles(self) -> frozenset[Role] | None:
        return self.inner.roles

    def in_role(self, roles: frozenset[Role]) -> Frozen:
        return self

    @property
    def needs(self) -> frozenset[Any]:
        """Nothing: it is given whole."""
        return frozenset()

    @property
    def drops(self) -> bool:
        """Dropout passes it by."""
        return True

    @property
    def frozen(self) -> frozenset[str]:
        """All of its tensors."""
        return frozenset(self.inner.shapes(1, 1))

    @property
    def kept(self) -> frozenset[str]:
        return self.inner.kept

    def packed(self, p: Params) -> Params:
        return self.inner.packed(p)

    def unpacked(self, p: Params, m: int, n: int) -> Params:
        return self.inner.unpacked(p, m, n)

    def at(self, module: str) -> Frozen:
        return self

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        own = self.inner.params(base, gen, start)
        missing = [k for k in own if k not in start]
        if missing:
            raise Invalid(f"a frozen term is given whole, and {missing[0]!r} is missing")
        return own

    def buffers(self, base: Layer, gen: Generator) -> Params:
        return self.inner.buffers(base, gen)

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        return self.inner.forward(p, x, base._replace(drop=identity))

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return self.inner.merged(p, W)

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        """The term as a plain product L R."""
        return self.inner.lowrank(p)

    def bias(self, p: Params, b: Tensor | None) -> Tensor | None:
        return self.inner.bias(p, b)

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return self.inner.shapes(m, n)

    def size(self, m: int, n: int) -> int:
        return 0

    def stored(self, m: int, n: int) -> int:
        return self.inner.size(m, n) + self.inner.stored(m, n)

    def common(self, m: int, n: int) -> tuple[int, int]:
        return 0, 0
