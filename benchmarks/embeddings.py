"""Embeddings and a tied head in 16, 8, 6, 4 and 3 bits: KL on held-out text, and memory planned and measured.

    python benchmarks/embeddings.py                    every piece that is not there yet, then the table
    python benchmarks/embeddings.py --only smollm2     of one model
    python benchmarks/embeddings.py --memory           SmolLM2's training peaks as well: each is planned, and trained once on its worst batches

The text and the models are those of benchmarks/start_quality.py. Nothing is trained for the KL: the table alone is rounded (to nearest), or the
table over linears in NF3. For memory, the quickstart's model and rows in float32 at 3.25 bits a linear weight; `python
examples/stdlib_docstrings.py` writes them. Pieces are kept as JSON in runs/embeddings.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from start_quality import MODELS, TITLES, Bench

import finebits as fb
from finebits.evaluate.heldout import Teacher, score, teacher
from finebits.files import write_text
from finebits.runfolder import PLAN
from finebits.sizes import show

OUT = Path("runs/embeddings")
OFFERED: dict[str, Any] = {
    "dense": None,
    "int8-b64-fp16": fb.Int(8, 64, scale="fp16"),
    "int6-b64-fp16": fb.Int(6, 64, scale="fp16"),
    "int4a-b64-fp16": fb.Int(4, 64, False, "fp16"),
    "nf4-b64-bf16": fb.NF(4, 64, "bf16"),
    "nf3-b64-bf16": fb.NF(3, 64, "bf16"),
}
LINEARS = {"dense": None, "nf3": fb.NF(3, 64, "bf16")}
BATCHES = {"smollm2": 4, "gemma3": 2}  # of eight rows
HERE = Path(__file__).parent.parent


def quality(bench: Bench, known: Teacher, key: str, linears: str) -> dict[str, Any]:
    """KL to the unquantized model with the table as `key` says."""
    model = bench.model()
    table = next(name for name, m in model.named_modules() if m is model.get_input_embeddings())
    specs = {} if OFFERED[key] is None else {table: fb.Spec(OFFERED[key])}
    if LINEARS[linears] is not None:
        specs |= dict.fromkeys(bench.shapes, fb.Spec(LINEARS[linears]))
    levers = fb.Levers(dtype=str(bench.dtype).removeprefix("torch."))
    with torch.no_grad():
        fb.build(model, fb.Plan(specs, levers=levers))
    weight = model.get_input_embeddings().weight
    scores = score(model, bench.held, known)
    assert scores.kl is not None and scores.agree is not None
    tokens = scores.tokens.sum()
    bits = 8 * weight.nbytes / weight.numel()
    found = {"bits": bits, "bytes": int(weight.nbytes), "kl": float(scores.kl.sum() / tokens), "loss": scores.loss}
    print(bench.which, key, linears, found, flush=True)
    return found | {"top1": float(scores.agree.sum() / tokens)}


def memory(key: str) -> dict[str, Any]:
    """Planned and measured training peak of SmolLM2 under the quickstart's rows."""
    from finebits import job
    from finebits.plan.base import Plan
    from finebits.recipe import Recipe

    with tempfile.TemporaryDirectory() as folder:
        changes = [f"output_dir={folder}", "model.dtype=float32", "adapter.init=zeros", "adapter.refine=[]", "quantization.quantizer=rtn"]
        changes += ["quantization.planner=lagrange", "evaluation.compare=[]", "quantization.calibration=collect", "evaluation.limit=8"]
        changes += ["training.max_steps=2", "training.warmup_steps=0"]
        changes += [f"quantization.embeddings=[{'null' if key == 'dense' else key}]"]
        recipe = Recipe.load(HERE / "recipes" / "quickstart.yaml", changes)
        job.plan(recipe, Path(folder) / PLAN, probe=True)
        plan = Plan.load(Path(folder) / PLAN)
    found = {**plan.solver["probed"], "embeddings": plan.memory["embeddings"], "linears": plan.memory["linear weights"]}
    print(key, {k: show(v) for k, v in found.items()}, flush=True)
    return found


def piece(file: Path, make: Any) -> None:
    if not file.exists():
        write_text(file, json.dumps(make()))


def markdown() -> str:
    """The table of all pieces that are there."""
    heads = ["model", "embeddings", "bits a weight", "stored", "KL, linears dense", "KL, linears nf3-b64", "top-1, linears dense"]
    heads += ["training peak planned", "measured"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for which in MODELS:
        for key in OFFERED:
            found = {k: json.loads(f.read_text()) for k in LINEARS if (f := OUT / f"{which}-{key}-{k}.json").exists()}
            if not found:
                continue
            any_, peak = next(iter(found.values())), OUT / f"memory-{key}.json"
            cells = [TITLES[which], key, f"{any_['bits']:.2f}", show(any_["bytes"])]
            cells += [f"{found[k]['kl']:.4f}" if k in found else "–" for k in LINEARS]
            cells += [f"{found['dense']['top1']:.1%}" if "dense" in found else "–"]
            peaks = json.loads(peak.read_text()) if which == "smollm2" and peak.exists() else None
            cells += [show(peaks["planned"]), show(peaks["measured"])] if peaks else ["–", "–"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", choices=list(MODELS), help="one model alone")
    parser.add_argument("--memory", action="store_true", help="training peaks as well")
    parser.add_argument("--table", action="store_true", help="do nothing, show the table")
    given = parser.parse_args()
    for folder in (OUT, Path("runs/start_quality")):
        folder.mkdir(parents=True, exist_ok=True)
    for which in () if given.table else [given.only] if given.only else MODELS:
        bench = Bench(which)
        bench.held = bench.held[: BATCHES[which]]
        known = teacher(bench.model(), bench.held)
        for linears, key in itertools.product(LINEARS, OFFERED):
            piece(OUT / f"{which}-{key}-{linears}.json", functools.partial(quality, bench, known, key, linears))
    for key in OFFERED if given.memory and not given.table else ():
        piece(OUT / f"memory-{key}.json", lambda key=key: memory(key))
    write_text(OUT / "table.md", markdown())
    print(markdown())


if __name__ == "__main__":
    main()
