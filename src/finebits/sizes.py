"""Sizes in bytes, read and printed: "400MiB", "8 GiB", "6GB"."""

from __future__ import annotations

import re

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse(text: str | int) -> int:
    """Bytes. A number alone is bytes; raises ValueError on anything else that is no size."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    unit = (match.group(2) or "b").lower() if match else ""
    if match is None or unit not in UNITS:
        raise ValueError(f"{text!r} is not a size: write a number and a unit, such as 400MiB or 8GiB")
    return int(float(match.group(1)) * UNITS[unit])


def show(size: float) -> str:
    """A size for people: 1.50 GiB, 312.0 MiB, 64 KiB, 12 B."""
    if abs(size) >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    if abs(size) >= 2**20:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**10:.0f} KiB" if abs(size) >= 2**10 else f"{size:.0f} B"
