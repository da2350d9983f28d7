"""From a model and a budget to a plan."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finebits import registry
from finebits.adapters.lora import LoRA
from finebits.build import Progress
from finebits.data.rows import gathered
from finebits.data.tokens import to_batch, tokenize
from finebits.formats.base import Format
from finebits.formats.nf import NF
from finebits.init.loftq import LoftQ
from finebits.interop.hf import Tensors, fill, fingerprint, folder_of, skeleton, tokenizer_of
from finebits.plan import cost, memory
from finebits.plan._knapsack import dual_bound, smallest
from finebits.plan.base import Infeasible, Option, Plan, Planner, Spec
from finebits.plan.lagrange import Lagrange
from finebits.quantizers.base import Quantizer, check_finite
from finebits.quantizers.rtn import RTN
from finebits.sizes import parse, show
from finebits.stats.base import Statistic
from finebits.stats.collect import collect
from finebits.stats.mean_square import MeanSquare
from finebits.train import next_token_loss

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
    objective: str = "output"  # or "weight"
    calibration_rows: int = 16
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
    dtype = getattr(torch, levers["dtype"])
    model = skeleton(folder, dtype, levers.get("attn_implementation", "sdpa"))
    fill(model, Tensors(folder), dtype)
    batches = calibration(folder, data, levers, 1)
    note: Callable[[int], None] = lambda done: progress(done, len(batches), "calibration") if progress else None  # noqa: E731
    return collect(model, batches, next_token_loss, wanted, keep=lambda b: b["attention_mask"].bool(), progress=note)


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
    the best options whatever they take; `data` chat or text rows, used for calibration (without data the objective is the plain weight error).
    Every linear is priced in every candidate format, one matrix at a time. `fast` reads config.json alone: every matrix is taken to lose what
    its format loses on normal data. `pareto` also solves that many budgets between the smallest and the largest choice, into
    `plan.solver["pareto"]`. Raises Infeasible (exit code 3), which names the smallest budget that fits and what else could be given up.
    """
    settings = settings or Settings()
    model = _name_of(model) if isinstance(model, nn.Module) else model
    folder = Path(model) if fast and (Path(model) / "config.json").exists() else folder_of(model, settings.model_revision)
    meta = _meta(folder, settings.attn_implementation)
    shapes = targets(meta, settings.target_modules)
    fixed = _overrides(settings.overrides, list(shapes))
    levers = _levers(settings)
    width = getattr(torch, levers["dtype"]).itemsize
    others = {k: p.numel() for k, p in meta.named_parameters() if k.removesuffix(".weight") not in shapes}
    g = memory.geometry(meta.config.get_text_config(), others, shapes)
    spec = lambda f: Spec(f, settings.quantizer, settings.adapter, settings.init)  # noqa: E731

    wanted = {name: settings.quantizer.needs for name in shapes}
    weighted = settings.objective == "output" and data is not None and not fast
    if weighted:
        wanted = {name: s | {MeanSquare} for name, s in wanted.items()}
    stats = gather(folder, data, wanted, levers, progress) if weighted or any(wanted.values()) else {}
    tensors = None if fast else Tensors(folder)
    table: dict[str, list[cost.Cell]] = {}
    for i, (name, shape) in enumerate(shapes.items()):
        formats = [fixed[name]] if name in fixed else list(settings.formats)
        if tensors is None:
            table[name] = [_typical(f, *shape, width) for f in formats]
        else:
            W = tensors[f"{name}.weight"]
            check_finite(W, f"{name}.weight")
            st = stats.get(name, {})
            table[name] = cost.row(W, formats, settings.quantizer, st, st[MeanSquare].value() if weighted else None, width)
        progress(i + 1, len(shapes), name)
    menu = {name: cost.options(cells, spec) for name, cells in table.items()}

    size = sum(settings.adapter.size(*s) for s in shapes.values())
    rank = getattr(settings.adapter, "rank", 0)
    rest = memory.terms(g, 0, size, rank, levers)
    total = None if budget is None else int(parse(budget) * (1 - settings.reserve))
    picked, solver = _solve(menu, total, rest, settings, g, size, rank, levers)
    if pareto:
        solver["pareto"] = _pareto(menu, sum(rest.values()), settings.planner, pareto)
    linears = sum(o.bytes for o in picked.values())
    dense = sum(m * n for m, n in shapes.values()) * width
    costs = {
        name: {
            "shape": list(shapes[name]),
            "bytes": picked[name].bytes,
            "loss": picked[name].loss,
            "menu": [{"format": registry.to_json(c.format), "bytes": c.bytes, "loss": c.loss} for c in table[name]],
        }
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
        solver=solver | {"objective": "output" if weighted else "weight", "measured": not fast},
    )


