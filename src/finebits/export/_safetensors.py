"""Model folders in Hugging Face form, one tensor in memory at a time.

- the base: every weight as it was multiplied with in training, dense (QTensor.dequantize in the plan's dtype) or in codes of a layout;
- merged: base plus update, summed in float32 and rounded once.
Nothing here knows transformers: the model's own config, generation config and tokenizer write themselves.
"""

from __future__ import annotations

import copy
import json
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finebits.build import all_hosts, hosts, weighted
from finebits.carrier import Following, Table, carriers, tables, tied
from finebits.errors import Invalid
from finebits.experts import tensors
from finebits.export import _fold as fold
from finebits.export.base import File
from finebits.linears import as_stored, files_shape, stored_otherwise
from finebits.lookup import Lookup
from finebits.qtensor import QTensor, dense
from finebits.served import served
from finebits.stream import present
from finebits.tensorfile import Entry, size, write

SHARD = 5 * 10**9  # bytes of values in one weight file
FORMAT = {"format": "pt"}  # what transformers and peft look for in the metadata
INDEX = "model.safetensors.index.json"


def base_entries(model: nn.Module, dtype: torch.dtype, folds: fold.Folds | None = None) -> dict[str, Entry]:
    """The dense tensors of the model without its adapters, by the names of files, each made when it is written; with what is folded into them,
    where that is not left beside (None)."""
    return _joined(model, _base(model, dtype, folds))


def _base(model: nn.Module, dtype: torch.dtype, folds: fold.Folds | None) -> dict[str, Entry]:
    inside = {} if folds is None else fold.into_tables(model)
    weight = lambda host: cast(Table, host).made(dtype) if host in inside.values() else dense(host.weight)  # noqa: E731
    entries = _entries(model, dtype, weight, folds or {})
    fold.check_written(folds or {}, entries)
    return entries


def merged_entries(model: nn.Module, dtype: torch.dtype) -> dict[str, Entry]:
    """The dense tensors of the model with its adapters in them. Raises ValueError where an adapter has no merged form."""
    for name, host in all_hosts(model):
        for a in host.active:
            if host.kinds[a].form == "beside":
                raise Invalid(f"{name}: {type(host.kinds[a]).__name__} depends on its input and cannot be merged: keep it as an adapter")
    entries = _entries(model, dtype, lambda host: _merged(host, dtype))
    for host in tables(model).values():  # heads that do not follow part with it
        for name, module in tied(model, host).items():
            if not isinstance(module, Following):
                entries[f"{name}.weight"] = Entry(dtype, tuple(host.weight.shape), lambda host=host: dense(host.weight).detach().to(dtype))
    for name, host in hosts(model):
        bias = host.stack(torch.float32).bias
        if bias is not None and host.bias is None:
            kinds = ", ".join(type(host.kinds[a]).__name__ for a in host.active)
            raise Invalid(f"{name} has no bias in its model, and {kinds} adds one to its outputs: export target adapter holds it")
        if bias is not None and bias is not host.bias and f"{name}.bias" in entries:
            shift = bias.detach().to(dtype)
            entries[f"{name}.bias"] = Entry(dtype, tuple(shift.shape), lambda shift=shift: shift)
    return _joined(model, entries)


def _bare(host: Table, dtype: torch.dtype) -> Tensor:
    with present(host):
        return dense(host.weight).detach().to(dtype)


