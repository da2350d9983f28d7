"""Answers beside each other and alone, token for token: `python benchmarks/serving.py --equal 10000 --model tiny`.

Over HTTP, as tenants ask: 20 of them, each with a key, and each calls its adapters alike (m00, m01, …), so that nothing but the key says whose
is meant. Every adapter is asked for once and then by Zipf's law, with one of a few prompts, greedily; the pool holds `--holds` adapters. Then
every different request is served by itself in an engine of its own that keeps no beginnings.

An answer that is not the same is another adapter's where that gives it to the same prompt. Else it is looked at where it parts: sums are taken
in another order beside others, which moves a log-probability in its last bits, so where the two likeliest tokens are within TIED nats alone,
either is as likely, and the answer is counted as tied; it is wrong where they are not. The exit code is 1 where one is wrong or another's.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving_adapters import OUT, folder, made, room

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

import tiny_llama as tiny  # noqa: E402
from finebits.files import write_json  # noqa: E402
from finebits.interop.quantizer import format_for  # noqa: E402
from finebits.interop.serving import Reader, Served, served  # noqa: E402
from finebits.serve import http as routes  # noqa: E402
from finebits.serve.engine import Engine, Limits  # noqa: E402
from finebits.serve.requests import Request, Sampling, Token  # noqa: E402
from finebits.serve.tenants import Tenants  # noqa: E402
from listening import Listening  # noqa: E402

TINY, FORMAT = "tiny", "nf4-b64-bf16"
TENANTS, PROMPTS, TOKENS, TIED = 20, 4, 8, 1e-4
Ask = tuple[int, int]  # adapter, prompt


@dataclass
class Clients:
    """Threads that ask, each over a connection of its own, for what is left of `asks`."""

    url: str
    asks: Sequence[Ask]
    prompts: Sequence[Sequence[int]]
    answers: list[tuple[int, Any]] = field(default_factory=list)
    next: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, _: int) -> None:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=600)
        while True:
            with self.lock:
                at, self.next = self.next, self.next + 1
            if at >= len(self.asks):
                return connection.close()
            adapter, prompt = self.asks[at]
            body = {"model": name(adapter), "prompt": self.prompts[prompt], "temperature": 0, "max_tokens": TOKENS, "logprobs": 0}
            status, found = asked(connection, "/v1/completions", body, adapter % TENANTS)
            with self.lock:
                self.answers.append((at, found["choices"][0]["logprobs"]["tokens"] if status == 200 else (status, found)))


def name(adapter: int) -> str:
    return f"m{adapter // TENANTS:02d}"


def key(tenant: int) -> str:
    return f"sk-of-tenant-{tenant:02d}"


def asked(connection: http.client.HTTPConnection, path: str, body: Any, tenant: int) -> tuple[int, Any]:
    connection.request("POST", path, json.dumps(body), {"Authorization": f"Bearer {key(tenant)}", "Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    return answer.status, json.loads(text) if text.startswith("{") else text


def beside(it: Served, place: Path, adapters: int, asks: Sequence[Ask], prompts: Sequence[Sequence[int]], limits: Limits) -> Any:
    """Every answer of a server that all are asked of at once, and what its engine counted."""
    engine, read = Engine(it.base, limits), Reader(it, 64)
    keys = {key(t): [folder(i).name for i in range(t, adapters, TENANTS)] for t in range(TENANTS)}
    server = Listening(routes.app(routes.Served("base", engine, it.tokenizer, it.stops, Tenants(keys), place, read.marked)))
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=600)
    for i in range(adapters):
        status, said = asked(connection, "/v1/load_lora_adapter", {"lora_name": name(i), "lora_path": folder(i).name}, i % TENANTS)
        assert status == 200, said
    connection.close()
    clients = Clients(server.url, asks, prompts)
    with ThreadPoolExecutor(2 * limits.max_batch) as pool:
        list(pool.map(clients.run, range(2 * limits.max_batch)))
    server.end()
    counts = {"loads": engine.adapters.loads, "evictions": engine.adapters.evictions, "tokens a step": engine.tokens / engine.steps}
    return [answer for _, answer in sorted(clients.answers)], counts


def alone(it: Served, place: Path, asks: Sequence[Ask], prompts: Sequence[Sequence[int]], budget: int) -> dict[Ask, Any]:
    """(tokens, nats between the two likeliest at each place, that of the end too) of every different request by itself."""
    engine, read, found = Engine(it.base, Limits(budget, max_batch=1, prefixes=False)), Reader(it, 64), dict[Ask, Any]()
    number, last = 0, -1
    for adapter, prompt in sorted(set(asks)):
        if adapter != last:
            number, last = engine.register(read.marked(folder(adapter, place))), adapter
        told = list[Token]()
        engine.submit(Request(prompts[prompt], Sampling(TOKENS, logprobs=2, stops=it.stops), number, lambda t, told=told: told.append(t)))
        while engine.busy:
            if not engine.step():
                time.sleep(0.001)
        words = [it.tokenizer.decode([t.id], skip_special_tokens=True) for t in told]
        found[adapter, prompt] = words, [t.top[0][1] - t.top[1][1] for t in told]
    engine.stop()
    return found


def verdict(answer: Any, ask: Ask, found: dict[Ask, Any], others: Counter[tuple[int, tuple[str, ...]]]) -> tuple[str, float]:
    """What an answer is, and how near the two likeliest tokens were where it parts from that alone."""
    if isinstance(answer, tuple):
        return f"{answer[0]}", 0.0
    words, margins = found[ask]
    if answer == words:
        return "the same", 0.0
    at = next((i for i, (a, b) in enumerate(zip(answer, words, strict=False)) if a != b), min(len(answer), len(words)))
    near = margins[at] if at < len(margins) else 0.0  # the end of a text has no margin: it is seen as it is
    if at < len(margins) and near <= TIED:
        return "tied", near
    return "another's" if others[ask[1], tuple(answer)] else "wrong", near


def equal(count: int, model: str, adapters: int, holds: int, batch: int) -> int:
    """Print and keep what `count` answers are."""
    if model == TINY:
        if not (OUT / TINY).exists():
            tiny.worded(OUT / TINY, max_position_embeddings=256)
        it, place = served(OUT / TINY), OUT / f"{TINY}-adapters"
    else:
        it, place = served(model, format_for(FORMAT)), OUT / "adapters"
    made(adapters, it, place, 1.5 if model == TINY else 0.3)
    draw, tokens = random.Random(3), it.base.vocabulary
    prompts = [[draw.randrange(3, tokens) for _ in range(length)] for length in (5, 11, 23, 41)]
    assert len(prompts) == PROMPTS
    once = draw.sample(range(adapters), min(adapters, count))
    zipf = draw.choices(range(adapters), [1 / (k + 1) for k in range(adapters)], k=count - len(once))
    asks = [(adapter, draw.randrange(PROMPTS)) for adapter in once + zipf]
    draw.shuffle(asks)
    limits = Limits(room(it, holds, batch, 64, place), max_queue=4 * batch, max_batch=batch)
    begun = time.perf_counter()
    answers, counts = beside(it, place, adapters, asks, prompts, limits)
    seconds = time.perf_counter() - begun
    found = alone(it, place, asks, prompts, limits.budget)
    others = Counter((prompt, tuple(words)) for (_, prompt), (words, _) in found.items())
    verdicts = [verdict(answer, ask, found, others) for answer, ask in zip(answers, asks, strict=True)]
    kinds = Counter(kind for kind, _ in verdicts)
    result: dict[str, Any] = {"model": model, "requests": count, "adapters asked for": len({a for a, _ in asks}), "answers": dict(kinds)}
    result |= {"different requests": len(found), "different answers alone": len(others), "seconds": round(seconds, 1), **counts}
    result["nats where not the same"] = sorted(near for kind, near in verdicts if kind != "the same")
    result["least nats alone"] = min(m for _, margins in found.values() for m in margins)
    write_json(OUT / f"equal-{Path(model).name.replace(':', '-')}.json", result)
    print(json.dumps(result, indent=2))
    return 0 if set(kinds) <= {"the same", "tied"} else 1
