"""Rounds of a federation, in this process: who takes part, what is made of what they send, and what it weighs. How a client trains is given.
An engine that reaches clients elsewhere calls the same two functions, `participants` and `aggregate`, and so has the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from finebits import files
from finebits.errors import Invalid
from finebits.federate._privacy import Privacy, checked, private
from finebits.federate.base import Aggregator, Sent, Server, Tensors, cut, nbytes
from finebits.tensorfile import Entry, Stored, write

SCHEMA = "finebits.round/1"
TENSORS, ABOUT = "round.safetensors", "round.json"


class Round(NamedTuple):
    """Where a federation stands after a round (0: before the first): the server, every client's rank, who sent something, and the bytes that all
    of them sent together and that all clients were sent."""

    number: int
    server: Server
    ranks: tuple[int, ...]
    sent: tuple[int, ...] = ()
    up: int = 0
    down: int = 0


class Federation(NamedTuple):
    """`clients` of them, each taking part in a round with chance `fraction`, and falling out, before it has sent anything, with
    chance `dropout`."""

    aggregator: Aggregator
    clients: int
    seed: int = 0
    fraction: float = 1.0
    dropout: float = 0.0
    privacy: Privacy | None = None

    def checked(self, ranks: Sequence[int]) -> Federation:
        """The same. Raises Invalid where its numbers, or ranks of its clients, make no rounds.

        >>> from finebits.federate.fedavg import FedAvg
        >>> Federation(FedAvg(), clients=2).checked([8, 4])
        Traceback (most recent call last):
            ...
        finebits.errors.Invalid: FedAvg averages factors of one rank, and clients have 8 and 4: take flora or hetlora
        """
        if self.clients < 1 or not 0 < self.fraction <= 1 or not 0 <= self.dropout < 1:
            raise Invalid(
                f"there are {self.clients} clients, of whom {self.fraction:g} take part and {self.dropout:g} fall out: at least one is "
                "wanted, a fraction above 0 and at most 1, and a dropout from 0 to below 1"
            )
        different = sorted(set(ranks), reverse=True)
        if len(different) > 1 and not self.aggregator.ranks:
            who, said = type(self.aggregator).__name__, " and ".join(map(str, different))
            raise Invalid(f"{who} averages factors of one rank, and clients have {said}: take flora or hetlora")
        if self.privacy is not None:
            checked(self.aggregator, self.privacy)
        return self

    def participants(self, number: int) -> list[int]:
        """Who sends something in a round, out of the seed and its number alone."""
        draws = torch.rand(2, self.clients, generator=self.gen("who", number))
        return [k for k in range(self.clients) if draws[0, k] < self.fraction and draws[1, k] >= self.dropout]

    def aggregate(self, before: Round, sent: Mapping[int, Sent]) -> Round:
        """The next round, of what these clients sent. Where nobody sent anything, nothing moves (but by noise)."""
        number, order = before.number + 1, sorted(sent)
        replies = [sent[k] for k in order]
        if self.privacy is not None:
            made = private(self.aggregator, before.server, replies, self.privacy, self.clients, self.gen("noise", number))
        elif not replies:
            return Round(number, before.server, before.ranks)
        else:
            made = self.aggregator(before.server, replies)
        ranks = tuple(sent[k].rank if k in sent and self.aggregator.ranks else r for k, r in enumerate(before.ranks))
        up = sum(nbytes(s.tensors) for s in replies)
        down = sum(nbytes(cut(made.down, r) if self.aggregator.cuts else made.down) for r in ranks)
        return Round(number, made.server, ranks, tuple(order), up, down)

    def start(self, server: Server, rank: int) -> Tensors:
        """What a client of this rank starts from; none: what it draws anew."""
        return cut(server.tensors, rank) if self.aggregator.ranks else server.tensors

    def gen(self, what: str, *of: int) -> Generator:
        """Randomness of one thing of one round, whatever was drawn before."""
        return torch.Generator().manual_seed(seed_of(self.seed, what, *of))


Local = Callable[[Federation, Round, int], Sent]  # a client's training in the round after this one


def seed_of(seed: int, what: str, *of: int) -> int:
    """A seed of its own for one thing of a run.

    >>> seed_of(42, "client", 3, 0) == seed_of(42, "client", 3, 0), seed_of(42, "client", 3, 0) == seed_of(42, "client", 0, 3)
    (True, False)
    """
    text = "/".join(map(str, (seed, what, *of)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def rounds(federation: Federation, local: Local, begun: Round, count: int) -> Iterator[Round]:
    """Every round after `begun` up to number `count`: clients train one after the other, and only what they send is held.

    >>> from finebits.federate.fed_sb import FedSB
    >>> def local(federation, before, client):  # a client whose training adds its number
    ...     R = federation.start(before.server, 1)["q"]["R"]
    ...     return Sent({"q": {"R": R + client}}, examples=1)
    >>> begun = Round(0, Server({"q": {"R": torch.zeros(1, 1)}}), ranks=(1, 1, 1))
    >>> [r.server.tensors["q"]["R"].item() for r in rounds(Federation(FedSB(), clients=3), local, begun, 2)]
    [1.0, 2.0]
    """
    federation.checked(begun.ranks)
    now = begun
    while now.number < count:
        sent = {k: local(federation, now, k) for k in federation.participants(now.number + 1)}
        now = federation.aggregate(now, sent)
        yield now


def save(now: Round, folder: Path, **about: Any) -> None:
    """The round into a folder, in the place of the one before it; the file that names it is written last."""
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    parts = (("tensors", now.server.tensors), ("residual", now.server.residual))
    named = {f"{part}/{name}/{k}": t.contiguous() for part, of in parts for name, p in of.items() for k, t in p.items()}
    path = folder / f"{now.number}-{TENSORS}"
    write(path, {k: Entry.of(t) for k, t in named.items()}, {})
    said = {"schema": SCHEMA, "number": now.number, "ranks": now.ranks, "sent": now.sent, "up": now.up, "down": now.down}
    files.write_json(folder / ABOUT, said | {"sha256": files.sha256(path)} | about)
    for old in folder.glob(f"*-{TENSORS}"):
        if old != path:
            old.unlink()


def load(folder: Path) -> tuple[Round, dict[str, Any]] | None:
    """What `save` wrote, and what was said beside it; None where nothing was. Raises Invalid where the files are not as they were written."""
    if not (folder / ABOUT).exists():
        return None
    said = files.read_json(folder / ABOUT)
    path = folder / f"{said.get('number')}-{TENSORS}"
    if said.get("schema") != SCHEMA or not path.is_file() or files.sha256(path) != said.get("sha256"):
        raise Invalid(f"{folder} does not hold the round that its {ABOUT} names: begin anew with --overwrite")
    stored = Stored(path)
    parts: dict[str, dict[str, dict[str, Tensor]]] = {"tensors": {}, "residual": {}}
    for key in stored:
        part, name, k = key.split("/")
        parts[part].setdefault(name, {})[k] = stored[key]
    server = Server(parts["tensors"], parts["residual"])
    return Round(said["number"], server, tuple(said["ranks"]), tuple(said["sent"]), said["up"], said["down"]), said
