"""What rules share: the tensors that a rule acts on, soft thresholds, rates, and what happens between the first forward and the last backward
of a step."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finebits.calibrate.blockwise import blocks_of
from finebits.errors import Invalid
from finebits.rules.base import Laid, Rule, Run, Scene, instead, wanted

Tensors = dict[str, nn.Parameter]
Hook = Callable[[Tensor, Tensor], Tensor]  # (input, output) of a host -> what is added to its output


def adapters(run: Run, rule: Rule) -> Iterator[tuple[str, Any, Any, Tensors]]:
    """(host.adapter, host, adapter, its tensors) wherever the rule can act; ValueError if that is nowhere."""
    found = False
    for name, host in run.hosts.items():
        for key in host.active:
            adapter, p = host.kinds[key], dict(host.p[key].items())
            own = {k for k, t in p.items() if t.requires_grad} - adapter.shared
            if rule.needs <= own and rule.writes <= p.keys() and adapter.form in rule.forms:
                found = True
                yield f"{name}.{key}", host, adapter, p
    if not found:
        raise Invalid(f"{type(rule).__name__} acts on {wanted(rule)}, and the model has none such: {instead(rule)}")


def tensors(run: Run, rule: Rule) -> dict[str, Tensors]:
    """The tensors of every adapter that the rule acts on, by host and adapter name."""
    return {name: p for name, _, _, p in adapters(run, rule)}


def blocks(model: nn.Module, rule: Rule) -> list[str]:
    """The blocks of a model, in order; ValueError where it has none."""
    try:
        return blocks_of(model)
    except Invalid:
        who = type(rule).__name__
        raise Invalid(f"{who} goes by the blocks of a model, and {type(model).__name__} has no list of them: leave the rule out") from None


def departure(P: Float[Tensor, "r n"]) -> Float[Tensor, ""]:
    """‖P Pᵀ − I‖: zero where P's rows are orthonormal."""
    return torch.linalg.matrix_norm(P @ P.mT - torch.eye(P.shape[0], device=P.device))


def departures(scene: Scene) -> int:
    """Bytes that `departure` keeps for its gradient, of B and A of all adapters."""
    return sum(4 * (on.shapes["A"][0] ** 2 + on.shapes["B"][1] ** 2) for on in scene.adapters)


def rank(on: Laid) -> int:
    """r of the factors L (m, r) and R (r, n) of an adapter that is a product."""
    return on.adapter.lowrank({k: torch.ones(s) for k, s in on.shapes.items()})[1].shape[0]


def generator(seed: int, what: str) -> torch.Generator:
    """Randomness of (seed, what) alone: the same in all processes, and in a run that was resumed."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{what}".encode()))


def soft(v: Tensor, t: float) -> Tensor:
    """prox of t‖·‖₁: every number goes t towards zero and stops there.

    >>> soft(torch.tensor([-3.0, -0.5, 1.5]), 1.0)
    tensor([-2.0000, -0.0000,  0.5000])
    """
    return v.sign() * (v.abs() - t).clamp(min=0)


def rate(run: Run, p: nn.Parameter, who: str) -> float:
    """The learning rate of the step that was just made, of one parameter."""
    for group in [] if run.optimizer is None else run.optimizer.param_groups:
        if any(q is p for q in group["params"]):
            return float(group["lr"])
    raise Invalid(f"{who} scales with the learning rate, and the run's optimizer does not hold the parameter that it scales")


def factors(adapter: Any, p: Mapping[str, Tensor]) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """The update L R of an adapter that is a product."""
    return adapter.lowrank(p)


def tangent(adapter: Any, p: Tensors, d: Mapping[str, Tensor]) -> tuple[Float[Tensor, "m r2"], Float[Tensor, "r2 n"]]:
    """Factors P Q of how L R moves with p along d: (dL) R + L (dR), of rank 2 r."""
    at, along = (tuple(t.detach() for t in ts) for ts in (p.values(), (d.get(k, torch.zeros_like(v)) for k, v in p.items())))
    product = lambda *ts: adapter.lowrank(dict(zip(p, ts, strict=True)))  # noqa: E731
    (L, R), (dL, dR) = cast(Any, torch.autograd.functional.jvp)(product, at, along)
    return torch.cat([dL, L], 1), torch.cat([R, dR], 0)


def squares(P: Float[Tensor, "m r"], Q: Float[Tensor, "r n"]) -> Float[Tensor, " m"]:
    """The squared norms of the rows of P Q, which is not formed."""
    return torch.einsum("mr,rs,ms->m", P, Q @ Q.mT, P).clamp(min=0)


def adding(span: contextlib.ExitStack, host: nn.Module, more: Hook) -> None:
    """For as long as `span` is open, `more` is added to what the host gives."""

    def hook(host: nn.Module, inputs: Any, out: Any) -> Any:
        return out + more(inputs[0], out)

    span.callback(host.register_forward_hook(hook).remove)
