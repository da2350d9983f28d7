"""What a statistic is: a monoid over a stream of layer inputs x and output gradients ∂L/∂y.

`add` takes what one layer saw in one pass, `merge` joins two streams (ranks, resumed runs, caches), `value` is the result. The state is
plain tensors, so any statistic can be written to disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid


class Statistic(ABC):
    """Abstract. `tokens` is how many rows were seen.

    >>> one, other = fb.MeanSquare(), fb.MeanSquare()
    >>> one.add(torch.tensor([[1.0, 2.0]]))
    >>> other.add(torch.tensor([[3.0, 0.0]]))
    >>> one.merge(other).value()  # of both tokens
    tensor([5., 2.])
    """

    backward: ClassVar[bool] = False  # does it need ∂L/∂y?

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    @abstractmethod
    def term(self, x: Float[Tensor, "t n"], g: Float[Tensor, "t m"] | None) -> Tensor:
        """What t tokens contribute to the running sum, in float32 and in memory of its own."""

    def add(self, x: Float[Tensor, "t n"], g: Float[Tensor, "t m"] | None = None) -> None:
        """Take in t tokens: inputs x and, if `backward`, the gradients g of the summed loss with respect to the outputs.

        >>> gram = fb.Gram()
        >>> gram.add(torch.ones(5, 2))
        >>> gram.tokens
        5
        """
        term = self.term(x, g)
        self.total = term if self.total is None else self.total.add_(term)
        self.tokens += x.shape[0]

    def merge(self, other: Statistic) -> Statistic:
        """The statistic of both streams.

        >>> one, other = fb.Gram(), fb.Gram()
        >>> one.add(torch.ones(5, 2))
        >>> other.add(torch.ones(3, 2))
        >>> one.merge(other).tokens
        8
        """
        out = type(self)()
        totals = [s.total for s in (self, other) if s.total is not None]
        out.total = None if not totals else totals[0].clone() if len(totals) == 1 else totals[0] + totals[1]
        out.tokens = self.tokens + other.tokens
        return out

    def smoothed(self, lam: Float[Tensor, " n"]) -> Statistic:
        """The statistic of the inputs x / λ and of a weight whose columns were multiplied by λ.

        >>> square = fb.MeanSquare()
        >>> square.add(torch.tensor([[4.0, 2.0]]))
        >>> square.smoothed(torch.tensor([2.0, 1.0])).value()  # of the inputs 4/2 and 2
        tensor([4., 4.])
        """
        out = type(self)()
        out.total = None if self.total is None else self.divided(self.total, lam.to(self.total.device))
        out.tokens = self.tokens
        return out

    @abstractmethod
    def divided(self, total: Tensor, lam: Float[Tensor, " n"]) -> Tensor:
        """The running sum had the inputs been x / λ."""

    def value(self) -> Tensor:
        """The mean over tokens.

        >>> fb.Gram().value()
        Traceback (most recent call last):
            ...
        finebits.errors.Invalid: Gram has seen no tokens
        """
        if self.total is None or self.tokens == 0:
            raise Invalid(f"{type(self).__name__} has seen no tokens")
        return self.total / self.tokens


Stats = Mapping[type[Statistic], Statistic]


def need(stats: Stats, wanted: type[Statistic], who: str) -> Tensor:
    """The value of a statistic that `who` cannot do without; a missing one is an error, never a default.

    >>> need({}, fb.Gram, "GPTQ")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: GPTQ needs Gram and the statistics hold nothing. Run collect(model, batches, loss, needs(plan)).
    """
    if wanted not in stats:
        present = ", ".join(sorted(s.__name__ for s in stats)) or "nothing"
        raise Invalid(f"{who} needs {wanted.__name__} and the statistics hold {present}. Run collect(model, batches, loss, needs(plan)).")
    return stats[wanted].value()
