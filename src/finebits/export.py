"""What a tuned model becomes for everyone else: plain folders, written one tensor at a time.

- the base: every weight dense, as it was multiplied with in training (QTensor.dequantize in the plan's dtype);
- merged: base plus update, summed in float32 and rounded once;
- portable: the update of every module as one product L R of one common rank, whatever ranks, scalings and gates it was trained with.
Nothing here knows transformers: the model's own config, generation config and tokenizer write themselves.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finebits.build import hosts
from finebits.errors import Failed, Invalid
from finebits.plan.base import Plan
from finebits.qtensor import dense
from finebits.tensorfile import Entry, size, write

SHARD = 5 * 10**9  # bytes of values in one weight file
FORMAT = {"format": "pt"}  # what transformers and peft look for in the metadata
INDEX = "model.safetensors.index.json"


class VerificationFailed(Failed):
    """The exported artefact is not the trained model. `result` holds the figures."""

    code = 6
    hint = "the folder was left in place to be looked at; do not publish it"

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


def base_entries(model: nn.Module, dtype: torch.dtype) -> dict[str, Entry]:
    """The dense tensors of the model without its adapters, by state-dict name, each made when it is written."""
    return _entries(model, dtype, lambda host: dense(host.weight))


def merged_entries(model: nn.Module, dtype: torch.dtype) -> dict[str, Entry]:
    """The dense tensors of the model with its adapters in them. Raises ValueError where an adapter has no merged form."""
    for name, host in hosts(model):
        for a in host.active:
            if not hasattr(host.kinds[a], "merged"):
                raise Invalid(f"{name}: {type(host.kinds[a]).__name__} depends on its input and cannot be merged: keep it as an adapter")
    return _entries(model, dtype, lambda host: dense(host.stack(torch.float32).weight))


def _entries(model: nn.Module, dtype: torch.dtype, weight: Any) -> dict[str, Entry]:
    of = {f"{name}.weight": host for name, host in hosts(model)}
    inside = tuple(f"{name}.{part}" for name in (n.removesuffix(".weight") for n in of) for part in ("p.", "weight."))
    state = (
        {k: t for k, t in model.state_dict(keep_vars=True).items() if not k.startswith(inside)}
        if inside
        else model.state_dict(keep_vars=True)
    )
    names = [*state, *(k for k in of if k not in state)]
    kept = {k for k, _ in model.named_buffers()}  # buffers stay in their own dtype: routers' biases are float32 in any model
    entries: dict[str, Entry] = {}
    seen: set[int] = set()
    for name in names:
        held = of[name].weight if name in of else state[name]
        if id(held) in seen:  # tied: written once, under its first name
            continue
        seen.add(id(held))
        wanted = dtype if held.is_floating_point() and name not in kept else held.dtype

        def value(name: str = name, held: Tensor = held, wanted: torch.dtype = wanted) -> Tensor:
            with torch.no_grad():
                return (weight(of[name]) if name in of else held).to(wanted)

        entries[name] = Entry(wanted, tuple(held.shape), value)
    return entries


def shards(entries: Mapping[str, Entry], limit: int = SHARD) -> dict[str, dict[str, Entry]]:
    """Entries by weight file, in order, no file over `limit` bytes of values unless one tensor is."""
    groups: list[dict[str, Entry]] = [{}]
    held = 0
    for name, e in entries.items():
        if groups[-1] and held + e.nbytes > limit:
            groups.append({})
            held = 0
        groups[-1][name] = e
        held += e.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups)}


def write_model(
    model: Any, entries: Mapping[str, Entry], folder: Path, dtype: torch.dtype, tokenizer: Any = None, limit: int = SHARD
) -> int:
    """A stock model folder: weights in shards, index, config, generation config, tokenizer. Returns the bytes of the weight files.

    One tensor is in memory at a time. Raises RuntimeError if a file is not of the size that was predicted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups, total = shards(entries, limit), 0
    for file, group in groups.items():
        written = write(folder / file, group, FORMAT)
        check_size(folder / file, size(group, FORMAT))
        total += written
    if len(groups) > 1:
        where = {name: file for file, group in groups.items() for name in group}
        held = sum(e.nbytes for e in entries.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": held}, "weight_map": where}, indent=2) + "\n")
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):  # of the file that the model was read from: what is written here is dense
        del config.quantization_config
    if getattr(config, "tie_word_embeddings", False) and not _tied(model):
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return total


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def check_size(path: Path, predicted: int) -> None:
    """Raise RuntimeError if a written file has not the bytes that were predicted."""
    found = path.stat().st_size
    if found != predicted:
        raise Failed(f"{path} has {found} bytes and {predicted} were predicted: the disk may be full, free some and export again")


