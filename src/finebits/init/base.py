"""What an initialiser is: given W, what is frozen, and where does the adapter start?

It returns the base (quantized, dense, or moved) and the adapter's starting parameters; the adapter completes what is missing. `quantize` is
the module's own quantizer and format, or the identity. Arithmetic is float32. Over a base that is quantized already `quantize` is the
identity, and build lays what was moved over the untouched codes. `needs` and `moves` may be properties where they depend on the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters.base import Base, Params
from finebits.errors import Invalid
from finebits.stats.base import Statistic, Stats

Quantize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BoundQuantizer:
    """A module's quantizer with its format and the statistics of its inputs: the `quantize` that initialisers are given.

    >>> BoundQuantizer(fb.RTN(), fb.Int(4), {})(torch.tensor([[7.0, 1.2]])).dequantize()
    tensor([[7., 1.]])
    """

    quantizer: Any
    format: Any
    stats: Stats

    def __call__(self, V: Tensor) -> Tensor:
        return self.quantizer(V, self.format, self.stats)

    def smoothed(self, lam: Float[Tensor, " n"]) -> BoundQuantizer:
        """The same where the inputs are divided by λ.

        >>> square = fb.MeanSquare()
        >>> square.add(torch.tensor([[4.0, 2.0]]))
        >>> BoundQuantizer(fb.RTN(), fb.Int(4), {fb.MeanSquare: square}).smoothed(torch.tensor([2.0, 1.0])).stats[fb.MeanSquare].value()
        tensor([4., 4.])
        """
        return replace(self, stats={S: s.smoothed(lam) for S, s in self.stats.items()})


@runtime_checkable
class Init(Protocol):
    """A frozen dataclass of settings with this call."""

    needs: ClassVar[frozenset[type[Statistic]]]
    exact: ClassVar[bool]  # does base + adapter reproduce W when quantize is the identity?
    moves: ClassVar[bool]  # is the base something else than W when quantize is the identity?
    for_training: ClassVar[bool] = False  # is it chosen for training's sake, whatever quantizing the base then loses?
    draws: ClassVar[bool] = False  # does the call take a generator of the module's own randomness as a fifth argument?
    chooses: ClassVar[bool] = False  # does it start as the best of others would, and say by `choose` which?

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]: ...


def check_start(adapter: Any, init: Init) -> None:
    """Raise unless `adapter` admits `init`: by name where it lists them, and by starting a small weight, since only tensors that it has can
    be started.

    >>> check_start(fb.LoRA(rank=8), fb.LoftQ())
    >>> check_start(fb.LoLDU(), fb.LoftQ())
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: LoLDU starts from factors of its own, and init loftq gives it others: leave init out, or take zeros
    """
    name, who = type(init).__module__.rpartition(".")[2], type(adapter).__name__
    if adapter.admits is not None and name not in adapter.admits:
        known = " or ".join(sorted(adapter.admits))
        raise Invalid(f"{who} starts from factors of its own, and init {name} gives it others: leave init out, or take {known}")
    if name == "zeros":  # which starts no tensor
        return
    gen = torch.Generator().manual_seed(0)
    small, base, start = _tried(adapter, init, torch.eye(2), lambda V: V, gen)
    try:
        small.params(Base(base), gen, start)
    except ValueError as e:
        raise Invalid(f"{who} cannot take init {name}: {e}") from None


def rounds_the_weight(adapter: Any, init: Init) -> bool:
    """Is the weight itself what `init` has quantized, and not what is left of it beside the adapter?

    >>> rounds_the_weight(fb.LoRA(rank=1), fb.Zeros()), rounds_the_weight(fb.LoRA(rank=1), fb.LoftQ())  # what is left beside the adapter
    (True, False)
    """
    W, untouched = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), list[bool]()

    def quantize(V: Tensor) -> Tensor:
        untouched.append(torch.equal(V, W))
        return V.round()

    _tried(adapter, init, W, quantize, torch.Generator().manual_seed(0))
    return all(untouched)


def _tried(adapter: Any, init: Init, W: Float[Tensor, "m n"], quantize: Quantize, gen: Generator) -> tuple[Any, Tensor, Params]:
    """The adapter at rank 1, and a small weight started with it."""
    small = replace(adapter, rank=1) if adapter.rank else adapter
    stats = {S: S() for S in init.needs}
    for statistic in stats.values():
        statistic.add(torch.eye(len(W)), torch.eye(len(W)))
    return small, *begin(init, W, small, quantize, stats, gen)


def begin(init: Init, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats, gen: Generator) -> tuple[Tensor, Params]:
    """The call, with `gen` for those that draw.

    >>> gen = torch.Generator().manual_seed(0)
    >>> begin(fb.Zeros(), torch.tensor([[1.4, -0.6]]), fb.LoRA(rank=1), torch.round, {}, gen)
    (tensor([[1., -1.]]), {})
    """
    return init(W, adapter, quantize, stats, *([gen] if init.draws else []))
