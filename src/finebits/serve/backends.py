"""vLLM and llama-server as engines: the command that serves a base and its adapters with one of them, and how each is asked for the likeliest
next tokens.

vLLM 0.32 takes the maximum of ranks out of a list and keeps places of that rank over every linear layer, for as many adapters as a batch may
have; an adapter is read from a folder by its name when a request is for it (the filesystem resolver that comes with it). llama-server reads all
adapters when it starts, and a request says by number which it wants.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finebits import sizes
from finebits.errors import Invalid

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has places of
TOLD = 20  # likeliest tokens, the most that vLLM tells where nobody says
LEAST = 256  # tokens of a request that a budget must have room for


class Asked(NamedTuple):
    """Where an engine listens, and how much it may take: bytes beside the model, requests that run together."""

    host: str = "127.0.0.1"
    port: int = 8765
    budget: int = 1 << 30
    batch: int = 32


class Written(NamedTuple):
    """What there is to serve: a base (a folder of transformers, or a GGUF file) and what it is called, adapters by name, the largest rank,
    numbers that all linear layers have in rows and columns (what rank 1 over every one takes), those that keys and values of a token take,
    and the longest text."""

    base: Path
    name: str
    adapters: Mapping[str, Path]
    rank: int
    sides: int
    token: int
    longest: int


class Command(NamedTuple):
    """A program with its arguments, and what its environment has to say."""

    words: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def line(self) -> str:
        """For a shell.

        >>> Command(("vllm", "serve", "my model"), {"A": "1"}).line
        "A=1 vllm serve 'my model'"
        """
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.words)])


@dataclass(frozen=True)
class Backend:
    """An engine: its program, how one gets it, its command, and a question for the next token, as (path, body), and log-probabilities by token
    out of the answer. `rounds` is how many nats its own arithmetic may move a distribution by."""

    name: str
    program: str
    install: str
    max_rank: int
    rounds: float
    command: Callable[[Written, Asked], Command] = field(repr=False)
    question: Callable[[Written, str | None, Sequence[int]], tuple[str, dict[str, Any]]] = field(repr=False)
    answer: Callable[[Any], dict[int, float]] = field(repr=False)


def place_of(rank: int) -> int:
    """The least rank of vLLM's list that has room for one.

    >>> place_of(1), place_of(24), place_of(512)
    (1, 32, 512)
    """
    return next(r for r in RANKS if r >= rank)


def _vllm(it: Written, asked: Asked) -> Command:
    """The budget holds places of adapters on the device, at most half of it, and keys and values: as that of the engine here."""
    rank, count = place_of(it.rank), len(it.adapters)
    place = 2 * rank * it.sides  # bytes, in 16 bits
    slots = min(max(count, 1), asked.batch, asked.budget // (2 * place)) if count else 0
    rest = asked.budget - slots * place
    if count and not slots or rest < LEAST * 2 * it.token:
        least = max(2 * place if count else 0, 2 * LEAST * 2 * it.token)
        raise Invalid(
            f"an adapter takes a place of {sizes.show(place)} at rank {rank} in vLLM, and the budget is {sizes.show(asked.budget)}: give "
            f"--budget {sizes.show(least)} or more"
        )
    words = ["vllm", "serve", str(it.base), "--served-model-name", it.name, "--host", asked.host, "--port", str(asked.port)]
    words += [
        "--generation-config",
        "vllm",
        "--max-model-len",
        "auto",
        "--max-num-seqs",
        str(asked.batch),
        "--kv-cache-memory-bytes",
        str(rest),
    ]
    if not count:
        return Command(tuple(words), {})
    words += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(slots), "--max-cpu-loras", str(max(count, slots))]
    folder = next(iter(it.adapters.values())).parent
    return Command(tuple(words), {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_LORA_RESOLVER_CACHE_DIR": str(folder)})


def _llama(it: Written, asked: Asked) -> Command:
    """The budget holds all adapters, and keys and values in 16 bits."""
    held = sum(path.stat().st_size for path in it.adapters.values())
    tokens = min((asked.budget - held) // (2 * it.token), asked.batch * it.longest)
    if tokens < asked.batch * min(LEAST, it.longest):
        least = held + asked.batch * min(LEAST, it.longest) * 2 * it.token
        raise Invalid(
            f"adapters of {sizes.show(held)} and {asked.batch} requests of {min(LEAST, it.longest)} tokens take {sizes.show(least)} in "
            f"llama-server, and the budget is {sizes.show(asked.budget)}: give a larger --budget or a smaller --max-batch"
        )
    words = ["llama-server", "--model", str(it.base), "--alias", it.name, "--host", asked.host, "--port", str(asked.port)]
    words += ["--parallel", str(asked.batch), "--ctx-size", str(tokens)]
    if it.adapters:
        paths = [str(path) for path in it.adapters.values()]
        if bad := next((path for path in paths if "," in path), None):
            raise Invalid(f"llama-server parts paths of adapters by commas, and there is one in {bad}: rename it")
        words += ["--lora", ",".join(paths), "--lora-init-without-apply"]
    return Command(tuple(words), {})


def _vllm_question(it: Written, adapter: str | None, ids: Sequence[int]) -> tuple[str, dict[str, Any]]:
    body = {"model": adapter or it.name, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "logprobs": TOLD}
    return "/v1/completions", body | {"return_tokens_as_token_ids": True}


def _vllm_answer(found: Any) -> dict[int, float]:
    told: Mapping[str, float] = found["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(token.removeprefix("token_id:")): float(p) for token, p in told.items()}


def _llama_question(it: Written, adapter: str | None, ids: Sequence[int]) -> tuple[str, dict[str, Any]]:
    number = None if adapter is None else list(it.adapters).index(adapter)
    loras = [{"id": i, "scale": float(i == number)} for i in range(len(it.adapters))]
    return "/completion", {"prompt": list(ids), "n_predict": 1, "n_probs": TOLD, "cache_prompt": False, "lora": loras}


def _llama_answer(found: Any) -> dict[int, float]:
    return {int(one["id"]): float(one["logprob"]) for one in found["completion_probabilities"][0]["top_logprobs"]}


BACKENDS = {
    "vllm": Backend("vllm", "vllm", "pip install vllm (0.32)", RANKS[-1], 5e-2, _vllm, _vllm_question, _vllm_answer),
    "llama.cpp": Backend(
        "llama.cpp",
        "llama-server",
        "it comes with llama.cpp (brew install llama.cpp, or a release of ggml-org/llama.cpp)",
        1 << 20,
        1e-1,
        _llama,
        _llama_question,
        _llama_answer,
    ),
}
