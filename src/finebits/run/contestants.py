"""Whom an evaluation compares: the model before tuning, a run as it started and as it was tuned, adapters over a base, exports as stock
libraries read them. Each is opened when its turn comes, and voices of one model together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finebits.errors import Invalid
from finebits.evaluate.heldout import Batch, Scores, Teacher, score, teacher
from finebits.plan.base import Plan
from finebits.report import tables
from finebits.run.places import Place, place_of, stock_of
from finebits.runfolder import PLAN
from finebits.stream import in_memory

FULL, AGAINST = "full", "against"


@dataclass(frozen=True)
class Open:
    """One that is open: how it scores rows, teaches others, and (`whole`) a transformers model that generates."""

    score: Callable[[Sequence[Batch], Teacher | None], Scores]
    teach: Callable[[Sequence[Batch], Path], Teacher]
    whole: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Contestant:
    """`rival` is the key of the one that its differences are from; None: nobody."""

    key: str
    name: str
    stage: str
    rival: str | None
    bits: float | None = None


@dataclass(frozen=True)
class Group:
    """Contestants that are one model while it is loaded; `folder` holds its config and tokenizer."""

    folder: Path
    members: tuple[Contestant, ...]
    opened: Callable[[], AbstractContextManager[dict[str, Open]]]


def groups(place: Place, adapters: Sequence[str], also: Sequence[str], against: str | None, exports: bool) -> list[Group]:
    """All of them, the one that the others are compared with first."""
    found = _of_run(place, against is not None) if place.run is not None else _of_model(place, adapters)
    if place.run is not None and adapters:
        raise Invalid(f"{place.title} has an adapter of its own, over which others would lie: give the model that {adapters[0]} is for")
    main = found[-1].members[-1].key
    extra = [(place_of(a), f"also{i}" if i else "also") for i, a in enumerate(also)]
    if place.run is not None and exports:
        extra += [(p, f"export_{p.target}") for p in _exports(place)]
    for other, key in extra:
        found.append(_alone(other, Contestant(key, other.target or other.title, "export", main)))
    if against is not None:
        other = place_of(against)
        title = other.title if other.kind == "model" else f"{other.title}, tuned"
        found.append(_alone(other, Contestant(AGAINST, title, "tuned", FULL if found[0].members[0].key == FULL else None)))
    return found


def _exports(place: Place) -> list[Place]:
    from finebits.runfolder import TARGETS

    assert place.run is not None
    found = [place_of(str(p)) for p in sorted((place.run / TARGETS).glob("*/"))]
    return [p for p in found if p.kind == "export"]


def _of_run(place: Place, rival: bool) -> list[Group]:
    assert place.run is not None
    plan = Plan.load(place.run / PLAN)
    from finebits.interop.hf import checked_folder

    folder, own = checked_folder(plan), tables.average_bits(tables.matrices(plan))
    full = Contestant(FULL, "full precision, untuned", "start", None, 8.0 * plan.levers.width)

    @contextlib.contextmanager
    def untouched() -> Iterator[dict[str, Open]]:
        from finebits.interop.streaming import Streamed

        streamed = Streamed.of(plan, folder)
        whole = partial(in_memory, streamed.model, streamed.blocks, streamed.read)
        yield {FULL: _flowing(streamed.model, streamed.hidden, whole, plan.levers.loss_chunk)}

    start = Contestant("untuned", "start, untuned", "start", FULL, own)
    tuned = Contestant("tuned", f"{place.title}, tuned", "tuned", AGAINST if rival else FULL, own)
    members = (start, tuned) if place.start is not None else (tuned,)
    return [Group(folder, (full,), untouched), Group(folder, members, lambda: _speaking(place, (), members, plan.levers.loss_chunk))]


def _of_model(place: Place, adapters: Sequence[str]) -> list[Group]:
    from finebits.interop.hf import folder_of
    from finebits.interop.voices import NONE, base_for

    if place.kind in ("saved", "peft"):
        from finebits.store import read

        base = base_for(Path(place.path)) if place.kind == "peft" else read(place.path).plan.model
        members = (Contestant(NONE, "without the adapter", "start", None), Contestant("tuned", place.title, "tuned", NONE))
        return [Group(folder_of(base), members, lambda: _speaking(place, (), members))]
    if place.kind == "export":
        return [_alone(place, Contestant("export", place.target, "export", None))]
    if not adapters:
        alone = (Contestant(NONE, place.title, "start", None),)
        return [Group(folder_of(place.path), alone, lambda: _speaking(place, (), alone))]
    names = [Path(a).resolve().name for a in adapters]
    if len(set(names)) < len(names):
        raise Invalid(f"adapters go by the names of their folders, and two are called {max(names, key=names.count)}: rename one")
    keys = [n.replace(".", "-") for n in names]
    members = (Contestant(NONE, place.title, "start", None), *(Contestant(k, n, "tuned", NONE) for k, n in zip(keys, names, strict=True)))
    return [Group(folder_of(place.path), members, lambda: _speaking(place, adapters, members))]


@contextlib.contextmanager
def _speaking(place: Place, adapters: Sequence[str], members: Sequence[Contestant], chunk: int = 256) -> Iterator[dict[str, Open]]:
    voices = place.voices(adapters)
    if missing := [m for m in members if m.key not in (*voices.names, "none")]:
        members = [m for m in members if m not in missing]  # a start that cannot be told from what was tuned

    def opened(key: str) -> Open:
        @contextlib.contextmanager
        def whole() -> Iterator[Any]:
            with voices.as_(key):
                yield voices.model

        def scored(batches: Sequence[Batch], taught: Teacher | None) -> Scores:
            with voices.as_(key):
                return score(voices.model, batches, taught, chunk)

        def teach(batches: Sequence[Batch], file: Path) -> Teacher:
            with voices.as_(key):
                return teacher(voices.model, batches, file=file)

        return Open(scored, teach, whole)

    yield {m.key: opened(m.key) for m in members}


def _alone(place: Place, as_: Contestant) -> Group:
    """One of them by itself: an export and a folder of PEFT by stock libraries, all else as it speaks."""
    from finebits.interop.hf import folder_of
    from finebits.interop.voices import base_for

    if place.kind in ("export", "peft"):
        from finebits.export.base import target

        at = target(place.target).read(Path(place.path)).base if place.target else folder_of(base_for(Path(place.path)))

        @contextlib.contextmanager
        def stock() -> Iterator[dict[str, Open]]:
            theirs = stock_of(place, torch.float32)
            yield {as_.key: _flowing(theirs.model, theirs.hidden, lambda: _stock_whole(place), 256)}

        return Group(at, (as_,), stock)
    if place.kind == "model":
        voice, folder = "none", folder_of(place.path)
    else:
        from finebits.store import read

        voice, folder = "tuned", folder_of(read(place.path).plan.model)

    @contextlib.contextmanager
    def speaking() -> Iterator[dict[str, Open]]:
        with _speaking(place, (), [Contestant(voice, "", "", None)]) as open:
            yield {as_.key: open[voice]}

    return Group(folder, (as_,), speaking)


@contextlib.contextmanager
def _stock_whole(place: Place) -> Iterator[Any]:
    from finebits.interop.peft import stock

    if place.kind == "export":
        yield stock(Path(place.path), place.target).eval()
        return
    yield place.voices().model


def _flowing(model: Any, hidden: Callable[..., Any], whole: Callable[[], AbstractContextManager[Any]], chunk: int) -> Open:
    """Of a model of which a block is in memory at a time."""
    return Open(
        lambda batches, taught: score(model, batches, taught, chunk, hidden(batches)),
        lambda batches, file: teacher(model, batches, hidden(batches), file=file),
        whole,
    )
