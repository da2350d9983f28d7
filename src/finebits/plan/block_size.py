"""Block-size tuning as the "QLoRA Technical Report" describes it in prose (its rules R1 to R12); an implementable reading.

With n_l weights of b bits in layer l, blocks that begin anew at every row and head (k_l(B) of them), o_l(B) bytes of scales at block size B
and e_l(B) = ‖W − Ŵ_B‖² / ‖W‖²:

    min Σ ω_l e_l(B_l)    s.t.    Σ o_l(B_l) ≤ ρ · Σ b n_l / 8    (R6),    Σ (b n_l / 8 + o_l(B_l)) ≤ M    and    each of them ≤ M_layer    (R7)

R1  larger layers, larger blocks: follows, because e is relative: of two layers with one curve e(B), the larger pays more for a small block
R3  skewed weights, smaller blocks: their e(B) rises faster              R4  B from 32 to 1024; 16, 2048 and 4096 can be asked for
R5  a size a layer: one option each                                      R8  ω: `Option.loss` of `menu(…, sensitivity=…)`
R9  blocks end with rows, and with heads where these are columns: `head_units`
R10, R11  shared scales (two-level, clustered) and double quantization are scale stores of a format: `stores` of `menu`
R12 `trials` measures the choices around the optimum, and the uniform ones, and `report` says why each layer has its block

`heuristic` is the same by rule of thumb: size, then kurtosis, then sensitivity, then doubling blocks until the budget is met.
Deviations: R2 says that tight memory "requires smaller blocks to minimize scale overhead"; smaller blocks have *more* overhead, and this goes
by the arithmetic. Errors of layers are added up, which single-layer measurements do not quite do: hence the trials.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from finebits.formats.base import Format
from finebits.plan import cost
from finebits.plan._knapsack import Menu, frontier, hull, smallest, total
from finebits.plan._trials import Measure, Trial, best_of
from finebits.plan.base import Infeasible, Option, Spec
from finebits.quantizers.base import Quantizer

BLOCKS = (32, 64, 128, 256, 512, 1024)
OUTPUT_SIDE = ("o_proj", "out_proj", "wo", "dense")  # projections whose inputs are heads, one after the other


class TooMuchOverhead(Infeasible):
    """No choice of blocks keeps to the share of scales. `overhead` is the least share that one does."""

    def __init__(self, message: str, smallest: int, overhead: float) -> None:
        super().__init__(message, smallest)
        self.overhead = overhead


@dataclass(frozen=True)
class BlockSize:
    """Block sizes at one code width. `overhead` is ρ (the report's example is 0.05), `layer` M_layer in bytes; the budget is M.

    Within one layer of optimal by the hull, optimal if `exact` (small models). Menus that mix code widths are for milp(overhead=…).
    """

    overhead: float | None = None
    layer: int | None = None
    exact: bool = False

    def __call__(self, menu: Menu, budget: int) -> dict[str, Option]:
        menu, budget = self.within(menu, budget)
        return frontier(menu, budget).pick(-1) if self.exact else hull(menu, budget)

    def within(self, menu: Menu, budget: int) -> tuple[Menu, int]:
        """What R6 and R7 leave of a menu and a budget: any bound is one of these."""
        if self.layer is not None:
            menu = {name: self._fitting(name, options) for name, options in menu.items()}
        if self.overhead is not None and menu:
            budget = min(budget, self.allowed(menu))
        return menu, budget

    def _fitting(self, name: str, options: Sequence[Option]) -> list[Option]:
        found = [o for o in options if o.bytes <= (self.layer or 0)]
        if options and not found:
            raise ValueError(
                f"{name} takes at least {min(o.bytes for o in options):,} bytes and layer={self.layer:,}: raise it, or use fewer bits"
            )
        return found

    def allowed(self, menu: Menu) -> int:
        """Bytes of a plan whose scales take exactly the share ρ. Raises TooMuchOverhead where even the largest blocks take more."""
        share, codes, rest = self.overhead or 0.0, 0, 0
        for name, options in menu.items():
            found = {(int(weight(o) - o.more["overhead"]), int(o.bytes - o.more["overhead"])) for o in options}
            if len(found) > 1:
                raise ValueError(f"blocks are tuned at one code width, and {name} has several: use milp(overhead={share:g})")
            codes, rest = codes + next(iter(found))[0], rest + next(iter(found))[1]
        least = (smallest(menu) - rest) / codes
        if least > share:
            needs = f"the scales take at least {100 * least:.4g} % of the codes' bytes"
            raise TooMuchOverhead(f"{needs}, and overhead={share:g} came: {least:.6g} can be met", smallest(menu), least)
        return rest + int(share * codes)


def weight(o: Option) -> float:
    """Bytes of the weight alone."""
    if "weight" not in o.more or "overhead" not in o.more:
        raise ValueError(f"a share of overhead needs options that say it (Option.more), and {o.spec.format} does not")
    return o.more["weight"]


def head_units(names: Iterable[str], head_dim: int) -> dict[str, int | None]:
    """The columns that blocks must not leave, by module: heads lie along the inputs of an output projection. Those of q, k and v lie along
    the rows (fused or grouped alike), where no block ever crosses."""
    return {name: head_dim if name.rpartition(".")[2] in OUTPUT_SIDE else None for name in names}


def menu(
    weights: Mapping[str, Float[Tensor, "m n"]],
    format: Format,
    sizes: Sequence[int] = BLOCKS,
    stores: Sequence[Any] = (),
    sensitivity: Mapping[str, float] | None = None,
    units: Mapping[str, int | None] | None = None,
    quantizer: Quantizer | None = None,
) -> dict[str, list[Option]]:
    """Every block size (and scale store) for every layer, with ω times the relative error. Sizes above a row's (or a unit's) columns that
    repeat a smaller one are left out."""
    found = {}
    for name, W in weights.items():
        unit = (units or {}).get(name)
        width = min(W.shape[1], unit or W.shape[1])
        kept = [b for i, b in enumerate(sizes) if i == 0 or sizes[i - 1] < width]
        formats = [dataclasses.replace(format, block=b, unit=unit, scale=s) for b in kept for s in (stores or (format.scale,))]  # type: ignore[call-arg]
        specs = [Spec(format=f) if quantizer is None else Spec(format=f, quantizer=quantizer) for f in formats]
        cells = cost.row(W, specs, {}, cost.error("weight", W.float(), {}), 4)
        omega = (sensitivity or {}).get(name, 1.0)
        found[name] = [dataclasses.replace(o, loss=omega * o.loss) for o in cost.options(cells, specs)]
    return found


def kurtosis(W: Float[Tensor, "m n"]) -> float:
    """Excess kurtosis: 0 for normal weights, more for heavier tails."""
    z = W.double() - W.double().mean()
    variance = float(z.square().mean())
    return float(z.pow(4).mean()) / variance**2 - 3 if variance > 0 else 0.0


def heuristic(menu: Menu, weights: Mapping[str, Tensor], budget: int, sensitivity: Mapping[str, float] | None = None) -> dict[str, Option]:
    """Blocks by rule of thumb: by size (1024 from 2^20 weights on, down to 32), an octave down for excess kurtosis above 1 and another
    above 5, one down for the most sensitive quarter; then, while over `budget` bytes, double the block that costs least loss a byte."""
    omega = sensitivity or {}
    eager = sorted(omega, key=lambda n: -omega[n])[: -(-len(omega) // 4)]
    choice = {}
    for name, options in menu.items():
        n, tail = weights[name].numel(), kurtosis(weights[name])
        rule = ((1 << 20, 1024), (1 << 19, 512), (1 << 18, 256), (1 << 16, 128), (1 << 14, 64), (0, 32))
        block = next(b for least, b in rule if n >= least) >> ((tail > 1) + (tail > 5) + (name in eager))
        near = min(abs(_octave(o) - block.bit_length()) for o in options)
        choice[name] = min((o for o in options if abs(_octave(o) - block.bit_length()) == near), key=lambda o: (o.loss, o.bytes))
    while total(choice)[0] > budget:
        moves = [(o, name) for name, options in menu.items() for o in options if o.bytes < choice[name].bytes]
        if not moves:
            raise Infeasible(f"the largest blocks hold {smallest(menu):,} bytes, and {budget:,} are left", smallest(menu))
        o, name = min(moves, key=lambda m: ((m[0].loss - choice[m[1]].loss) / (choice[m[1]].bytes - m[0].bytes), -m[0].bytes))
        choice[name] = o
    return choice


def _octave(o: Option) -> int:
    return int(o.spec.format.block).bit_length()  # type: ignore[union-attr]


def trials(menu: Menu, planner: BlockSize, budget: int, measure: Measure, most: int = 2) -> list[Trial]:
    """What is really lost by the optimum, by every uniform choice, and by an octave up and down on the `most` layers that lose most; those
    within the budgets alone, best first, of equals the one that holds least."""
    optimum = planner(menu, budget)
    if planner.overhead is not None:
        budget = min(budget, planner.allowed(menu))
    fits = lambda choice: total(choice)[0] <= budget  # noqa: E731
    formats = {o.spec.format for options in menu.values() for o in options}
    tried = [("optimum", optimum)]
    for format in sorted(formats, key=repr):
        same = {name: next((o for o in options if o.spec.format == format), None) for name, options in menu.items()}
        if None not in same.values():
            tried.append((f"uniform {format.block}", same))  # type: ignore[arg-type, union-attr]
    for name in sorted(optimum, key=lambda n: -optimum[n].loss)[:most]:
        for o in menu[name]:
            if abs(_octave(o) - _octave(optimum[name])) == 1 and o.spec.format.scale == optimum[name].spec.format.scale:  # type: ignore[union-attr]
                tried.append((f"{name} at {o.spec.format.block}", {**optimum, name: o}))  # type: ignore[union-attr]
    return best_of(tried, measure, fits)


def report(menu: Menu, choice: Mapping[str, Option], planner: BlockSize, budget: int) -> dict[str, Any]:
    """Why each layer has its block: rows (module, block, overhead as a share of its codes, loss, what the next smaller block would save
    for how many bytes), the totals, and the constraint that binds ("overhead", "memory" or None)."""
    rows = []
    for name, o in choice.items():
        finer = [x for x in menu[name] if x.bytes > o.bytes and x.loss < o.loss]
        step = max(finer, key=lambda x: (o.loss - x.loss) / (x.bytes - o.bytes), default=None)
        saved = "nothing on offer loses less" if step is None else f"{o.loss - step.loss:.3g} less for {step.bytes - o.bytes:,} bytes more"
        share = o.more["overhead"] / (weight(o) - o.more["overhead"])
        rows.append({"module": name, "block": o.spec.format.block, "overhead": share, "loss": o.loss, "reason": saved})  # type: ignore[union-attr]
    scales = sum(o.more["overhead"] for o in choice.values())
    codes = sum(weight(o) for o in choice.values()) - scales
    size, loss = total(choice)
    largest = sum(max(o.bytes for o in options) for options in menu.values())
    limits = {"memory": budget} | ({"overhead": planner.allowed(menu)} if planner.overhead is not None else {})
    tight = min(limits, key=lambda k: limits[k])
    return {"rows": rows, "bytes": size, "loss": loss, "overhead": scales / codes, "active": tight if limits[tight] < largest else None}
