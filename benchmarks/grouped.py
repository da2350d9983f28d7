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


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--turns", type=int, default=15)
    given = parse.parse_args()
    gen, pool = torch.Generator().manual_seed(0), Pool(400, 12288)
    draw = lambda *shape: torch.randn(*shape, generator=gen) / 24  # noqa: E731
    own = [Factors(draw(SIDE, r), draw(r, SIDE), 0.5) for r in itertools.islice(itertools.cycle(RANKS), 64)]
    laid = [lay({"q": f}, pool, i) for i, f in enumerate(own)]
    print(f"{torch.get_num_threads()} threads\n rows adapters   ms grouped  by row /  gathered /        far")
    for batch, count in ((b, a) for b in COUNTS for a in COUNTS if a <= b):
        x, y = torch.randn(batch, SIDE, generator=gen), torch.randn(batch, SIDE, generator=gen)
        groups = groups_of(batch, laid[:count])
        rows = [(torch.arange(g.start, g.stop), f) for g, f in zip(groups, own, strict=False)]
        wanted, got = reference(x, y, groups, "q"), y.clone()
        add(x, got, groups, "q")
        far = float((got - wanted).abs().max() / wanted.abs().max())
        to = y.clone()
        times = turns(
            [
                Contender("grouped", [lambda: add(x, to, groups, "q")]),
                Contender("by row", [lambda: reference(x, to, groups, "q")]),
                Contender("gathered", [lambda: gathered(x, to, rows)]),
            ],
            given.turns,
            0.003,
        )
        by = {name: ratio(times[name].hot, times["grouped"].hot) for name in ("by row", "gathered")}
        print(
            f"{batch:5} {count:8} {1e3 * min(times['grouped'].hot):12.4f} {by['by row']:9.1f} {by['gathered']:11.1f} {far:10.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
