"""Native CPU bodies (placeholder until built)."""

from __future__ import annotations

name = "cpu"


def available() -> str | None:
    return "not built"


def supports(job, device, bits) -> bool:
    return False
