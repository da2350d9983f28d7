"""A linear layer under an adapter of stock PEFT: what ours are compared with."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn


def under(config: Any, W: Tensor, b: Tensor | None = None) -> nn.Module:
    """The layer of a model of one, as PEFT has it, its trained tensors somewhere on the way."""
    from peft import get_peft_model

    linear = nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    linear.weight.data = W.clone()
    if b is not None:
        linear.bias.data = b.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(nn.Sequential(linear), config)  # type: ignore[arg-type]
    layer = model.base_model.model[0]
    gen = torch.Generator().manual_seed(11)
    for p in layer.parameters():
        if p.requires_grad:
            p.data = p.data + 0.3 * torch.randn(p.shape, generator=gen)
    return layer


def trained(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}
