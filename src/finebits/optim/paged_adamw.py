"""QLoRA: Efficient Finetuning of Quantized LLMs.  Dettmers, Pagnoni, Holtzman & Zettlemoyer, NeurIPS 2023.  arXiv:2305.14314v1.

AdamW whose m and v are in memory that may be paged out (section 3, paged optimizers): of a large tensor they are there while it moves.
On CUDA bitsandbytes keeps them in unified memory. On a CPU they lie in a file without a name that is mapped into memory, whose pages go once a
tensor has moved: what AdamW computes, bit for bit.
Deviations: none. A disk takes eight bytes a trained number; TMPDIR says where.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.optim._family import Usual
from finebits.optim._shell import Inner, Shell

LEAST = 100_000  # numbers of a tensor below which its state is not paged, as in bitsandbytes


@dataclass(frozen=True)
class PagedAdamW(Usual):
    """AdamW with state that may be paged out.

    >>> PagedAdamW().matrix(1000, 1000), PagedAdamW().matrix(10, 10)  # of small tensors it stays in memory
    (0, 800)
    """

    hf: ClassVar[str] = "paged_adamw_32bit"
    label: ClassVar[str] = "paged Adam"
    alone: ClassVar[bool] = True

    def state(self, numbers: int) -> int:
        return 8 * numbers

    def matrix(self, m: int, n: int) -> int:
        return 8 * m * n if m * n < LEAST else 0

    def make(self, groups: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
        groups = list(groups)
        held = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
        if not any(p.device.type == "cuda" for p in held):
            return _Mapped(groups, lambda held: torch.optim.AdamW(held, lr=lr, betas=betas, eps=eps, weight_decay=0.0))
        try:
            from bitsandbytes.optim.adamw import PagedAdamW32bit as Theirs
        except ImportError:
            raise Invalid("training.optim paged_adamw needs bitsandbytes on CUDA: pip install bitsandbytes, or take adamw") from None
        return Theirs(groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0)


class _Mapped(Shell):
    """A shell whose large state lies in files."""

    def __init__(self, groups: Iterable[Any], inner: Inner) -> None:
        self.maps: dict[tuple[int, str], tuple[mmap.mmap, Tensor]] = {}
        super().__init__(groups, inner)

    def keep(self, p: torch.nn.Parameter, state: dict[str, Any]) -> None:
        for k, v in state.items():
            if not torch.is_tensor(v) or v.numel() < LEAST:
                continue
            file, t = self.maps.get((id(p), k)) or _mapped(v)
            self.maps[id(p), k] = file, t
            if v is not t:
                t.copy_(v)
                state[k] = t
            if hasattr(mmap, "MADV_DONTNEED"):
                file.madvise(mmap.MADV_DONTNEED)  # the file is shared: its pages leave this process, and what they hold is not lost


def _mapped(like: Tensor) -> tuple[mmap.mmap, Tensor]:
    """A file without a name, mapped, and a tensor of the same kind over it."""
    with tempfile.TemporaryFile(prefix="finebits-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, like.nbytes)  # a page that finds no room later ends the process
        except OSError as e:
            raise Invalid(
                f"{tempfile.gettempdir()} has no room for {like.nbytes:,} bytes of optimizer state ({e.strerror}): set TMPDIR to another folder"
            ) from None
        pages = mmap.mmap(file.fileno(), like.nbytes)
    return pages, torch.frombuffer(pages, dtype=like.dtype).view(like.shape)
