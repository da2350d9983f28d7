"""Rows of different adapters, of different ranks, through one linear layer: y += s·(x Aᵀ) Bᵀ of each row's own adapter (S-LoRA, section 5.2).

The base product is one for all rows. Rows of one adapter stand together, and the products of a group read its factors where they lie in the
pool.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finebits import kernels
from finebits.errors import Failed, Invalid
from finebits.kernels.laid import Group, Groups, Laid, Resident
from finebits.merging.base import Factors
from finebits.serve.pages import Pool, spans, view


def pages_of(adapter: Mapping[str, Factors], elements: int) -> int:
    """How many pages of so many elements an adapter takes.

    >>> pages_of({"q": Factors(torch.ones(3, 2), torch.ones(2, 4))}, 8)  # 2·4 in one, 2·3 in another
    2
    """
    return spans(_vectors(adapter), elements)[1]


def _vectors(adapter: Mapping[str, Factors]) -> list[tuple[int, int]]:
    return [size for f in adapter.values() for size in ((f.rank, f.A.shape[1]), (f.rank, f.B.shape[0]))]


def lay(adapter: Mapping[str, Factors], pool: Pool, owner: Hashable) -> Resident:
    """Copy an adapter into pages of the pool, in the pool's dtype."""
    where, count = spans(_vectors(adapter), pool.elements)
    pages = pool.take(count, owner)
    at = {}
    for i, (module, f) in enumerate(adapter.items()):
        pieces: list[tuple[Tensor, ...]] = []
        for bundle, source in zip(where[2 * i : 2 * i + 2], (f.A, f.B.mT), strict=True):
            own = tuple(view(pool.pages, pages[p], offset, rows, source.shape[1]) for p, offset, rows in bundle)
            for piece, part in zip(own, source.split([len(o) for o in own]), strict=True):
                piece.copy_(part)
            pieces.append(own)
        at[module] = Laid(pieces[0], pieces[1], f.s)
    return Resident(pages, at)


def factors(laid: Laid) -> Factors:
    """Copies, in float32."""
    return Factors(torch.cat(laid.B).mT.float(), torch.cat(laid.A).float(), laid.s)


def reference(x: Tensor, y: Tensor, groups: Sequence[Group], module: str) -> Tensor:
    """What is meant: y (t, m) plus, row by row, s·B (A x) of the row's adapter."""
    out = y.clone()
    for start, stop, adapter in groups:
        laid = None if adapter is None else adapter.at.get(module)
        if laid is None:
            continue
        B, A, s = factors(laid)
        for row in range(start, stop):
            out[row] += (s * (B @ (A @ x[row].float()))).to(y.dtype)
    return out


def add(x: Tensor, y: Tensor, groups: Groups, module: str) -> None:
    """The same into y: by the fastest body that runs here, and the groups that it leaves by two products for every piece of the pool that a
    factor lies in."""
    for start, stop, adapter in kernels.grouped(x, y, groups, module):
        laid = None if adapter is None else adapter.at.get(module)
        if laid is None:
            continue
        rows, to = x[start:stop], y[start:stop]
        h = rows @ laid.A[0].mT if len(laid.A) == 1 else torch.cat([rows @ a.mT for a in laid.A], 1)
        at = 0
        for b in laid.B:
            to.addmm_(h[:, at : at + len(b)], b, alpha=laid.s)
            at += len(b)


class Now(threading.local):
    """What the forward pass that a thread is in is about; None outside of the engine."""

    step: Any = None


now = Now()


class Hooks:
    """One hook on every linear layer that some adapter has been laid over."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.linears = linears
        self.hooked: dict[str, Any] = {}

    def cover(self, modules: Iterable[str]) -> None:
        for name in modules:
            if name not in self.hooked:
                self.hooked[name] = self.linears[name].register_forward_hook(_hook(name))

    def remove(self) -> None:
        for handle in self.hooked.values():
            handle.remove()
        self.hooked.clear()


def _hook(name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if now.step is not None:
            x, groups = args[0].reshape(-1, args[0].shape[-1]), now.step.groups
            if len(x) != groups[-1].stop:
                raise Failed(f"{name} was given {len(x)} rows of a step of {groups[-1].stop} tokens")
            add(x, output.view(-1, output.shape[-1]), groups, name)

    return hook


def check(adapter: Mapping[str, Factors], linears: Mapping[str, nn.Linear], max_rank: int) -> None:
    """Raise ValueError, in one sentence, where an adapter cannot be served over these layers."""
    if not adapter:
        raise Invalid("the adapter has no factors over any linear layer: there is nothing to serve")
    for name, f in adapter.items():
        linear = linears.get(name)
        if linear is None:
            raise Invalid(f"the adapter lies over {name}, which is none of the linear layers that this model sends every token through")
        if (f.B.shape[0], f.A.shape[1]) != tuple(linear.weight.shape) or f.B.shape[1] != f.rank:
            raise Invalid(
                f"the adapter's B A over {name} is {f.B.shape[0]}×{f.A.shape[1]}, and the weight {linear.weight.shape[0]}×"
                f"{linear.weight.shape[1]}: it was trained over another model"
            )
        if f.rank > max_rank:
            raise Invalid(f"the adapter has rank {f.rank} over {name}, and this server takes ranks up to {max_rank} (--max-rank)")
        if not (torch.isfinite(f.A).all() and torch.isfinite(f.B).all()):
            raise Invalid(f"the adapter holds NaN or Inf over {name}: its training failed, or the file is damaged")
