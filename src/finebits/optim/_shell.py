"""What steps weights one at a time: an inner optimizer on each of them, or on what a transform of its gradient makes of it.

State is flat and plain, so that checkpoints hold tensors and numbers alone: of a weight, what the inner optimizer keeps and, beside it, what the
transform does. It is loaded back as it was written, whatever the weight's dtype.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finebits.errors import Invalid

State = dict[str, Any]
Inner = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@runtime_checkable
class Transform(Protocol):
    """What stands between the gradient G of a weight (m, n) and an inner optimizer. `state` is its own, of one weight: tensors and numbers."""

    def fits(self, m: int, n: int) -> bool:
        """Is a weight of this shape transformed?"""
        ...

    def before(self, G: Float[Tensor, "m n"], state: State) -> Tensor:
        """What the inner optimizer sees for a gradient."""
        ...

    def after(self, N: Tensor, G: Float[Tensor, "m n"], state: State) -> Float[Tensor, "m n"]:
        """The change of the weight out of the inner optimizer's change of what it saw."""
        ...


class Shell(torch.optim.Optimizer):
    """Weights one at a time through an optimizer of `inner`; the matrices among them that `transform` fits go through that.

    A group that says `matrices: False` (embeddings, heads) is never transformed. Weight decay of what is transformed is decoupled:
    W ← (1 − ηλ) W.
    With `layerwise` a weight moves as soon as its gradient is there, in the backward pass, and the gradient goes: at most one is there at a
    time, so that none can be added up, cut or seen by others.

    >>> W = torch.nn.Parameter(torch.ones(2, 2))
    >>> shell = Shell([W], lambda held: torch.optim.SGD(held, lr=0.1), layerwise=True)
    >>> (2 * W).sum().backward()
    >>> W.grad is None, W.data
    (True, tensor([[0.8000, 0.8000],
            [0.8000, 0.8000]]))
    """

    def __init__(self, groups: Iterable[Any], inner: Inner, transform: Transform | None = None, layerwise: bool = False) -> None:
        self.proxy = nn.Parameter(torch.zeros(0))
        self.inner, self.transform, self.layerwise = inner([self.proxy]), transform, layerwise
        super().__init__(groups, dict(self.inner.defaults) | {"matrices": True})
        if layerwise:
            for group in self.param_groups:
                for p in group["params"]:
                    p.register_post_accumulate_grad_hook(functools.partial(self._at_once, group))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)
        return loss

    def update(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        """Move one weight by the gradient that it has."""
        state = self.state[p]
        self._move(p, group, state)
        self.keep(p, state)

    def keep(self, p: nn.Parameter, state: State) -> None:
        """What is done with a weight's state once it is what it will be until the weight moves again."""

    def _move(self, p: nn.Parameter, group: dict[str, Any], state: State) -> None:
        t, G = self.transform, p.grad
        assert G is not None
        if t is None or not group["matrices"] or p.ndim != 2 or not t.fits(*p.shape):
            self._inner(p, group, state)
            return
        own = {k.removeprefix(OWN): v for k, v in state.items() if k.startswith(OWN)}
        R = t.before(G, own)
        self.proxy.data, self.proxy.grad = torch.zeros_like(R), R
        self._inner(self.proxy, group | {"weight_decay": 0.0}, state)
        change = t.after(self.proxy.data, G, own)
        self.proxy.data, self.proxy.grad = torch.zeros(0), None
        state.update({OWN + k: v for k, v in own.items()})
        p.mul_(1 - group["lr"] * group.get("weight_decay", 0.0)).add_(change.to(p.dtype))

    def _inner(self, p: nn.Parameter, group: dict[str, Any], state: State) -> None:
        """One step of the inner optimizer on `p` alone, with the settings of its group."""
        settings = {k: v for k, v in group.items() if k in self.inner.defaults}
        self.inner.param_groups[:] = [self.inner.param_groups[0] | settings | {"params": [p]}]
        kept = {k: v for k, v in state.items() if not k.startswith(OWN)}
        self.inner.state = defaultdict(dict, {p: kept} if kept else {})
        self.inner.step()
        state.update(self.inner.state.pop(p, {}))

    @torch.no_grad()
    def _at_once(self, group: dict[str, Any], p: nn.Parameter) -> None:
        self.update(p, group)
        p.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but that numbers keep the dtype that they were saved in."""
        super().load_state_dict({**state_dict, "state": {}})
        places = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(places, params, strict=True):
            held = state_dict["state"].get(i, {})
            self.state[p] = {k: v.to(p.device, copy=True) if torch.is_tensor(v) and v.ndim else v for k, v in held.items()}
            self.keep(p, self.state[p])


OWN = "transform."  # before the names of a transform's state, beside the inner optimizer's


def refuse_layerwise(passes: int, norm: float, processes: int, rules: bool) -> None:
    """Raise where something needs gradients that a layerwise update leaves nobody.

    >>> refuse_layerwise(1, 0.0, 1, rules=False)
    >>> refuse_layerwise(4, 0.0, 1, rules=False)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: layerwise updates keep no gradient, so that those of 4 passes cannot be added up: set gradient_...
    """
    why = [
        (passes > 1, f"those of {passes} passes cannot be added up: set gradient_accumulation_steps to 1"),
        (norm > 0, f"their norm is never known and cannot be cut to {norm:g}: set max_grad_norm to 0"),
        (processes > 1, f"those of {processes} processes cannot be averaged: train in one"),
        (rules, "the rules of this recipe would see none: leave them out"),
    ]
    for wrong, words in why:
        if wrong:
            raise Invalid(f"layerwise updates keep no gradient, so that {words}, or leave layerwise out")
