"""Memory of this process, phase by phase, above a baseline; or of the CUDA device that it runs on.

The kernel's high-water mark (VmHWM) is reset before each phase by writing 5 to /proc/self/clear_refs. Figures follow the arithmetic only
with MALLOC_ARENA_MAX=1 and MALLOC_MMAP_THRESHOLD_=65536 in the environment from the start of the process: then freed tensors leave at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
# torch asks for large pages: a tensor of megabytes costs a page fault for two of them, not for 4 KiB, and is rounded up to them
HUGE = {"THP_MEM_ALLOC_ENABLE": "1"}


def _status(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def relax() -> None:
    """From here on, freed memory may stay with the process: twice as fast, and nothing to measure."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


def strict() -> None:
    """From here on, freed memory leaves at once again, as MALLOC in the environment has it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, int(MALLOC["MALLOC_MMAP_THRESHOLD_"]))


def trim() -> None:
    """Give free heap pages back to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Meter:
    """`phase(name)` measures one phase's peak above the process as it was when the meter was made; None where the system does not tell.

    On a CUDA device: what torch's allocator took from it at most, and what the device held beside when the meter was made (the context of
    this process, and whatever else was there). `note` is called with every phase's peak as an event.

    >>> meter = Meter()
    >>> with meter.phase("ten"):
    ...     held = bytearray(10)
    >>> list(meter.peaks)
    ['ten']
    """

    def __init__(self, device: str = "cpu", note: Callable[..., None] = lambda **event: None) -> None:
        trim()
        self.device, self.note = device, note
        self.baseline = _status("VmRSS") if device == "cpu" else 0
        self.beside = _beside() if device == "cuda" else 0
        self.peaks: dict[str, int | None] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        trim()
        since = time.time()
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                yield
            finally:
                self.peaks[name] = self.beside + torch.cuda.max_memory_reserved()
                self.note(event="peak", phase=name, since=since, bytes=self.peaks[name])
            return
        possible = self.baseline is not None
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except OSError:
            possible = False
        try:
            yield
        finally:
            peak = _status("VmHWM") if possible else None
            above = None if peak is None or self.baseline is None else max(peak - self.baseline, 0)
            before = self.peaks.get(name)  # of a phase that comes more than once, the largest
            self.peaks[name] = above if above is None or before is None else max(above, before)
            self.note(event="peak", phase=name, since=since, bytes=above)


def _beside() -> int:
    """Bytes that the device holds and torch's allocator does not."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def settings() -> dict[str, str]:
    """The allocator settings that this process runs under.

    >>> sorted(settings())
    ['MALLOC_ARENA_MAX', 'MALLOC_MMAP_THRESHOLD_', 'ONEDNN_PRIMITIVE_CACHE_CAPACITY']
    """
    return {k: os.environ.get(k, "not set") for k in MALLOC}
