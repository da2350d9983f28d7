"""What the modules of transformers and peft make of an exported folder, with one block of it in memory.

A weight that is held as codes is decoded as its target says, and is then what the loaded model would hold: a number of the model's dtype.

`from_pretrained` loads a folder whole, as people do. Here the same modules, made from the folder's own config.json and
adapter_config.json, read its files when they are called, by the names that those libraries give their parameters. Every tensor of the files must
have its parameter and every parameter its tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finebits.calibrate.blockwise import blocks_of
from finebits.errors import Invalid
from finebits.evaluate.exact import ends
from finebits.evaluate.heldout import Batch, Hidden, backbone
from finebits.export.base import Read
from finebits.interop.checkpoint import Tensors
from finebits.interop.coded import Coded, Parts
from finebits.interop.hf import skeleton
from finebits.interop.streaming import final
from finebits.stream import Flow, lazily
from finebits.tensorfile import Stored


class Stock:
    """`model` computes in `dtype`; embeddings and a plain head are held as the files have them. `base` and `adapter` are what was read, `by`
    whose code read it. The adapter's file may be missing: then there is none."""

    def __init__(self, read: Read, adapter: Path, dtype: torch.dtype) -> None:
        self.by, folder = read.by, read.base
        self.base = decoded(read) if read.tensors is None else read.tensors
        self.adapter = Stored(adapter) if adapter.exists() else {}
        model: Any = skeleton(folder, dtype)
        if adapter.exists():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter.parent), low_cpu_mem_usage=True).get_base_model()
        model.tie_weights()
        self.dtype, end_ids = dtype, ends(model)
        self._complete(folder, model)
        self.blocks = blocks_of(model)
        inside = tuple(f"{name}." for name in self.blocks)
        for name, p in list(model.named_parameters()):
            if not name.startswith(inside):
                own = self._tensor(name)
                p.requires_grad_(False)
                owner, _, leaf = name.rpartition(".")
                new = nn.Parameter(own if id(p) in end_ids else own.to(dtype), requires_grad=False)
                model.get_submodule(owner)._parameters[leaf] = new
        model.tie_weights()
        for m in model.modules():
            if isinstance(m, nn.Embedding):
                m.register_forward_hook(lambda m, i, out: out.to(dtype))
        self.model = lazily(model.eval(), self.blocks, self.read)

    def read(self, name: str) -> Tensor:
        """A parameter of a block."""
        return self._tensor(name).to(self.dtype)

    def hidden(self, batches: Iterable[Batch]) -> Hidden:
        """Final hidden states of these batches."""
        flow = Flow(self.model, self.blocks, list(batches), lambda model, batch: backbone(model)(batch))
        return final(flow, self.read)

    def _source(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        """Where the value of a parameter is, and under which name: peft's for what it added, transformers' for the rest."""
        if ".lora_" in name:
            return self.adapter, f"base_model.model.{name.replace('.default.', '.')}"
        return self.base, name.replace(".base_layer.", ".")

    def _tensor(self, name: str) -> Tensor:
        tensors, key = self._source(name)
        return tensors[key]

    def _complete(self, folder: Path, model: nn.Module) -> None:
        names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
        tied = set(names) - {n for n, _ in model.named_parameters()}
        wanted = {(id(tensors), key): n for n in names for tensors, key in [self._source(n)]}
        for tensors in (self.base, self.adapter):
            for key in tensors:
                name = wanted.pop((id(tensors), key), None)
                if name is None and key not in dict(model.named_buffers()):
                    raise Invalid(f"{folder} holds {key}, for which stock libraries have no parameter: export it again")
        if left := sorted(n for n in wanted.values() if n not in tied):
            raise Invalid(f"{folder} has no tensor for {left[0]}, which stock libraries want: export it again")


def decoded(read: Read) -> Tensors:
    """The tensors of the base, those in codes as the target decodes them, or as we do where it leaves that to us."""
    tensors = Tensors(read.base)
    layout = tensors.layout
    dtype = layout.config.dtype

    def by_target(name: str, coded: Coded) -> Coded:
        def plain(parts: Parts) -> Tensor:
            return (coded.plain(parts) if read.decode is None else read.decode(name, parts)).to(dtype)

        return replace(coded, plain=plain)

    tensors.layout = replace(layout, coded={name: by_target(name, coded) for name, coded in layout.coded.items()})
    return tensors
