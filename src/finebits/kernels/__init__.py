"""Faster bodies for a few jobs, chosen at run time; the reference is the judge of all of them.

Jobs: `quantize` (round-to-nearest of a whole matrix), `dequantize`, `linear` (x @ Wᵀ and x @ W on packed weights), `successive` (columns
rounded one after the other with feedback), `search` (the scale of every block under weights of the columns; its torch body is
quantizers._family.searched), `grouped` (rows of different adapters through one layer; its torch body is serve.grouped). A body is a module
with `name`, `available()` (None, or the reason why it cannot run here), `supports(job, device, bits)` and one function per job.
FINEBITS_KERNELS=reference switches every fast body off.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.kernels import reference
from finebits.kernels.laid import Group, Groups
from finebits.kernels.table import Rounding, Table

__all__ = ["Rounding", "Table", "bodies", "chosen", "dequantize", "grouped", "linear", "placed", "quantize", "search", "successive"]

JOBS = ("quantize", "dequantize", "linear", "successive", "search", "grouped")
VARIABLE = "FINEBITS_KERNELS"


@functools.cache
def bodies() -> tuple[tuple[ModuleType, str | None], ...]:
    """Every body of this folder, fastest first, each with the reason why it cannot run here (None if it can)."""
    fast = []
    for module in ("cuda", "cpu"):
        body = importlib.import_module(f"finebits.kernels.{module}")
        fast.append((body, body.available()))
    return (*fast, (reference, None))


def chosen(job: str, device: torch.device, bits: int) -> ModuleType:
    """The body that runs `job` on `device` for codes of `bits` bits."""
    wanted = os.environ[VARIABLE] if VARIABLE in os.environ else "auto"  # .get() takes four times as long where it is not set
    return _chosen(wanted, job, device, bits)


@functools.cache
def _chosen(wanted: str, job: str, device: torch.device, bits: int) -> ModuleType:
    if wanted not in ("auto", "reference"):
        raise Invalid(f"{VARIABLE} is {wanted!r}; it can be auto or reference")
    if wanted == "auto":
        for body, reason in bodies():
            if reason is None and body.supports(job, device, bits):
                return body
    return reference


def quantize(W: Tensor, r: Rounding) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round-to-nearest of W (*e, m, n): packed codes (*e, m, bytes), scale (*e, m, k) and shift or None, in their store."""
    return chosen("quantize", W.device, r.bits).quantize(W, r)


def dequantize(t: Table, dtype: torch.dtype) -> Tensor:
    """The dense weight (*e, m, n) in `dtype`."""
    return chosen("dequantize", t.codes.device, t.bits).dequantize(t, dtype)


def linear(x: Tensor, t: Table, transposed: bool = False) -> Tensor:
    """x (*b, n) @ Wᵀ -> (*b, m); with `transposed`, x (*b, m) @ W -> (*b, n). In x.dtype."""
    return chosen("linear", x.device, t.bits).linear(x, t, transposed)


def successive(
    W: Tensor, U: Tensor, scale: Tensor, shift: Tensor | None, block: Tensor, levels: Tensor, r: Rounding
) -> tuple[Tensor, Tensor]:
    """Columns W (c, m) rounded in order, each one's loss over U_kk taken off the later ones by its row of U: codes and losses, both (c, m)."""
    return chosen("successive", W.device, r.bits).successive(W, U, scale, shift, block, levels, r)


def search(
    W: Tensor,
    d: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    levels: Tensor,
    r: Rounding,
    factors: Sequence[float],
    refits: int,
    zero: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """The best scale and shift (k, m) of every block of columns W (c, m), from the format's own on, where errors weigh d (c,).

    `zero`: a shift is held as a whole number of scales, a byte. None where no fast body runs: quantizers._family.searched is the reference,
    which knows how every format holds its scales.
    """
    body = chosen("search", W.device, r.bits)
    return None if body is reference else body.search(W, d, scale, shift, levels, r, factors, refits, zero)


def grouped(x: Tensor, y: Tensor, groups: Groups, module: str) -> Sequence[Group]:
    """y (t, m) += s·(x Aᵀ) Bᵀ in place, of the rows of x (t, n) that are an adapter's over this module; what is left to torch."""
    return chosen("grouped", x.device, 8).grouped(x, y, groups, module)


def placed(t: Tensor) -> Tensor:
    """A copy of codes or scales where the products read them fastest: on a CPU that has the fast body, in large pages."""
    body = chosen("linear", t.device, 8)
    return body.placed(t) if hasattr(body, "placed") else t.clone()
