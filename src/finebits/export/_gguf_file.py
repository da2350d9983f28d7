"""A GGUF file: its tensors, each made when it is written, and how transformers reads them again with the gguf package."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.export import _gguf as conversion
from finebits.export.base import File

MODEL = "model.gguf"


class Piece(NamedTuple):
    """A tensor of a GGUF file: its type, its shape in bytes, and its bytes."""

    kind: str
    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]


def plain(entry: Any, rows: Tensor | None) -> Piece:
    """A dense tensor: BF16 or F16 where it is a matrix of that, else F32."""
    narrow = len(entry.shape) > 1 and entry.dtype in (torch.bfloat16, torch.float16)
    dtype = entry.dtype if narrow else torch.float32
    kind = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(dtype, "F32")
    shape = (*entry.shape[:-1], entry.shape[-1] * dtype.itemsize)
    return Piece(kind, shape, lambda: ordered(entry.value().to(dtype).contiguous().view(torch.uint8).numpy(), rows, entry.shape[0]))


def ordered(data: np.ndarray, rows: Tensor | None, count: int | None = None) -> np.ndarray:
    if rows is None:
        return data
    parted = data.reshape(count or len(data), -1)  # of a vector too: its numbers' bytes stay together
    return np.ascontiguousarray(parted[rows.numpy()]).reshape(data.shape)


def file(arch: str, about: Callable[[Any], None], tensors: Mapping[str, Piece]) -> File:
    """A GGUF file of these tensors; its head is made once more to see how long it is."""
    with tempfile.TemporaryDirectory(prefix="finebits-gguf-") as scratch:
        writer = _begun(Path(scratch) / MODEL, arch, about, tensors)
        writer.close()
        head = (Path(scratch) / MODEL).stat().st_size
    padded = lambda n: writer.ggml_pad(n, writer.data_alignment)  # noqa: E731

    def write(path: Path) -> None:
        writer = _begun(path, arch, about, tensors)
        try:
            for piece in tensors.values():
                writer.write_tensor_data(piece.value())
        finally:
            writer.close()

    return File(padded(head) + sum(padded(int(np.prod(p.shape))) for p in tensors.values()), write)


def _begun(path: Path, arch: str, about: Callable[[Any], None], tensors: Mapping[str, Piece]) -> Any:
    """A writer that has written all but the values."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    about(writer)
    for name, piece in tensors.items():
        kind = gguf.GGMLQuantizationType[piece.kind]
        writer.add_tensor_info(name, piece.shape, np.dtype(np.uint8), int(np.prod(piece.shape)), raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def loading(base: Path) -> Callable[[torch.dtype], Any]:
    """How people load a folder with a GGUF file in transformers."""

    def load(dtype: torch.dtype) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(base, gguf_file=MODEL, dtype=dtype)

    return load


class Blocks(Mapping[str, Tensor]):
    """The tensors of a GGUF file by the names of the model, as transformers and gguf read it: one is dequantized when it is asked for, into
    `dtype`, or else the dtype of the model.

    Raises ValueError where the metadata says another model than config.json beside it.
    """

    def __init__(self, base: Path, dtype: torch.dtype | None = None) -> None:
        from gguf import GGUFReader
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers import modeling_gguf_pytorch_utils as stock

        config = AutoConfig.from_pretrained(base)
        stated = stock.load_gguf_checkpoint(str(base / MODEL))["config"]
        for key, value in stated.items():
            wanted = config.rope_parameters["rope_theta"] if key == "rope_theta" else getattr(config, key, None)
            named = key in ("_model_name_or_path", "model_type", "architectures") or key.endswith("_token_id")
            if not named and wanted is not None and not np.isclose(float(value), float(wanted), rtol=1e-6):
                raise Invalid(f"{base / MODEL} says that {key} is {value}, and the model has {wanted}: export it again")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        arch = conversion.architecture(config.to_dict())
        self.process = stock.TENSOR_PROCESSORS.get(arch, stock.TensorProcessor)(config=stated)
        names = stock.get_gguf_hf_weights_map(model, self.process, model_type=arch)
        self.dtype = dtype or config.dtype
        self.tensors = {names[t.name]: t for t in GGUFReader(base / MODEL).tensors}

    def __getitem__(self, name: str) -> Tensor:
        from gguf import dequantize

        tensor = self.tensors[name]
        value = self.process.process(dequantize(tensor.data, tensor.tensor_type), tensor.name).weights
        return torch.from_numpy(np.array(value, dtype=np.float32)).to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
