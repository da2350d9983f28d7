"""What rules share: the tensors of adapters of a kind, and how far factors are from orthonormal ones."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.rules.base import Run


def tensors(run: Run, of: str, who: str, wanted: str) -> dict[str, dict[str, nn.Parameter]]:
    """The tensors of every active adapter whose tensor `of` is trained, by host and adapter name; ValueError if there is none."""
    by_adapter: dict[str, dict[str, nn.Parameter]] = {}
    for name, host in run.hosts.items():
        for adapter in host.active:
            if of in host.p[adapter] and host.p[adapter][of].requires_grad:
                by_adapter[f"{name}.{adapter}"] = dict(host.p[adapter].items())
    if not by_adapter:
        raise Invalid(f"{who} needs {wanted}")
    return by_adapter


def gated(run: Run, who: str) -> dict[str, dict[str, nn.Parameter]]:
    """The tensors A, B and gate of every gated adapter."""
    return tensors(run, "gate", who, "adapters with gates, and the model has none: plan with adapter gated")


def departure(P: Float[Tensor, "r n"]) -> Float[Tensor, ""]:
    """‖P Pᵀ − I‖: zero where P's rows are orthonormal."""
    return torch.linalg.matrix_norm(P @ P.mT - torch.eye(P.shape[0], device=P.device))
