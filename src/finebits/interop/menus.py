"""The menu of a model: what every matrix could be, and what that costs and loses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from finebits import registry
from finebits.adapters.base import of_rank
from finebits.build import Progress
from finebits.formats.base import Format
from finebits.formats.int import Int
from finebits.interop.pricing import Calibration, CostTable, price
from finebits.interop.ranking import check_ranked
from finebits.interop.selecting import Mistake, Shape
from finebits.plan import cost
from finebits.plan.base import Option, Spec, served
from finebits.plan.knapsack import hull, smallest
from finebits.plan.levers import Levers, Workload
from finebits.plan.planner import Menu
from finebits.quantizers.rtn import RTN

if TYPE_CHECKING:
    from finebits.recipe.settings import Settings

HEAD = (None, Int(8, block=128, scale="bf16"))


@dataclass(frozen=True)
class Coverage:
    """The matrices of a model that a plan chooses for: planned ones, the head where it may be chosen, those whose format is given.

    >>> covered = Coverage({"q_proj": (64, 64), "experts.up": (8, 64, 64)}, {"lm_head": (1000, 64)}, {})
    >>> covered.fused, list(covered.adapted), list(covered.all)
    (['experts.up'], ['q_proj'], ['q_proj', 'experts.up', 'lm_head'])
    """

    shapes: Mapping[str, Shape]
    head: Mapping[str, Shape]
    fixed: Mapping[str, Format | None]
    tables: Mapping[str, Shape] = field(default_factory=dict)  # the input embeddings where they may be quantized
    units: Mapping[str, int | None] = field(default_factory=dict)  # the columns that blocks must not leave, where the planner minds
    adapters: Mapping[str, Any] = field(default_factory=dict)  # None for a module without one; those that are not here have the settings'
    experts: Mapping[str, int] = field(default_factory=dict)  # of an expert's matrix, how many experts its layer has

    @property
    def all(self) -> dict[str, Shape]:
        return {**self.tables, **self.shapes, **self.head}

    @property
    def fused(self) -> list[str]:
        """Parameters that hold the matrices of all experts and cannot be taken apart: quantized, and trained by no adapter."""
        return [name for name, shape in self.shapes.items() if len(shape) == 3]

    @property
    def adapted(self) -> dict[str, Shape]:
        """The planned matrices that may have an adapter."""
        return {name: shape for name, shape in self.shapes.items() if len(shape) == 2}


@dataclass(frozen=True)
class PricedMenu:
    """What can be chosen: candidates and their prices by module, in one order; and what they were priced with."""

    specs: dict[str, list[Spec]]
    cells: dict[str, list[cost.Cell]]
    objective: str
    calibration: Calibration | None = None
    table: CostTable | None = None

    @property
    def menu(self) -> dict[str, list[Option]]:
        return {name: cost.options(self.cells[name], specs) for name, specs in self.specs.items()}


def priced_menu(
    settings: Settings,
    folder: Path,
    covered: Coverage,
    data: Any,
    levers: Levers,
    fast: bool,
    progress: Progress,
    priced: Workload,
) -> PricedMenu:
    """The candidate grid (formats × ranks × starts), priced on rows that the model meets under the workload `priced`. Without data, or from a
    config alone, `output` falls back to `weight`."""
    joint = bool(settings.ranks or settings.inits)
    width = levers.width
    specs = {name: candidates(settings, covered, name) for name in covered.all}
    objective = "weight" if settings.objective == "output" and (fast or data is None) else settings.objective
    if fast:
        cells = {name: [typical(s, covered.all[name], width) for s in specs[name]] for name in specs}
        return PricedMenu(specs, _weighed(cells, covered.experts), objective)
    nats = objective in ("fisher", "kl")
    planned = {name: _priced(specs[name], settings) for name in covered.shapes}
    needs = frozenset(cost.OBJECTIVES[objective]).union(*(s.quantizer.needs for v in planned.values() for s in v))
    needs = needs.union(*(s.init.needs for v in planned.values() for s in v)) if joint else needs
    calibration = None if data is None or not needs else Calibration(folder, data, priced)
    shapes = {name: (s[-2], s[-1]) for name, s in covered.all.items()}
    planned |= {name: specs[name] for name in covered.tables} if nats else {}
    cells, table = price(folder, planned, shapes, objective, calibration, width, joint, progress)
    ends = {name: specs[name] for name in (covered.head if nats else {**covered.head, **covered.tables})}
    if ends:  # what meets them is not gathered: their weight error stands for their output error, both relative
        cells |= price(folder, ends, shapes, "weight", None, width, progress=progress)[0]
    return PricedMenu(specs, cells if nats else _weighed(cells, covered.experts), objective, calibration, table)


def _weighed(cells: dict[str, list[cost.Cell]], experts: Mapping[str, int]) -> dict[str, list[cost.Cell]]:
    """Where all matrices count alike, those of a layer's experts count as one: a token meets few of them."""
    return {name: [replace(c, loss=c.loss / experts.get(name, 1)) for c in own] for name, own in cells.items()}


