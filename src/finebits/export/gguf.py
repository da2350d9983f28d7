"""The base as a GGUF file (finebits.layouts.gguf), in `base/`; the adapter twice, as `adapter.gguf` for llama.cpp (--lora) and as a PEFT folder.

Q4_0, Q4_1 and Q8_0; what the plan leaves dense is BF16 or F32 as it was held, norms and biases F32. Of Llama, Mistral and Qwen 2 and 3. Read by
transformers with the gguf package, which dequantize; config and tokenizer lie beside the file for them.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from finebits.build import Adapted, served, weighted
from finebits.carrier import tables
from finebits.errors import Invalid
from finebits.export import _fold as fold
from finebits.export import _gguf as conversion
from finebits.export import _peft as peft
from finebits.export._safetensors import base_entries
from finebits.export.base import Extras, File, Layers, Read, Weights, try_each
from finebits.layouts.gguf import to_gguf
from finebits.lookup import Lookup
from finebits.qtensor import QTensor
from finebits.store import plan_of

MODEL, ADAPTER = "model.gguf", "adapter.gguf"


class Piece(NamedTuple):
    """A tensor of a GGUF file: its type, its shape in bytes, and its bytes."""

    kind: str
    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]


@dataclass(frozen=True)
class GGUF:
    """Integer blocks under an adapter.

    >>> GGUF().check({"up_proj": (fb.Int(4, 32, scale="fp16"), (256, 128))}, torch.bfloat16)  # it holds that as it is
    """

    rounds: ClassVar[bool] = False
    scales: ClassVar[str | None] = "fp16"
    layers: ClassVar[Layers] = "linears"

    def check(self, weights: Weights, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> None:
        try_each(weights, dtype, to_gguf)
        if config is not None:
            conversion.architecture(config)

    def files(self, model: nn.Module, extras: Extras) -> dict[str, File]:
        config: Any = model.config
        arch = conversion.architecture(config.to_dict())

        def about(writer: Any) -> None:
            conversion.sizes(writer, config)
            conversion.tokens(writer, extras.tokenizer, config.vocab_size)

        weight_files = {f"{peft.BASE}/{MODEL}": _file(arch, about, pieces(model, arch))}
        if peft.adapted(model):
            rank, update = lora(model, arch)

            def adapting(writer: Any) -> None:
                writer.add_type("adapter")
                writer.add_string("adapter.type", "lora")
                writer.add_float32("adapter.lora.alpha", float(rank))

            weight_files[ADAPTER] = _file(arch, adapting, update)
        return weight_files | peft.adapter_files(model, packed=True)

    def describe(self, model: nn.Module, folder: Path, place: Path, extras: Extras) -> None:
        about = peft.about(
            "which base/model.gguf holds in integer blocks (llama.cpp: `-m base/model.gguf --lora adapter.gguf`)",
            'AutoModelForCausalLM.from_pretrained(f"{folder}/base", gguf_file="model.gguf")',
        )
        peft.describe(model, folder, place, extras, *about)

    def read(self, folder: Path) -> Read:
        base = peft.base_of(folder)
        if not (base / MODEL).is_file():
            raise Invalid(f"{folder} holds no {peft.BASE}/{MODEL}, so it is no export to GGUF: export it again")

        def load(dtype: torch.dtype) -> Any:
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_pretrained(base, gguf_file=MODEL, dtype=dtype)

        return Read("transformers, gguf, peft", base, tensors=Blocks(base), load=load)


def pieces(model: nn.Module, arch: str) -> dict[str, Piece]:
    """The tensors of the base by GGUF's names; embeddings that it does not hold as they are, are dense. Raises ValueError that names any other
    module which it does not hold so."""
    of, config = weighted(model), cast(Any, model.config)
    dtype, name_of = getattr(torch, plan_of(model).levers.dtype), conversion.named(arch, config.num_hidden_layers)
    tensors: dict[str, Piece] = {}
    folds, inside = fold.folded(model, packed=True), fold.into_tables(model)
    for name, entry in base_entries(model, dtype, folds).items():
        module, new = name.removesuffix(".weight"), name_of(name)
        rows = conversion.order(new, arch, config, entry.shape[0])
        host = of[module] if module in of and module not in inside else None
        own = functools.partial(_served, host, folds.get(module))
        try:
            W = own()
            blocks = None if W is None else to_gguf(W)
        except Invalid as e:
            if not isinstance(host, Lookup):
                raise Invalid(f"{module}: {e}") from None
            blocks = None
        if blocks is None:
            tensors[new] = _dense(entry, rows)
        else:
            data, kind = blocks
            tensors[new] = Piece(kind, data.shape, lambda own=own, rows=rows: _ordered(to_gguf(cast(QTensor, own()))[0], rows))
    return tensors


def _served(host: Adapted | Lookup | None, own: fold.Folded | None) -> QTensor | None:
    """The codes of a module with what is folded into them; None where it has none."""
    W = host if host is None else host.weight if isinstance(host, Lookup) else served(host)
    return fold.rescaled(W, own, "fp16") if isinstance(W, QTensor) else None


def _dense(entry: Any, rows: Tensor | None) -> Piece:
    """A dense tensor: BF16 or F16 where it is a matrix of that, else F32."""
    narrow = len(entry.shape) > 1 and entry.dtype in (torch.bfloat16, torch.float16)
    dtype = entry.dtype if narrow else torch.float32
    kind = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(dtype, "F32")
    shape = (*entry.shape[:-1], entry.shape[-1] * dtype.itemsize)
    return Piece(kind, shape, lambda: _ordered(entry.value().to(dtype).contiguous().view(torch.uint8).numpy(), rows, entry.shape[0]))


def _ordered(data: np.ndarray, rows: Tensor | None, count: int | None = None) -> np.ndarray:
    if rows is None:
        return data
    parted = data.reshape(count or len(data), -1)  # of a vector too: its numbers' bytes stay together
    return np.ascontiguousarray(parted[rows.numpy()]).reshape(data.shape)


def lora(model: nn.Module, arch: str) -> tuple[int, dict[str, Piece]]:
    """The rank, and the update's factors by GGUF's names."""
    config = cast(Any, model.config)
    rank, products = peft.portable(model, packed=True)
    if name := next((n for n in tables(model) if n in products), None):
        raise Invalid(
            f"{name} is a table of embeddings under an adapter, for which GGUF has no place that all readers know: export target merged"
        )
    if beside := peft.biases(model, packed=True):
        raise Invalid(
            f"{next(iter(beside))} has no bias in its model, and its adapter adds one, for which GGUF has no place: export target adapter"
        )
    name_of, factors = conversion.named(arch, config.num_hidden_layers), dict[str, Piece]()
    for name, (L, R) in products.items():
        new = name_of(f"{name}.weight")
        rows = conversion.order(new, arch, config, L.shape[0])
        for end, t in (("lora_a", R), ("lora_b", L if rows is None else L[rows])):
            factors[f"{new}.{end}"] = Piece("F32", (t.shape[0], 4 * t.shape[1]), lambda t=t: t.contiguous().view(torch.uint8).numpy())
    return rank, factors


def _file(arch: str, about: Callable[[Any], None], tensors: Mapping[str, Piece]) -> File:
    """A GGUF file of these tensors; its head is made once more to see how long it is."""
    with tempfile.TemporaryDirectory(prefix="finebits-gguf-") as scratch:
        writer = _begun(Path(scratch) / MODEL, arch, about, tensors)
        writer.close()
        head = (Path(scratch) / MODEL).stat().st_size
    padded = lambda n: writer.ggml_pad(n, writer.data_alignment)  # noqa: E731

    def write(path: Path) -> None:
        writer = _begun(path, arch, about, tensors)
        for piece in tensors.values():
            writer.write_tensor_data(piece.value())
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


class Blocks(Mapping[str, Tensor]):
    """The tensors of a GGUF file by the names of the model, as transformers and gguf read it: one is dequantized when it is asked for, into
    the dtype of the model.

    Raises ValueError where the metadata says another model than config.json beside it.
    """

    def __init__(self, base: Path) -> None:
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
        self.dtype = config.dtype
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
