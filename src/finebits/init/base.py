"""What an initialiser is: given W, what is frozen, and where does the adapter start?

It returns the base (quantized, dense, or moved) and the adapter's starting parameters; the adapter completes what is missing. `quantize` is
the module's own quantizer and format, or the identity. Arithmetic is float32. Over a base that is quantized already `quantize` is the
identity, and build lays what was moved over the untouched codes. `needs` and `moves` may be properties where they depend on the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters.base import Params
from finebits.stats.base import Statistic, Stats

Quantize = Callable[[Tensor], Tensor]


@runtime_checkable
class Init(Protocol):
    """A frozen dataclass of settings with this call."""

    needs: ClassVar[frozenset[type[Statistic]]]
    exact: ClassVar[bool]  # does base + adapter reproduce W when quantize is the identity?
    moves: ClassVar[bool]  # is the base something else than W when quantize is the identity?
    # for_training: ClassVar[bool] = True  where the start is chosen for training's sake, whatever quantizing the base then loses
    # draws: ClassVar[bool] = True  where the call takes a generator of the module's own randomness as a fifth argument

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]: ...


def begin(init: Init, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats, gen: Generator) -> tuple[Tensor, Params]:
    """The call, with `gen` for those that draw."""
    return init(W, adapter, quantize, stats, *([gen] if getattr(init, "draws", False) else []))
