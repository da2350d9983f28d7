"""GGUF files made byte by byte: one that is whole, and many that lie about a count, a length, a type or a place."""

from __future__ import annotations

import struct


def text(s: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(s) if length is None else length) + s


def gguf_bytes(
    version: int = 3,
    tensors: int | None = None,
    values: int | None = None,
    more: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: bytes = bytes(128),
) -> bytes:
    kv = [text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama"), *(more or [])]
    own = infos if infos is not None else [info(b"a"), info(b"b", at=64)]
    head = b"GGUF" + struct.pack("<IQQ", version, len(own) if tensors is None else tensors, len(kv) if values is None else values)
    head += b"".join(kv) + b"".join(own)
    return head + bytes(-len(head) % 32) + data


def info(name: bytes, sides: tuple[int, ...] = (4, 4), kind: int = 0, at: int = 0, count: int | None = None) -> bytes:
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides) if count is None else count, *sides, kind, at)


def value(key: bytes, kind: int, body: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + body


GGUFS: dict[str, bytes] = {
    **{f"cut at {n}": gguf_bytes()[:n] for n in (0, 3, 4, 10, 20, 30, 45, 60, 80, 110, 200)},
    "another mark": b"GGML" + gguf_bytes()[4:],
    **{f"version {n}": gguf_bytes(version=n) for n in (0, 1, 4, 2**31, 3 << 24)},
    **{f"{n} tensors": gguf_bytes(tensors=n) for n in (3, 10**6, 2**63)},
    **{f"{n} values": gguf_bytes(values=n) for n in (0, 2, 10**6, 2**63)},
    **{f"a text of {n}": gguf_bytes(more=[value(b"a", 8, text(b"x", n))]) for n in (10**6, 2**40, 2**64 - 1)},
    **{f"a key of {n}": gguf_bytes(more=[text(b"a", n) + bytes(8)]) for n in (10**6, 2**64 - 1)},
    "a value of type 13": gguf_bytes(more=[value(b"a", 13, bytes(8))]),
    "a list in a list": gguf_bytes(more=[value(b"a", 9, struct.pack("<IQ", 9, 1) + bytes(20))]),
    **{f"a list of {n} numbers": gguf_bytes(more=[value(b"a", 9, struct.pack("<IQ", 4, n))]) for n in (1000, 2**62, 2**64 - 1)},
    **{f"a list of {n} texts": gguf_bytes(more=[value(b"a", 9, struct.pack("<IQ", 8, n))]) for n in (1000, 2**62)},
    "a list with a long text": gguf_bytes(more=[value(b"a", 9, struct.pack("<IQ", 8, 1) + text(b"x", 2**50))]),
    "a key twice": gguf_bytes(more=[value(b"general.architecture", 4, bytes(4))]),
    "a key that is no text": gguf_bytes(more=[value(b"\xff\xfe", 4, bytes(4))]),
    **{f"alignment {n}": gguf_bytes(more=[value(b"general.alignment", 4, struct.pack("<I", n))]) for n in (0, 3, 2**31)},
    "a name twice": gguf_bytes(infos=[info(b"a"), info(b"a", at=64)]),
    "one over another": gguf_bytes(infos=[info(b"a"), info(b"b", at=32)]),
    "behind the end": gguf_bytes(infos=[info(b"a", at=10**6)]),
    "far behind the end": gguf_bytes(infos=[info(b"a", at=2**64 - 1)]),
    **{f"sides {s}": gguf_bytes(infos=[info(b"a", sides=s)]) for s in ((0, 4), (2**62, 2**62), (2**63,), (100, 100))},
    **{f"{n} sides": gguf_bytes(infos=[info(b"a", count=n)]) for n in (0, 5, 2**31)},
    **{f"of type {n}": gguf_bytes(infos=[info(b"a", kind=n)]) for n in (4, 5, 999, 2**31)},
    "half a block": gguf_bytes(infos=[info(b"a", kind=2)]),
}
