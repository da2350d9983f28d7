"""Rows of different adapters through one linear layer: the grouped product against the row-by-row reference and PEFT's way, one product for each
adapter's rows gathered and scattered: `python benchmarks/grouped.py`.

A layer of 576×576 in float32, as in SmolLM2-135M; adapters of ranks 4, 8, 16, 32, 64 in turn, rows spread over them evenly; contenders take
turns, and ratios are medians over the turns. `far` is the largest distance from the reference over its largest number.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from paired import ratio, turns
from torch import Tensor

from finebits.kernels.laid import Group, Groups, Resident
from finebits.merging.base import Factors
from finebits.serve.grouped import add, lay, reference
from finebits.serve.pages import Pool

SIDE, RANKS, COUNTS = 576, (4, 8, 16, 32, 64), (1, 4, 16, 64)
PAGE = 22  # vectors of a page


class Contender(NamedTuple):
    name: str
    calls: list[Callable[[], object]]


def gathered(x: Tensor, y: Tensor, rows: list[tuple[Tensor, Factors]]) -> None:
    """PEFT's mixed batch: for every adapter that is there, its rows out of x and back into y."""
    for at, (B, A, s) in rows:
        y[at] += x[at] @ A.mT @ B.mT * s


def groups_of(batch: int, laid: list[Resident]) -> Groups:
    ends = [batch * (i + 1) // len(laid) for i in range(len(laid))]
    return Groups(Group(a, b, one) for a, b, one in zip([0, *ends], ends, laid, strict=False))


class Case(NamedTuple):
    """The largest distance from the reference over its largest number, and who takes part."""

    far: float
    contenders: list[Contender]


def laid_out(side: int, count: int, device: str, dtype: torch.dtype) -> tuple[list[Factors], list[Resident]]:
    """Adapters over a layer of side×side, and where they lie in a pool."""
    gen = torch.Generator().manual_seed(0)
    pool = Pool(count * (2 * max(RANKS) * side // (PAGE * side) + 2), PAGE * side, dtype, device)
    draw = lambda *shape: (torch.randn(*shape, generator=gen) / side**0.5).to(device, dtype)  # noqa: E731
    own = [Factors(draw(side, r), draw(r, side), 0.5) for r in itertools.islice(itertools.cycle(RANKS), count)]
    return own, [lay({"q": f}, pool, i) for i, f in enumerate(own)]


def case(batch: int, side: int, own: list[Factors], laid: list[Resident]) -> Case:
    """Rows of these adapters, spread over them evenly."""
    gen, like = torch.Generator().manual_seed(batch), own[0].A
    x, y = (torch.randn(batch, side, generator=gen).to(like.device, like.dtype) for _ in range(2))
    groups = groups_of(batch, laid)
    rows = [(torch.arange(g.start, g.stop, device=like.device), f) for g, f in zip(groups, own, strict=True)]
    wanted, got, to = reference(x.float(), y.float(), groups, "q"), y.clone(), y.clone()
    add(x, got, groups, "q")
    calls = [lambda: add(x, to, groups, "q")], [lambda: reference(x, to, groups, "q")], [lambda: gathered(x, to, rows)]
    names = ("grouped", "by row", "gathered")
    return Case(float((got.float() - wanted).abs().max() / wanted.abs().max()), [*map(Contender, names, calls)])


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--turns", type=int, default=15)
    given = parse.parse_args()
    own, laid = laid_out(SIDE, max(COUNTS), "cpu", torch.float32)
    print(f"{torch.get_num_threads()} threads\n rows adapters   ms grouped  by row /  gathered /        far")
    for batch, count in ((b, a) for b in COUNTS for a in COUNTS if a <= b):
        found = case(batch, SIDE, own[:count], laid[:count])
        times = turns(found.contenders, given.turns, 0.003)
        by = {name: ratio(times[name].hot, times["grouped"].hot) for name in ("by row", "gathered")}
        least = 1e3 * min(times["grouped"].hot)
        print(f"{batch:5} {count:8} {least:12.4f} {by['by row']:9.1f} {by['gathered']:11.1f} {found.far:10.1e}", flush=True)


if __name__ == "__main__":
    main()
