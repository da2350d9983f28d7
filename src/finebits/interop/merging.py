"""An adapter merged into its base without the base in memory: one matrix is read, added to, rounded and written after another."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finebits.build import Adapted, generator, sign
from finebits.errors import Invalid
from finebits.interop.adapter_folders import combine, lora_folder, write_folder
from finebits.interop.checkpoint import Tensors, config_of, fingerprint, held_dtype
from finebits.interop.from_peft import belonging, beside, load_peft
from finebits.interop.hf import fill, folder_of, processor_of, skeleton
from finebits.interop.peft import export
from finebits.interop.peft_folder import Given, base_named, read
from finebits.merging.base import Merging
from finebits.merging.cat import Cat
from finebits.plan.base import Plan
from finebits.plan.levers import WIDTHS, Levers
from finebits.stream import absent

WORDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "preprocessor_config.json")


def merge(adapter: str | Path, base: str | Path, target: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the folder `target`: the model of `base` (a name or folder) with the adapter of a PEFT folder or GGUF file in its weights,
    in shards, as export target merged has it; name, path and bytes of it.

    Memory: one matrix in float32 twice, and the adapter. Adapters that are no product and rescale no weight, and those of tables of embeddings,
    are merged with the base in memory. What lay at `target` before stays until all is written. Raises ValueError as `load_peft` does.

    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(f"{place}/llama")
    ...     tuned = get_peft_model(LlamaForCausalLM.from_pretrained(f"{place}/llama"), LoraConfig(r=2, target_modules=["up_proj"]))
    ...     tuned.save_pretrained(f"{place}/lora")
    ...     print(fb.merge(f"{place}/lora", f"{place}/llama", f"{place}/merged")["name"])
    merged
    """
    folder = folder_of(base)
    dtype = str(config_of(folder).dtype or torch.float32).removeprefix("torch.")
    dtype = dtype if dtype in WIDTHS else "float32"
    model = skeleton(folder, getattr(torch, dtype))
    given = read(Path(adapter), model)
    belonging(Path(adapter), given.settings, folder, None)
    if _streams(given, model):
        plan = Plan({}, model=str(base), model_hash=fingerprint(folder), levers=Levers(dtype=dtype))
        model = sign(_laid(model, given, folder, getattr(torch, dtype)), plan)
        beside(model, given.others, given.settings)
    else:
        model = load_peft(adapter, base)
    words = any((folder / name).is_file() for name in WORDS)
    return export(model, target, "merged", processor_of(folder) if words else None, overwrite=overwrite)


def merge_several(
    adapters: Sequence[str | Path],
    base: str | Path | None,
    target: str | Path,
    by: Merging | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """`merge` of one adapter, or of several LoRAs of one base that are one first: by `by` (Cat, which is exact, if None), with `weights` before
    updates. The base is the one that the adapters name where none is given. Raises ValueError where they name none, or different ones.
    """
    if base is None:
        named = dict.fromkeys(base_named(Path(a)) for a in adapters)
        if len(named) != 1 or "" in named:
            said = " and ".join(name or "none" for name in named)
            raise Invalid(f"name the base that the adapters belong to: {', '.join(map(str, adapters))} say {said}")
        base = next(iter(named))
    if len(adapters) == 1 and weights is None and by is None:
        return merge(adapters[0], base, target, overwrite)
    one = combine([lora_folder(a) for a in adapters], by or Cat(), weights, seed)
    with tempfile.TemporaryDirectory(prefix="finebits-merge-") as scratch:
        write_folder(one, Path(scratch) / "adapter")
        return merge(Path(scratch) / "adapter", base, target, overwrite)


def _streams(given: Given, model: nn.Module) -> bool:
    """Does every adapter lie over a linear layer, with all its tensors in the folder?"""
    for name, h in given.held.items():
        if (
            h.adapter.over != "matrix"
            or h.adapter.form not in ("product", "scaled")
            or not isinstance(model.get_submodule(name), nn.Linear)
        ):
            return False
    return not given.tied


def _laid(model: Any, given: Given, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The adapters over a model whose matrices are absent."""
    tensors = Tensors(folder)
    for name, p in list(model.named_parameters()):
        if p.ndim > 1:
            owner, _, leaf = name.rpartition(".")
            held = held_dtype(model, name, dtype)
            there = absent(torch.empty(p.shape, dtype=held, device="meta"), lambda name=name, held=held: tensors[name].to(held))
            setattr(model.get_submodule(owner), leaf, there)
    fill(model, tensors, dtype)
    for name, h in given.held.items():
        host = Adapted.over(model.get_submodule(name))
        host.add("default", h.adapter, generator(0, name), dict(h.p))
    return model.eval()
