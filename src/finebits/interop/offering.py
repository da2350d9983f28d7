"""The menu of a model: what every matrix could be, and what that costs and loses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finebits import registry
from finebits.adapters.base import of_rank
from finebits.build import Progress
from finebits.formats.base import Format
from finebits.formats.int import Int
from finebits.init.base import check_start, rounds_the_weight
from finebits.interop.pricing import Calibration, Table, price
from finebits.interop.selecting import Mistake, Shape
from finebits.plan import cost
from finebits.plan.base import Option, Spec
from finebits.plan.budget import Bits, Share
from finebits.plan.knapsack import Menu, smallest
from finebits.planners.ada_quant_ip import AdaQuantIP
from finebits.planners.block_size import BlockSize
from finebits.planners.lagrange import Lagrange
from finebits.planners.milp import MILP
from finebits.planners.uniform import Uniform
from finebits.quantizers.rtn import RTN
from finebits.ranks.base import Ranking
from finebits.ranks.diffora import DiffoRA
from finebits.refine._scales import clips

if TYPE_CHECKING:
    from finebits.recipe.settings import Settings

HEAD = (None, Int(8, block=128, scale="bf16"))


@dataclass(frozen=True)
class Covered:
    """The matrices of a model that a plan chooses for: planned ones, the head where it may be chosen, those whose format is given."""

    shapes: Mapping[str, Shape]
    head: Mapping[str, Shape]
    fixed: Mapping[str, Format | None]
    units: Mapping[str, int | None] = field(default_factory=dict)  # the columns that blocks must not leave, where the planner minds
    adapters: Mapping[str, Any] = field(default_factory=dict)  # None for a module without one; those that are not here have the settings'

    @property
    def all(self) -> dict[str, Shape]:
        return {**self.shapes, **self.head}

    @property
    def experts(self) -> list[str]:
        """Parameters that hold the matrices of all experts: quantized, and trained by no adapter."""
        return [name for name, shape in self.shapes.items() if len(shape) == 3]

    @property
    def adapted(self) -> dict[str, Shape]:
        """The planned matrices that may have an adapter."""
        return {name: shape for name, shape in self.shapes.items() if len(shape) == 2}


@dataclass(frozen=True)
class Offer:
    """What can be chosen: candidates and their prices by module, in one order; and what they were priced with."""

    specs: dict[str, list[Spec]]
    cells: dict[str, list[cost.Cell]]
    objective: str
    calibration: Calibration | None = None
    table: Table | None = None

    @property
    def menu(self) -> dict[str, list[Option]]:
        return {name: cost.options(self.cells[name], specs) for name, specs in self.specs.items()}


def check(s: Settings, covered: Covered, fast: bool, stated: int | Bits | Share | None) -> None:
    """Raise Mistake where two things that were asked for cannot be had together."""
    if isinstance(stated, Bits) and s.serve_budget is not None:
        raise Mistake(
            f"budget.memory is {stated.average:g} bits, which bound what is saved as well: leave budget.serve_memory out, or state "
            "budget.memory in bytes"
        )
    for init in s.inits or (s.init,):
        try:
            check_start(s.adapter, init)
        except ValueError as e:
            raise Mistake(str(e)) from None
    _clips(s, covered)
    joint = "ranks" if s.ranks else "starts" if s.inits else ""
    if s.objective not in cost.OBJECTIVES:
        raise Mistake(f"the objective is {s.objective!r}; it can be {', '.join(cost.OBJECTIVES)}")
    if fast and joint:
        raise Mistake("ranks and starts are chosen by what they do to the weights, and --fast does not read them: plan without it")
    nats = s.objective in ("fisher", "kl")
    if fast and nats:
        raise Mistake(f"the objective {s.objective} needs the model's weights and rows, and --fast reads neither: plan without it")
    if covered.experts and not fast:
        raise Mistake(f"{covered.experts[0]} holds all experts in one tensor, which can be planned for (--fast) and not yet be quantized")
    if nats and covered.head:
        raise Mistake(
            f"an 8-bit head is priced by its weight error, and the objective {s.objective} counts nats: leave head out of budget.levers"
        )
    if s.objective == "kl" and joint:
        raise Mistake(f"the objective kl measures variants without their starts, so {joint} cannot be chosen under it: use fisher")
    if s.pricing is not None and (joint or s.objective == "kl"):
        why = f"{joint} are" if joint else "the objective kl measures variants"
        raise Mistake(f"quantization.pricing rounds otherwise than the quantizer, and {why} chosen as they will be: leave pricing out")
    if s.objective == "kl" and s.quantizer.needs:
        raise Mistake(
            f"the objective kl measures variants as they are rounded, and {type(s.quantizer).__name__} needs statistics: use fisher"
        )
    name = type(s.planner).__name__
    if isinstance(s.planner, Ranking):
        paper = type(s.planner).__module__.rpartition(".")[2]
        raise Mistake(f"{paper} gives out ranks and no bits: write adapter.ranks={paper}, and take the planner lagrange for the bits")
    if isinstance(s.planner, DiffoRA):
        raise Mistake(
            "DiffoRA chooses modules by training gates over all of them, which no plan does: take the planner lagrange, and adapter.ranks"
        )
    if s.ranking is not None and s.ranks:
        raise Mistake("ranks are given out before the bits are chosen, or chosen with them: leave ranking out, or ranks")
    if s.ranking is not None and fast:
        raise Mistake(f"{type(s.ranking).__name__} gives out ranks by weights and rows, and --fast reads neither: plan without it")
    if isinstance(s.planner, Uniform) and (covered.fixed or covered.head):
        what = "quantization.locks or overrides" if covered.fixed else "head in budget.levers"
        raise Mistake(f"the planner uniform gives all matrices one candidate: leave {what} out, or take another planner")
    if isinstance(s.planner, BlockSize) and (s.ranks or covered.head):
        what = "adapter.ranks" if s.ranks else "head in budget.levers"
        raise Mistake(f"the planner block_size chooses blocks at one code width: leave {what} out, or take another planner")
    if isinstance(s.planner, BlockSize) and any(not isinstance(getattr(f, "block", None), int) for f in s.formats):
        raise Mistake("the planner block_size chooses among blocks of a width, and a candidate has none: write them as nf4-b32, nf4-b64, …")
    if isinstance(s.planner, BlockSize) and fast and (s.planner.trials or s.planner.by == "heuristic"):
        raise Mistake("block_size's trials and heuristic look at the weights, and --fast does not read them: plan without it")
    if tries(s) and (s.quantizer.needs or s.pricing is not None or s.inits):
        what = (
            "adapter.inits"
            if s.inits
            else "quantization.pricing"
            if s.pricing is not None
            else f"the quantizer {type(s.quantizer).__name__}"
        )
        raise Mistake(
            f"block_size's trials measure weights as they are rounded, without statistics and starts: leave {what} out, or trials"
        )
    if s.serve_budget is not None and s.ranks and not isinstance(s.planner, Lagrange | MILP):
        raise Mistake(f"with ranks to choose, a serve budget is a second limit that {name} does not keep: take the planner milp")
    if getattr(s.planner, "latency", None) is not None and isinstance(s.planner, MILP | AdaQuantIP):
        raise Mistake("a limit on latency needs a menu that says how long a candidate takes, and plans of models do not: leave latency out")


def _clips(s: Settings, covered: Covered) -> None:
    """Raise Mistake where clipping is to be learned and a weight is not rounded to nearest under its extremes."""
    who = next((type(r).__name__ for r in s.refine if "clips" in getattr(r, "moves", ())), None)
    if who is None:
        return
    instead = "use its scales instead of clip, which serve any codes"
    if not isinstance(s.quantizer, RTN):
        name = type(s.quantizer).__name__
        raise Mistake(
            f"{who}'s clip rounds weights to nearest at every step, which would undo what {name} has found: take rtn, or {instead}"
        )
    for init in s.inits or (s.init,):
        if not rounds_the_weight(s.adapter, init):
            name = type(init).__name__
            raise Mistake(
                f"{who}'s clip rounds the weight itself, and {name} rounds what it leaves beside the adapter: take qera, or {instead}"
            )
    for f in {*s.formats, *covered.fixed.values()} - {None}:
        if not clips(f):  # type: ignore[arg-type]
            raise Mistake(f"{who}'s clip moves the extremes that a block is scaled by, and {f} has none: offer nf or int, or {instead}")


def tries(s: Settings) -> bool:
    """Does the planner ask for what it has found to be measured?"""
    return isinstance(s.planner, BlockSize) and s.planner.trials > 0


def offer(
    settings: Settings,
    folder: Path,
    covered: Covered,
    data: Any,
    levers: Mapping[str, Any],
    fast: bool,
    progress: Progress,
    priced: Mapping[str, Any],
) -> Offer:
    """The candidate grid (formats × ranks × starts), priced on rows that the model meets under the levers `priced`. Without data, or from a
    config alone, `output` falls back to `weight`."""
    joint = bool(settings.ranks or settings.inits)
    width = getattr(torch, levers["dtype"]).itemsize
    specs = {name: candidates(settings, covered, name) for name in covered.all}
    objective = "weight" if settings.objective == "output" and (fast or data is None) else settings.objective
    if fast:
        return Offer(specs, {name: [typical(s, covered.all[name], width) for s in specs[name]] for name in specs}, objective)
    planned = {name: _priced(specs[name], settings) for name in covered.shapes}
    needs = frozenset(cost.OBJECTIVES[objective]).union(*(s.quantizer.needs for v in planned.values() for s in v))
    needs = needs.union(*(s.init.needs for v in planned.values() for s in v)) if joint else needs
    calibration = None if data is None or not needs else Calibration(folder, data, priced)
    shapes = {name: (s[-2], s[-1]) for name, s in covered.all.items()}
    cells, table = price(folder, planned, shapes, objective, calibration, width, joint, progress)
    if covered.head:  # what meets it is not gathered: its weight error stands for its output error, both relative
        cells |= price(folder, {name: specs[name] for name in covered.head}, shapes, "weight", None, width, progress=progress)[0]
    return Offer(specs, cells, objective, calibration, table)


def _priced(specs: list[Spec], settings: Settings) -> list[Spec]:
    """The candidates as they are rounded while they are priced."""
    return specs if settings.pricing is None else [replace(s, quantizer=settings.pricing) for s in specs]


def candidates(settings: Settings, covered: Covered, name: str) -> list[Spec]:
    """The candidates of one matrix. An adapter of another rank keeps its scale s."""
    if name in covered.head:
        return [Spec(f) for f in HEAD]
    formats, shape = [covered.fixed[name]] if name in covered.fixed else settings.formats, covered.shapes[name]
    if len(shape) == 3:
        return [Spec(f, settings.quantizer) for f in formats]
    if (unit := covered.units.get(name)) is not None:
        formats = _ending(formats, unit)
    adapters = [covered.adapters.get(name, settings.adapter)]
    inits = settings.inits if adapters[0] is not None else ()
    if settings.ranks:
        own = settings.adapter
        if not hasattr(own, "rank"):
            raise Mistake(f"ranks are to be chosen, and {type(own).__name__} has none: leave ranks out or use another adapter")
        kept = [r for r in settings.ranks if r <= min(shape)]
        if not kept:
            raise Mistake(
                f"a {shape[0]}x{shape[1]} matrix has ranks up to {min(shape)}, and the smallest on offer is {min(settings.ranks)}"
            )
        adapters = [of_rank(own, r) for r in kept]
    return [Spec(f, settings.quantizer, a, i) for f in formats for a in adapters for i in (inits or (settings.init,))]


def _ending(formats: Sequence[Format | None], unit: int) -> list[Format | None]:
    """Formats whose blocks end with a unit; of those that are then the same, the one of the smallest block."""
    found: dict[Any, Format | None] = {}
    for f in sorted(formats, key=lambda f: getattr(f, "block", 0)):
        found.setdefault(None if f is None else replace(f, unit=unit, block=min(int(f.block), unit)), f and replace(f, unit=unit))  # type: ignore[call-arg]
    return list(found.values())


def line(spec: Spec, cell: cost.Cell, settings: Settings) -> dict[str, Any]:
    """One line of a menu as a plan keeps it."""
    said: dict[str, Any] = {"format": registry.to_json(spec.format), "bytes": cell.bytes, "loss": cell.loss}
    if spec.adapter is None:
        return said
    said |= {"rank": getattr(spec.adapter, "rank", None)} if settings.ranks else {}
    return said | ({"init": registry.to_json(spec.init)} if settings.inits else {})


def typical(spec: Spec, shape: Shape, width: int) -> cost.Cell:
    """A candidate priced without its matrix, or those of all experts: exact bytes, and the error on normal data."""
    *experts, m, n = shape
    format, count, held = spec.format, math.prod(experts), cost.numbers(spec.adapter, m, n)
    if format is None:
        return cost.Cell(math.prod(shape) * width, 0, *held, 0.0)
    if format not in _normal:
        W = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
        _normal[format] = cost.row(W, [Spec(format, RTN())], {}, cost.error("weight", W, {}), width)[0].loss
    return cost.Cell(count * format.storage_bits(m, n) // 8, count * cost.overhead(format, m, n), *held, _normal[format])


_normal: dict[Format, float] = {}


def variants(menu: Menu) -> list[dict[str, Option]]:
    """Three plans of a menu that lie apart in what they lose: the choices whose loss is nearest to equal steps of its logarithm."""
    low, high = smallest(menu), sum(max(o.bytes for o in options) for options in menu.values())
    path = [Lagrange()(menu, low + (high - low) * i // 40) for i in range(41)]
    losses = [sum(o.loss for o in choice.values()) for choice in path]
    top, bottom = math.log(losses[0] or 1.0), math.log(max(losses[-1], 1e-3 * losses[0]) or 1.0)
    wanted = [top + (bottom - top) * share for share in STEPS]
    picked = {min(range(41), key=lambda i: abs(math.log(losses[i] or 1e-300) - w)) for w in wanted}
    return [path[i] for i in sorted(picked)]


STEPS = (0.15, 0.45, 0.8)
