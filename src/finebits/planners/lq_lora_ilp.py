"""LQ-LoRA's mixed quantization strategy (section 3.2).  Guo et al., ICLR 2024.  arXiv:2311.12023v4.

Every matrix i takes one configuration c = (b, b0, b1, B0, B1): NF(b) codes in blocks of B0, their scales in b0 bits above the least of them
under groups of B1, those groups' scales in b1 bits. Binary x_ic, exactly:

    min Σ ‖A_i − lq(A_i, c)‖²_F x_ic    s.t.    Σ storage(A_i, c) x_ic ≤ B,    Σ_c x_ic = 1
    storage a weight = b + b0/B0 + b1/(B0·B1) bits

`grid()` is the grid of the code, 432 configurations, `grid("paper")` that of the paper, 243; `bits` is the storage formula.
Deviations: groups of B1 end with their row, so that a row shorter than B0·B1 columns holds one group that is not full (4.133 bits instead
of 4.127 for NF4 at 4096 columns), and one float32 offset is held a matrix; both are priced. Solved by HiGHS instead of Gurobi; losses are
scaled to norm 1000 as in the code. A loss is whatever the menu says: for the paper's, price with its start (LQ-LoRA's decomposition).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

from finebits import registry
from finebits.formats._stores import Double
from finebits.formats.base import Format
from finebits.plan.planner import Menu, Planner, Solution
from finebits.planners._highs import solve

Inner = Literal["bf16", "fp16", "fp32"]
B1_DTYPES: dict[Inner, int] = {"bf16": 16, "fp16": 16, "fp32": 32}


def config(b: int, b0: int, b1: Inner, B0: int, B1: int) -> Format:
    """One configuration as a format.

    >>> format = config(4, 8, "fp32", 64, 256)
    >>> format.bits, format.block, format.storage_bits(1, 1 << 14) / 2**14  # 4 + 8/64 + 32/(64 · 256), and an offset of 32
    (4, 64, 4.12890625)
    """
    return registry.load("formats", "nf")(b, block=B0, scale=Double(b0, B1, "min", b1))


def bits(b: int, b0: int, b1: Inner, B0: int, B1: int) -> float:
    """Storage of a weight in bits, as the paper counts it.

    >>> bits(4, 8, "fp32", 64, 256)  # 4 + 8/64 + 32/(64 · 256)
    4.126953125
    """
    return b + b0 / B0 + B1_DTYPES[b1] / (B0 * B1)


def configs(which: Literal["code", "paper"] = "code") -> list[tuple[int, int, Inner, int, int]]:
    """(b, b0, b1, B0, B1) of a grid.

    >>> len(configs()), len(configs("paper")), configs()[0]
    (432, 243, (2, 2, 'bf16', 16, 16))
    """
    widths = {"code": (2, 3, 4, 8), "paper": (2, 3, 4)}[which]
    return list(itertools.product(widths, widths, B1_DTYPES, (16, 32, 64), (16, 64, 256)))


def grid(which: Literal["code", "paper"] = "code") -> list[Format]:
    """The formats of a grid.

    >>> len(grid("paper")), grid("paper")[0].bits
    (243, 2)
    """
    return [config(*c) for c in configs(which)]


NF4_LIKE = (4, 8, "fp32", 64, 256)  # 4.127 bits
NF3_LIKE = (3, 8, "fp32", 64, 256)  # 3.127 bits


@dataclass(frozen=True)
class LQLoRAILP(Planner):
    """The integer program, solved to within `gap` in at most `seconds` (the paper's limit). Needs the extra milp.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"a": [fb.Option(few, 10, 5.0), fb.Option(many, 20, 1.0)], "b": [fb.Option(few, 10, 3.0), fb.Option(many, 20, 2.5)]}
    >>> {name: o.bytes for name, o in fb.LQLoRAILP()(menu, 30).items()}
    {'a': 20, 'b': 10}
    """

    gap: float = 0.0
    seconds: float = 60.0
    exact: ClassVar[bool] = True
    minimises: ClassVar[bool] = True

    def __call__(self, menu: Menu, budget: int) -> Solution:
        return solve(menu, budget, gap=self.gap, seconds=self.seconds)
