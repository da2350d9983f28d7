"""A server under twice the load that it sustains: `python benchmarks/overload.py --seconds 120`, over loopback, with a tiny random Llama.

Every (adapter, prompt) is asked for alone first, greedily; those are the answers. Then as many clients as keep it busy say what it sustains, and
requests arrive at twice that rate, whether others are through or not, while adapters are unloaded and loaded. A request is answered right,
refused (429, or 400 or 404 where its adapter is being unloaded), or counted as what it is. Halfway through another such load the server is
killed (SIGKILL), and started again; at last with stdout and stderr on a full disk (/dev/full).

Prints rates, percentiles of seconds of answered requests, and the most resident memory; results lie in runs/overload/results.json. The exit code
is 1 where an answer was lost or another's.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "serve")]

from lora_folders import lora  # noqa: E402

import tiny_llama as tiny  # noqa: E402
from finebits.files import write_json  # noqa: E402

OUT = Path("runs/overload")
RANKS, TOKENS, PROMPTS, MOST = (4, 8, 16, 32), 12, 4, 400_000  # requests at most
CHURNED = 2  # the last adapters are unloaded and loaded
Ask = tuple[str, int]


class Server:
    """`finebits serve` in a process."""

    def __init__(self, port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        words = ["serve", str(OUT / "llama"), "--adapters", str(OUT / "adapters"), "--port", str(port), "--budget", "3MiB"]
        words += ["--max-queue", "64", "--max-batch", "16"]
        with log.open("a") as said:
            self.process = subprocess.Popen([sys.executable, "-m", "finebits", *words], stdout=said, stderr=said)
        while self.ask("/health")[0] != 200:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with code {self.process.returncode}: {log}")
            time.sleep(0.2)

    def ask(self, path: str, body: Any = None, timeout: float = 60) -> tuple[int | str, Any]:
        """(status, or the name of the error of the connection; the answer)."""
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read().decode()
                return answer.status, json.loads(text) if text.startswith("{") else text
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()
        except (OSError, ValueError, http.client.HTTPException) as e:  # an answer that was cut short is the last
            return type(getattr(e, "reason", e)).__name__, None

    def complete(self, ask: Ask) -> tuple[int | str, str | None]:
        adapter, prompt = ask
        text = " ".join(f"w{(7 * prompt + 3 * i) % 120 + 1}" for i in range(6 + prompt))
        status, found = self.ask("/v1/completions", {"model": adapter, "prompt": text, "temperature": 0, "max_tokens": TOKENS})
        return status, found["choices"][0]["text"] if status == 200 else None

    def resident(self) -> float:
        """MiB."""
        try:
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024
        except (OSError, StopIteration):
            return 0.0

    def end(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


class Load:
    """What came of requests."""

    def __init__(self, server: Server, answers: dict[Ask, str]) -> None:
        self.server, self.answers = server, answers
        self.came, self.seconds, self.lock = Counter[str](), list[float](), threading.Lock()

    def one(self, ask: Ask) -> None:
        begun = time.monotonic()
        status, text = self.server.complete(ask)
        took = time.monotonic() - begun
        kind = ("right" if text == self.answers[ask] else "another's") if status == 200 else str(status)
        with self.lock:
            self.came[kind] += 1
            if kind == "right":
                self.seconds.append(took)

    def percentile(self, share: float) -> float:
        return sorted(self.seconds)[int(share * (len(self.seconds) - 1))] if self.seconds else float("nan")


def sustained(load: Load, asks: list[Ask], seconds: float, clients: int) -> float:
    """Answers a second with so many clients that wait for theirs."""
    end = time.monotonic() + seconds

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            load.one(draw.choice(asks))

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return load.came["right"] / seconds


def arriving(load: Load, asks: list[Ask], rate: float, seconds: float, during: Any = None) -> tuple[int, float]:
    """(requests that were sent, a second), at this rate; `during(share of the time)` is called between them."""
    draw, begun, sent = random.Random(1), time.monotonic(), 0
    with ThreadPoolExecutor(256) as pool:
        while (passed := time.monotonic() - begun) < seconds and sent < MOST:
            for _ in range(int(passed * rate) - sent):
                pool.submit(load.one, draw.choice(asks))
                sent += 1
            if during is not None:
                during(passed / seconds)
            time.sleep(0.005)
        took = time.monotonic() - begun
    return sent, sent / took


def churn(server: Server, names: list[str], end: threading.Event, came: Counter[str]) -> None:
    """Unload and load these, again and again."""
    while not end.is_set():
        for name in names:
            came[f"unload {server.ask('/v1/unload_lora_adapter', {'lora_name': name})[0]}"] += 1
            came[f"load {server.ask('/v1/load_lora_adapter', {'lora_name': name, 'lora_path': name})[0]}"] += 1
            end.wait(0.05)


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--seconds", type=float, default=120)
    parse.add_argument("--adapters", type=int, default=24)
    given = parse.parse_args()
    names = [f"a{i:02d}" for i in range(given.adapters)]
    if not (OUT / "llama").exists():
        tiny.worded(OUT / "llama", max_position_embeddings=256)
    for i, name in enumerate(names):
        if not (OUT / "adapters" / name).exists():
            lora(OUT / "adapters" / name, RANKS[i % len(RANKS)], i)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server, asks = Server(port, OUT / "log"), [(name, p) for name in names for p in range(PROMPTS)]
    answers = {ask: text for ask in asks if (text := server.complete(ask)[1]) is not None}
    assert len(answers) == len(asks), "an answer is missing before there is any load"
    found: dict[str, Any] = {"distinct": len(set(answers.values())), "of": len(answers), "idle_mib": server.resident()}
    rate = sustained(Load(server, answers), asks, min(15, given.seconds), 32)

    load, end, churned, memory = Load(server, answers), threading.Event(), Counter[str](), list[float]()
    thread = threading.Thread(target=churn, args=(server, names[-CHURNED:], end, churned))
    thread.start()
    sent, arrived = arriving(load, asks, 2 * rate, given.seconds, lambda share: memory.append(server.resident()))
    end.set()
    thread.join()
    lost = sent - sum(load.came.values())
    found |= {"sustained": rate, "sent": sent, "sent_a_second": arrived, "came": dict(load.came), "churned": dict(churned), "lost": lost}
    found |= {
        "p50": load.percentile(0.5),
        "p99": load.percentile(0.99),
        "most_mib": max(memory),
        "half_mib": max(memory[: len(memory) // 2]),
    }

    killed, crash = [False], Load(server, answers)

    def kill(share: float) -> None:
        if share > 0.5 and not killed[0]:
            killed[0] = True
            server.end(signal.SIGKILL)

    crashed, _ = arriving(crash, asks, 2 * rate, 10, kill)
    again = Server(port, OUT / "log")
    found["killed"] = {"sent": crashed, "came": dict(crash.came), "lost": crashed - sum(crash.came.values())}
    found["right_after_restart"] = sum(again.complete(ask)[1] == text for ask, text in answers.items())
    found["drained"] = again.end()
    full = Server(port, Path("/dev/full"))
    found["right_with_a_full_disk"] = sum(full.complete(ask)[1] == text for ask, text in answers.items())
    full.end()
    write_json(OUT / "results.json", found)
    print(json.dumps(found, indent=2))
    whole = found["right_after_restart"] == found["right_with_a_full_disk"] == len(answers)
    mixed = load.came["another's"] + crash.came["another's"]
    return 0 if whole and not mixed and not lost and not found["killed"]["lost"] else 1


if __name__ == "__main__":
    sys.exit(main())
