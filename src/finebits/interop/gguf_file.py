"""The head of a GGUF file, of which nothing is believed before it is compared with the file: counts, lengths, types, places.

    "GGUF", version (2 or 3), how many tensors, how many values
    a value:   key, type, value; a text is its length and its bytes, a list its type, its length and its values
    a tensor:  name, how many sides, the sides (the innermost first), type, place
    then, at the next multiple of the alignment, the tensors' bytes, to which places are relative

A tensor is read when it is asked for, into memory of its own. What the gguf package does with a file, it does after this.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from finebits.errors import Invalid

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
TEXT, LIST = 8, 9
LONG = 2**20  # bytes of a text outside of lists; chat templates have some ten thousand
SIDES, NAME = 4, 2**10


class Line(NamedTuple):
    """Type and shape (the innermost side last) of a tensor, and where its bytes are in the file."""

    kind: str
    shape: tuple[int, ...]
    at: int
    nbytes: int


class GGUFFile(Mapping[str, np.ndarray]):
    """The values of a GGUF file's head that are no lists, and its tensors, in float32.

    Raises ValueError that says what is wrong where the file is not whole or not GGUF.

    >>> import tempfile, gguf
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     writer = gguf.GGUFWriter(f"{folder}/a.gguf", "llama")
    ...     writer.add_tensor("output.weight", np.eye(2, dtype=np.float32))
    ...     writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    ...     file = GGUFFile(Path(folder, "a.gguf"))
    ...     print(file.values_of["general.architecture"], file.lines["output.weight"].kind, file["output.weight"].tolist())
    (None, None, None, None)
    llama F32 [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, path: Path) -> None:
        self.path, self.values_of, self.lines = path, dict[str, Any](), dict[str, Line]()
        with open(path, "rb") as f:
            self.size = os.fstat(f.fileno()).st_size
            try:
                self._head(f)
            except (struct.error, UnicodeDecodeError) as e:
                raise self._wrong(f"its head ends in the middle of a value, or is no text ({e})") from None

    def _wrong(self, what: str) -> Invalid:
        return Invalid(f"{self.path} could not be read as a GGUF model, it may be damaged: {what}; fetch it again")

    def _head(self, f: IO[bytes]) -> None:
        if f.read(4) != b"GGUF":
            raise Invalid(f"{self.path} is not a GGUF file (it does not begin with GGUF): it is damaged or of another kind")
        version, tensors, values = self._one(f, "<I"), self._one(f, "<Q"), self._one(f, "<Q")
        if version not in (2, 3):
            raise self._wrong(f"it is of version {version}, and 2 and 3 are read")
        if tensors * 24 + values * 13 > self.size:  # the least that each takes
            raise self._wrong(f"it says that it has {tensors} tensors and {values} values, and it has {self.size} bytes")
        for _ in range(values):
            key = self._text(f, NAME)
            if key in self.values_of:
                raise self._wrong(f"it has {key[:60]!r} twice")
            self.values_of[key] = self._value(f, self._one(f, "<I"), key)
        places = [self._info(f) for _ in range(tensors)]
        unit = self.values_of.get("general.alignment", 32)
        if not isinstance(unit, int) or unit < 1 or unit & (unit - 1) or unit > 2**20:
            raise self._wrong(f"its alignment is {unit!r}, and that is a power of two")
        start, end = -(-f.tell() // unit) * unit, 0
        for name, line in sorted(places, key=lambda p: p[1].at):
            if line.at < end or start + line.at + line.nbytes > self.size:
                inside = "lies over the one before it" if line.at < end else f"ends behind the {self.size} bytes of the file"
                raise self._wrong(f"its tensor {name} ({line.nbytes} bytes at {line.at}) {inside}")
            end = line.at + line.nbytes
        self.lines = {name: line._replace(at=start + line.at) for name, line in places}
        if len(self.lines) < len(places):
            raise self._wrong("it has two tensors of one name")

    def _one(self, f: IO[bytes], code: str) -> Any:
        return struct.unpack(code, f.read(struct.calcsize(code)))[0]

    def _text(self, f: IO[bytes], most: int) -> str:
        length = self._one(f, "<Q")
        if length > min(most, self.size - f.tell()):
            raise self._wrong(f"a text at byte {f.tell()} says that it has {length} bytes")
        return f.read(length).decode()

    def _value(self, f: IO[bytes], kind: int, key: str) -> Any:
        """A number or a text; of a list nothing, but that it is whole."""
        if kind in SCALARS:
            return self._one(f, SCALARS[kind])
        if kind == TEXT:
            return self._text(f, LONG)
        if kind != LIST:
            raise self._wrong(f"{key[:60]} is of type {kind}, which GGUF has not")
        inner, count = self._one(f, "<I"), self._one(f, "<Q")
        if inner not in SCALARS and inner != TEXT:
            raise self._wrong(f"{key[:60]} is a list of type {inner}, which is not read")
        least = struct.calcsize(SCALARS[inner]) if inner in SCALARS else 8
        if count * least > self.size - f.tell():
            raise self._wrong(f"{key[:60]} says that it has {count} values, and {self.size - f.tell()} bytes are left")
        if inner in SCALARS:
            f.seek(count * least, os.SEEK_CUR)
        for _ in range(count if inner == TEXT else 0):
            length = self._one(f, "<Q")
            if length > self.size - f.tell():
                raise self._wrong(f"a text of {key[:60]} says that it has {length} bytes")
            f.seek(length, os.SEEK_CUR)
        return None

    def _info(self, f: IO[bytes]) -> tuple[str, Line]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name, count = self._text(f, NAME), self._one(f, "<I")
        if not 1 <= count <= SIDES:
            raise self._wrong(f"its tensor {name} has {count} sides, and 1 to {SIDES} are read")
        shape = tuple(self._one(f, "<Q") for _ in range(count))[::-1]
        code, at = self._one(f, "<I"), self._one(f, "<Q")
        try:
            kind = GGMLQuantizationType(code)
            block, nbytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise self._wrong(f"its tensor {name} is of type {code}, which the installed gguf does not know") from None
        if shape[-1] % block or 0 in shape:
            raise self._wrong(f"its tensor {name} is {shape}, and {kind.name} has rows of whole blocks of {block}")
        return name, Line(kind.name, shape, at, math.prod(shape) // block * nbytes)

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, (*, bytes of a row)."""
        line = self.lines[name]
        with open(self.path, "rb", buffering=0) as f:
            data = np.fromfile(f, np.uint8, line.nbytes, offset=line.at)
        return data.reshape(*line.shape[:-1], -1)

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf import GGMLQuantizationType, dequantize

        line, data = self.lines[name], self.raw(name)
        try:
            if line.kind in ("I8", "I16", "I32", "I64", "F64"):
                return data.view(line.kind.lower().replace("i", "int").replace("f", "float")).reshape(line.shape).astype(np.float32)
            kind = GGMLQuantizationType[line.kind]
            return np.asarray(dequantize(data, kind), dtype=np.float32).reshape(line.shape)
        except NotImplementedError as e:
            raise Invalid(
                f"{name} of {self.path} is {line.kind}, which the installed gguf does not decode ({e}): give another file"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)
