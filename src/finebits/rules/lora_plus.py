"""LoRA+: Efficient Low Rank Adaptation of Large Models.  Hayou, Ghosh & Yu, ICML 2024.  arXiv:2402.12354v2.
Use it with lora at width: at equal rates B learns too slowly.

    η_B = λ η_A,    λ ≫ 1

η_A is the run's learning rate, with its schedule and with the factors of other rules.
Deviations: none. (PEFT's helper also raises the rate of every tensor of one dimension, of which the paper says nothing.)
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Across, Rule, Run


class LoRAPlus(Rule):
    """`ratio` is λ.

    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(2, 2)), fb.Plan({"0": fb.Spec(adapter=fb.LoRA(rank=1))}))
    >>> hosts = dict(fb.hosts(model))
    >>> factors = fb.LoRAPlus(ratio=16.0).factors(fb.Run(model, hosts))
    >>> factors[hosts["0"].p["default"]["B"]], len(factors)
    ({'lr': 16.0}, 1)
    """

    null: ClassVar[dict[str, Any]] = {"ratio": 1.0}
    across: ClassVar[Across] = "rows"
    needs: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    def __init__(self, ratio: float = 16.0) -> None:
        if not ratio > 0:
            raise Invalid(f"LoRAPlus needs a ratio above 0; got {ratio}")
        self.ratio = ratio

    def factors(self, run: Run) -> dict[nn.Parameter, dict[str, float]]:
        return {p["B"]: {"lr": self.ratio} for p in family.tensors(run, self).values()}
