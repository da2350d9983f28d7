"""From a model and a budget to a plan."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finebits import registry
from finebits.adapters.lora import LoRA
from finebits.build import Progress
from finebits.formats.base import Format
from finebits.formats.nf import NF
from finebits.init.loftq import LoftQ
from finebits.interop.hf import fingerprint, folder_of
from finebits.interop.pricing import Calibration, Table, evaluate, price
from finebits.plan import _curve, cost, memory
from finebits.plan._knapsack import dual_bound, smallest
from finebits.plan._ranks import of_rank
from finebits.plan.base import Infeasible, Option, Plan, Planner, Spec
from finebits.plan.lagrange import Lagrange
from finebits.plan.milp import MILP
from finebits.quantizers.base import Quantizer
from finebits.quantizers.rtn import RTN
from finebits.sizes import parse, show
from finebits.stats.base import Statistic

CANDIDATES = tuple(NF(bits, block=block, scale="bf16") for bits in (2, 3, 4) for block in (64, 128)) + (NF(8, block=128, scale="bf16"),)


@dataclass(frozen=True)
class Settings:
    """What a plan is made from beside the model, the budget and the data: candidates, adapter, start, and the levers that are fixed."""

    formats: tuple[Format | None, ...] = CANDIDATES
    quantizer: Quantizer = field(default_factory=RTN)
    adapter: Any = field(default_factory=LoRA)
    init: Any = field(default_factory=LoftQ)
    calibration: str = "collect"  # or "sweep"
    refine: tuple[Any, ...] = ()
    planner: Planner = field(default_factory=Lagrange)
    objective: str = "output"  # one of finebits.plan.cost.OBJECTIVES
    calibration_rows: int = 16
    ranks: tuple[int, ...] = ()  # ranks to choose from, matrix by matrix; none: the adapter's own everywhere
    inits: tuple[Any, ...] = ()  # starts to choose from; none: `init` everywhere, and errors are those of the quantized weight alone
    serve_budget: int | None = None  # bytes of the tuned model as it is saved: weights, embeddings, head, norms, adapters
    locks: Mapping[str, Format | None] = field(default_factory=dict)  # module, or the end of its name, -> the format that it must have
    target_modules: str | Sequence[str] = "all-linear"
    overrides: Mapping[str, Format | None] = field(default_factory=dict)
    reserve: float = 0.0  # share of the budget that stays free
    seed: int = 42
    dtype: str = "auto"
    device: str = "cpu"
    attn_implementation: str = "sdpa"
    max_length: int = 512
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    loss_chunk: int = 256
    dropout: float = 0.0
    assistant_only_loss: bool = True
    model_revision: str | None = None


def compute_dtype(wanted: str, device: str) -> str:
    """The dtype of activations: "auto" is bfloat16 where the device computes in it, else float32."""
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bfloat16"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags.split() else "float32"


def targets(model: nn.Module, wanted: str | Sequence[str]) -> dict[str, tuple[int, int]]:
    """The linears that a plan covers: name -> (m, n). "all-linear" is every nn.Linear but the output head; a list names endings, a string
    is a regular expression over whole names. Raises ValueError if an ending or expression matches nothing."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    linears = {k: m for k, m in model.named_modules() if type(m) is nn.Linear and m is not head}
    shapes = {k: (m.out_features, m.in_features) for k, m in linears.items()}
    if wanted == "all-linear":
        found = shapes
    elif isinstance(wanted, str):
        found = {k: s for k, s in shapes.items() if re.fullmatch(wanted, k)}
    else:
        for ending in wanted:
            if not any(k == ending or k.endswith(f".{ending}") for k in shapes):
                raise ValueError(f"target_modules names {ending}, and no linear of the model ends so")
        found = {k: s for k, s in shapes.items() if any(k == e or k.endswith(f".{e}") for e in wanted)}
    if not found:
        raise ValueError(f"target_modules {wanted!r} matches no linear of the model")
    return found


