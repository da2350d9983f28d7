"""What a model can take of a tokenizer's ids and of a row's length, and where it stops: compared with the rows before anything is planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finebits.data.arrays import Example
from finebits.data.error import DataError
from finebits.data.finding import Finding, rows_
from finebits.data.tokens import Encoded


@dataclass(frozen=True)
class Limits:
    """`ids`: rows of the embedding; `positions`: tokens of a row that the model was made for; each None if it is not known. `fixed`: there
    is nothing behind the last position (a table of learned ones), where others only grow unreliable. `stops`: ids that generation ends at;
    empty if that is not known. `notes`: what else was found and mended, a sentence each.

    >>> from finebits.data.arrays import Example
    >>> Limits(positions=2, fixed=True).require([Example([5, 6, 7], [-100, 6, 7], 1, path="a.jsonl")], tokenizer=None)
    Traceback (most recent call last):
        ...
    finebits.data.error.DataError: a.jsonl:1: the row has 3 tokens, and the model has 2 positions: set max_length to 2 at most
    """

    ids: int | None = None
    positions: int | None = None
    fixed: bool = False
    stops: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def findings(self, seen: Sequence[Encoded], tokenizer: Any, max_length: int) -> Iterator[Finding]:
        """What these rows ask that the model does not have."""
        cut = [e.cut(max_length) for e in seen]
        if self.ids is not None and (at := [e.line for e in cut if max(e.input_ids, default=0) >= self.ids]):
            first = next(i for e in cut for i in e.input_ids if i >= self.ids)
            message = f"{rows_(at)} with tokens that have no embedding, such as {_token(tokenizer, first)}: {self._embedded()}"
            yield Finding("no_embedding", "fail", tuple(at), message, "use the model's own tokenizer, or enlarge its embedding first")
        if self.positions is not None and (at := [e.line for e in cut if len(e.input_ids) > self.positions]):
            message = f"{rows_(at)} longer than the {self.positions:,} positions of the model"
            fix = f"set max_length to {self.positions} at most"
            if self.fixed:
                yield Finding("positions", "fail", tuple(at), message, fix)
            else:
                yield Finding("far_positions", "warn", tuple(at), f"{message}: it was not made for what lies behind them", fix)
        ends = [(e, tuple(e.ids[i] for i in e.ends if i is not None and e.trained[i])) for e in seen]
        open_ = [e.line for e, closing in ends if closing and not self.stops & set(closing)]
        if self.stops and open_:
            token = _token(tokenizer, next(c[-1] for _, c in ends if c and not self.stops & set(c)))
            stops = ", ".join(_token(tokenizer, i) for i in sorted(self.stops))
            message = f"{rows_(open_)} whose answers end in {token}, and generation stops at {stops}"
            yield Finding("never_stops", "warn", tuple(open_), message, "add it to eos_token_id in the model's generation_config.json")
        for note in self.notes:
            yield Finding("pad_token", "info", (), note)

    def require(self, examples: Sequence[Example], tokenizer: Any) -> None:
        """Raises DataError, naming the first row, unless the model can take these examples."""
        for e in examples:
            if self.ids is not None and max(e.input_ids, default=0) >= self.ids:
                token = _token(tokenizer, next(i for i in e.input_ids if i >= self.ids))
                raise DataError(
                    f"{e.where}: {token} has no embedding: {self._embedded()}. Use the model's own tokenizer, or enlarge its embedding first"
                )
            if self.fixed and self.positions is not None and len(e.input_ids) > self.positions:
                has = f"{len(e.input_ids):,} tokens, and the model has {self.positions:,} positions"
                raise DataError(f"{e.where}: the row has {has}: set max_length to {self.positions} at most")

    def _embedded(self) -> str:
        return f"the model embeds the ids 0 to {(self.ids or 0) - 1:,}"


UNKNOWN = Limits()


def positions_of(config: Any, model: Any = None) -> tuple[int | None, bool]:
    """(tokens of a row that a model of this config of transformers was made for, or None; whether there is nothing behind the last of them).
    A table of learned positions that keeps places for padding, as RoBERTa's does, says so in the `model` alone, which may be on meta.

    >>> from types import SimpleNamespace as Config
    >>> positions_of(Config(max_position_embeddings=8)), positions_of(Config(max_position_embeddings=8, rope_parameters={"rope_theta": 1.0}))
    ((8, True), (8, False))
    """
    count = getattr(config, "max_position_embeddings", None)
    if getattr(config, "alibi", False) or not isinstance(count, int):
        return None, not getattr(config, "rope_parameters", None)
    if getattr(config, "rope_parameters", None):
        return count, False
    tables = [m for m in ([] if model is None else model.modules()) if getattr(m, "num_embeddings", None) == count]
    kept = {m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None}
    return count - max(kept, default=0), True


def _token(tokenizer: Any, id: int) -> str:
    token = tokenizer.convert_ids_to_tokens(id)
    return f"{token} (id {id:,})" if token is not None else f"id {id:,}"
