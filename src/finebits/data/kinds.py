"""What a file is, by how it begins: one that holds rows is read, any other is called what it is."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from finebits.data.error import DataError

WRITE = "write its rows into a .jsonl file, one JSON object a line"
UNPACK = "unpack it, and name the files of rows in it"
SIGNS = (  # (how it begins, what it is, what to do)
    (b"(\xb5/\xfd", "compressed (zstd)", "unpack it, or compress it with gzip"),
    (b"7z\xbc\xaf\x27\x1c", "an archive (7z)", UNPACK),
    (b"Rar!", "an archive (rar)", UNPACK),
    (b"%PDF", "a PDF document", f"take its text out, and {WRITE}"),
    (b"\xd0\xcf\x11\xe0", "an old Office document (.xls, .doc)", "save it as .csv or .txt"),
    (b"SQLite format 3", "a database (SQLite)", WRITE),
    (b"\x93NUMPY", "an array (NumPy)", WRITE),
    (b"\x89HDF", "an HDF5 file", WRITE),
    (b"\x89PNG", "a picture", "name a file whose rows name the pictures"),
    (b"\xff\xd8\xff", "a picture", "name a file whose rows name the pictures"),
    (b"GGUF", "a model (GGUF)", "name the model under model.model_name_or_path, and rows here"),
    (b"version https://git-lfs", "a pointer of Git LFS in the place of a file", "fetch the file itself: git lfs pull"),
    (b"<!DOCTYPE html", "a web page", "fetch the file itself: the address gave a page in its place"),
    (b"<html", "a web page", "fetch the file itself: the address gave a page in its place"),
    (b"\xff\xfe", "text in UTF-16", "save the file as UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "save the file as UTF-8"),
)
OFFICE = {"xl/": ("an Excel workbook", "save the sheet as .csv"), "word/": ("a Word document", "save it as .txt")}
PACKED: dict[bytes, tuple[str, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": ("gzip", gzip.decompress),
    b"BZh": ("bzip2", bz2.decompress),
    b"\xfd7zXZ\x00": ("xz", lzma.decompress),
}
ENDINGS = (".gz", ".bz2", ".xz")


def unpacked(content: bytes, path: Path) -> tuple[bytes, Path, str]:
    """(what a compressed file holds, its name without the ending of that, how it was compressed); of any other file what it is. Raises DataError
    where it is broken.

    >>> unpacked(gzip.compress(b"once"), Path("a.txt.gz"))
    (b'once', PosixPath('a.txt'), 'gzip')
    """
    for sign, (name, open_) in PACKED.items():
        if content.startswith(sign):
            try:
                return open_(content), path.with_suffix("") if path.suffix.lower() in ENDINGS else path, name
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as e:
                raise DataError(f"{path} is compressed ({name}) and broken ({e}): fetch or write it again") from None
    return content, path, ""


def refuse(content: bytes, path: Path) -> None:
    """Raises DataError (exit code 2) where the file is of a kind that holds no rows which are read.

    >>> refuse(b'{"text": "once"}', Path("a.jsonl"))
    >>> refuse(b"%PDF-1.7", Path("a.jsonl"))
    Traceback (most recent call last):
        ...
    finebits.data.error.DataError: a.jsonl is a PDF document: take its text out, and write its rows into a .jsonl file, one JSON object a line
    """
    what = next(((name, do) for sign, name, do in SIGNS if content.startswith(sign)), None)
    if content.startswith(b"PK\x03\x04"):
        what = _archive(content)
    elif content[:1] == b"\x80" and content[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        what = "a Python pickle, which runs code when it is read", f"where it was made, {WRITE}"
    elif content[257:262] == b"ustar":
        what = "an archive (tar)", UNPACK
    elif what is None and len(content) > 8 and content[8:9] == b"{" and b'"dtype"' in content[:400]:
        what = "a file of tensors (safetensors)", "name rows here"
    if what is not None:
        raise DataError(f"{path} is {what[0]}: {what[1]}", code=2)


def _archive(content: bytes) -> tuple[str, str]:
    try:
        inside = zipfile.ZipFile(io.BytesIO(content)).namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        inside = []
    for start, what in OFFICE.items():
        if any(name.startswith(start) for name in inside):
            return what
    if any(name.endswith("data.pkl") for name in inside):
        return "a file of torch.save, a pickle, which runs code when it is read", f"where it was made, {WRITE}"
    return "an archive (zip)", UNPACK
