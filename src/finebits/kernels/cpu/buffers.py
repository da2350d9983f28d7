"""Where results and scratch lie: large pages, and one panel that is kept for the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from finebits.kernels.cpu.binding import library

LARGE_PAGES_FROM = 4 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    if out.nbytes >= LARGE_PAGES_FROM:
        library().finebits_large_pages(out.data_ptr(), out.nbytes)
    return out


def placed(t: Tensor) -> Tensor:
    """A contiguous copy in large pages, where it is large enough to fill some: small ones end the processor's prefetching every 4 KiB."""
    return empty(tuple(t.shape), t.dtype).copy_(t)


_kept: dict[str, Tensor] = {}
_kept_lock = threading.Lock()


@contextmanager
def scratch(count: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Scratch of `count` values. One buffer is kept for the process; a second caller at the same time gets one of its own."""
    if not _kept_lock.acquire(blocking=False):
        yield empty((count,), dtype)
        return
    try:
        nbytes = count * dtype.itemsize
        buffer = _kept.get("panel")
        if buffer is None or buffer.numel() < nbytes:
            _kept.pop("panel", None)
            buffer = _kept["panel"] = empty((nbytes,), torch.uint8)
        yield buffer[:nbytes].view(dtype)
    finally:
        _kept_lock.release()
