"""What a refinement is: it moves adapters (or vectors, scales, weights) of a quantized part so that the part does what it did unquantized.

The part is a block or the whole model, which only the caller knows. All else stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from finebits.refine._words import WordedWeight


class Matching(NamedTuple):
    """Batch number -> states (b, t, h) of ours, which depend on `tensors` and `scales`, and of theirs, which are the goal.

    `tensors` are adapters or vectors, as the refinement moves; `scales` what the scales (or clips) of the quantized weights are moved by
    (finebits.refine._scales), none where it leaves them alone; weights that learn themselves are among the tensors, and those in words of
    codebooks, whose codes it may move, are `words`. `keep` gives the positions (b, t) that count, None for all. `head` makes
    outputs (p, v) of states (p, h), and `learned` those of the states (p, h) of a batch at which its rows say what follows, and that (p,); None
    where the part is a block.

    >>> matching = Matching(ours=lambda i: torch.zeros(1, 3, 2), theirs=lambda i: torch.ones(1, 3, 2), tensors=[], batches=4)
    >>> matching.ours(0).shape, matching.keep(0) is None  # every position counts
    (torch.Size([1, 3, 2]), True)
    """

    ours: Callable[[int], Float[Tensor, "b t h"]]
    theirs: Callable[[int], Float[Tensor, "b t h"]]
    tensors: Sequence[nn.Parameter]
    batches: int
    keep: Callable[[int], Bool[Tensor, "b t"] | None] = lambda batch: None
    head: Callable[[Tensor], Tensor] | None = None
    learned: Callable[[int, Tensor], tuple[Float[Tensor, "p h"], Int[Tensor, " p"]]] | None = None
    scales: Sequence[nn.Parameter] = ()
    words: Sequence[WordedWeight] = ()


@runtime_checkable
class Refine(Protocol):
    """A frozen dataclass of settings with this call, which returns its loss at every step."""

    scope: ClassVar[Literal["block", "model"]]
    # "vectors": biases and gains of norms; "scales": those of quantized weights; "clips": what weights are clipped at before they are rounded
    # to nearest, and "weights" themselves, where scope is "block"; "words": codes and words of codebooks
    moves: ClassVar[frozenset[str]] = frozenset({"adapters"})

    def __call__(self, matching: Matching) -> list[float]: ...
