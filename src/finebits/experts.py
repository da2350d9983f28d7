"""Experts whose matrices a model holds in one tensor each, taken apart: every expert's matrix an nn.Linear of its own.

    y_t = Σ_k w_tk · down_e(act(gate_up_e x_t)),    e = chosen_tk

A tensor (E, 2I, H), or (E, H, 2I), becomes a list of E linears under its own name, so that `…experts.gate_up_proj.3` is a matrix as any other:
it is planned, quantized and adapted by itself. Tokens are sorted by their experts, and one expert after another multiplies its own.

Experts are known by what transformers' interface for them says of a class (`has_gate`, `is_transposed`, `_apply_gate`, …), which is all that its
own ways to compute them read; what says nothing is left as it is.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from finebits.linears import expert

SAID = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")


class Experts(nn.Module):
    """The experts of a layer, one by one. Made by `apart`, never constructed."""

    num_experts: int

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens, k = top_k_index.shape
        order = top_k_index.reshape(-1).argsort(stable=True)
        parts = []
        for e, x in enumerate(hidden_states[order // k].split(self._counts(top_k_index))):
            if len(x) or self.training:  # one that nobody chose has gradients too while it trains: zeros, on every rank and for every rule
                parts.append(self._expert(e, x))
        y = torch.cat(parts) * top_k_weights.reshape(-1)[order, None]
        return y[order.argsort()].unflatten(0, (tokens, k)).sum(1).to(hidden_states.dtype)

    def _counts(self, top_k_index: Tensor) -> list[int]:
        """How many tokens every expert is given. Without values, as few experts as there can be are given them all."""
        tokens, k = top_k_index.shape
        if top_k_index.is_meta:
            return [tokens] * k + [0] * (self.num_experts - k)
        return top_k_index.reshape(-1).bincount(minlength=self.num_experts).tolist()

    def _expert(self, e: int, x: Tensor) -> Tensor:
        own: Any = self
        h = own._apply_gate(own.gate_up_proj[e](x)) if own.has_gate else own.act_fn(own.up_proj[e](x))
        y = own.down_proj[e](h)
        return own.post_expert_norm(y) if own.has_post_expert_norm else y


def fused(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """The tensors of experts that `apart` takes apart: name -> (experts, outputs, inputs); none where the module is something else.

    >>> fused(torch.nn.Linear(2, 2))
    {}
    """
    if isinstance(module, Experts) or not all(hasattr(module, k) for k in SAID):
        return {}
    own: Any = module
    wanted = {"gate_up_proj" if own.has_gate else "up_proj", "down_proj"}
    tensors = {k: t for k, t in module._parameters.items() if k in wanted}  # in the order in which they lie there
    if tensors.keys() != wanted or not all(isinstance(t, Tensor) and t.ndim == 3 and len(t) == own.num_experts for t in tensors.values()):
        return {}
    if any(own.has_bias and own._parameters.get(f"{k}_bias") is None for k in tensors):
        return {}
    shapes = {k: tuple(cast(Tensor, t).shape) for k, t in tensors.items()}
    return {k: (e, n, m) if own.is_transposed else (e, m, n) for k, (e, m, n) in shapes.items()}


def apart(module: nn.Module) -> nn.Module:
    """The same module, its experts one by one; one that is none that `fused` knows is left as it is.

    >>> from transformers import MixtralConfig
    >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    >>> experts = MixtralExperts(MixtralConfig(hidden_size=4, intermediate_size=6, num_local_experts=3, experts_implementation="eager"))
    >>> x, chosen, weights = torch.randn(5, 4), torch.tensor([[0], [2], [2], [0], [2]]), torch.ones(5, 1)
    >>> _ = [torch.nn.init.normal_(p) for p in experts.parameters()]
    >>> before = experts(x, chosen, weights)
    >>> torch.allclose(apart(experts)(x, chosen, weights), before, atol=1e-5), experts.down_proj[2]
    (True, Linear(in_features=6, out_features=4, bias=False))
    """
    shapes, own = fused(module), cast(Any, module)
    for name, (count, m, n) in shapes.items():
        W: Tensor = module._parameters.pop(name)  # pyright: ignore[reportAssignmentType]
        b = module._parameters.pop(f"{name}_bias") if own.has_bias else None
        setattr(own, name, nn.ModuleList(_linear(W, b, e, count, m, n, own.is_transposed) for e in range(count)))
    if shapes:
        module.__class__ = _apart(type(module))
    return module


def _linear(W: Tensor, b: Tensor | None, e: int, count: int, m: int, n: int, transposed: bool) -> nn.Linear:
    linear: Any = nn.Linear(n, m, bias=b is not None, device="meta")
    own = W.detach()[e]
    linear.weight = nn.Parameter(own.T.contiguous() if transposed else own.clone(), requires_grad=W.requires_grad)
    if b is not None:
        linear.bias = nn.Parameter(b.detach()[e].clone(), requires_grad=b.requires_grad)
    linear.expert, linear.inputs_first = (e, count), transposed
    return linear


@functools.cache
def _apart(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (Experts, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def tensors(model: nn.Module) -> dict[str, list[str]]:
    """The tensors that files hold of experts: name -> the layers that each have a part of it, in order.

    >>> tensors(torch.nn.Linear(2, 2))
    {}
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if expert(module) is not None:
            found.setdefault(name.rpartition(".")[0], []).append(name)
    return found