def _solve(
    menu: Mapping[str, Sequence[Option]],
    total: int | None,
    rest: Mapping[str, int],
    settings: Settings,
    g: memory.Geometry,
    size: int,
    rank: int,
    levers: dict[str, Any],
) -> tuple[dict[str, Option], dict[str, Any]]:
    name = type(settings.planner).__module__.rsplit(".", 1)[-1]
    if total is None:
        picked = {k: min(v, key=lambda o: (o.loss, o.bytes)) for k, v in menu.items()}
        return picked, {"name": "unbounded", "loss": sum(o.loss for o in picked.values()), "bound": None, "gap": 0.0}
    left = total - sum(rest.values())
    if smallest(menu) > left:
        least = smallest(menu) + sum(rest.values())
        needed = int(least / (1 - settings.reserve)) + 1
        raise Infeasible(
            f"Does not fit: the smallest plan needs {show(needed)}, the budget is {show(total / (1 - settings.reserve))}.",
            needed,
            _ways_out(menu, needed - int(total / (1 - settings.reserve)), rest, g, size, rank, levers, needed),
        )
    picked = settings.planner(menu, left)
    loss, bound = sum(o.loss for o in picked.values()), dual_bound(menu, left)
    return picked, {"name": name, "loss": loss, "bound": bound, "gap": (loss - bound) / bound if bound > 0 else 0.0}


def _name_of(model: nn.Module) -> str:
    """Where a transformers model came from: a plan reads weights from files, matrix by matrix, and must find them again."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ValueError("this model does not say where it was loaded from (config._name_or_path is empty): save it and give the folder")
    return name


def _pareto(menu: Mapping[str, Sequence[Option]], rest: int, planner: Planner, count: int) -> list[dict[str, float]]:
    """What each of `count` budgets, evenly spaced, would lose: training peak and loss."""
    low, high = smallest(menu), sum(max(o.bytes for o in options) for options in menu.values())
    points = []
    for i in range(count):
        picked = planner(menu, low + (high - low) * i // max(count - 1, 1))
        points.append({"peak": rest + sum(o.bytes for o in picked.values()), "loss": sum(o.loss for o in picked.values())})
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


def _typical(format: Format | None, m: int, n: int, width: int) -> cost.Cell:
    """A candidate priced without its matrix: exact bytes, and the error on normal data."""
    if format is None:
        return cost.Cell(None, m * n * width, 0.0)
    if format not in _normal:
        W = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
        _normal[format] = cost.row(W, [format], RTN(), {}, None, width)[0].loss
    return cost.Cell(format, format.storage_bits(m, n) // 8, _normal[format])


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


def _levers(s: Settings) -> dict[str, Any]:
    kept = ("attn_implementation", "max_length", "per_device_train_batch_size", "gradient_checkpointing", "loss_chunk", "dropout")
    kept += ("gradient_accumulation_steps",)
    kept += ("device", "calibration", "calibration_rows", "assistant_only_loss", "model_revision")
    if s.calibration not in ("collect", "sweep"):
        raise ValueError(f"calibration is {s.calibration!r}; it can be 'collect' or 'sweep'")
    refine = {"refine": [registry.to_json(r) for r in s.refine]} if s.refine else {}
    return {"dtype": compute_dtype(s.dtype, s.device)} | {k: getattr(s, k) for k in kept} | refine