def _merged(host: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(host, Table):
        return host.made(dtype)
    return dense(host.weight if isinstance(host, Lookup) else host.stack(torch.float32).weight)


def parted(model: nn.Module) -> bool:
    """Is there a head that was the embeddings' own tensor, and is none once adapters are in the weights?"""
    return any(not isinstance(m, Following) for host in tables(model).values() for m in tied(model, host).values())


def coded_entries(
    model: nn.Module,
    dtype: torch.dtype,
    code: Callable[[QTensor], Mapping[str, Tensor]],
    store: str = "fp32",
    tables: bool = False,
) -> dict[str, Entry]:
    """The base with every quantized weight of a linear layer as `code` gives it: tensors by what follows the name of their module; most layouts
    know no table of embeddings in codes, which is dense but with `tables`. Scales that rows are folded into are held in `store`.

    Each weight is coded once to see what there will be, and again when it is written, codes of an adapter made anew with it. Raises ValueError
    that names the module that `code` refuses.
    """
    of: Mapping[str, Any] = weighted(model) if tables else dict(hosts(model))
    entries, folds = dict[str, Entry](), fold.folded(model, packed=True)
    for name, entry in _base(model, dtype, folds).items():
        module = name.removesuffix(".weight")
        if module not in of or not isinstance(served(of[module]), QTensor):
            entries[name] = entry
            continue
        if (shape := files_shape(of[module])) is not None:
            raise Invalid(f"{module} is {shape} in files of its model, and codes go along rows of (out, in): export adapter or merged")

        def coded(host: Any = of[module], own: fold.Folded | None = folds.get(module)) -> Mapping[str, Tensor]:
            return code(fold.rescaled(cast(QTensor, served(host)), own, store))

        try:
            parts = coded()
        except Invalid as e:
            raise Invalid(f"{module}: {e}") from None
        for part, t in parts.items():
            entries[f"{module}.{part}"] = Entry(t.dtype, tuple(t.shape), lambda coded=coded, part=part: coded()[part])
    return _joined(model, entries)


def _joined(model: nn.Module, entries: dict[str, Entry]) -> dict[str, Entry]:
    """The same, all experts of a layer in one tensor as files of their model have them."""
    first: dict[str, tuple[str, list[Entry]]] = {}
    inside: set[str] = set()
    for tensor, layers in tensors(model).items():
        for kind, after in (("weight", ""), ("bias", "_bias")):
            names = [f"{layer}.{kind}" for layer in layers]
            if names[0] in entries:
                first[names[0]] = f"{tensor}{after}", [entries[n] for n in names]
                inside |= set(names)
    whole: dict[str, Entry] = {}
    for name, entry in entries.items():
        if name in first:
            joined, parts = first[name]
            make = lambda parts=parts: torch.stack([part.value() for part in parts])  # noqa: E731
            whole[joined] = Entry(entry.dtype, (len(parts), *entry.shape), make)
        elif name not in inside:
            whole[name] = entry
    return whole


def quantized(model: nn.Module) -> tuple[dict[str, QTensor], list[str]]:
    """(weights that are held as codes, names of the linear layers that are dense), by module."""
    coded = {name: W for name, host in hosts(model) if isinstance(W := served(host), QTensor)}
    return coded, [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in coded]


def _entries(model: nn.Module, dtype: torch.dtype, weight: Any, folds: fold.Folds = types.MappingProxyType({})) -> dict[str, Entry]:
    of = {f"{name}.weight": host for name, host in (weighted(model) | tables(model)).items()}
    inside = tuple(f"{name}.{part}" for name in (n.removesuffix(".weight") for n in of) for part in ("p.", "weight."))
    inside += tuple(f"{name}.p." for name, _ in carriers(model))
    state = (
        {k: t for k, t in model.state_dict(keep_vars=True).items() if not k.startswith(inside)}
        if inside
        else model.state_dict(keep_vars=True)
    )
    names = [*state, *(k for k in of if k not in state)]
    others = {f"{name}.weight": module for name, module in model.named_modules() if stored_otherwise(module)}
    kept = {k for k, _ in model.named_buffers()}  # buffers stay in their own dtype: routers' biases are float32 in any model
    entries: dict[str, Entry] = {}
    seen: set[int] = set()
    for name in names:
        tensor = of[name].weight if name in of else state[name]
        if id(tensor) in seen:  # tied: written once, under its first name
            continue
        seen.add(id(tensor))
        wanted = dtype if tensor.is_floating_point() and name not in kept else tensor.dtype

        def value(name: str = name, tensor: Tensor = tensor, wanted: torch.dtype = wanted) -> Tensor:
            owner, _, leaf = name.rpartition(".")
            module = of[name] if name in of else model.get_submodule(owner) if hasattr(tensor, "read") else nn.Module()
            with torch.no_grad(), present(module):
                own = weight(module) if name in of else getattr(module, leaf) if hasattr(tensor, "read") else tensor
                t = fold.into(own.to(wanted), name, folds)
                return as_stored(others[name], t) if name in others else t

        shape = as_stored(others[name], torch.empty(tensor.shape, device="meta")).shape if name in others else tensor.shape
        entries[name] = Entry(wanted, tuple(shape), value)
    return entries


def shards(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """Entries by weight file, in order, no file over SHARD bytes of values unless one tensor is."""
    groups: list[dict[str, Entry]] = [{}]
    filled = 0
    for name, e in entries.items():
        if groups[-1] and filled + e.nbytes > SHARD:
            groups.append({})
            filled = 0
        groups[-1][name] = e
        filled += e.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups)}


def model_files(entries: Mapping[str, Entry]) -> dict[str, File]:
    """The weight files of a stock model folder, and their index where they are many; while they are written, one tensor is in memory."""
    groups = shards(entries)
    weight_files = {file: File(size(group, FORMAT), _writer(group)) for file, group in groups.items()}
    if len(groups) > 1:
        where = {name: file for file, group in groups.items() for name in group}
        total = sum(e.nbytes for e in entries.values())
        index = (json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n").encode()
        weight_files[INDEX] = File(len(index), lambda path: path.write_bytes(index))
    return weight_files


def _writer(group: Mapping[str, Entry]) -> Callable[[Path], int]:
    return lambda path: write(path, group, FORMAT)


def describe_model(
    model: Any, folder: Path, dtype: torch.dtype, tokenizer: Any = None, quantization: dict[str, Any] | None = None, apart: bool = False
) -> None:
    """What lies beside the weights of a stock model folder: config, generation config, tokenizer. `quantization` says how weights are held
    that are not dense; `apart`: the head has a weight of its own, even if here it has not."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):  # of the file that the model was read from
        del config.quantization_config
    if quantization is not None:
        config.quantization_config = quantization
    if getattr(config, "tie_word_embeddings", False) and (apart or not _tied(model)):
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight
