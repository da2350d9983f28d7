"""OpenAI's routes over an engine, and vLLM's for loading and unloading adapters.

An adapter is a model by its name. What a tenant may not see is not there: asked for, it is answered as a name that nobody has. Local paths are
followed inside the folder of adapters alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from finebits.errors import FinebitsError, Invalid
from finebits.merging.base import Factors
from finebits.serve.answers import Answer, ChatAnswer, TextAnswer, error, model_card
from finebits.serve.engine import Engine
from finebits.serve.metrics import Metrics
from finebits.serve.requests import Busy, TooLong
from finebits.serve.schema import Chat, Completion, Load, Unload, asked
from finebits.serve.studio import HOSTS
from finebits.serve.tenants import Tenant, Tenants, inside
from finebits.serve.worker import Piece, Worker

LONGEST = 8 << 20  # bytes of a body
Read = Callable[[Path], Callable[[], Mapping[str, Factors]]]


class Refused(FinebitsError):
    """An answer that is no 200.

    >>> Refused(404, "there is no such model").status
    404
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.said, self.headers = status, code, headers

    def response(self) -> Response:
        kind = (
            "invalid_request_error"
            if self.status < 500 and self.status != 429
            else "rate_limit_error"
            if self.status == 429
            else "server_error"
        )
        return JSONResponse(error(str(self), kind, self.said), self.status, self.headers)


def refusal(e: Exception) -> Refused:
    """What an exception is over HTTP."""
    if isinstance(e, Refused):
        return e
    if isinstance(e, Busy):
        return Refused(429, str(e), "rate_limit_exceeded", {"Retry-After": str(e.wait)})
    if isinstance(e, TooLong):
        return Refused(400, str(e), "context_length_exceeded")
    if isinstance(e, ValueError) and isinstance(e, FinebitsError):
        return Refused(400, str(e))
    return Refused(500, str(e) if isinstance(e, FinebitsError) else f"{type(e).__name__} while this was answered", "internal_error")