def _priced(specs: list[Spec], settings: Settings) -> list[Spec]:
    """The candidates as they are rounded while they are priced."""
    return specs if settings.pricing is None else [replace(s, quantizer=settings.pricing) for s in specs]


def candidates(settings: Settings, covered: Coverage, name: str) -> list[Spec]:
    """The candidates of one matrix. An adapter of another rank keeps its scale s.

    >>> from finebits.recipe.settings import Settings
    >>> settings = Settings(formats=(fb.NF(4), fb.NF(3)), ranks=(4, 8))
    >>> covered = Coverage({"q_proj": (64, 64)}, {}, {})
    >>> [(spec.format.bits, spec.adapter.rank) for spec in candidates(settings, covered, "q_proj")]
    [(4, 4), (4, 8), (3, 4), (3, 8)]
    """
    if name in covered.head:
        return [Spec(f) for f in HEAD]
    if name in covered.tables:
        quantizer = RTN() if settings.quantizer.needs else settings.quantizer
        return [Spec(f, quantizer) for f in dict.fromkeys(settings.embeddings)]
    formats, shape = [covered.fixed[name]] if name in covered.fixed else settings.formats, covered.shapes[name]
    if len(shape) == 3:
        return [Spec(f, settings.quantizer) for f in formats]
    if (unit := covered.units.get(name)) is not None:
        formats = _ending(formats, unit)
    own = covered.adapters.get(name, settings.adapter)
    adapters = [own and own.at(name)]
    inits = settings.inits if adapters[0] is not None else ()
    if settings.ranks:
        own = settings.adapter
        check_ranked(own)
        kept = [r for r in settings.ranks if r <= min(shape)]
        if not kept:
            raise Mistake(
                f"a {shape[0]}x{shape[1]} matrix has ranks up to {min(shape)}, and the smallest on offer is {min(settings.ranks)}"
            )
        adapters = [of_rank(own.at(name), r) for r in kept]
    starts = lambda a: [_admitted(a, i) for i in (inits or (settings.init,))]  # noqa: E731
    return [Spec(f, settings.quantizer, a, i) for f in formats for a in adapters for i in dict.fromkeys(starts(a))]


def _admitted(adapter: Any, init: Any) -> Any:
    """The start, or the own one of an adapter that a ranking has given out in the place of the recipe's and that takes no other."""
    if adapter is None or adapter.admits is None or registry.to_json(init)["paper"] in adapter.admits:
        return init
    return registry.load("init", adapter.own)()


def _ending(formats: Sequence[Format | None], unit: int) -> list[Format | None]:
    """Formats whose blocks end with a unit; of those that are then the same, the one of the smallest block."""
    unique: dict[Any, Format | None] = {}
    for f in sorted(cast(Sequence[Any], formats), key=lambda f: getattr(f, "block", 0)):
        unique.setdefault(None if f is None else replace(f, unit=unit, block=min(int(f.block), unit)), f and replace(f, unit=unit))
    return list(unique.values())


def line(spec: Spec, cell: cost.Cell, settings: Settings) -> dict[str, Any]:
    """One line of a menu as a plan keeps it."""
    entry: dict[str, Any] = {"format": registry.to_json(spec.format), "bytes": cell.bytes, "loss": cell.loss}
    if spec.adapter is None:
        return entry
    entry |= {"rank": spec.adapter.rank} if settings.ranks else {}
    return entry | ({"init": registry.to_json(spec.init)} if settings.inits else {})


def typical(spec: Spec, shape: Shape, width: int) -> cost.Cell:
    """A candidate priced without its matrix, or those of all experts: exact bytes, and the error on normal data."""
    *experts, m, n = shape
    format, count, numbers, codes = served(spec), math.prod(experts), cost.numbers(spec.adapter, m, n), cost.served_bytes(spec, m, n)
    if format is None:
        return cost.Cell(math.prod(shape) * width, 0, *numbers, 0.0)
    if format not in _normal:
        W = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
        _normal[format] = cost.row(W, [Spec(format, RTN())], {}, cost.error("weight", W, {}), width)[0].loss
    if spec.format is None:
        return cost.Cell(math.prod(shape) * width, 0, *numbers, _normal[format], codes)
    return cost.Cell(count * format.storage_bits(m, n) // 8, count * cost.overhead(format, m, n), *numbers, _normal[format], codes)


_normal: dict[Format, float] = {}
STEPS = (0.15, 0.45, 0.8)


def spread(menu: Menu) -> list[dict[str, Option]]:
    """Three plans of a menu that lie apart in what they lose: the choices whose loss is nearest to equal steps of its logarithm."""
    low, high = smallest(menu), sum(max(o.bytes for o in options) for options in menu.values())
    path = [hull(menu, low + (high - low) * i // 40) for i in range(41)]
    losses = [sum(o.loss for o in choice.values()) for choice in path]
    top, bottom = math.log(losses[0] or 1.0), math.log(max(losses[-1], 1e-3 * losses[0]) or 1.0)
    wanted = [top + (bottom - top) * share for share in STEPS]
    picked = {min(range(41), key=lambda i: abs(math.log(losses[i] or 1e-300) - w)) for w in wanted}
    return [path[i] for i in sorted(picked)]
