"""What is asked of the engine, and how the next token of a row is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from finebits.errors import FinebitsError, Invalid

Reason = Literal["stop", "length", "abort", "refused", "error"]  # refused: what was asked for, or its adapter, is bad; error: we are


class Busy(FinebitsError):
    """The queue is full, or the server goes down: try again after `wait` seconds.

    >>> Busy("the queue is full", 3).wait
    3
    """

    def __init__(self, message: str, wait: int) -> None:
        super().__init__(message)
        self.wait = wait


class TooLong(Invalid):
    """A prompt and what may follow it are longer than the model's texts.

    >>> issubclass(TooLong, ValueError)
    True
    """


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; `logprobs` is how many of the likeliest tokens are told beside the chosen (None: nothing is told).

    >>> Sampling(top_p=0.0)
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: top_p is 0.0; it is to be above 0 and at most 1
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    stops: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise Invalid(f"max_tokens is {self.max_tokens}; it is to be at least 1")
        if not 0 <= self.temperature <= 2:
            raise Invalid(f"temperature is {self.temperature}; it is to be from 0 to 2")
        if not 0 < self.top_p <= 1:
            raise Invalid(f"top_p is {self.top_p}; it is to be above 0 and at most 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise Invalid(f"seed is {self.seed}; it is to have 64 bits")


class Token(NamedTuple):
    """A chosen token, the log of its probability in what the model gives (before temperature), and those of the likeliest."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Request:
    """`prompt` is token ids, `adapter` the number that the engine gave it (None: the model alone). `token` is called with every token that does
    not end the request, and ends it by returning True; `end` once, with the reason and what went wrong. Both from the engine's thread."""

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: int | None = None
    token: Callable[[Token], bool | None] = lambda token: None
    end: Callable[[Reason, str], None] = lambda reason, error: None
    arrived: float = 0.0
    aborted: bool = False


def sampled(logits: Tensor, sampling: Sampling, gen: Generator | None) -> int:
    """The next token of one row of logits, float32: the likeliest, or drawn from the least set that holds top_p, by `gen`.

    >>> sampled(torch.tensor([0.0, 2.0, 1.0]), Sampling(), None)
    1
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    p = torch.softmax(logits / sampling.temperature, 0)
    if sampling.top_p < 1:
        likeliest, order = p.sort(descending=True, stable=True)
        kept = likeliest.cumsum(0) - likeliest < sampling.top_p  # the first is always kept
        p = torch.zeros_like(p).scatter(0, order[kept], likeliest[kept])
    return int(torch.multinomial(p, 1, generator=gen))


def chosen(logits: Tensor, sampling: Sampling, gen: Generator | None) -> Token:
    """That, with the logprobs that were asked for."""
    id = sampled(logits, sampling, gen)
    if sampling.logprobs is None:
        return Token(id)
    logs = torch.log_softmax(logits, 0)
    top = logs.topk(min(sampling.logprobs, len(logs))) if sampling.logprobs else None
    return Token(id, float(logs[id]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ())


def peak(rows: Sequence[tuple[int, int]], pages: Callable[[int], int]) -> int:
    """The most pages that rows of (tokens that are kept, tokens that may still come) ever hold together, where each gets one a step and goes
    when it is through (S-LoRA's admission, its token pool in pages): when one goes, those before it are gone and all others have grown as much.

    >>> peak([(10, 1), (1, 10)], lambda tokens: tokens)  # 11 + 2 when the first goes, and 11 when the second does
    13
    """
    order = sorted(rows, key=lambda row: -row[1])
    return max((sum(pages(kept + left) for kept, _ in order[: i + 1]) for i, (_, left) in enumerate(order)), default=0)
