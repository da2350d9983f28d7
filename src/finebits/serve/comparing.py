"""Does another engine give the adapters that were handed to it? Its log-probabilities of next tokens next to those of the engine here.

For a few prompts, the engine here goes on greedily with every adapter; the other is asked for the likeliest next tokens after every prefix of
that. The distance is Σ p |log p − log q| over our likeliest tokens, a mean over places, in nats a token; what the other does not tell counts as
the least that it does.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finebits.errors import Failed
from finebits.serve.backends import TOLD, Backend, Command, Written
from finebits.serve.engine import Engine
from finebits.serve.requests import Request, Sampling, Token

STEPS = 4  # tokens of every answer
WAITED = 900  # seconds until an engine is to be ready: it reads the model, and some compile
PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "Dear customer, your order")
Likeliest = Mapping[int, float]


class Row(NamedTuple):
    """How far the other's distribution is from ours under an adapter (None: the base alone), how far the adapter moves ours from the base's,
    and how often both have the same likeliest token."""

    adapter: str | None
    distance: float
    moves: float
    top1: float
    verdict: str


def distance(ours: Likeliest, theirs: Likeliest) -> float:
    """In nats, over our likeliest tokens.

    >>> round(distance({1: math.log(0.5), 2: math.log(0.25)}, {1: math.log(0.25), 3: math.log(0.125)}), 4)  # ¾ ln 2
    0.5199
    """
    least = min(theirs.values(), default=-math.inf)
    return sum(math.exp(p) * abs(p - theirs.get(token, least)) for token, p in ours.items())


def next_of(engine: Engine, adapter: int | None, ids: Sequence[int]) -> dict[int, float]:
    """Our likeliest next tokens. Raises RuntimeError where the engine has none."""
    found, wrong = list[Token](), list[str]()
    request = Request(list(ids), Sampling(1, logprobs=TOLD), adapter, lambda t: found.append(t), lambda reason, error: wrong.append(error))
    engine.submit(request)
    while engine.busy:
        if not engine.step():
            time.sleep(0.002)
    if not found:
        raise Failed(f"the engine here gives no next token: {wrong[0] if wrong else 'it is over'}")
    return dict(found[0].top)


class Client:
    """Of an engine at `url`."""

    def __init__(self, url: str, backend: Backend, written: Written) -> None:
        self.url, self.backend, self.written = url, backend, written

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def next_of(self, adapter: str | None, ids: Sequence[int]) -> dict[int, float]:
        """Its likeliest next tokens. Raises RuntimeError, with what it said, where it does not answer so."""
        path, body = self.backend.question(self.written, adapter, ids)
        asked = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        whose = f"{self.backend.name} gives no next token of {adapter or 'the base'}"
        try:
            with urllib.request.urlopen(asked, timeout=300) as answer:
                return self.backend.answer(json.loads(answer.read()))
        except urllib.error.HTTPError as e:
            raise Failed(f"{whose} ({e.code}): {e.read().decode(errors='replace')[:300]}") from None
        except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
            raise Failed(f"{whose} ({type(e).__name__}: {' '.join(str(e).split())[:200]})") from None


def compared(engine: Engine, numbers: Mapping[str, int], prompts: Sequence[Sequence[int]], client: Client) -> list[Row]:
    """The base and these adapters, as `numbers` of the engine here and by name there."""
    rows = []
    for name, number in ((None, None), *numbers.items()):
        far, moved, same = list[float](), list[float](), list[bool]()
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(STEPS):
                ours, theirs = next_of(engine, number, ids), client.next_of(name, ids)
                far.append(distance(ours, theirs))
                moved.append(distance(ours, next_of(engine, None, ids)) if number is not None else 0.0)
                likeliest = max(ours, key=lambda t: ours[t])
                same.append(likeliest == max(theirs, key=lambda t: theirs[t], default=-1))
                ids.append(likeliest)
        mean = lambda values: sum(values) / len(values)  # noqa: E731
        rows.append(_judged(name, mean(far), mean(moved), mean(same), client.backend.rounds))
    return rows


def _judged(name: str | None, far: float, moves: float, same: float, most: float) -> Row:
    """Nearer than the engine rounds, and nearer to ours than the base alone is, where the adapter moves it enough to be seen."""
    if not far <= most or name is not None and moves > most and far > moves / 2:
        verdict = "fail"
    else:
        verdict = "ok" if name is None or moves > 2 * far else "ok, but it hardly moves the base"
    return Row(name, far, moves, same, verdict)


def program(backend: Backend) -> str:
    """Where its program is. Raises RuntimeError, which says how one gets it, where it is not installed."""
    found = shutil.which(backend.program)
    if found is None:
        raise Failed(f"{backend.program} is not installed here (it is on no PATH): {backend.install}, or run the command where it is")
    return found


class Running:
    """An engine that was started, until the block ends. Raises RuntimeError where it ends before it is ready, with the last that it said."""

    def __init__(self, backend: Backend, command: Command, written: Written, url: str, environment: Mapping[str, str], log: Any) -> None:
        self.words = [program(backend), *command.words[1:]]
        self.client, self.environment, self.log = Client(url, backend, written), {**environment, **command.environment}, log

    def __enter__(self) -> Client:
        if self.client.ready():
            raise Failed(f"something answers at {self.client.url} already: give another --port")
        self.process = subprocess.Popen(self.words, env=self.environment, stdout=self.log, stderr=subprocess.STDOUT)
        begun = time.monotonic()
        try:
            while not self.client.ready():
                if self.process.poll() is not None:
                    said = _last(self.log.name)
                    raise Failed(f"{self.client.backend.program} ended with code {self.process.returncode} before it served: {said}")
                if time.monotonic() - begun > WAITED:
                    raise Failed(f"{self.client.backend.program} was not ready after {WAITED} s: {self.log.name} has what it said")
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise
        return self.client

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def _last(path: str) -> str:
    """The last lines of a log, in one."""
    with open(path, errors="replace", encoding="utf-8") as f:
        lines = [line.strip() for line in f if line.strip()]
    return f"{' / '.join(lines[-3:])[-500:] or 'it said nothing'} ({path})"


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [f" {'adapter':24} {'nats from ours':>14} {'it moves by':>12} {'top-1 agree':>12}   verdict"]
    for row in rows:
        moves = "" if row.adapter is None else f"{row.moves:.5f}"
        lines.append(f" {row.adapter or '(the base)':24} {row.distance:14.5f} {moves:>12} {row.top1:12.1%}   {row.verdict}")
    return "\n".join(lines)
