"""What the modules of transformers and peft make of an exported folder, with one block of it in memory.

A weight that is held as codes is decoded as its target says, and is then what the loaded model would hold: a number of the model's dtype.

`from_pretrained` loads a folder whole, as people do. Here the same modules, made from the folder's own config.json and
adapter_config.json, read the base's files when they are called, by the names that those libraries give their parameters; peft reads its own.
Every tensor of the files must have its parameter and every parameter its tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finebits.calibrate.blockwise import blocks_of
from finebits.errors import Invalid
from finebits.evaluate.exact import ends
from finebits.evaluate.heldout import Batch, Hidden, backbone
from finebits.export.base import Read
from finebits.interop.checkpoint import Tensors
from finebits.interop.coded import Coded, Parts
from finebits.interop.hf import stock_skeleton
from finebits.interop.streaming import final
from finebits.stream import Flow, lazily
from finebits.tasks._head import instead
from finebits.tensorfile import Stored

TIED = ("trainable_tokens_delta", "lora_embedding_A")  # tensors of adapters over tables of embeddings


class Stock:
    """`model` computes in `dtype`; embeddings and a plain head are held as the files have them. `base` is what was read, `by` whose
    code read it; peft reads the adapter. The adapter's file may be missing: then there is none."""

    def __init__(self, read: Read, adapter: Path, dtype: torch.dtype) -> None:
        self.by, folder = read.by, read.base
        self.base = decoded(read) if read.tensors is None else read.tensors
        model: Any = stock_skeleton(folder, dtype)
        self.around: Any = None  # peft's model, where there is an adapter
        self.loaded = dict[str, Tensor]()  # what peft brought, by its names in the model
        model.tie_weights()
        again = tie(model)
        if adapter.exists():
            self.around, self.loaded = with_adapter(model, adapter)
            model = self.around.get_base_model()
        again()
        self.dtype, end_ids = dtype, ends(model)
        self._complete(folder, model)
        self.blocks = blocks_of(model)
        inside = tuple(f"{name}." for name in self.blocks)
        end_ids -= {id(p) for m in model.modules() if hasattr(m, "trainable_tokens_delta") for p in m.parameters()}  # rows take their dtype
        for name, p in list(model.named_parameters()):
            if not name.startswith(inside):
                own = self._tensor(name)
                p.requires_grad_(False)
                _put(model, name, nn.Parameter(own if id(p) in end_ids else own.to(dtype), requires_grad=False))
        again()
        for m in model.modules():
            if isinstance(m, nn.Embedding):
                m.register_forward_hook(lambda m, i, out: out.to(dtype))
        self.model = lazily(model.eval(), self.blocks, self.read)

    @property
    def prompted(self) -> bool:
        """Whether peft's model puts an adapter's tokens before a row: then that is asked, not the model within."""
        return self.around is not None and self.around.active_peft_config.is_prompt_learning

    def read(self, name: str) -> Tensor:
        """A parameter of a block."""
        return self._tensor(name).to(self.dtype)

    def hidden(self, batches: Iterable[Batch]) -> Hidden:
        """Final hidden states of these batches."""
        run = self._prompted if self.prompted else lambda model, batch: backbone(model)(batch)
        flow = Flow(self.model, self.blocks, list(batches), run)
        return final(flow, self.read)

    def _prompted(self, model: Any, batch: Batch) -> Tensor:
        """Final states under tokens that peft puts before a row, without theirs. The head, which peft's forward ends in, is not asked: it is in
        the dtype of the files, and has as many outputs as there are words."""
        seen: list[Any] = []
        hook = model.base_model.register_forward_hook(lambda m, i, out: seen.append(out.last_hidden_state))
        head = model.get_output_embeddings()
        with contextlib.ExitStack() as stack:
            stack.callback(hook.remove)
            if head is not None:
                stack.enter_context(instead(head, lambda h: h[..., :1]))
            cast(Any, self.around)(**{k: v for k, v in batch.items() if k != "labels"})
        return seen[0][:, -batch["input_ids"].shape[1] :]

    def _tensor(self, name: str) -> Tensor:
        return self.loaded[name] if name in self.loaded else self.base[plain(name)]

    def _complete(self, folder: Path, model: nn.Module) -> None:
        names = {plain(n) for n, _ in model.named_parameters(remove_duplicate=False) if n not in self.loaded}
        tied = names - {plain(n) for n, _ in model.named_parameters()}
        for key in self.base:
            if key not in names and key not in dict(model.named_buffers()):
                raise Invalid(f"{folder} holds {key}, for which stock libraries have no parameter: export it again")
        if left := sorted(names - set(self.base) - tied):
            raise Invalid(f"{folder} has no tensor for {left[0]}, which stock libraries want: export it again")


