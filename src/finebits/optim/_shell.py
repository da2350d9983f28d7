"""What steps weights one at a time: an inner optimizer on each of them, or on what a transform of its gradient makes of it.

State is flat and plain, so that checkpoints hold tensors and numbers alone: of a weight, what the inner optimizer keeps and, beside it, what the
transform does. It is loaded back as it was written, whatever the weight's dtype.
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.optim._family import evaluated
from finebits.optim.base import Optimizer
from finebits.qtensor import QTensor, dense
from finebits.rewrite import rewrite

State = dict[str, Any]
Inner = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Thin(NamedTuple):
    """The change α L R, which is added to a weight as it is multiplied: nothing of the weight's size is made.

    >>> Thin(torch.ones(2, 1), torch.tensor([[1.0, 2.0]]), 4.0).onto(torch.ones(2, 2), 0.5, 0.5)  # W/2 + ½ · 4 L R
    tensor([[2.5000, 4.5000],
            [2.5000, 4.5000]])
    """

    L: Float[Tensor, "m r"]
    R: Float[Tensor, "r n"]
    scale: float = 1.0

    def onto(self, W: Float[Tensor, "m n"], decay: float, rate: float) -> Float[Tensor, "m n"]:
        """decay · W + rate · α L R, in W."""
        return W.addmm_(self.L.to(W.dtype), self.R.to(W.dtype), beta=decay, alpha=rate * self.scale)


@runtime_checkable
class Transform(Protocol):
    """What stands between the gradient G of a weight (m, n) and an inner optimizer. `state` is its own, of one weight: tensors and numbers."""

    def fits(self, m: int, n: int) -> bool:
        """Is a weight of this shape transformed?"""
        ...

    def before(self, G: Float[Tensor, "m n"], state: State) -> Tensor:
        """What the inner optimizer sees for a gradient."""
        ...

    def after(self, N: Tensor, G: Float[Tensor, "m n"], state: State) -> Float[Tensor, "m n"] | Thin:
        """The change of the weight at rate 1 out of the inner optimizer's change N, at rate 1 too, of what it saw; N may be overwritten."""
        ...


