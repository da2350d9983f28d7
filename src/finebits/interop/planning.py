"""From a model and a budget to a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finebits import registry
from finebits.adapters.base import frozen_size
from finebits.adapters.lora import LoRA
from finebits.build import Progress
from finebits.data.rows import gathered
from finebits.data.tokens import to_batch, tokenize
from finebits.formats.base import Format
from finebits.formats.int import Int
from finebits.formats.nf import NF
from finebits.init.loftq import LoftQ
from finebits.interop.hf import Tensors, fill, fingerprint, folder_of, skeleton, special_head, tokenizer_of
from finebits.losses import IGNORED
from finebits.plan import cost, memory, whole
from finebits.plan.base import Infeasible, Plan, Planner, Spec
from finebits.plan.compare import Offer, offer, ranked
from finebits.plan.lagrange import Lagrange
from finebits.quantizers.base import Quantizer, check_finite
from finebits.quantizers.rtn import RTN
from finebits.sizes import parse
from finebits.stats.base import Statistic
from finebits.stats.collect import collect
from finebits.stats.mean_square import MeanSquare
from finebits.train import met, next_token_loss

CANDIDATES = tuple(NF(bits, block=block, scale="bf16") for bits in (2, 3, 4) for block in (64, 128)) + (NF(8, block=128, scale="bf16"),)


@dataclass(frozen=True)
class Settings:
    """What a plan is made from beside the model, the budget and the data: candidates, adapter, start, and the levers that are fixed."""

    formats: tuple[Format | None, ...] = CANDIDATES
    quantizer: Quantizer = field(default_factory=RTN)
    adapter: Any = field(default_factory=LoRA)
    init: Any = field(default_factory=LoftQ)
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
    optim: str = "adamw_torch"
    levers: tuple[str, ...] = ()  # of finebits.plan.whole.PULLS: those that the plan may change
    max_steps: int = -1  # as in a recipe: how many batches of the data are met
    num_train_epochs: float = 1.0
    runtime: int | None = None  # what the process holds beside tensors, where a probe has measured it
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


def targets(model: nn.Module, wanted: str | Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The matrices that a plan covers: name -> (m, n), or (e, m, n) where one parameter holds the matrices of all experts.

    "all-linear" is every nn.Linear but the output head, and every such parameter; a list names endings, a string is a regular expression
    over whole names. Raises ValueError if an ending or expression matches nothing."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    shapes: dict[str, tuple[int, ...]] = {}
    for k, m in model.named_modules():
        if type(m) is nn.Linear and m is not head:
            shapes[k] = (m.out_features, m.in_features)
        shapes |= {f"{k}.{own}": tuple(p.shape) for own, p in m.named_parameters(recurse=False) if p.ndim == 3 and k.endswith("experts")}
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
    tokenizer = tokenizer_of(folder)
    rows = gathered(data)
    examples = tokenize(
        rows[: levers.get("calibration_rows", 16)], tokenizer, levers["max_length"], levers.get("assistant_only_loss", True)
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batches = [to_batch([e], pad) for e in examples]
    note: Callable[[int], None] = lambda done: progress(done, len(batches), "calibration") if progress else None  # noqa: E731
    return collect(model, batches, next_token_loss, wanted, keep=lambda b: b["attention_mask"].bool(), progress=note)


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
    the best options whatever they take; `data` chat or text rows, used for calibration (without data the objective is the plain weight error)
    and to count what the batches of training hold (without data every row is full, and every token trained).
    Every linear is priced in every candidate format, one matrix at a time. `fast` reads config.json alone: every matrix is taken to lose what
    its format loses on normal data. `pareto` also solves that many budgets between the smallest and the largest choice, into
    `plan.solver["pareto"]`. Raises Infeasible (exit code 3), which names the smallest budget that fits and what else could be given up.
    """
    settings = settings or Settings()
    model = _name_of(model) if isinstance(model, nn.Module) else model
    folder = folder_of(model, settings.model_revision, config_only=fast)
    meta = _meta(folder, settings.attn_implementation)
    shapes = targets(meta, settings.target_modules)
    experts = [name for name, shape in shapes.items() if len(shape) == 3]
    if experts and not fast:
        raise ValueError(f"{experts[0]} holds all experts in one tensor, which can be planned for (--fast) and not yet be quantized")
    fixed = _overrides(settings.overrides, list(shapes))
    head = _head(meta) if "head" in settings.levers else {}
    levers = _levers(settings)
    width = getattr(torch, levers["dtype"]).itemsize
    others = {k: p.numel() for k, p in meta.named_parameters() if k.removesuffix(".weight") not in shapes | head}
    adapted = [(s[-2], s[-1]) for name, s in shapes.items() if name not in experts]
    counts = [(settings.adapter.size(*s), frozen_size(settings.adapter, *s)) for s in adapted]
    trained = memory.Trained(sum(t for t, _ in counts), sum(f for _, f in counts), getattr(settings.adapter, "rank", 0))
    dense = sum(math.prod(s) for s in shapes.values()) * width
    geometry = memory.geometry(meta.config.get_text_config(), others, shapes)
    shapes |= head  # chosen as a matrix is, dense or in 8 bits, and trained by no adapter
    around = whole.Around(geometry, trained, dense, settings.reserve, tuple(settings.levers))

    def spec(name: str) -> Callable[[Format | None], Spec]:
        if name in head:
            return lambda f: Spec(f)
        return lambda f: Spec(f, settings.quantizer) if name in experts else Spec(f, settings.quantizer, settings.adapter, settings.init)

    if data is not None and not fast:
        levers |= batches(folder, data, settings)
    wanted = {name: settings.quantizer.needs for name in shapes if name not in head}
    weighted = settings.objective == "output" and data is not None and not fast
    if weighted:
        wanted = {name: s | {MeanSquare} for name, s in wanted.items()}
    stats = gather(folder, data, wanted, levers, progress) if weighted or any(wanted.values()) else {}
    tensors = None if fast else Tensors(folder)
    table: dict[str, list[cost.Cell]] = {}
    for i, (name, shape) in enumerate(shapes.items()):
        formats = list(HEAD) if name in head else [fixed[name]] if name in fixed else list(settings.formats)
        if tensors is None:
            table[name] = [_typical(f, shape, width) for f in formats]
        else:
            W = tensors[f"{name}.weight"]
            check_finite(W, f"{name}.weight")
            st = stats.get(name, {})
            d = st[MeanSquare].value() if weighted and name not in head else None
            table[name] = cost.row(W, formats, RTN() if name in head else settings.quantizer, st, d, width)
        progress(i + 1, len(shapes), name)
    menu = {name: cost.options(cells, spec(name)) for name, cells in table.items()}
    listed = {
        name: [{"format": registry.to_json(c.format), "bytes": c.bytes, "loss": c.loss} for c in cells] for name, cells in table.items()
    }
    unsolved = Plan(
        modules={name: options[0].spec for name, options in menu.items()},
        model=str(model),
        model_hash="" if fast else fingerprint(folder),
        seed=settings.seed,
        budget=None if budget is None else parse(budget),
        levers=levers,
        costs={name: {"shape": list(s), "menu": listed[name]} | ({"head": True} if name in head else {}) for name, s in shapes.items()},
        solver={"objective": "output" if weighted else "weight", "measured": not fast},
        sizes=around.to_json(),
    )
    return whole.whole(unsolved, menu, settings.planner, pareto)


