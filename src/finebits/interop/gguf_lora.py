"""A LoRA in a GGUF file, as llama.cpp's converter writes it and llama.cpp reads it, in the words of PEFT.

    general.type "adapter", adapter.type "lora", adapter.lora.alpha; of every weight W its W.lora_a (r, n) and W.lora_b (m, r)

The scale is α/r with the r of each matrix, and 1 where α is 0. Rows of lora_b lie as rows of W do in a GGUF file: what transformers makes of W
is made of them. Of a table of embeddings lora_a is (words, r).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.interop.gguf_file import GGUFFile
from finebits.peft_forms.base import PREFIX

ENDS = (".lora_a", ".lora_b")


def read(path: Path, model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, tensors by PEFT's names) for a model of transformers, which may be without values. Raises ValueError that names what is no
    LoRA of this model."""
    file = GGUFFile(path)
    kind, method = file.values_of.get("general.type"), file.values_of.get("adapter.type")
    if (kind, method) != ("adapter", "lora"):
        raise Invalid(
            f"{path} holds {kind or 'a model'} ({method or 'no adapter.type'}) and no LoRA: give the adapter.gguf that llama.cpp reads"
        )
    if "adapter.alora.invocation_tokens" in file.values_of:
        raise Invalid(
            f"adapter.alora.invocation_tokens in {path}: finebits cannot compute an adapter that begins at some words of the text"
        )
    alpha = file.values_of.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not 0 <= alpha < float("inf"):
        raise Invalid(f"adapter.lora.alpha is {alpha!r} in {path}, and it is to be a number from 0")
    names, process = _names(file, model)
    tensors, ranks = dict[str, Tensor](), dict[str, int]()
    for name in sorted(file):
        weight, dot, end = name.rpartition(".lora_")
        if not dot or end not in ("a", "b") or f"{weight}.lora_a" not in file or f"{weight}.lora_b" not in file:
            raise Invalid(f"{path} holds {name}, which is none of a pair {ENDS[0]} and {ENDS[1]}: finebits reads products alone")
        if weight not in names:
            raise Invalid(f"{path} is for {weight}, and the model has no such weight: it was trained over another model")
        module, t = names[weight].removesuffix(".weight"), file[name]
        if end == "b":
            t = process.process(weights=t, name=weight, tensor_key_mapping=names, parsed_parameters={"tensors": {}}).weights
            if t.shape != file.lines[name].shape or t.ndim != 2:
                raise Invalid(f"{path} is for {weight}, whose rows lie otherwise in its model than LoRA can follow: give the PEFT folder")
            ranks[module] = t.shape[1]
        tensors |= _peft(module, end, torch.from_numpy(np.array(t, dtype=np.float32)), model)
    if not ranks:
        raise Invalid(f"{path} holds no adapter: it has no tensors")
    alphas = {} if alpha else {f"^{re.escape(m)}": float(r) for m, r in ranks.items()}
    settings = {"peft_type": "LORA", "r": max(ranks.values()), "lora_alpha": alpha or 1.0, "target_modules": sorted(ranks), "bias": "none"}
    return settings | {
        "rank_pattern": {f"^{re.escape(m)}": r for m, r in ranks.items()},
        "alpha_pattern": alphas,
        "lora_dropout": 0.0,
    }, tensors


def _peft(module: str, end: str, t: Tensor, model: nn.Module) -> dict[str, Tensor]:
    table = isinstance(dict(model.named_modules()).get(module), nn.Embedding)
    if table:  # PEFT has A (r, words) and B (n, r) of it
        return {f"{PREFIX}{module}.lora_embedding_{end.upper()}": t.T.contiguous() if end == "a" else t}
    return {f"{PREFIX}{module}.lora_{end.upper()}.weight": t}


def _names(file: GGUFFile, model: Any) -> tuple[dict[str, str], Any]:
    """(GGUF's name of a weight -> the model's, what transformers makes of rows)."""
    from transformers import modeling_gguf_pytorch_utils as stock

    arch = str(file.values_of.get("general.architecture"))
    config = model.config.get_text_config()
    process = stock.TENSOR_PROCESSORS.get(arch, stock.TensorProcessor)(config=config.to_dict())
    try:
        found = stock.get_gguf_hf_weights_map(model, process)
    except NotImplementedError:
        found = stock.get_gguf_hf_weights_map(model, process, model_type=arch)
    return {k: v for k, v in found.items() if k.endswith(".weight")}, process
