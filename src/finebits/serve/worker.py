"""The thread that an engine steps in, and what others ask of it from an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from finebits.errors import Failed, Invalid
from finebits.serve.engine import Engine
from finebits.serve.requests import Reason, Request, Sampling, Token
from finebits.serve.text import Written

READING = 0.002  # seconds until it is looked again whether an adapter has been read


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text that is certain, the tokens since the part before, and with the last part why it is over."""

    text: str
    tokens: Sequence[Token]
    reason: Reason | None = None


class Worker:
    """Runs `engine` until `close`. A request that ends in an error raises it where its answer is read."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._wake, self._end = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._end:
                self._wake.clear()
                if not self.engine.step():
                    self._wake.wait(READING if self.engine.busy else None)
        finally:  # where a step itself broke, nobody waits for an answer that never comes, and /health says so
            self.engine.stop()

    def close(self) -> None:
        """End what still runs, and the thread."""
        self._end = True
        self._wake.set()
        self._thread.join()

    async def answer(
        self, prompt: Sequence[int], sampling: Sampling, adapter: int | None, decode: Callable[[list[int]], str], stops: Sequence[str]
    ) -> AsyncIterator[Piece]:
        """Of one request, submitted when this is awaited: Busy and ValueError are raised before anything comes. Whoever stops listening aborts
        it."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception]()
        written, told = Written(decode, stops), list[Token]()

        def put(piece: Piece | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def token(t: Token) -> bool:
            text = written.add(t.id)
            told.append(t)
            if text:
                put(Piece(text, tuple(told)))
                told.clear()
            return written.ended

        def end(reason: Reason, error: str) -> None:
            if reason in ("refused", "error", "abort"):
                put(Invalid(error) if reason == "refused" else Failed(error or "the server went down before this answer was over"))
            else:
                put(Piece(written.rest(), tuple(told), reason))

        request = Request(prompt, sampling, adapter, token, end)
        self.engine.submit(request)
        self._wake.set()
        return self._pieces(request, pieces)

    async def _pieces(self, request: Request, pieces: asyncio.Queue[Piece | Exception]) -> AsyncIterator[Piece]:
        over = False
        try:
            while not over:
                piece = await pieces.get()
                over = isinstance(piece, Exception) or piece.reason is not None
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            if not over:
                self.engine.abort(request)
                self._wake.set()
