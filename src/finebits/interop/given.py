"""A transformers model that is given in the place of its name: weights are read from files, matrix by matrix, so it must be what these hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from finebits.calibrate.blockwise import blocks_of
from finebits.errors import Invalid
from finebits.interop.checkpoint import Tensors

ROUNDED = 2**-8  # of a weight: what a passage through bfloat16 may have changed


def name_of(model: Any) -> str:
    """Where the model came from. Raises Invalid where it does not say so, or has an adapter of peft over it.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    >>> name_of(LlamaForCausalLM(LlamaConfig(**sizes)))
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: this model does not say where it was loaded from (config._name_or_path is empty): save it and give the folder
    """
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise Invalid(
            "this model has an adapter of peft over it, which a plan would leave out: give the model that it lies over, and the folder of the "
            "adapter as folder=… to go on with it"
        )
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise Invalid("this model does not say where it was loaded from (config._name_or_path is empty): save it and give the folder")
    return name


def unchanged(model: nn.Module, folder: Path) -> None:
    """Raise Invalid where the model has other shapes than the files of its folder, or its last block or one of its vectors has other values,
    whatever rounding to bfloat16 may have done. What is quantized, or holds no values, is not compared."""
    tensors = Tensors(folder, stock=True)
    if tensors.layout.coded or getattr(model, "is_quantized", False):
        return
    shapes, last = {k: p.shape for k, p in tensors.layout.model.named_parameters()}, blocks_of(model)[-1:]
    for name, p in model.named_parameters():
        if p.device.type == "meta" or name not in tensors:
            continue
        same = p.shape == shapes.get(name, p.shape)
        if same and (p.ndim < 2 or name.startswith(tuple(f"{block}." for block in last))):
            value, held = tensors[name].float(), p.detach().float().cpu()
            same = torch.allclose(value, held, rtol=ROUNDED, atol=ROUNDED * float(value.abs().max()) * 1e-3)
        if not same:
            raise Invalid(
                f"{name} of this model is not what {folder} holds, from which weights are read: it was changed since it was loaded; save it "
                "(model.save_pretrained, and its tokenizer) and give that folder"
            )
