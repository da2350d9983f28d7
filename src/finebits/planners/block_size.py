"""Block-size tuning as the "QLoRA Technical Report" describes it in prose (its rules R1 to R12); an implementable reading.

With n_l weights of b bits in layer l, blocks that begin anew at every row and head (k_l(B) of them), o_l(B) bytes of scales at block size B
and e_l(B) = ‖W − Ŵ_B‖² / ‖W‖²:

    min Σ ω_l e_l(B_l)    s.t.    Σ o_l(B_l) ≤ ρ · Σ b n_l / 8    (R6),    Σ (b n_l / 8 + o_l(B_l)) ≤ M    and    each of them ≤ M_layer    (R7)

R1  larger layers, larger blocks: follows, because e is relative: of two layers with one curve e(B), the larger pays more for a small block
R3  skewed weights, smaller blocks: their e(B) rises faster              R4  B from 16 to 4096, as the candidates say
R5  a size a layer: one option each                                      R8  ω: what the objective makes of an error
R9  blocks end with rows, and with heads where these are columns: `tunes_blocks`
R10, R11  shared scales (two-level, clustered) and double quantization are scale stores of candidates
R12 `trials`: what `neighbours` gives (the uniform choices, and those next to the optimum) is quantized and measured; `explained` says why each
    layer has its block

`by` "heuristic" is the same by rule of thumb: by size (1024 from 2^20 weights on, down to 32), an octave down for excess kurtosis above 1 and
another above 5, one down for the quarter of the layers that lose most at one block for all; then, while over the budget, the block that costs
least loss a byte is made larger.
Deviations: R2 says that tight memory "requires smaller blocks to minimize scale overhead"; smaller blocks have *more* overhead, and this goes
by the arithmetic. Errors of layers are added up, which single-layer measurements do not quite do: hence the trials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from finebits.errors import Invalid
from finebits.formats.base import Format
from finebits.plan.base import Infeasible, Option
from finebits.plan.knapsack import check, dual_bound, frontier, hull, smallest, total
from finebits.plan.planner import Menu, Planner, Solution

SIZES = ((1 << 20, 1024), (1 << 19, 512), (1 << 18, 256), (1 << 16, 128), (1 << 14, 64), (0, 32))  # of the rule of thumb: weights, block


class TooMuchOverhead(Infeasible):
    """No choice of blocks keeps to the share of scales. `overhead` is the least share that one does.

    >>> option = fb.Option(fb.Spec(fb.NF(4)), 72, 1.0, {"weight": 72, "overhead": 8})  # of 64 bytes of codes
    >>> fb.BlockSize(overhead=0.1)({"a": [option]}, 100)
    Traceback (most recent call last):
        ...
    finebits.planners.block_size.TooMuchOverhead: the scales take at least 12.5 % of the codes' bytes, and overhead=0.1 came:
    0.125 can be met
    """

    for_bytes = False

    def __init__(self, message: str, smallest: int, overhead: float) -> None:
        super().__init__(message, smallest)
        self.overhead = overhead


@dataclass(frozen=True)
class BlockSize(Planner):
    """Block sizes at one code width. `overhead` is ρ (the report's example is 0.05), `layer` M_layer in bytes; the budget is M.

    `by` "hull" is within one layer of optimal, "exact" optimal (small models), "heuristic" the rule of thumb. `trials` is the number of layers
    whose neighbouring blocks are measured; at 0 nothing is. Menus that mix code widths are for milp(overhead=…).

    >>> small, large = fb.Spec(fb.NF(4, block=32)), fb.Spec(fb.NF(4, block=128))
    >>> menu = {"a": [fb.Option(large, 66, 5.0), fb.Option(small, 72, 1.0)], "b": [fb.Option(large, 66, 3.0), fb.Option(small, 72, 2.5)]}
    >>> {name: o.spec.format.block for name, o in fb.BlockSize()(menu, 140).items()}
    {'a': 32, 'b': 128}
    """

    overhead: float | None = None
    layer: int | None = None
    by: Literal["hull", "exact", "heuristic"] = "hull"
    trials: int = 0
    honours: ClassVar[frozenset[str]] = frozenset({"fixed"})
    because: ClassVar[str] = "chooses blocks at one code width"
    tunes_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.by not in ("hull", "exact", "heuristic"):
            raise Invalid(f"by is {self.by!r}; it can be 'hull', 'exact' or 'heuristic'")
        if self.trials < 0:
            raise Invalid(f"trials is {self.trials}; it is the number of layers whose neighbouring blocks are tried, or 0")

    @property
    def asks(self) -> frozenset[str]:
        counted = {"weight", "overhead"} if self.overhead is not None or self.by == "heuristic" else set()
        return frozenset(counted | ({"kurtosis"} if self.by == "heuristic" else set()))

    def __call__(self, menu: Menu, budget: int) -> Solution:
        menu, budget = self.within(menu, budget)
        if self.by == "hull":
            return hull(menu, budget)
        choice = frontier(menu, budget).pick(-1) if self.by == "exact" else heuristic(menu, budget)
        return Solution(choice, dual_bound(menu, budget))

    def neighbours(self, menu: Menu, budget: int, choice: Mapping[str, Option]) -> list[tuple[str, dict[str, Option]]]:
        """What is tried: `choice`, every uniform choice, and it with an octave up and down on the layers that lose most; those that keep to the
        limits alone, each once.

        >>> small, large = (fb.Option(fb.Spec(fb.NF(4, block=b)), size, loss) for b, size, loss in ((32, 72, 1.0), (64, 68, 2.0)))
        >>> planner = fb.BlockSize(trials=1)
        >>> [name for name, _ in planner.neighbours({"a": [small, large]}, 80, {"a": small})]
        ['optimum', 'uniform 64']
        """
        menu, budget = self.within(menu, budget)
        tried: list[tuple[str, dict[str, Option]]] = [("optimum", dict(choice))]
        several = {name: options for name, options in menu.items() if len(options) > 1}
        for kind in dict.fromkeys(_kind(o) for options in several.values() for o in options):
            same = {name: next((o for o in options if _kind(o) == kind), None) for name, options in several.items()}
            if None not in same.values():
                tried.append((f"uniform {kind[0]}", {**choice, **cast(dict[str, Option], same)}))
        for name in sorted(several, key=lambda n: -choice[n].loss)[: self.trials]:
            for o in several[name]:
                if abs(_octave(o) - _octave(choice[name])) == 1 and _kind(o)[1] == _kind(choice[name])[1]:
                    tried.append((f"{name} at {_kind(o)[0]}", {**choice, name: o}))
        distinct: list[tuple[str, dict[str, Option]]] = []
        for name, one in tried:
            if total(one)[0] <= budget and all(one != other for _, other in distinct):
                distinct.append((name, one))
        return distinct

    def explained(self, menu: Menu, choice: Mapping[str, Option], budget: int) -> dict[str, Any]:
        """Why each layer has its block: rows (module, block, overhead as a share of its codes, loss, what the next smaller block would save
        for how many bytes), the totals, and the constraint that binds ("overhead", "memory" or None).

        >>> small = fb.Option(fb.Spec(fb.NF(4, block=32)), 72, 1.0, {"weight": 72, "overhead": 8})
        >>> large = fb.Option(fb.Spec(fb.NF(4, block=64)), 68, 2.0, {"weight": 68, "overhead": 4})
        >>> told = fb.BlockSize().explained({"a": [small, large]}, {"a": large}, 70)
        >>> told["rows"][0]["reason"], told["overhead"], told["active"]
        ('1 less for 4 bytes more', 0.0625, 'memory')
        """
        rows = []
        for name, o in choice.items():
            finer = [x for x in menu[name] if x.bytes > o.bytes and x.loss < o.loss]
            step = max(finer, key=lambda x: (o.loss - x.loss) / (x.bytes - o.bytes), default=None)
            saved = (
                "nothing on offer loses less" if step is None else f"{o.loss - step.loss:.3g} less for {step.bytes - o.bytes:,} bytes more"
            )
            share = o.more["overhead"] / (weight(o) - o.more["overhead"])
            rows.append({"module": name, "block": _kind(o)[0], "overhead": share, "loss": o.loss, "reason": saved})
        scales = sum(o.more["overhead"] for o in choice.values())
        codes = sum(weight(o) for o in choice.values()) - scales
        size, loss = total(choice)
        largest = sum(max(o.bytes for o in options) for options in menu.values())
        limits = {"memory": budget} | ({"overhead": self.allowed(menu)} if self.overhead is not None else {})
        tight = min(limits, key=lambda k: limits[k])
        return {"rows": rows, "bytes": size, "loss": loss, "overhead": scales / codes, "active": tight if limits[tight] < largest else None}

    def within(self, menu: Menu, budget: int) -> tuple[Menu, int]:
        """What R6 and R7 leave of a menu and a budget: any bound is one of these."""
        if self.layer is not None:
            menu = {name: self._fitting(name, options) for name, options in menu.items()}
        if self.overhead is not None and menu:
            budget = min(budget, self.allowed(menu))
        return menu, budget

    def _fitting(self, name: str, options: Sequence[Option]) -> list[Option]:
        fitting = [o for o in options if o.bytes <= (self.layer or 0)]
        if options and not fitting:
            raise Invalid(
                f"{name} takes at least {min(o.bytes for o in options):,} bytes and layer={self.layer:,}: raise it, or use fewer bits"
            )
        return fitting

    def allowed(self, menu: Menu) -> int:
        """Bytes of a plan whose scales take exactly the share ρ. Raises TooMuchOverhead where even the largest blocks take more.

        >>> option = fb.Option(fb.Spec(fb.NF(4)), 72, 1.0, {"weight": 72, "overhead": 8})
        >>> fb.BlockSize(overhead=0.25).allowed({"a": [option]})  # 64 of codes and a quarter of that
        80
        """
        share, codes, rest = self.overhead or 0.0, 0, 0
        for name, options in menu.items():
            sizes = {(int(weight(o) - o.more["overhead"]), int(o.bytes - o.more["overhead"])) for o in options}
            if len(sizes) > 1:
                raise Invalid(f"blocks are tuned at one code width, and {name} has several: use milp(overhead={share:g})")
            codes, rest = codes + next(iter(sizes))[0], rest + next(iter(sizes))[1]
        least = (smallest(menu) - rest) / codes
        if least > share:
            needs = f"the scales take at least {100 * least:.4g} % of the codes' bytes"
            raise TooMuchOverhead(f"{needs}, and overhead={share:g} came: {least:.6g} can be met", smallest(menu), least)
        return rest + int(share * codes)


def weight(o: Option) -> float:
    """Bytes of the weight alone.

    >>> weight(fb.Option(fb.Spec(fb.NF(4)), 72, 1.0, {"weight": 72, "overhead": 8}))
    72
    """
    if "weight" not in o.more or "overhead" not in o.more:
        raise Invalid(f"a share of overhead needs options that say it (Option.more), and {o.spec.format} does not")
    return o.more["weight"]


def heuristic(menu: Menu, budget: int) -> dict[str, Option]:
    """Blocks by rule of thumb, then larger ones until they fit. Options say the `kurtosis` of their layer's weights.

    >>> more = {"weight": 72, "overhead": 8, "kurtosis": 0.0}  # 128 weights of four bits, no tails
    >>> menu = {"a": [fb.Option(fb.Spec(fb.NF(4, block=b)), 72, 1.0, more) for b in (32, 64, 128)]}
    >>> heuristic(menu, 100)["a"].spec.format.block  # the smallest layers get the smallest blocks
    32
    """
    check(menu, budget)
    several = {name: menu[name] for name in sorted(menu) if len(menu[name]) > 1}
    common = {name: min(options, key=lambda o: (abs(_octave(o) - 7), o.loss)) for name, options in several.items()}  # block 64, or near
    eager = sorted(common, key=lambda n: -common[n].loss)[: len(common) // 4]
    choice = {name: options[0] for name, options in menu.items()}
    for name, options in several.items():
        if "kurtosis" not in options[0].more:
            raise Invalid(f"the rule of thumb needs options that say their kurtosis (Option.more), and those of {name} do not")
        o, tail = options[0], options[0].more["kurtosis"]
        n = 8 * (weight(o) - o.more["overhead"]) / cast(Format, o.spec.format).bits
        block = next(b for least, b in SIZES if n >= least) >> ((tail > 1) + (tail > 5) + (name in eager))
        near = min(abs(_octave(o) - block.bit_length()) for o in options)
        choice[name] = min((o for o in options if abs(_octave(o) - block.bit_length()) == near), key=lambda o: (o.loss, o.bytes))
    while total(choice)[0] > budget:
        moves = [(o, name) for name, options in several.items() for o in options if o.bytes < choice[name].bytes]
        o, name = min(moves, key=lambda m: ((m[0].loss - choice[m[1]].loss) / (choice[m[1]].bytes - m[0].bytes), -m[0].bytes))
        choice[name] = o
    return choice


def _kind(o: Option) -> tuple[Any, Any]:
    """Block and scale store."""
    return getattr(o.spec.format, "block", None), getattr(o.spec.format, "scale", None)


def _octave(o: Option) -> int:
    return int(_kind(o)[0]).bit_length()
