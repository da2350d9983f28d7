"""The kernels that are chosen here: do they agree with the reference, and how long do they take beside a dense layer?

A quick look of a second or two, for `finebits doctor`; benchmarks/linear.py measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from finebits import api, kernels
from finebits.formats.nf import NF
from finebits.kernels import Table, reference
from finebits.qtensor import QTensor

BITS = (2, 3, 4, 8)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # of the largest output: sums are ordered otherwise, and bfloat16 rounds them
TURNS = 7
TOKENS = (1, 64)
SIDE = {"cpu": 1024, "cuda": 4096}


def computed(device: torch.device) -> torch.dtype:
    """What a device is tried in."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _packed(m: int, n: int, bits: int, device: torch.device) -> Table:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(bits)).to(device)
    table = QTensor.table(api.quantize(W, NF(bits)))
    assert table is not None, "NF has a table"
    return table


def agreement(device: torch.device) -> list[dict[str, Any]]:
    """[{"job", "bits", "body", "error", "ok"}] of every fast body that is chosen on a device: its largest difference from the reference, as a
    share of the largest output."""
    dtype, found = computed(device), []
    for bits in BITS:
        table = _packed(96, 320, bits, device)
        dense = reference.dequantize(table, torch.float32)
        trials: dict[str, tuple[tuple[Callable[..., Tensor], Tensor], ...]] = {
            "dequantize": ((lambda b: b.dequantize(table, torch.float32), dense),)
        }
        ways = []
        for transposed in (False, True):
            x = torch.randn(5, 96 if transposed else 320, generator=torch.Generator().manual_seed(7)).to(device, dtype)
            wide = x.float() @ (dense.to(dtype).float() if transposed else dense.to(dtype).float().mT)
            ways.append((lambda b, x=x, t=transposed: b.linear(x, table, t), wide))
        trials["linear"] = tuple(ways)
        for job, runs in trials.items():
            body = kernels.chosen(job, device, bits)
            if body is reference:
                continue
            error = max(float((run(body).float() - right).abs().max() / right.abs().max()) for run, right in runs)
            limit = TOLERANCE[dtype] if job == "linear" else TOLERANCE[torch.float32]
            found.append({"job": job, "bits": bits, "body": body.name, "error": error, "ok": error <= limit})
    return found


def timings(device: torch.device, bits: int = 4) -> list[dict[str, Any]]:
    """[{"what", "body", "side", "dtype", "ours", "dense", "ratio"}]: seconds of a product with a packed weight beside that of the same weight
    dense, and of making it dense. The two take turns: seconds are the least of all turns, the ratio is the median of those within each."""
    dtype, side = computed(device), SIDE[device.type]
    table = _packed(side, side, bits, device)
    dense = kernels.dequantize(table, dtype)
    found = []
    for tokens in TOKENS:
        x = torch.randn(tokens, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        ours, theirs = _turns(device, lambda x=x: kernels.linear(x, table), lambda x=x: linear(x, dense))
        what = f"product with {tokens} token{'' if tokens == 1 else 's'}"
        found.append(_timed(what, kernels.chosen("linear", device, bits).name, ours, theirs))
    ours, theirs = _turns(device, lambda: kernels.dequantize(table, dtype), dense.clone)
    found.append(_timed("dequantize, beside a copy", kernels.chosen("dequantize", device, bits).name, ours, theirs))
    return [row | {"side": side, "bits": bits, "dtype": str(dtype).removeprefix("torch.")} for row in found]


def _timed(what: str, body: str, ours: list[float], dense: list[float]) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(ours, dense, strict=True))
    return {"what": what, "body": body, "ours": min(ours), "dense": min(dense), "ratio": ratios[len(ratios) // 2]}


def _turns(device: torch.device, *calls: Callable[[], object]) -> tuple[list[float], ...]:
    """Seconds of each call, turn by turn, after one that counts for nothing."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    took: tuple[list[float], ...] = tuple([] for _ in calls)
    for turn in range(TURNS + 1):
        for times, call in zip(took, calls, strict=True):
            wait()
            begun = time.perf_counter()
            call()
            wait()
            if turn:
                times.append(time.perf_counter() - begun)
    return took