def portable(model: nn.Module) -> tuple[int, dict[str, tuple[Tensor, Tensor]]]:
    """(r, {module: (L (m, r), R (r, n))}): every module's update as L R in float32, scaling in L, filled up with zeros to one rank.

    Several active adapters on a module become one product. Raises ValueError that names the module whose adapter is not low-rank.
    """
    products: dict[str, tuple[Tensor, Tensor]] = {}
    for name, host in hosts(model):
        factors = []
        for a in host.active:
            kind: Any = host.kinds[a]
            if not hasattr(kind, "lowrank"):
                raise Invalid(
                    f"{name}: {type(kind).__name__} is not a low-rank update and has no PEFT form here: export target merged is the way"
                )
            factors.append(kind.lowrank({k: t.detach().float() for k, t in host.tensors(a).items()}))
        if factors:
            products[name] = torch.cat([L for L, _ in factors], 1), torch.cat([R for _, R in factors], 0)
    if not products:
        raise Invalid("the model has no active adapter to export: export target merged writes its weights")
    rank = max(1, *(R.shape[0] for _, R in products.values()))
    for name, (L, R) in products.items():
        more = rank - R.shape[0]
        products[name] = nn.functional.pad(L, (0, more)), nn.functional.pad(R, (0, 0, 0, more))
    return rank, products


def target_modules(model: nn.Module, wanted: list[str]) -> list[str]:
    """Leaf names (`q_proj`, …) if they pick exactly the wanted linears, else full names."""
    leaves = sorted({name.rpartition(".")[2] for name in wanted})
    picked = {n for n, m in model.named_modules() if n.rpartition(".")[2] in leaves and not isinstance(m, nn.ParameterDict)}
    return leaves if picked == set(wanted) else sorted(wanted)


# The card ------------------------------------------------------------------------------------------------------------------------------


def card(
    plan: Plan,
    target: str,
    *,
    title: str,
    data: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    memory: Mapping[str, Any] | None = None,
) -> str:
    """README.md of an exported folder; `target` is "adapter", "base" or "merged". `data` is data.json's content, `recipe` the recipe's
    text, `memory` memory.json's content; what is not given is left out."""
    relation = {"adapter": "adapter", "base": "quantized", "merged": "finetune"}[target]
    head: dict[str, Any] = {
        "library_name": "peft" if target == "adapter" else "transformers",
        "tags": ["finebits"],
        "pipeline_tag": "text-generation",
    }
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", plan.model) and not Path(plan.model).exists():
        head |= {"base_model": plan.model, "base_model_relation": relation}
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in head.items()), "---", "", f"# {title}", ""]
    model = Path(plan.model).name if plan.model.startswith(("/", ".", "~")) else plan.model
    lines += [f"Made by finebits from {model or 'a local model'} (fingerprint {plan.model_hash or 'unknown'}); plan {plan.hash}.", ""]
    lines += [ABOUT[target], "", "## Plan", "", "| format | adapter | start | modules |", "|---|---|---|---|"]
    kinds: dict[tuple[str, str, str], int] = {}
    for spec in plan.modules.values():
        start = type(spec.init).__name__ if spec.adapter is not None else "-"
        kind = str(spec.format or plan.levers["dtype"]), str(spec.adapter or "-"), start
        kinds[kind] = kinds.get(kind, 0) + 1
    lines += [f"| {f} | {a} | {i} | {n} |" for (f, a, i), n in kinds.items()]
    if data is not None:
        shown = {k: data[k] for k in ("rows", "tokens", "trained_tokens", "truncated") if k in data}
        lines += ["", "## Data", "", Path(str(data.get("path", ""))).name + ": " + ", ".join(f"{v} {k}" for k, v in shown.items())]
    if memory is not None:
        lines += ["", "## Memory", "", "| | planned | measured |", "|---|---|---|"]
        lines += [f"| training peak | {_mib(memory.get('planned_peak'))} | {_mib(memory.get('measured_peak'))} |"]
        lines += [f"| {r['phase']} | {_mib(r.get('planned'))} | {_mib(r.get('measured'))} |" for r in memory.get("rows", [])]
    if recipe is not None:
        lines += ["", "## Recipe", "", "```yaml", recipe.rstrip(), "```"]
    return "\n".join(lines) + "\n"


ABOUT = {
    "adapter": "A LoRA adapter for peft. It belongs to the model in `base/`, the dense form of the quantized weights it was trained over, "
    "and is not valid over the original weights: a start such as LoftQ's lies in the adapter *and* in the base. Ranks, scalings and gates "
    'are folded in: one rank, lora_alpha equal to it.\n\n```python\nbase = AutoModelForCausalLM.from_pretrained(f"{folder}/base")\n'
    "model = PeftModel.from_pretrained(base, folder)\n```",
    "base": "The dense form of the quantized weights that the adapter beside it was trained over. Not the original model.",
    "merged": "The quantized weights and the adapter trained over them, summed in float32 and rounded once to the dtype of the files."
    "\n\n```python\nmodel = AutoModelForCausalLM.from_pretrained(folder)\n```",
}


def _mib(n: int | None) -> str:
    return "-" if n is None else f"{n / 2**20:.0f} MiB"
