"""Reading and writing safetensors one tensor at a time, so that nothing but the tensor at hand is in memory: values are read, not mapped (a
mapped file counts as the process's own), and a file's layout is known before its first value is.

The file is what the safetensors library writes: eight bytes of header length, a JSON header padded to eight bytes, the values, those of
wider types first so that everything is aligned.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.files import fetched, parsed

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


KINDS = {code: dtype for dtype, code in CODES.items()} | {
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}


HEADER, SIDES = 10**8, 64  # bytes and sides that the safetensors library and torch have at most


class UnknownType(Invalid):
    """A file holds numbers of a type that torch does not have.

    >>> issubclass(UnknownType, ValueError)
    True
    """


class Stored(Mapping[str, Tensor]):
    """The tensors of a file, each read into memory of its own when it is asked for.

    Raises ValueError that says what is wrong where the file is not whole or not safetensors.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.safetensors")
    ...     print(write(path, {"w": Entry.of(torch.eye(2))}, {"made": "by hand"}), "bytes")
    ...     stored = Stored(path)
    ...     print(list(stored), stored.metadata)
    ...     print(stored["w"])
    120 bytes
    ['w'] {'made': 'by hand'}
    tensor([[1., 0.], [0., 1.]])
    """

    def __init__(self, path: Path) -> None:
        self.path, size = path, path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(size - 8, HEADER):
                fetched(path)
                raise Invalid(f"{path} is damaged or not safetensors (a header of {length} bytes in {size}): fetch it again")
            try:
                header = parsed(f.read(length))
                self.metadata: dict[str, str] = header.pop("__metadata__", {})
                if not isinstance(self.metadata, dict) or not all(isinstance(v, str) for v in self.metadata.values()):
                    raise Invalid("its __metadata__ is no object of texts")
                if odd := next((k for k, v in header.items() if v["dtype"] not in KINDS), None):
                    raise UnknownType(f"{odd} of {path} is {header[odd]['dtype']}, which is not read")
                self.lines = {k: (KINDS[v["dtype"]], *_place(v)) for k, v in sorted(header.items())}
            except UnknownType:
                raise
            except (ValueError, KeyError, TypeError) as e:
                raise Invalid(f"{path} is damaged or not safetensors ({type(e).__name__}: {str(e)[:200]}): fetch it again") from None
        self.start, end = 8 + length, 0
        for name, (dtype, shape, a, b) in sorted(self.lines.items(), key=lambda line: line[1][2:]):
            if b - a != dtype.itemsize * math.prod(shape) or not end <= a <= b <= size - self.start:
                raise Invalid(f"{path} is damaged at {name} (bytes {a} to {b} of {size - self.start}, from {end} on): fetch it again")
            end = b

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def read(self, name: str, at: int | None = None) -> Tensor:
        """A tensor, or of its first dimension `at` alone, which is (1, …).

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.safetensors")
        ...     _ = write(path, {"w": Entry.of(torch.eye(2))}, {})
        ...     Stored(path).read("w", 1)
        tensor([[0., 1.]])
        """
        dtype, shape, a, b = self.lines[name]
        if at is not None:
            each, shape = (b - a) // shape[0], (1, *shape[1:])
            a, b = a + at * each, a + (at + 1) * each
        out = torch.empty(b - a, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as f:
            f.seek(self.start + a)
            view, done = out.numpy().data, 0
            while done < b - a and (n := f.readinto(view[done:])):
                done += n
        return out.view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)


def _place(line: Mapping[str, Any]) -> tuple[tuple[int, ...], int, int]:
    """(shape, first byte, byte after the last) of a header's line."""
    shape, (a, b) = tuple(line["shape"]), line["data_offsets"]
    if len(shape) > SIDES or not all(type(n) is int and 0 <= n < 2**60 for n in (*shape, a, b)):
        raise Invalid(f"{shape} at {a} to {b} is no place of a tensor")
    return shape, a, b


class Entry(NamedTuple):
    """One tensor that a file will hold, and how to get its values when their turn comes.

    >>> Entry(torch.float16, (2, 3), lambda: torch.zeros(2, 3).half()).nbytes  # nothing is made yet
    12
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    value: Callable[[], Tensor]

    @classmethod
    def of(cls, t: Tensor) -> Entry:
        """A tensor that is already there."""
        return cls(t.dtype, tuple(t.shape), lambda: t)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def _plan(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[list[str], bytes]:
    order = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)  # stable: the caller's order within a width
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        e = entries[name]
        header[name] = {"dtype": CODES[e.dtype], "shape": list(e.shape), "data_offsets": [at, at + e.nbytes]}
        at += e.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return order, len(text).to_bytes(8, "little") + text


def size(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> int:
    """Bytes of the file that `write` would make, exactly.

    >>> size({"w": Entry.of(torch.eye(2))}, {})  # eight bytes, a header, and 16 of values
    88
    """
    return len(_plan(entries, metadata)[1]) + sum(e.nbytes for e in entries.values())


def write(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> int:
    """Write the file; returns its bytes. Raises ValueError if a value is not of the type and shape that were announced.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     entries = {"w": Entry.of(torch.eye(2))}
    ...     print(write(Path(folder, "a.safetensors"), entries, {}) == size(entries, {}))
    True
    """
    order, head = _plan(entries, metadata)
    with open(path, "wb") as f:
        f.write(head)
        for name in order:
            e = entries[name]
            t = e.value().detach()
            if t.dtype != e.dtype or tuple(t.shape) != e.shape:
                raise Invalid(f"{name} is {tuple(t.shape)} {t.dtype}; {path.name} expected {e.shape} {e.dtype}")
            f.write(_bytes(t))
        return f.tell()


class Spool:
    """A file whose tensors come one after another, of shapes that nobody knows before: values wait on disk beside it, by the width of their
    type, until `close` knows the header. The file is that which `write` would make of the same tensors in the same order. Used in a `with`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Spool(Path(folder, "a.safetensors")) as spool:
    ...         spool.add("w", torch.eye(2))
    ...         spool.close({})
    ...     print(Stored(Path(folder, "a.safetensors"))["w"])
    88
    tensor([[1., 0.], [0., 1.]])
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.waiting: dict[int, IO[bytes]] = {}

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        for width, file in self.waiting.items():
            file.close()
            self._beside(width).unlink(missing_ok=True)

    def add(self, name: str, t: Tensor) -> None:
        """One more tensor, written at once. Raises ValueError if the name was there."""
        if name in self.entries:
            raise Invalid(f"{self.path.name} has a tensor {name} already")
        width = t.dtype.itemsize
        if width not in self.waiting:
            self.waiting[width] = open(self._beside(width), "wb")
        self.waiting[width].write(_bytes(t.detach()))
        self.entries[name] = Entry(t.dtype, tuple(t.shape), lambda: torch.empty(0))

    def close(self, metadata: Mapping[str, str]) -> int:
        """Write the file; returns its bytes."""
        with open(self.path, "wb") as f:
            f.write(_plan(self.entries, metadata)[1])
            for width in sorted(self.waiting, reverse=True):
                self.waiting[width].close()
                with open(self._beside(width), "rb") as part:
                    shutil.copyfileobj(part, f, 1 << 20)
            return f.tell()

    def _beside(self, width: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{width}")


def _bytes(t: Tensor) -> memoryview:
    return t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
