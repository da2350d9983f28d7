"""Answers in OpenAI's shapes: whole, and in the parts of a stream."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from finebits.serve.requests import Token

Decode = Callable[[list[int]], str]


@dataclass
class Answer(ABC):
    """Of one request. `model` is what it was asked of, `prompt` how many tokens that has."""

    model: str
    prompt: int
    decode: Decode
    logprobs: int | None
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offset: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    kind, chunk, prefix = "", "", ""

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    def usage(self) -> dict[str, int]:
        made = len(self.tokens)
        return {"prompt_tokens": self.prompt, "completion_tokens": made, "total_tokens": self.prompt + made}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, reason: str | None) -> dict[str, Any]:
        return self._head(self.kind) | {"choices": [self._choice(self.text, self.tokens, reason)], "usage": self.usage()}

    def part(self, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        return self._head(self.chunk) | {"choices": [self._delta(text, tokens, reason)]}

    def last(self) -> dict[str, Any]:
        """What a stream ends with where usage was asked for."""
        return self._head(self.chunk) | {"choices": [], "usage": self.usage()}

    @abstractmethod
    def _choice(self, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]: ...

    @abstractmethod
    def _delta(self, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]: ...


class ChatAnswer(Answer):
    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _choice(self, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _delta(self, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        return {"index": 0, "delta": {"content": text} if text else {}, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def first(self) -> dict[str, Any]:
        """Who speaks, before anything is said."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return self._head(self.chunk) | {"choices": [choice]}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        one = lambda id, logprob: {"token": (t := self.decode([id])), "logprob": logprob, "bytes": list(t.encode())}  # noqa: E731
        return {"content": [one(t.id, t.logprob) | {"top_logprobs": [one(*top) for top in t.top]} for t in tokens], "refusal": None}


class TextAnswer(Answer):
    kind, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def _choice(self, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    _delta = _choice

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        words, offsets = [self.decode([t.id]) for t in tokens], []
        for word in words:
            offsets.append(self.offset)
            self.offset += len(word)
        top = [{self.decode([id]): logprob for id, logprob in t.top} | {w: t.logprob} for t, w in zip(tokens, words, strict=True)]
        return {"tokens": words, "token_logprobs": [t.logprob for t in tokens], "top_logprobs": top, "text_offset": offsets}


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """What went wrong, as OpenAI's clients read it.

    >>> error("no", "invalid_request_error")
    {'error': {'message': 'no', 'type': 'invalid_request_error', 'param': None, 'code': None}}
    """
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model_card(name: str, created: int, root: str, parent: str | None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "finebits", "root": root, "parent": parent}