def compare(budget: str | int, models: Sequence[str], settings: Settings, progress: Progress, fast: bool = False) -> list[Offer]:
    """What each model could be within the budget, the best buy first (finebits.plan.compare says on what that rests). Every lever may be
    pulled; the objective is the plain weight error. A folder that holds a config.json alone is planned for from that."""
    offers = []
    for model in models:
        folder = folder_of(model, settings.model_revision, config_only=fast)
        parameters = sum(p.numel() for p in _meta(folder, settings.attn_implementation).parameters())
        own = replace(settings, objective="weight", levers=whole.PULLS)
        try:
            plan = plan_model(model, budget, None, own, progress, fast=fast or not list(folder.glob("*.safetensors")))
        except Infeasible as e:
            offers.append(offer(model, parameters, e))
        else:
            offers.append(offer(model, parameters, plan, whole.said(plan.levers)))
    return ranked(offers)


def batches(folder: Path, data: Any, settings: Settings) -> dict[str, Any]:
    """What the rows ask of memory, as levers: `batches`, by rows a batch the batches of the run (in the trainer's own order) that no other
    exceeds, as [tokens of the longest padded row, trained tokens], and how many padded widths there are; and `lengths`, a histogram of the
    rows ([up to tokens, rows])."""
    tokenizer = tokenizer_of(folder)
    examples = tokenize(gathered(data), tokenizer, settings.max_length, settings.assistant_only_loss)
    long = [len(e.input_ids) for e in examples]
    labelled = [sum(y != IGNORED for y in e.labels[1:]) for e in examples]
    found, b, passes = {}, settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    while True:
        used = met(long, b, settings.seed, passes, settings.max_steps, settings.num_train_epochs)
        pairs = {(memory.padded(max(long[i] for i in rows), settings.device), sum(labelled[i] for i in rows)) for rows in used}
        worst = [p for p in pairs if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in pairs)]
        found[str(b)] = {"worst": sorted(map(list, worst)), "widths": len({t for t, _ in pairs})}
        if b % 2 or "micro_batch" not in settings.levers:
            break
        b, passes = b // 2, passes * 2
    edges = [settings.max_length * (i + 1) // 16 for i in range(16)]
    bins = [[e, sum(a < n <= e for n in long)] for a, e in zip([0, *edges], edges, strict=False)]
    return {"batches": found, "lengths": bins}


def _name_of(model: nn.Module) -> str:
    """Where a transformers model came from: a plan reads weights from files, matrix by matrix, and must find them again."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ValueError("this model does not say where it was loaded from (config._name_or_path is empty): save it and give the folder")
    return name


def _typical(format: Format | None, shape: tuple[int, ...], width: int) -> cost.Cell:
    """A candidate priced without its matrix, or those of all experts: exact bytes, and the error on normal data."""
    *experts, m, n = shape
    if format is None:
        return cost.Cell(None, math.prod(shape) * width, 0.0)
    if format not in _normal:
        W = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
        _normal[format] = cost.row(W, [format], RTN(), {}, None, width)[0].loss
    return cost.Cell(format, math.prod(experts) * format.storage_bits(m, n) // 8, _normal[format])


_normal: dict[Format, float] = {}


def _meta(folder: Path, attention: str) -> Any:
    """The model of a folder, wholly on the meta device: shapes only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.tie_weights()
    return model


HEAD = (None, Int(8, block=128, scale="bf16"))


def _head(model: Any) -> dict[str, tuple[int, ...]]:
    """The output head that may be quantized: name -> (V, H). None where it is the embeddings' own tensor, or does more than multiply."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight is model.get_input_embeddings().weight or special_head(model):
        return {}
    return {name: (head.out_features, head.in_features) for name, m in model.named_modules() if m is head}


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
    kept += ("gradient_accumulation_steps", "optim")
    kept += ("device", "calibration_rows", "assistant_only_loss", "model_revision")
    measured = {} if s.runtime is None else {"runtime": s.runtime}
    return {"dtype": compute_dtype(s.dtype, s.device)} | {k: getattr(s, k) for k in kept} | measured
