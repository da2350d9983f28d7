"""Which parts of a block's matrices belong together: channels of its feed-forward sublayer, and heads of its attention.

A channel is a row of what leads in (up, and gate) and a column of what leads back. A head of keys and values is its rows of k and v, with the
queries that attend to it, rows of q, and their columns of o: with g queries a head, head h has the queries g·h … g·h + g − 1. No architecture is
known by name; roles are told by what matrices are called, and held against the numbers of the config.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from finebits.anatomy import parts_of
from finebits.errors import Invalid

Kind = Literal["channels", "heads"]
SEPARATE, TOGETHER = ("q_proj", "k_proj", "v_proj"), "qkv_proj"  # queries, keys and values: three matrices, or rows of one
BACK = ("o_proj", "out_proj", "dense")


class Side(NamedTuple):
    """Units as slices of a matrix: unit u is `size` of its outputs (axis 0) or inputs (axis 1) from `start` + u·`size` on."""

    module: str
    axis: int
    size: int
    start: int = 0

    def of(self, units: Tensor) -> Tensor:
        """The places of these units.

        >>> Side("q_proj", 0, 2).of(torch.tensor([0, 2]))
        tensor([0, 1, 4, 5])
        """
        return (self.start + units[:, None] * self.size + torch.arange(self.size)).flatten()


class Group(NamedTuple):
    """All sides of the units of one kind; `back` is the matrix that leads back to the states."""

    count: int
    sides: tuple[Side, ...]
    back: str

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(side.module for side in self.sides))

    def places(self, units: Iterable[int]) -> dict[tuple[str, int], Tensor]:
        """{(module, axis): its places} of some units, as they follow each other.

        >>> Group(2, (Side("gate_up", 0, 1), Side("gate_up", 0, 1, 2), Side("down", 1, 1)), "down").places([1])
        {('gate_up', 0): tensor([1, 3]), ('down', 1): tensor([1])}
        """
        wanted, found = torch.tensor(list(units), dtype=torch.int64), dict[tuple[str, int], list[Tensor]]()
        for side in self.sides:
            found.setdefault((side.module, side.axis), []).append(side.of(wanted))
        return {at: torch.cat(parts) for at, parts in found.items()}

    def sums(self, module: str, scores: Tensor) -> Tensor:
        """(count,): scores of the entries of one of the matrices, added up over every unit.

        >>> Group(2, (Side("q", 0, 2),), "o").sums("q", torch.ones(4, 3))
        tensor([6., 6.])
        """
        total = scores.new_zeros(self.count)
        for side in self.sides:
            if side.module == module:
                lines = scores.sum(1 - side.axis)[side.start : side.start + self.count * side.size]
                total = total + lines.view(self.count, side.size).sum(1)
        return total


def coupled(model: nn.Module, block: str, kind: Kind, config: Any) -> Group:
    """The units of a block of a model whose text has this config, modules by their full names. Raises Invalid where the block has none, or
    others than are known."""
    return _channels(model, block) if kind == "channels" else _heads(model, block, config)


def _inside(model: nn.Module, block: str) -> Iterator[tuple[str, nn.Module]]:
    return ((f"{block}.{name}".rstrip("."), module) for name, module in model.get_submodule(block).named_modules())


def _channels(model: nn.Module, block: str) -> Group:
    parts = {name: parts_of(module) for name, module in _inside(model, block)}
    found = {name: p for name, p in parts.items() if p is not None}
    if len(found) != 1:
        what = "no feed-forward sublayer that is known" if not found else f"{len(found)} feed-forward sublayers"
        raise Invalid(f"{block} has {what}, and channels are those of one: leave them (channels=1)")
    ((at, p),) = found.items()
    inner, _ = p.shape
    leads = [f"{at}.{k}" for k in (p.gate, p.up) if k is not None]
    sides = [Side(name, 0, 1) for name in leads] + ([Side(leads[0], 0, 1, inner)] if p.halves else [])
    return Group(inner, (*sides, Side(f"{at}.{p.down}", 1, 1)), f"{at}.{p.down}")


def _heads(model: nn.Module, block: str, config: Any) -> Group:
    said = f"leave its heads (heads=1), or name a model with {', '.join(SEPARATE)} and {' or '.join(BACK)}"
    queries = int(config.num_attention_heads)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    found = []
    for name, module in _inside(model, block):
        own = {k: (m.out_features, m.in_features) for k, m in module.named_children() if isinstance(m, nn.Linear)}
        back = next((k for k in BACK if k in own), None)
        if back is not None and (set(SEPARATE) <= own.keys() or TOGETHER in own):
            found.append((name, own, back))
    if len(found) != 1 or queries % heads:
        raise Invalid(f"{block} has {len(found) or 'no'} attention whose matrices are known: {said}")
    ((at, own, back),) = found
    inner = own[back][1]
    size, g = inner // queries, queries // heads
    rows = [own[k][0] for k in SEPARATE] if set(SEPARATE) <= own.keys() else [own[TOGETHER][0]]
    wanted = [queries * size, heads * size, heads * size]
    if inner != queries * size or rows != (wanted if len(rows) == 3 else [sum(wanted)]):
        raise Invalid(
            f"{at} has {rows} outputs and leads back from {inner}, which are no {queries} heads of queries over {heads} of keys of one "
            f"size: {said}"
        )
    names, starts = (
        ([f"{at}.{k}" for k in SEPARATE], [0, 0, 0]) if len(rows) == 3 else ([f"{at}.{TOGETHER}"] * 3, [0, wanted[0], sum(wanted[:2])])
    )
    sides = [Side(name, 0, n, start) for name, n, start in zip(names, (g * size, size, size), starts, strict=True)]
    return Group(heads, (*sides, Side(f"{at}.{back}", 1, g * size)), f"{at}.{back}")