def gather(
    folder: Path, data: Any, wanted: Mapping[str, frozenset[type[Statistic]]], levers: Mapping[str, Any], progress: Progress | None = None
) -> dict[str, dict[type[Statistic], Statistic]]:
    """Statistics of the unquantized model over the first `calibration_rows` rows of `data`."""
    return Calibration(folder, data, levers).statistics(wanted, progress=progress)[0]


def calibration(folder: Path, data: Any, levers: Mapping[str, Any], per_batch: int) -> list[dict[str, Any]]:
    """The first `calibration_rows` rows of `data` as batches, rows of like length together."""
    tokenizer = tokenizer_of(folder)
    rows = gathered(data)[: levers.get("calibration_rows", 16)]
    examples = tokenize(rows, tokenizer, levers["max_length"], levers.get("assistant_only_loss", True))
    if per_batch > 1:
        examples.sort(key=lambda e: -len(e.input_ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return [to_batch(examples[i : i + per_batch], pad) for i in range(0, len(examples), per_batch)]


def plan_model(
    model: str | Path | nn.Module,
    budget: str | int | None,
    data: Any = None,
    settings: Settings | None = None,
    progress: Progress = lambda done, total, name: None,
    fast: bool = False,
    pareto: int = 0,
) -> Plan:
    """The plan with the least expected loss whose training peak fits the budget.

    `model` is a folder, hub id, .gguf, package:NAME, or a transformers model loaded from one of these; `budget` a size ("400MiB") or None for
    the best options whatever they take; `data` chat or text rows, used for calibration (without data `output` falls back to `weight`).
    Every linear is priced under every candidate, one matrix at a time, and prices are kept in the cache. `fast` reads config.json alone:
    every matrix is taken to lose what its format loses on normal data. `pareto` also solves that many budgets between the smallest and the
    largest choice, into `plan.solver["pareto"]`. Raises Infeasible (exit code 3), which names the smallest budget that fits and what else
    could be given up.
    """
    settings = settings or Settings()
    model = _name_of(model) if isinstance(model, nn.Module) else model
    folder = Path(model) if fast and (Path(model) / "config.json").exists() else folder_of(model, settings.model_revision)
    meta = _meta(folder, settings.attn_implementation)
    shapes = targets(meta, settings.target_modules)
    fixed = _overrides(settings.overrides, list(shapes)) | _locked(settings.locks, list(shapes))
    levers = _levers(settings)
    width = getattr(torch, levers["dtype"]).itemsize
    others = {k: p.numel() for k, p in meta.named_parameters() if k.removesuffix(".weight") not in shapes}
    g = memory.geometry(meta.config.get_text_config(), others, shapes)
    offer = _offer(settings, folder, shapes, fixed, data, levers, width, fast, progress)
    varied = bool(settings.ranks)
    menu = {name: cost.options(offer.cells[name], offer.specs[name], varied) for name in shapes}

    size = 0 if varied else sum(settings.adapter.size(*s) for s in shapes.values())  # where ranks vary, options hold their own
    rank = max((getattr(s.adapter, "rank", 0) for specs in offer.specs.values() for s in specs), default=0)
    rest = memory.terms(g, 0, size, rank, levers)
    total = None if budget is None else int(parse(budget) * (1 - settings.reserve))
    apart = (g.embeddings + g.head + g.other) * width  # what the saved model holds beside planned matrices and adapters
    planner, cap = _planner(settings, menu, apart)
    picked, solver, left = _solve(menu, total, rest, settings, planner, cap, g, size, rank, levers)
    curve = None
    if offer.objective == "kl" and offer.calibration is not None and offer.table is not None:
        curve = _fitted(offer.calibration, offer.table, menu, progress)
        picked, tried = trials(menu, lambda m: planner(m, left), offer.calibration, offer.table, progress)
        loss = sum(o.loss for o in picked.values())
        solver |= {"loss": loss, "gap": _gap(loss, solver["bound"]), "trials": tried, "kl": curve.said(loss) | {"measured": tried[0]["kl"]}}
    if pareto:
        solver["pareto"] = _pareto(menu, sum(rest.values()), planner, pareto, curve)
    if settings.serve_budget is not None:
        solver["serve"] = {"budget": settings.serve_budget, "planned": apart + int(sum(o.more["serve"] for o in picked.values()))}
    cells = {name: offer.cells[name][offer.specs[name].index(picked[name].spec)] for name in shapes}
    linears, size = sum(c.bytes for c in cells.values()), sum(c.trained for c in cells.values())
    rank = max((getattr(o.spec.adapter, "rank", 0) for o in picked.values()), default=0)
    dense = sum(m * n for m, n in shapes.values()) * width
    costs = {
        name: {
            "shape": list(shapes[name]),
            "bytes": cells[name].bytes,
            "loss": cells[name].loss,
            "menu": [_line(spec, cell, settings) for spec, cell in zip(offer.specs[name], offer.cells[name], strict=True)],
        }
        | ({"chosen": offer.specs[name].index(picked[name].spec)} if settings.ranks or settings.inits else {})
        for name in shapes
    }
    return Plan(
        modules={name: o.spec for name, o in picked.items()},
        model=str(model),
        model_hash="" if fast else fingerprint(folder),
        seed=settings.seed,
        budget=None if budget is None else parse(budget),
        memory=memory.terms(g, linears, size, rank, levers),
        rows=memory.rows(g, linears, dense, size, levers),
        levers=levers,
        costs=costs,
        solver=solver | {"objective": offer.objective, "measured": not fast},
    )


@dataclass(frozen=True)
class Offer:
    """What can be chosen: candidates and their prices by module, in one order; and what they were priced with."""

    specs: dict[str, list[Spec]]
    cells: dict[str, list[cost.Cell]]
    objective: str
    calibration: Calibration | None = None
    table: Table | None = None


def _offer(
    settings: Settings,
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    fixed: Mapping[str, Format | None],
    data: Any,
    levers: Mapping[str, Any],
    width: int,
    fast: bool,
    progress: Progress,
) -> Offer:
    """The candidate grid (formats × ranks × starts), priced. Without data, or from a config alone, `output` falls back to `weight`."""
    joint = bool(settings.ranks or settings.inits)
    specs = {name: _specs(settings, [fixed[name]] if name in fixed else settings.formats, shape) for name, shape in shapes.items()}
    objective = settings.objective
    if objective not in cost.OBJECTIVES:
        raise ValueError(f"the objective is {objective!r}; it can be {', '.join(cost.OBJECTIVES)}")
    if fast and joint:
        raise ValueError("ranks and starts are chosen by what they do to the weights, and --fast does not read them: plan without it")
    if objective == "output" and (fast or data is None):
        objective = "weight"
    if fast:
        if objective != "weight":
            raise ValueError(f"the objective {objective} needs the model's weights and rows, and --fast reads neither: plan without it")
        return Offer(specs, {name: [_typical(s, *shapes[name], width) for s in specs[name]] for name in shapes}, objective)
    calibration = None if data is None else Calibration(folder, data, levers)
    cells, table = price(folder, specs, shapes, objective, calibration, width, joint, progress)
    return Offer(specs, cells, objective, calibration, table)


def _specs(settings: Settings, formats: Sequence[Format | None], shape: tuple[int, int]) -> list[Spec]:
    """The candidates of one matrix. An adapter of another rank keeps its scale s."""
    adapters = [settings.adapter]
    if settings.ranks:
        own = settings.adapter
        if not hasattr(own, "rank"):
            raise ValueError(f"ranks are to be chosen, and {type(own).__name__} has none: leave ranks out or use another adapter")
        kept = [r for r in settings.ranks if r <= min(shape)]
        if not kept:
            raise ValueError(
                f"a {shape[0]}x{shape[1]} matrix has ranks up to {min(shape)}, and the smallest on offer is {min(settings.ranks)}"
            )
        adapters = [of_rank(own, r) for r in kept]
    return [Spec(f, settings.quantizer, a, i) for f in formats for a in adapters for i in (settings.inits or (settings.init,))]


def _line(spec: Spec, cell: cost.Cell, settings: Settings) -> dict[str, Any]:
    """One line of a menu as a plan keeps it."""
    line: dict[str, Any] = {"format": registry.to_json(spec.format), "bytes": cell.bytes, "loss": cell.loss}
    line |= {"rank": getattr(spec.adapter, "rank", None)} if settings.ranks else {}
    return line | ({"init": registry.to_json(spec.init)} if settings.inits else {})


def _planner(settings: Settings, menu: Mapping[str, Sequence[Option]], apart: int) -> tuple[Planner, int | None]:
    """The planner, and what a second budget, of the saved model, leaves for options. Where ranks vary, that is another sum than the training
    peak's, and two sums are the integer program's; else it is the same sum but for what is fixed, and the smaller of the two limits counts."""
    if settings.serve_budget is None:
        return settings.planner, None
    left = settings.serve_budget - apart
    least = sum(min(o.more["serve"] for o in options) for options in menu.values())
    if least > left:
        raise Infeasible(
            f"Does not fit: the smallest model that can be saved takes {show(int(least) + apart)}, the serve budget is "
            f"{show(settings.serve_budget)}.",
            int(least) + apart,
            f"Of these, {show(apart)} are embeddings, head and norms. Raise --serve-budget, or offer formats of fewer bits.",
        )
    if not settings.ranks:
        fixed = int(sum(options[0].more["serve"] - options[0].bytes for options in menu.values()))
        return settings.planner, left - fixed
    given = settings.planner if isinstance(settings.planner, MILP) else MILP()
    return replace(given, serve=left), None


@dataclass(frozen=True)
class Fitted:
    """Predicted loss to KL, and the variants that it was fitted on."""

    curve: _curve.Curve
    points: list[_curve.Point]

    def said(self, loss: float) -> dict[str, Any]:
        """What a plan keeps: the interval, and what it comes from."""
        seen = [{"loss": p.predicted, "kl": p.measured, "error": p.error} for p in self.points]
        return {"interval": list(self.curve(loss)), "share": _curve.SHARE, "variants": seen}


def _fitted(calibration: Calibration, table: Table, menu: Mapping[str, Sequence[Option]], progress: Progress) -> Fitted:
    """KL really measured for three plans of this menu, the same for every budget, and the curve through them."""
    points = evaluate(calibration, variants(menu), table, progress)
    return Fitted(_curve.fit(points), points)


SATURATIONS = (0.0, 1.0, 3.0, 10.0)


def trials(
    menu: Mapping[str, Sequence[Option]],
    choose: Callable[[Mapping[str, Sequence[Option]]], Mapping[str, Option]],
    calibration: Calibration,
    table: Table,
    progress: Progress = lambda done, total, name: None,
) -> tuple[dict[str, Option], list[dict[str, float]]]:
    """The choice that really has the least KL on the calibration's other rows, of those with the least Σ log(1 + κ·loss) / κ.

    κ = 0 is the plain sum; with a larger κ a matrix that is lost already cannot lose much more, which is what a sum of second-order
    estimates does not know where KL is above one. Also what was tried, the best first: κ, predicted loss, measured KL and its error.
    """
    found: list[dict[str, Option]] = []
    for k in SATURATIONS:
        bent = {name: [replace(o, loss=math.log1p(k * o.loss) / k) if k else o for o in options] for name, options in menu.items()}
        picked = choose(bent)
        found.append({name: menu[name][next(i for i, o in enumerate(bent[name]) if o is picked[name])] for name in menu})
    points = evaluate(calibration, found, table, progress)
    order = sorted(range(len(found)), key=lambda i: (points[i].measured, i))
    tried = [{"saturation": SATURATIONS[i], "loss": points[i].predicted, "kl": points[i].measured, "error": points[i].error} for i in order]
    return found[order[0]], tried


def variants(menu: Mapping[str, Sequence[Option]]) -> list[dict[str, Option]]:
    """Three plans of a menu that lie apart in what they lose: the choices whose loss is nearest to equal steps of its logarithm."""
    low, high = smallest(menu), sum(max(o.bytes for o in options) for options in menu.values())
    path = [Lagrange()(menu, low + (high - low) * i // 40) for i in range(41)]
    losses = [sum(o.loss for o in choice.values()) for choice in path]
    top, bottom = math.log(losses[0] or 1.0), math.log(max(losses[-1], 1e-3 * losses[0]) or 1.0)
    wanted = [top + (bottom - top) * share for share in STEPS]
    picked = {min(range(41), key=lambda i: abs(math.log(losses[i] or 1e-300) - w)) for w in wanted}
    return [path[i] for i in sorted(picked)]


STEPS = (0.15, 0.45, 0.8)


def _solve(
    menu: Mapping[str, Sequence[Option]],
    total: int | None,
    rest: Mapping[str, int],
    settings: Settings,
    planner: Planner,
    cap: int | None,
    g: memory.Geometry,
    size: int,
    rank: int,
    levers: dict[str, Any],
) -> tuple[dict[str, Option], dict[str, Any], int]:
    """The choice, what is known about it, and the bytes that it had. `cap` limits the menu's bytes beside the budget."""
    name = type(planner).__module__.rsplit(".", 1)[-1]
    left = sum(max(o.bytes for o in options) for options in menu.values())
    if total is None and cap is None and not isinstance(planner, MILP):
        picked = {k: min(v, key=lambda o: (o.loss, o.bytes)) for k, v in menu.items()}
        return picked, {"name": "unbounded", "loss": sum(o.loss for o in picked.values()), "bound": None, "gap": 0.0}, left
    if total is not None:
        left = min(left, total - sum(rest.values()))
    if total is not None and smallest(menu) > left:
        least = smallest(menu) + sum(rest.values())
        needed = int(least / (1 - settings.reserve)) + 1
        raise Infeasible(
            f"Does not fit: the smallest plan needs {show(needed)}, the budget is {show(total / (1 - settings.reserve))}.",
            needed,
            _ways_out(menu, needed - int(total / (1 - settings.reserve)), rest, g, size, rank, levers, needed),
        )
    left = left if cap is None else min(left, cap)
    if isinstance(planner, MILP):
        picked, bound, _ = planner.solve(menu, left)
    else:
        picked, bound = planner(menu, left), dual_bound(menu, left)
    loss = sum(o.loss for o in picked.values())
    return picked, {"name": name, "loss": loss, "bound": bound, "gap": _gap(loss, bound)}, left


def _gap(loss: float, bound: float | None) -> float:
    return max(loss - bound, 0.0) / bound if bound is not None and bound > 0 else 0.0


def _name_of(model: nn.Module) -> str:
    """Where a transformers model came from: a plan reads weights from files, matrix by matrix, and must find them again."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ValueError("this model does not say where it was loaded from (config._name_or_path is empty): save it and give the folder")
    return name


def _pareto(
    menu: Mapping[str, Sequence[Option]], rest: int, planner: Planner, count: int, curve: Fitted | None = None
) -> list[dict[str, Any]]:
    """What each of `count` budgets, evenly spaced, would lose: training peak and loss, and the interval of KL where it is predicted.

    Budgets that side constraints leave nothing for are left out."""
    low, high = smallest(menu), sum(max(o.bytes for o in options) for options in menu.values())
    points = []
    for i in range(count):
        try:
            picked = planner(menu, low + (high - low) * i // max(count - 1, 1))
        except Infeasible:
            continue
        loss = sum(o.loss for o in picked.values())
        point: dict[str, Any] = {"peak": rest + sum(o.bytes for o in picked.values()), "loss": loss}
        points.append(point | ({"kl": list(curve.curve(loss))} if curve else {}))
    return points


def _ways_out(
    menu: Any, short: int, rest: Mapping[str, int], g: memory.Geometry, size: int, rank: int, levers: dict[str, Any], needed: int
) -> str:
    """What could be given up, each alone, with what it saves; those that are enough come first."""
    now = sum(rest.values())
    tried: list[tuple[str, dict[str, Any]]] = []
    if levers["per_device_train_batch_size"] > 1:
        half = levers["per_device_train_batch_size"] // 2
        tried.append((f"training.per_device_train_batch_size={half}", {"per_device_train_batch_size": half}))
    if levers["max_length"] > 64:
        tried.append((f"data.max_length={levers['max_length'] // 2}", {"max_length": levers["max_length"] // 2}))
    if not levers["gradient_checkpointing"]:
        tried.append(("training.gradient_checkpointing=true", {"gradient_checkpointing": True}))
    if levers["loss_chunk"] > 32:
        tried.append((f"training.loss_chunk={levers['loss_chunk'] // 4}", {"loss_chunk": levers["loss_chunk"] // 4}))
    saved = [(now - sum(memory.terms(g, 0, size, rank, levers | change).values()), text) for text, change in tried]
    saved += [(now - sum(memory.terms(g, 0, size // 2, rank // 2, levers).values()), f"adapter.rank={rank // 2}")] if rank > 1 else []
    lines = [f"  budget.memory={-(-needed // 2**20)}MiB".ljust(52) + "fits"]
    for gain, text in sorted(saved, reverse=True):
        if gain > 0:
            lines.append(f"  {text}".ljust(52) + f"saves {show(gain)}" + ("  fits" if gain >= short else ""))
    return "What could be given up, each alone:\n" + "\n".join(lines)


def _typical(spec: Spec, m: int, n: int, width: int) -> cost.Cell:
    """A candidate priced without its matrix: exact bytes, and the error on normal data."""
    format, trained = spec.format, spec.adapter.size(m, n) if spec.adapter is not None else 0
    if format is None:
        return cost.Cell(m * n * width, 0, trained, 0.0)
    if format not in _normal:
        W = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
        _normal[format] = cost.row(W, [Spec(format, RTN())], {}, cost.error("weight", W, {}), width)[0].loss
    return cost.Cell(format.storage_bits(m, n) // 8, cost.overhead(format, m, n), trained, _normal[format])


_normal: dict[Format, float] = {}


def _meta(folder: Path, attention: str) -> Any:
    """The model of a folder, wholly on the meta device: shapes only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.tie_weights()
    return model


def _overrides(overrides: Mapping[str, Format | None], names: Iterable[str]) -> dict[str, Format | None]:
    """Formats that the user fixed by regular expression; one that matches nothing is an error."""
    names, fixed = list(names), {}
    for pattern, format in overrides.items():
        hit = [n for n in names if re.fullmatch(pattern, n)]
        if not hit:
            hint = f"they are {', '.join(names[:3])}, …"
            if any(pattern in n for n in names):
                hint = f"whole names are compared, so write .*{pattern}.* for those that contain it"
            raise ValueError(f"quantization.overrides has {pattern!r}, which matches no planned linear of this model: {hint}")
        fixed.update(dict.fromkeys(hit, format))
    return fixed


def _locked(locks: Mapping[str, Format | None], names: Sequence[str]) -> dict[str, Format | None]:
    """Formats that the user locked: a whole name or its end (layers.3.mlp.down_proj, o_proj), or a pattern with * of either (layers.0.*)."""
    fixed: dict[str, Format | None] = {}
    for wanted, format in locks.items():
        hit = [n for n in names if fnmatch.fnmatchcase(n, wanted) or fnmatch.fnmatchcase(n, f"*.{wanted}")]
        if not hit:
            near = difflib.get_close_matches(wanted, [*names, *{n.rpartition(".")[2] for n in names}], 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(names[:3])}, …"
            raise Mistake(f"--lock names {wanted}, and no planned linear of this model is called or ends so: {hint}")
        fixed.update(dict.fromkeys(hit, format))
    return fixed


class Mistake(ValueError):
    """Something that the user asked for and that this model does not have."""

    code = 2


def _levers(s: Settings) -> dict[str, Any]:
    kept = ("attn_implementation", "max_length", "per_device_train_batch_size", "gradient_checkpointing", "loss_chunk", "dropout")
    kept += ("gradient_accumulation_steps",)
    kept += ("device", "calibration", "calibration_rows", "assistant_only_loss", "model_revision")
    if s.calibration not in ("collect", "sweep"):
        raise ValueError(f"calibration is {s.calibration!r}; it can be 'collect' or 'sweep'")
    refine = {"refine": [registry.to_json(r) for r in s.refine]} if s.refine else {}
    return {"dtype": compute_dtype(s.dtype, s.device)} | {k: getattr(s, k) for k in kept} | refine
