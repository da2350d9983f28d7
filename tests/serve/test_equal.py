"""Many requests of many tenants at once, while adapters come and go: every answer is that of the request alone."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lora_folders import lora

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

import tiny_llama as tiny  # noqa: E402
from finebits.interop.serving import Reader, served  # noqa: E402
from finebits.serve import http as routes  # noqa: E402
from finebits.serve.engine import Engine, Limits  # noqa: E402
from finebits.serve.requests import Request, Sampling  # noqa: E402
from finebits.serve.tenants import Tenants  # noqa: E402
from listening import Listening  # noqa: E402

TENANTS, ADAPTERS, RANKS, TOKENS = 4, 20, (4, 8, 16, 32, 64), 5
PROMPTS = [[random.Random(i).randrange(3, 128) for _ in range(length)] for i, length in enumerate((3, 9, 19, 35))]


def key(adapter: int) -> str:
    return f"sk-of-tenant-{adapter % TENANTS}"


def name(adapter: int) -> str:
    """What its owner calls it: every tenant calls theirs alike."""
    return f"m{adapter // TENANTS}"


def alone(it: Any, place: Path) -> dict[tuple[int, int], str]:
    """Every answer by itself."""
    engine, read, found = Engine(it.base, Limits(4 << 20, max_batch=1, prefixes=False)), Reader(it, 64), {}
    for adapter in range(ADAPTERS):
        number = engine.register(read.marked(place / f"a{adapter}"))
        for i, prompt in enumerate(PROMPTS):
            ids = list[int]()
            engine.submit(Request(prompt, Sampling(TOKENS, stops=it.stops), number, lambda t, ids=ids: ids.append(t.id)))
            while engine.busy:
                engine.step()
            found[adapter, i] = it.tokenizer.decode(ids, skip_special_tokens=True)
    engine.stop()
    return found


def test_answers_are_those_of_the_request_alone_and_nobody_else_s(tmp_path: Path) -> None:
    tiny.worded(tmp_path / "llama", max_position_embeddings=256)
    for i in range(ADAPTERS):
        lora(tmp_path / "adapters" / f"a{i}", RANKS[i % len(RANKS)], i)
    it = served(tmp_path / "llama")
    expected = alone(it, tmp_path / "adapters")
    assert len(set(expected.values())) > 0.9 * len(expected)  # nobody's answer passes for another's
    engine, read = Engine(it.base, Limits(1 << 20, max_queue=100, max_batch=8)), Reader(it, 64)
    tenants = Tenants({key(t): [f"a{i}" for i in range(t, ADAPTERS, TENANTS)] for t in range(TENANTS)})
    server = Listening(routes.app(routes.Served("base", engine, it.tokenizer, it.stops, tenants, tmp_path / "adapters", read.marked)))
    load = lambda i: server.ask("/v1/load_lora_adapter", {"lora_name": name(i), "lora_path": f"a{i}"}, key(i))[0]  # noqa: E731
    unload = lambda i: server.ask("/v1/unload_lora_adapter", {"lora_name": name(i)}, key(i))[0]  # noqa: E731
    assert {load(i) for i in range(ADAPTERS)} == {200}
    draw, coming = random.Random(0), ADAPTERS - 2  # the last two come and go
    asks = [(i, 0) for i in range(ADAPTERS)]
    weights = [1 / (1 + i % coming) for i in range(ADAPTERS)]
    asks += [(draw.choices(range(ADAPTERS), weights)[0], draw.randrange(len(PROMPTS))) for _ in range(120)]
    over, churned = threading.Event(), list[int]()

    def churn() -> None:
        while not over.is_set():
            churned.extend(f(i) for i in range(coming, ADAPTERS) for f in (unload, load))
            over.wait(0.05)

    def one(ask: tuple[int, int]) -> tuple[int, str]:
        adapter, prompt = ask
        body = {"model": name(adapter), "prompt": PROMPTS[prompt], "temperature": 0, "max_tokens": TOKENS}
        code, found = server.ask("/v1/completions", body, key(adapter))
        return code, found["choices"][0]["text"] if code == 200 else ""

    thread = threading.Thread(target=churn)
    thread.start()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, asks))
    over.set()
    thread.join()
    server.end()
    assert engine.adapters.evictions > 0 and len(engine.adapters.entries) == ADAPTERS and set(churned) == {200}
    for ask, (code, text) in zip(asks, answers, strict=True):
        assert code == 200 and text == expected[ask] or code in (400, 404) and ask[0] >= coming, (ask, code, text, expected[ask])
    held = {owner for owner in engine.pool.held() if not isinstance(owner, int)}
    assert held <= set(engine.prefixes.idle())  # nothing is left of requests
