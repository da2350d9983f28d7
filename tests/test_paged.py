"""State in files: what AdamW computes, to the bit, in the memory of what moves."""

from __future__ import annotations

import copy
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finebits.meter import MALLOC
from finebits.optim.base import named

SIZES = [(400, 600), (300, 400), (8, 8)]  # the last is too small to be paged


def weights(seed: int = 0) -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=gen)) for s in SIZES]


def run(held: list[nn.Parameter], optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    for i in range(first, first + count):
        for p, g in zip(held, weights(i + 1), strict=True):
            p.grad = g.data
        optimizer.step()


def test_is_adamw_to_the_bit_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    ours, theirs, later = weights(), weights(), weights()
    make = lambda name, held: named(name).make([{"params": held, "weight_decay": 0.1}], lr=0.01)  # noqa: E731
    paged = make("paged_adamw", ours)
    run(ours, paged, 0, 2)
    torch.save(paged.state_dict(), tmp_path / "state.pt")
    for p, q in zip(later, ours, strict=True):
        p.data = q.detach().clone()
    again = make("paged_adamw", later)
    again.load_state_dict(copy.deepcopy(torch.load(tmp_path / "state.pt", weights_only=True)))
    run(ours, paged, 2, 2)
    run(later, again, 2, 2)
    run(theirs, make("adamw", theirs), 0, 4)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(ours, theirs, later, strict=True))
    assert set(paged.maps) == {(id(p), k) for p in ours[:2] for k in ("exp_avg", "exp_avg_sq")}  # type: ignore[attr-defined]


MOVED = """
import torch
from finebits.meter import Meter
from finebits.optim.base import named
resident = lambda: Meter().baseline
held = [torch.nn.Parameter(torch.randn(2000, 2000)) for _ in range(6)]  # 96 MB, and 192 of state
for p in held:
    p.grad = torch.ones_like(p)
optimizer = named("paged_adamw").make(held, lr=0.01)
before = resident()
optimizer.step()
optimizer.step()
print(resident() - before, float(optimizer.state[held[5]]["exp_avg"][7, 7]))
"""


def test_state_leaves_memory_once_a_weight_has_moved() -> None:
    """In a process of its own, as a job's: there freed memory leaves at once."""
    done = subprocess.run([sys.executable, "-c", MOVED], env=os.environ | MALLOC, capture_output=True, text=True, check=True)
    grown, moment = map(float, done.stdout.split())
    assert grown < 64e6 < 192e6 and moment == pytest.approx(0.19)


def test_a_disk_without_room_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    held = weights()
    with pytest.raises(ValueError, match="no room for 960,000 bytes of optimizer state .No space left on device.: set TMPDIR"):
        run(held, named("paged_adamw").make(held, lr=0.01), 0, 1)
