"""What may be asked over HTTP, in OpenAI's words. A field that would change the answer and is not known is refused, and never passed over."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finebits.errors import Invalid
from finebits.serve.requests import Sampling

CHAT_TOKENS = 512  # of an answer in a chat, where nobody says; the field's standard for completions is 16


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Fields):
    include_usage: bool = False
    include_obfuscation: bool = False  # asks for nothing where it is off


class Generation(_Fields):
    """Fields that both routes have. Those that are one value alone are what clients send to say that they do not want them."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> list[str]:
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(found) > 4 or "" in found:
            raise Invalid("stop is to be up to 4 texts, and none of them empty")
        return found

    @property
    def usage(self) -> bool:
        """Is a stream to end with how many tokens it took?"""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, most: int, logprobs: int | None, stops: frozenset[int]) -> Sampling:
        """OpenAI samples at temperature 1 where nobody says."""
        t, p = self.temperature, self.top_p
        return Sampling(most, 1.0 if t is None else t, 1.0 if p is None else p, self.seed, logprobs, stops)


class Part(_Fields):
    type: Literal["text"]
    text: str


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def turn(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class Chat(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def most(self, room: int) -> int:
        """Tokens of the answer, of `room` that the model has after the prompt."""
        return self.max_completion_tokens or self.max_tokens or max(1, min(CHAT_TOKENS, room))

    @property
    def told(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise Invalid("top_logprobs is told beside logprobs: set logprobs to true")
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(Generation):
    prompt: str | list[int]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def most(self, room: int) -> int:
        return self.max_tokens or 16

    @property
    def told(self) -> int | None:
        return self.logprobs


class Load(_Fields):
    """vLLM's."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@-]*$")]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class Unload(_Fields):
    lora_name: str
    lora_int_id: int | None = None


Fields = TypeVar("Fields", bound=_Fields)


def asked(kind: type[Fields], body: Any) -> Fields:
    """The fields of a body. Raises ValueError that names the first that is wrong.

    >>> asked(Unload, {"lora_name": 3})
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: lora_name: Input should be a valid string
    """
    if not isinstance(body, dict):
        raise Invalid("the body is to be an object in JSON")
    if any(isinstance(v, float) and not math.isfinite(v) for v in body.values()):
        raise Invalid("the body holds NaN or Infinity, which is no JSON")
    try:
        return kind.model_validate(body)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier()) or "the body"
        said = "this server knows no such field" if first["type"] == "extra_forbidden" else first["msg"]
        raise Invalid(f"{where}: {said}") from None
