"""The card (README.md) of an exported folder: what the model is, and from what it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finebits.data.turns import template_sha
from finebits.export.base import Extras
from finebits.plan.base import Plan
from finebits.report.text import requantized

ADAPTER, QUANTIZED, FINETUNE = "adapter", "quantized", "finetune"  # what a folder is to the model that it was made from


def card(plan: Plan, relation: str, about: str, title: str, extras: Extras = Extras(), pipeline: str = "text-generation") -> str:
    """README.md of a folder; `about` says what lies in it and how it is loaded, `pipeline` what the model is for, as the hub calls it."""
    head: dict[str, Any] = {
        "library_name": "peft" if relation == ADAPTER else "transformers",
        "tags": ["finebits"],
        "pipeline_tag": pipeline,
    }
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", plan.model) and not Path(plan.model).exists():
        head |= {"base_model": plan.model, "base_model_relation": relation}
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in head.items()), "---", "", f"# {title}", ""]
    model = Path(plan.model).name if plan.model.startswith(("/", ".", "~")) else plan.model
    lines += [f"Made by finebits from {model or 'a local model'} (fingerprint {plan.model_hash or 'unknown'}); plan {plan.hash}.", ""]
    if template := template_sha(extras.tokenizer):
        lines += [f"Trained with the chat template that lies here, sha256 {template}.", ""]
    lines += [about, "", "## Plan", "", "| format | adapter | start | modules |", "|---|---|---|---|"]
    kinds: dict[tuple[str, str, str], int] = {}
    for spec in plan.modules.values():
        start = type(spec.init).__name__ if spec.adapter is not None else "-"
        kind = str(spec.format or plan.levers.dtype), str(spec.adapter or "-"), start
        kinds[kind] = kinds.get(kind, 0) + 1
    lines += [f"| {f} | {a} | {i} | {n} |" for (f, a, i), n in kinds.items()]
    more = _requantized(extras.requantized) + _data(extras.data) + _memory(extras.memory) + _recipe(extras.recipe)
    return "\n".join(lines + more) + "\n"


def _requantized(report: Mapping[str, Any] | None) -> list[str]:
    return [] if report is None else ["", "## Rounded once more", "", *requantized(report)]


def _data(data: Mapping[str, Any] | None) -> list[str]:
    if data is None:
        return []
    shown = {k: data[k] for k in ("rows", "tokens", "trained_tokens", "truncated") if k in data}
    return ["", "## Data", "", Path(str(data.get("path", ""))).name + ": " + ", ".join(f"{v} {k}" for k, v in shown.items())]


def _memory(memory: Mapping[str, Any] | None) -> list[str]:
    if memory is None:
        return []
    lines = ["", "## Memory", "", "| | planned | measured |", "|---|---|---|"]
    lines += [f"| training peak | {_mib(memory.get('planned_peak'))} | {_mib(memory.get('measured_peak'))} |"]
    return lines + [f"| {r['phase']} | {_mib(r.get('planned'))} | {_mib(r.get('measured'))} |" for r in memory.get("rows", [])]


def _recipe(recipe: str | None) -> list[str]:
    return [] if recipe is None else ["", "## Recipe", "", "```yaml", recipe.rstrip(), "```"]


def _mib(n: int | None) -> str:
    return "-" if n is None else f"{n / 2**20:.0f} MiB"