@dataclass
class Served:
    """What the routes are over: the model's name, its engine and tokenizer, the ids that end its texts, the folder that adapters may be loaded
    from (with what reads one) and who may use which."""

    name: str
    engine: Engine
    tokenizer: Any
    stops: frozenset[int]
    tenants: Tenants
    root: Path | None = None
    read: Read | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, body: Chat) -> list[int]:
        """The ids of a conversation. Raises ValueError where the model has no template, or its template refuses the turns."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise Invalid(f"{self.name} has no chat template: ask /v1/completions")
        try:
            encoded = self.tokenizer.apply_chat_template([m.turn() for m in body.messages], add_generation_prompt=True, return_dict=True)
        except Exception as e:  # templates raise what they like
            raise Invalid(f"the chat template of {self.name} refuses these messages ({' '.join(str(e).split())[:200]})") from e
        return list(encoded["input_ids"])

    def prompt(self, body: Completion) -> list[int]:
        return list(self.tokenizer(body.prompt)["input_ids"]) if isinstance(body.prompt, str) else body.prompt


def app(served: Served) -> Starlette:
    """The application: /v1/chat/completions, /v1/completions, /v1/models, /v1/load_lora_adapter, /v1/unload_lora_adapter, /health and /metrics.

    Its engine steps from the application's start to its end. Without keys it answers to names of this machine alone.
    """
    metrics = Metrics()
    worker: list[Worker] = []

    @contextlib.asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        worker.append(Worker(served.engine))
        yield
        await run_in_threadpool(worker[0].close)

    def tenant(request: Request) -> Tenant:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        found = served.tenants.of(key.strip() if scheme.lower() == "bearer" else None)
        if found is None:
            raise Refused(401, "give a key of this server: Authorization: Bearer KEY", "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        return found

    def numbered(who: Tenant, name: str) -> int | None:
        """The engine's number of the adapter that a tenant calls so; None: the model alone."""
        if name == served.name:
            return None
        if name not in who.names:
            raise Refused(404, f"the model {name!r} does not exist, or you have no access to it", "model_not_found")
        return who.names[name]

    async def generate(request: Request, kind: type[Chat] | type[Completion], shape: type[Answer]) -> Response:
        who = tenant(request)
        body = asked(kind, await _json(request))
        number = numbered(who, body.model)
        prompt = await run_in_threadpool(served.chat if isinstance(body, Chat) else served.prompt, body)  # pyright: ignore[reportArgumentType]
        told, stops = body.told, body.stops
        sampling = body.sampling(body.most(served.engine.base.longest - len(prompt)), told, served.stops)
        answer = shape(body.model, len(prompt), served.decode, told)
        pieces = _timed(await worker[0].answer(prompt, sampling, number, served.decode, stops), metrics)
        if body.stream:
            pieces = _again(await _heard(request, anext(pieces)), pieces)  # what is refused has its status still
            return StreamingResponse(
                _events(answer, pieces, body.usage), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        reason = await _heard(request, _collected(answer, pieces))
        return JSONResponse(answer.whole(reason))

    async def chat(request: Request) -> Response:
        return await generate(request, Chat, ChatAnswer)

    async def complete(request: Request) -> Response:
        return await generate(request, Completion, TextAnswer)

    async def models(request: Request) -> Response:
        who = tenant(request)
        cards = [model_card(served.name, served.created, served.name, None)]
        cards += [model_card(name, served.created, name, served.name) for name in sorted(who.names)]
        return JSONResponse({"object": "list", "data": cards})

    async def load(request: Request) -> Response:
        who = tenant(request)
        body = asked(Load, await _json(request))
        if served.root is None or served.read is None:
            raise Refused(400, "this server has no folder of adapters to load from: start it with --adapters")
        at, first = inside(served.root, body.lora_path)
        if not who.may(first):  # as if nothing were there
            raise Invalid("lora_path names no folder among the adapters of this server")
        if body.lora_name == served.name or body.lora_name in who.names:
            raise Invalid(f"there is a model {body.lora_name!r} already: unload it first, or give another name")
        read = await run_in_threadpool(served.read, at)
        await run_in_threadpool(read)  # all that is wrong with it is said now
        if body.lora_name in who.names:
            raise Invalid(f"there is a model {body.lora_name!r} already: unload it first, or give another name")
        who.names[body.lora_name] = served.engine.register(read)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(request: Request) -> Response:
        who = tenant(request)
        body = asked(Unload, await _json(request))
        number = numbered(who, body.lora_name)
        if number is None:
            raise Invalid(f"{served.name} is the model itself, which stays")
        del who.names[body.lora_name]
        if not served.tenants.held(number):
            served.engine.unregister(number)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def health(request: Request) -> Response:
        well = bool(worker) and worker[0].alive and not served.engine.closed
        return JSONResponse({"status": "ok" if well else "down"}, 200 if well else 503)

    async def counted(request: Request) -> Response:
        if served.tenants.open is None:
            tenant(request)
        return PlainTextResponse(metrics.text(served.engine), media_type="text/plain; version=0.0.4; charset=utf-8")

    def guarded(path: str, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                response = await answer(request)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as e:  # of one request
                response = refusal(e).response()
            metrics.answered(path, response.status_code)
            return response

        return endpoint

    async def unknown(request: Request, e: Exception) -> Response:
        return Refused(getattr(e, "status_code", 404), f"there is no {request.method} {request.url.path} here").response()

    post = {
        "/v1/chat/completions": chat,
        "/v1/completions": complete,
        "/v1/load_lora_adapter": load,
        "/v1/unload_lora_adapter": unload,
    }
    get = {"/v1/models": models, "/health": health, "/metrics": counted}
    routes = [Route(path, guarded(path, f), methods=["POST"]) for path, f in post.items()]
    routes += [Route(path, guarded(path, f)) for path, f in get.items()]
    only = [Middleware(TrustedHostMiddleware, allowed_hosts=[*HOSTS, "[::1]"])] if served.tenants.open else []
    return Starlette(routes=routes, middleware=only, lifespan=running, exception_handlers={404: unknown, 405: unknown})


async def _json(request: Request) -> Any:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LONGEST:
            raise Refused(413, f"the body is longer than {LONGEST:,} bytes")
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise Refused(400, "the body is no JSON") from None


async def _timed(pieces: AsyncIterator[Piece], metrics: Metrics) -> AsyncIterator[Piece]:
    begun, first = time.perf_counter(), None
    try:
        async for piece in pieces:
            first = first or time.perf_counter() - begun
            yield piece
    finally:
        metrics.timed(first, time.perf_counter() - begun)
        await pieces.aclose()  # pyright: ignore[reportAttributeAccessIssue]


async def _again(first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()  # pyright: ignore[reportAttributeAccessIssue]


async def _collected(answer: Answer, pieces: AsyncIterator[Piece]) -> str | None:
    reason = None
    async for piece in pieces:
        answer.text += piece.text
        answer.tokens += piece.tokens
        reason = piece.reason
    return reason


async def _heard(request: Request, answer: Any) -> Any:
    """`answer`, which is dropped where the client goes away before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    wanted, left = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({wanted, left}, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            raise ClientDisconnect
        return wanted.result()
    finally:
        for task in (wanted, left):
            task.cancel()


async def _events(answer: Answer, pieces: AsyncIterator[Piece], usage: bool) -> AsyncIterator[str]:
    """Server-sent events: the parts of an answer, and [DONE]. What goes wrong on the way is an event too."""
    say: Callable[[Any], str] = lambda data: f"data: {json.dumps(data, ensure_ascii=False)}\n\n"  # noqa: E731
    try:
        if isinstance(answer, ChatAnswer):
            yield say(answer.first())
        async for piece in pieces:
            answer.tokens += piece.tokens
            yield say(answer.part(piece.text, piece.tokens, piece.reason))
        if usage:
            yield say(answer.last())
    except Exception as e:  # the status is out already
        wrong = refusal(e)
        yield say(error(str(wrong), "server_error" if wrong.status >= 500 else "invalid_request_error", wrong.said))
    finally:
        await pieces.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    yield "data: [DONE]\n\n"
