"""Byte sizes as people write them: "400MiB", "8GiB", "6 GB", "5%"."""

from __future__ import annotations

import re

from finebits.errors import Invalid

BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
UNITS = {unit.lower(): 1024**i for i, unit in enumerate(BINARY)} | {unit: 1000**i for i, unit in enumerate(("b", "kb", "mb", "gb", "tb"))}
FORM = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse(text: str | int) -> int:
    """Bytes. "KiB MiB GiB TiB" are powers of 1024, "kB MB GB TB" powers of 1000; upper and lower case alike; a bare number is bytes.

    Raises ValueError if `text` is no size, or less than one byte.

    >>> parse("400MiB"), parse("6 GB"), parse(512)
    (419430400, 6000000000, 512)
    """
    if isinstance(text, int):
        number, unit = float(text), "b"
    else:
        match = FORM.fullmatch(text)
        digits, unit = (match[1], match[2].lower() or "b") if match else ("0", "")
        if unit in ("k", "m", "g", "t"):
            big = unit.upper()
            raise Invalid(f"{text!r} does not say which unit: write {digits}{big}iB (1024) or {digits}{big}B (1000)")
        number = float(digits)
    if unit not in UNITS:
        raise Invalid(f"a size like 400MiB, 8GiB or 6 GB is wanted, and {text!r} came")
    size = round(number * UNITS[unit])
    if size < 1:
        raise Invalid(f"a size of at least one byte is wanted, and {text!r} came")
    return size


def show(size: float) -> str:
    """A size in the largest binary unit that leaves at least 1 of it; GiB and TiB with two digits, the others with one, none if exact.

    >>> show(419430400), show(6000000000), show(-2048)
    ('400 MiB', '5.59 GiB', '-2 KiB')
    """
    size = round(size)
    i = max((i for i in range(len(BINARY)) if abs(size) >= 1024**i), default=0)
    if size % 1024**i == 0:
        return f"{size // 1024**i} {BINARY[i]}"
    return f"{size / 1024**i:.{2 if i > 2 else 1}f} {BINARY[i]}"


def share(text: str | int, of: int) -> int:
    """Bytes of a share of `of` ("5%"), or of a size ("300MiB"; "0" is nothing).

    Raises ValueError if it is neither, or leaves nothing of `of`.

    >>> share("5%", of=1000), share("300", of=1000), share("0", of=1000)
    (50, 300, 0)
    """
    if isinstance(text, str) and text.strip().endswith("%"):
        try:
            percent = float(text.strip()[:-1])
        except ValueError:
            percent = -1.0
        if not 0 <= percent < 100:
            raise Invalid(f"a share from 0% up to (not including) 100% is wanted, and {text!r} came")
        return round(of * percent / 100)
    size = 0 if str(text).strip() == "0" else parse(text)
    if size >= of:
        raise Invalid(f"{show(size)} cannot be kept back from {show(of)}: nothing would be left")
    return size
