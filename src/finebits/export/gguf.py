"""The base as a GGUF file (finebits.layouts.gguf), in `base/`; the adapter twice, as `adapter.gguf` for llama.cpp (--lora) and as a PEFT folder.

With a mix, as gguf:q4_k_m, it is one merged file instead (finebits.export._gguf_merged). Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0; what the plan leaves
dense is BF16 or F32 as it was held, norms and biases F32. Of Llama, Mistral and Qwen 2 and 3. Read by transformers with the gguf package, which
dequantize; config and tokenizer lie beside the file for them, and a Modelfile for Ollama.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from finebits.build import Adapted, weighted
from finebits.carrier import tables
from finebits.errors import Invalid
from finebits.export import _fold as fold
from finebits.export import _gguf as conversion
from finebits.export import _peft as peft
from finebits.export._gguf_file import MODEL, Blocks, Piece, file, loading, ordered, plain
from finebits.export._gguf_merged import MergedGGUF
from finebits.export._ollama import ends_of, modelfile
from finebits.export._safetensors import base_entries
from finebits.export.base import Extras, File, Layers, Read, Weights, try_each
from finebits.files import write_text
from finebits.layouts.gguf import to_gguf
from finebits.lookup import Lookup
from finebits.qtensor import QTensor
from finebits.served import served
from finebits.store import plan_of

ADAPTER = "adapter.gguf"


@dataclass(frozen=True)
class GGUF:
    """Integer blocks under an adapter.

    >>> GGUF().check({"up_proj": (fb.Int(4, 32, scale="fp16"), (256, 128))}, torch.bfloat16)  # it holds that as it is
    """

    rounds: ClassVar[float] = 0.0
    scales: ClassVar[str | None] = "fp16"
    layers: ClassVar[Layers] = "linears"

    @staticmethod
    def of(mix: str) -> MergedGGUF:
        """The target gguf:MIX, which is merged."""
        return MergedGGUF(mix)

    def check(self, weights: Weights, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> None:
        try_each(weights, dtype, to_gguf)
        if config is not None:
            conversion.architecture(config)

    def files(self, model: nn.Module, extras: Extras) -> dict[str, File]:
        config: Any = model.config
        arch = conversion.architecture(config.to_dict())

        def about(writer: Any) -> None:
            conversion.sizes(writer, config)
            conversion.tokens(writer, extras.tokenizer, config.vocab_size, ends_of(model, extras.tokenizer))

        weight_files = {f"{peft.BASE}/{MODEL}": file(arch, about, pieces(model, arch))}
        if peft.adapted(model):
            weight_files[ADAPTER] = lora(model, arch)
        return weight_files | peft.adapter_files(model, packed=True)

    def describe(self, model: nn.Module, folder: Path, place: Path, extras: Extras) -> None:
        about = peft.about(
            "which base/model.gguf holds in integer blocks (llama.cpp: `-m base/model.gguf --lora adapter.gguf`)",
            'AutoModelForCausalLM.from_pretrained(f"{folder}/base", gguf_file="model.gguf")',
        )
        peft.describe(model, folder, place, extras, *about)
        adapter = f"./{ADAPTER}" if peft.adapted(model) else None
        write_text(folder / "Modelfile", modelfile(f"./{peft.BASE}/{MODEL}", adapter, extras.tokenizer, ends_of(model, extras.tokenizer)))

    def read(self, folder: Path) -> Read:
        base = peft.base_of(folder)
        if not (base / MODEL).is_file():
            raise Invalid(f"{folder} holds no {peft.BASE}/{MODEL}, so it is no export to GGUF: export it again")

        return Read("transformers, gguf, peft", base, tensors=Blocks(base), load=loading(base))


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
            tensors[new] = plain(entry, rows)
        else:
            data, kind = blocks
            tensors[new] = Piece(kind, data.shape, lambda own=own, rows=rows: ordered(to_gguf(cast(QTensor, own()))[0], rows))
    return tensors


def _served(host: Adapted | Lookup | None, own: fold.Folded | None) -> QTensor | None:
    """The codes of a module with what is folded into them; None where it has none."""
    W = None if host is None else served(host)
    return fold.rescaled(W, own, "fp16") if isinstance(W, QTensor) else None


def lora(model: nn.Module, arch: str) -> File:
    """The model's update."""
    products = peft.portable(model, packed=True)[1]
    if name := next((n for n in tables(model) if n in products), None):
        raise Invalid(
            f"{name} is a table of embeddings under an adapter, for which GGUF has no place that all readers know: export target merged"
        )
    if beside := peft.biases(model, packed=True):
        raise Invalid(
            f"{next(iter(beside))} has no bias in its model, and its adapter adds one, for which GGUF has no place: export target adapter"
        )
    return lora_file(products, arch, model.config)


def lora_file(products: Mapping[str, tuple[Tensor, Tensor]], arch: str, config: Any) -> File:
    """A LoRA of products L (m, r), R (r, n) of one rank, by the names of the model's modules; scaling is in L."""
    name_of, factors, ranks = (
        conversion.named(arch, config.num_hidden_layers),
        dict[str, Piece](),
        [R.shape[0] for _, R in products.values()],
    )
    for name, (L, R) in products.items():
        new = name_of(f"{name}.weight")
        rows = conversion.order(new, arch, config, L.shape[0])
        for end, t in (("lora_a", R), ("lora_b", L if rows is None else L[rows])):
            factors[f"{new}.{end}"] = Piece("F32", (t.shape[0], 4 * t.shape[1]), lambda t=t: t.contiguous().view(torch.uint8).numpy())

    def about(writer: Any) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(ranks[0]))

    return file(arch, about, factors)
