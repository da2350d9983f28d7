"""The best of several starts, matrix by matrix: a choice, not a paper.

    argmin over candidates c of  E ‖(Q_c + ΔW_c − W) x‖² = tr (Q_c + ΔW_c − W) R (Q_c + ΔW_c − W)ᵀ,    R = E x xᵀ over calibration tokens

ΔW_c is what the adapter adds at the start. The quantized weight with nothing added (init zeros) is always among the candidates, and is kept
unless another has a smaller error. `choose` gives the whole table and the call uses it, so that a report can ask for the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from finebits import registry
from finebits.adapters.base import Base, Params
from finebits.init import _family as family
from finebits.init.base import Init, Quantize
from finebits.qtensor import dense
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.gram import Gram

USUAL = ("loftq", "lq_lora", "qera", "caldera")


class Choice(NamedTuple):
    """Candidates with their output errors in the order tried, zeros first (its init is None), and the start of the one with the least.

    >>> Choice(((None, 0.5), (fb.LoftQ(), 0.25)), 1, torch.ones(1, 1), {}).share
    0.5
    """

    tried: tuple[tuple[Any, float], ...]
    best: int
    base: Tensor
    start: Params

    @property
    def share(self) -> float:
        """The best error as a share of that of quantizing alone."""
        return self.tried[self.best][1] / self.tried[0][1] if self.tried[0][1] > 0 else 1.0

    def to_json(self) -> dict[str, Any]:
        """What a report says of it: every candidate with its error, which one won, and its error as a share of zeros'.

        >>> Choice(((None, 0.5), (fb.QPiSSA(), 0.75)), 0, torch.ones(1, 1), {}).to_json()["tried"][0]
        {'init': {'paper': 'zeros'}, 'error': 0.5}
        """
        tried = [{"init": registry.to_json(init) or {"paper": "zeros"}, "error": error} for init, error in self.tried]
        return {"tried": tried, "won": self.best, "share": self.share}


@dataclass(frozen=True)
class Auto(Init):
    """`candidates` are initialisers, or their names; none given, those of LoftQ, LQ-LoRA, QERA and CALDERA with their defaults.

    >>> gram = fb.Gram()
    >>> gram.add(torch.eye(2))  # R = 1/2 on the diagonal
    >>> W = torch.tensor([[1.4, 0.0], [0.0, 1.3]])
    >>> choice = fb.Auto(("loftq",)).choose(W, fb.LoRA(rank=1, alpha=1), torch.round, {fb.Gram: gram})
    >>> [round(error, 4) for _, error in choice.tried]  # (.4² + .3²)/2 with nothing added, .3²/2 after LoftQ
    [0.125, 0.045]
    """

    candidates: tuple[Any, ...] = field(default=())
    chooses: ClassVar[bool] = True
    moves: ClassVar[bool] = False  # where nothing is quantized, nothing is lost by zeros

    def __post_init__(self) -> None:
        candidates = self.candidates or USUAL
        methods = (registry.from_json("init", c) if isinstance(c, (str, dict)) else c for c in candidates)
        object.__setattr__(self, "candidates", tuple(methods))

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Those of every candidate, and the Gram matrix to judge them by.

        >>> fb.Auto(("loftq",)).needs == {fb.Gram}
        True
        """
        return frozenset({Gram}).union(*(c.needs for c in self.candidates))

    @property
    def exact(self) -> bool:
        """Whether every candidate is.

        >>> fb.Auto(("loftq", "qera")).exact
        True
        """
        return all(c.exact for c in self.candidates)

    def choose(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> Choice:
        """Try every candidate. Raises ValueError where one cannot serve this adapter or lacks its statistics."""
        W, R = W.float(), need(stats, Gram, "Auto").to(W.device)
        family.check_gram(R, W)

        def error(base: Tensor, start: Params) -> float:
            D = dense(base, torch.float32) - W
            if start:
                tensors = adapter.params(Base(base), torch.Generator().manual_seed(0), start)
                D = adapter.merged({k: v.to(W.device) for k, v in tensors.items()}, dense(base, torch.float32)) - W
            return float((D.double() @ R.double() * D).sum())

        best, base, start = 0, quantize(W), Params()
        tried: list[tuple[Any, float]] = [(None, error(base, start))]
        for i, init in enumerate(self.candidates, 1):
            trial_base, trial_start = init(W, adapter, quantize, stats)
            tried.append((init, error(trial_base, trial_start)))
            if tried[i][1] < tried[best][1]:
                best, base, start = i, trial_base, trial_start
        return Choice(tuple(tried), best, base, start)

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        choice = self.choose(W, adapter, quantize, stats)
        return choice.base, choice.start