def tie(model: nn.Module) -> Callable[[], None]:
    """What ties once more the parameters that are one now, wherever peft will have put their modules."""
    first, same = dict[int, tuple[nn.Module, str]](), list[tuple[nn.Module, str, nn.Module, str]]()
    for module in model.modules():
        for k, p in module._parameters.items():
            if p is not None and first.setdefault(id(p), (module, k)) != (module, k):
                same.append((module, k, *first[id(p)]))

    def again() -> None:
        for module, k, other, own in same:
            module._parameters[k] = other._parameters[own]

    return again


def plain(name: str) -> str:
    """A parameter's name in transformers' model, out of that under peft."""
    return name.replace(".token_adapter", "").replace(".base_layer", "")


def with_adapter(model: nn.Module, file: Path) -> tuple[Any, dict[str, Tensor]]:
    """(peft's model, of a model of meta tensors and the adapter of a folder, what peft brought by its names in the model within). Raises
    ValueError where peft lacks a tensor, or leaves one aside."""
    from peft import PeftModel, get_peft_model_state_dict

    absent, again = {n: p for n, p in model.named_parameters() if p.device.type == "meta"}, tie(model)
    for name, p in absent.items():  # peft puts an adapter where its base is: a real tensor of no size stands in for that
        _put(model, name, nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False))
    again()
    standing = {id(p) for p in model.parameters()}
    # What follows a table is not made without values by peft: it would be left so.
    ties = any(name.endswith(TIED) for name in Stored(file))
    adapted = PeftModel.from_pretrained(model, str(file.parent), low_cpu_mem_usage=not ties)
    theirs = get_peft_model_state_dict(adapted, adapted.state_dict(), save_embedding_layers=False)
    ours = set(Stored(file))
    there = {t.data_ptr() for name, t in theirs.items() if name in ours}  # what many modules share may be in the file once
    if unmet := sorted(ours - theirs.keys()) + sorted(name for name in theirs.keys() - ours if theirs[name].data_ptr() not in there):
        why = "holds it and peft has no place for it" if unmet[0] in ours else "lacks it and peft wants it"
        raise Invalid(f"{unmet[0]}: {file} {why}: export it again")
    whole = adapted.get_base_model()
    brought = {}
    for name, p in list(whole.named_parameters()):
        if id(p) not in standing:
            brought[name] = p.detach()
        elif plain(name) in absent:
            _put(whole, name, absent[plain(name)])
    again()
    return adapted, brought


def _put(model: nn.Module, name: str, p: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = p


def decoded(read: Read) -> Tensors:
    """The tensors of the base, those in codes as the target decodes them, or as we do where it leaves that to us."""
    tensors = Tensors(read.base, stock=True)
    layout = tensors.layout
    dtype = layout.config.dtype

    def by_target(name: str, coded: Coded) -> Coded:
        def plain(parts: Parts) -> Tensor:
            return (coded.plain(parts) if read.decode is None else read.decode(name, parts)).to(dtype)

        return replace(coded, plain=plain)

    tensors.layout = replace(layout, coded={name: by_target(name, coded) for name, coded in layout.coded.items()})
    return tensors
