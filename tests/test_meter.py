"""What a meter reads on a CUDA device, with a device that is told rather than there."""

from __future__ import annotations

import torch

from finebits.meter import Meter


def test_a_phase_on_a_device_is_the_allocators_peak_and_what_lies_beside(monkeypatch):
    held = {"reserved": 100, "peak": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 1600))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: held["reserved"])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=0))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: held["peak"])
    meter = Meter("cuda")
    with meter.phase("train"):
        held["peak"] = 300
    with meter.phase("save"):
        held["peak"] = 120
    assert meter.peaks == {"train": 500 + 300, "save": 500 + 120} and meter.baseline == 0
