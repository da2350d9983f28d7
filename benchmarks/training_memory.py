"""What training takes in memory, all weights or some of them: planned and measured on SmolLM2, planned from shapes for Llama-3.1.

    python examples/stdlib_docstrings.py runs/quickstart/data     writes the data
    python benchmarks/training_memory.py                          every piece that is not there yet, then the table
    python benchmarks/training_memory.py --only lora galore       some methods
    python benchmarks/training_memory.py --table                  the table of the pieces that are there

On SmolLM2 (bfloat16, 2 rows of up to 256 tokens, checkpointing) a piece is planned, and trained on its worst batches in a process of its own, as
`finebits plan --probe` does. Llama's shapes are planned alone: bfloat16, one row of 2,048 tokens, a device of its own. Pieces are JSON in
runs/training_memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from finebits import registry
from finebits.files import write_text
from finebits.plan.base import Plan
from finebits.runfolder import PLAN
from finebits.sizes import show

OUT, HERE = Path("runs/training_memory"), Path(__file__).parent.parent
FULL, LAYERS = "{paper: full}", ["max_grad_norm=0", "gradient_accumulation_steps=1"]
INT8, NF4, DENSE = "int8a-b256", "nf4-b64-bf16", None

# name -> (what it is, format of the weights, keys of the recipe)
METHODS: dict[str, tuple[str, str | None, list[str]]] = {
    "adamw": ("AdamW, all linears", DENSE, [f"adapter={FULL}"]),
    "adamw_8bit_weights": ("AdamW, all linears in 8 bits", INT8, [f"adapter={FULL}"]),
    "galore": ("GaLore, rank 64", DENSE, [f"adapter={FULL}", "training.optim={paper: galore, rank: 64}"]),
    "galore_layerwise": (
        "GaLore, rank 64, layerwise",
        DENSE,
        [f"adapter={FULL}", "training.optim={paper: galore, rank: 64, layerwise: true}", *LAYERS],
    ),
    "q_galore": (
        "Q-GaLore, rank 64, layerwise",
        INT8,
        [f"adapter={FULL}", "training.optim={paper: q_galore, rank: 64, inner: adamw, layerwise: true}", *LAYERS],
    ),
    "apollo_mini": (
        "APOLLO-Mini, layerwise",
        DENSE,
        [f"adapter={FULL}", "training.optim={paper: apollo, rank: 1, layerwise: true}", *LAYERS],
    ),
    "lisa": ("LISA, 2 blocks", DENSE, [f"adapter={FULL}", "rules=[{paper: lisa, blocks: 2}]"]),
    "lora": ("LoRA, rank 16", DENSE, ["adapter={paper: lora, rank: 16, init: zeros}"]),
    "lora64": ("LoRA, rank 64", DENSE, ["adapter={paper: lora, rank: 64, init: zeros}"]),
    "lora_nf4": ("LoRA, rank 16", NF4, ["adapter={paper: lora, rank: 16, init: zeros}"]),
    "lora64_nf4": ("LoRA, rank 64", NF4, ["adapter={paper: lora, rank: 64, init: zeros}"]),
    "s2ft": ("S2FT, 3 % of heads and channels", DENSE, ["adapter={paper: s2ft}"]),
    "s2ft_nf4": ("S2FT, 3 % of heads and channels", NF4, ["adapter={paper: s2ft}"]),
    "spiel_nf4": ("SpIEL, as many entries as LoRA of rank 16", NF4, ["adapter={paper: sparse, rank: 16}", "rules=[spiel]"]),
}
LLAMA = {  # hidden size, inner size, layers, heads
    "Llama-3.1-8B": (4096, 14336, 32, 32),
    "Llama-3.1-70B": (8192, 28672, 80, 64),
}


def changes(name: str) -> list[str]:
    """The recipe's keys of a method; a dense weight is one that is locked."""
    _, format, keys = METHODS[name]
    held = ["quantization.locks={'*': null}"] if format is None else [f"quantization.candidates=[{format}]"]
    return [*keys, *held]


def known(name: str) -> bool:
    """Are the rules and the optimizer there that it takes?"""
    return not any("paper: lisa" in key for key in METHODS[name][2]) or "lisa" in registry.names("rules")


def measured(name: str) -> dict[str, Any]:
    """Planned and measured, on SmolLM2."""
    from finebits import job
    from finebits.recipe import Recipe

    with tempfile.TemporaryDirectory() as folder:
        base = [f"output_dir={folder}", "model.dtype=bfloat16", "budget.memory=8GiB", "quantization.quantizer=rtn", "adapter.refine=[]"]
        base += ["quantization.planner=lagrange", "quantization.calibration=collect", "evaluation.compare=[]", "evaluation.limit=8"]
        base += ["training.max_steps=2", "training.warmup_steps=0", "training.per_device_train_batch_size=2", "export.to=[merged]"]
        recipe = Recipe.load(HERE / "recipes" / "quickstart.yaml", [*base, *changes(name)])
        job.plan(recipe, Path(folder) / PLAN, probe=True)
        plan = Plan.load(Path(folder) / PLAN)
    return {"memory": plan.memory, **plan.solver["probed"]}


def planned(name: str, model: str) -> dict[str, Any]:
    """Planned from a config alone."""
    from finebits.recipe import Recipe
    from finebits.run.plans import priced

    hidden, inner, layers, heads = LLAMA[model]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": inner}
    config |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256}
    config |= {"tie_word_embeddings": False, "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5}
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / "config.json", json.dumps(config))
        keys = [f"model.model_name_or_path={folder}", "model.dtype=bfloat16", "budget.memory=4096GiB", "budget.device=cuda"]
        keys += ["data.max_length=2048", "training.per_device_train_batch_size=1", "export.to=[merged]"]
        plan = priced(Recipe.parse("recipe: 1", overrides=[*keys, *changes(name)]), None, fast=True)
    return {"memory": plan.memory, "planned": plan.peak}


def piece(file: Path, make: Any) -> None:
    if not file.exists():
        found = make()
        write_text(file, json.dumps(found))
        print(file.stem, {k: show(v) for k, v in found.items() if k != "memory"}, flush=True)


def markdown() -> str:
    """The tables of all pieces that are there."""
    heads = ["method", "weights in", "weights", "trained beside", "gradients", "optimizer", "peak planned", "measured", "ratio"]
    out = ""
    for model in ("SmolLM2-135M", *LLAMA):
        own = heads if model == "SmolLM2-135M" else heads[:-2]
        lines = ["| " + " | ".join(own) + " |", "|---" * len(own) + "|"]
        for name, (title, format, _) in METHODS.items():
            file = OUT / f"{model}--{name}.json"
            if not file.exists():
                continue
            found = json.loads(file.read_text())
            terms = found["memory"]
            cells = [title, format or "16 bits", *(show(terms.get(k, 0)) for k in ("linear weights", "adapters", "gradients", "optimizer"))]
            cells += [show(found["planned"])]
            if model == "SmolLM2-135M":
                cells += [show(found["measured"]), f"{found['measured'] / found['planned']:.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
        out += f"\n{model}\n\n" + "\n".join(lines) + "\n"
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), help="these methods alone")
    parser.add_argument("--table", action="store_true", help="do nothing, show the table")
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for name in () if given.table else [n for n in given.only or METHODS if known(n)]:
        for model in LLAMA:
            piece(OUT / f"{model}--{name}.json", lambda name=name, model=model: planned(name, model))
        piece(OUT / f"SmolLM2-135M--{name}.json", lambda name=name: measured(name))
    write_text(OUT / "table.md", markdown())
    print(markdown())


if __name__ == "__main__":
    main()