class Shell(torch.optim.Optimizer):
    """Weights one at a time through an optimizer of `inner`; the matrices among them that `transform` fits go through that.

    A group that says `matrices: False` (embeddings, heads) is never transformed. Weight decay of what is transformed is decoupled:
    W ← (1 − ηλ) W.
    Weights in codes, and with a `seed` those of 16 bits, are float32 while they move; with a seed, what they hold is rounded by chance, so that
    its mean is what it was to be (`finebits.rewrite`). With `layerwise` a weight moves as soon as its gradient is there, in the backward
    pass, and the gradient goes: at most one is there at a time, so that none can be added up, cut or seen by others.

    >>> W = torch.nn.Parameter(torch.ones(2, 2))
    >>> shell = Shell([W], lambda held: torch.optim.SGD(held, lr=0.1), layerwise=True)
    >>> (2 * W).sum().backward()
    >>> W.grad is None, W.data
    (True, tensor([[0.8000, 0.8000],
            [0.8000, 0.8000]]))
    """

    def __init__(
        self, groups: Iterable[Any], inner: Inner, transform: Transform | None = None, layerwise: bool = False, seed: int | None = None
    ) -> None:
        self.proxy = nn.Parameter(torch.zeros(0))
        self.inner, self.transform, self.layerwise, self.seed = inner([self.proxy]), transform, layerwise, seed
        super().__init__(groups, dict(self.inner.defaults) | {"matrices": True})
        self.places = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        self.hooks: list[Any] = []
        self.attach()

    def attach(self) -> None:
        """Wait for gradients where updates are layerwise; again, where weights in codes were moved (`Module.to`), which leaves hooks behind."""
        self.detach()
        pairs = [(p, group) for group in self.param_groups for p in group["params"]] if self.layerwise else []
        for p, _ in pairs:
            if p._post_accumulate_grad_hooks is not None:  # torch takes them for registered: what they are called by was left behind
                p._post_accumulate_grad_hooks = p._post_accumulate_grad_hooks
        self.hooks = [p.register_post_accumulate_grad_hook(functools.partial(self._at_once, group)) for p, group in pairs]

    def detach(self) -> None:
        """Wait no more: weights would keep the optimizer, and its state, as long as they live."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = evaluated(closure)
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
            if self._exact(p):
                self._inner(p, group, state)
                return
            self.proxy.data, self.proxy.grad = dense(p.detach(), torch.float32), G.float()
            self._inner(self.proxy, group, state)
            self._write(p, self.proxy.data, state)
            self.proxy.data, self.proxy.grad = torch.zeros(0), None
            return
        own = {k.removeprefix(OWN): v for k, v in state.items() if k.startswith(OWN)}
        R = t.before(G, own)
        self.proxy.data, self.proxy.grad = torch.zeros_like(R), R
        # One pass over R, where the inner optimizer has such a kernel, takes a CPU a fifth of what its steps one by one take.
        at_rate_1 = {"weight_decay": 0.0, "lr": 1.0} | ({"fused": True} if R.device.type == "cpu" else {})
        self._inner(self.proxy, group | at_rate_1, state)
        change = t.after(self.proxy.data, G, own)
        self.proxy.data, self.proxy.grad = torch.zeros(0), None
        state.update({OWN + k: v for k, v in own.items()})
        rate = group["lr"]
        decay = 1 - rate * group.get("weight_decay", 0.0)
        if not self._exact(p):
            self._write(p, _added(dense(p.detach(), torch.float32), change, decay, rate), state)
        elif p.dtype in HALVES:
            p.copy_(_added(p.detach().float(), change, decay, rate))
        else:
            _added(p, change, decay, rate)

    def _exact(self, p: nn.Parameter) -> bool:
        """Does a weight hold what it is made to hold?"""
        return not isinstance(p, QTensor) and (self.seed is None or p.dtype not in HALVES)

    def _write(self, p: nn.Parameter, W: Tensor, state: State) -> None:
        """Make a weight hold W, rounded by chance where there is a seed: another draw at every step, the same in every run."""
        gen = None
        if self.seed is not None:
            state[WRITES] = state.get(WRITES, 0) + 1
            digest = hashlib.sha256(f"{self.seed}/{self.places[id(p)]}/{state[WRITES]}".encode()).digest()
            gen = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        if isinstance(p, QTensor):
            rewrite(p, W, gen)
        else:
            p.copy_(W if gen is None else by_chance(W, p.dtype, gen))

    def _inner(self, p: nn.Parameter, group: dict[str, Any], state: State) -> None:
        """One step of the inner optimizer on `p` alone, with the settings of its group."""
        settings = {k: v for k, v in group.items() if k in self.inner.defaults}
        self.inner.param_groups[:] = [self.inner.param_groups[0] | settings | {"params": [p]}]
        kept = {k: v for k, v in state.items() if not k.startswith(OWN) and k != WRITES}
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


def _added(W: Tensor, change: Tensor | Thin, decay: float, rate: float) -> Tensor:
    """decay · W + rate · change, in W."""
    if isinstance(change, Thin):
        return change.onto(W, decay, rate)
    return (W.mul_(decay) if decay != 1 else W).add_(change.to(W.dtype), alpha=rate)


def made(
    kind: Optimizer, groups: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, seed: int = 0
) -> torch.optim.Optimizer:
    """An optimizer of this kind over groups of parameters, which steps them one at a time where some are in codes or have 16 bits.

    >>> from finebits.optim.base import named
    >>> half = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    >>> [type(made(named("adamw"), [p], lr=0.1)).__name__ for p in (half, torch.nn.Parameter(torch.ones(2)))]
    ['Shell', 'AdamW']
    """
    groups = list(groups)
    held = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    optimizer = kind.make(groups, lr, betas, eps)
    if not any(isinstance(p, QTensor) or p.dtype in HALVES for p in held):
        return optimizer
    if not isinstance(optimizer, Shell):
        optimizer = Shell(groups, lambda held: kind.make(held, lr, betas, eps))
    optimizer.seed = seed
    return optimizer


def by_chance(W: Tensor, dtype: torch.dtype, gen: torch.Generator) -> Tensor:
    """W in 16 bits, each number at one of the two values around it, so that its mean is W.

    >>> gen = torch.Generator().manual_seed(0)
    >>> round(by_chance(torch.full((100_000,), 1 + 2**-10), torch.bfloat16, gen).double().mean().item(), 4)
    1.001
    """
    W = W.float()
    if dtype == torch.bfloat16 and W.numel() and float(torch.stack(W.aminmax()).abs().max()) < 3e38:  # of NaN and Inf neither
        chance = torch.randint(2**16, W.shape, generator=gen, dtype=torch.int32).to(
            W.device
        )  # the half of the bits that is cut off, and a carry
        return chance.add_(W.contiguous().view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).to(dtype)
    near = W.to(dtype)
    other = torch.nextafter(near, torch.where(W > near.float(), torch.inf, -torch.inf).to(dtype))
    gap = (other.float() - near.float()).abs()
    share = torch.where(gap.isfinite() & (gap > 0), (W - near.float()).abs() / gap, 0.0)
    return torch.where(torch.rand(W.shape, generator=gen).to(W.device) < share, other, near)


WRITES = "writes"  # of a weight that is rounded by chance: how often that was
HALVES = torch.bfloat16, torch.float16
OWN = "transform."  # before the names of a transform's state, beside the inner optimizer's


def refuse_layerwise(passes: int, norm: float, processes: int, rules: bool) -> None:
    """Raise where something needs gradients that a layerwise update leaves nobody.

    >>> refuse_layerwise(1, 0.0, 1, rules=False)
    >>> refuse_layerwise(1, 0.0, 1, rules=True)
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: layerwise updates keep no gradient, so that the rules of this recipe would see none: leave them out, or leave
    layerwise out
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
