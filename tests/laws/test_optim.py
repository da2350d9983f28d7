"""Laws of optimizers: the price is what is held after a step, and two steps are those of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finebits import registry
from finebits.optim.base import known, named

every = pytest.mark.parametrize("name", registry.names("optim"))
RATE, DECAY = 0.01, 0.1


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=gen, dtype=dtype)) for shape in ((64, 96), (80, 64))]


NEEDED = {"adamw_8bit": "bitsandbytes", "adamw_torch_8bit": "torchao", "adamw_torch_4bit": "torchao"}
BITS = {"adamw_8bit": 8, "adamw_torch_8bit": 8, "adamw_torch_4bit": 4}  # of numbers of state


def made(name: str, held: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    return named(name).make([{"params": held, "weight_decay": DECAY}], lr=RATE)


def step(held: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    for p in held:
        p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float32).to(p.dtype)
    optimizer.step()


@every
def test_state_after_a_step_is_what_was_priced(name: str) -> None:
    held = parameters()
    optimizer = made(name, held)
    step(held, optimizer, 1)
    parts = {t.data_ptr(): t.nbytes for s in optimizer.state.values() for v in s.values() for t in inside(v) if t.numel() > 1}
    found = sum(n for n in parts.values())
    tables = 2 * 4 * 2 ** BITS.get(name, 0) if name in NEEDED else 0  # which bitsandbytes' tensors share, and torchao's do not
    assert found - tables * (1 if name == "adamw_8bit" else len(held)) == named(name).state(sum(p.numel() for p in held))
    if name != "adamw_8bit":
        assert found == sum(named(name).matrix(*p.shape) for p in held)


def inside(held: Any) -> list[torch.Tensor]:
    """The plain tensors of what a state holds."""
    if not torch.is_tensor(held):
        return []
    if hasattr(held, "tensor_attrs"):
        return [t for k in held.tensor_attrs for t in inside(getattr(held, k))]
    return [held]


def reference(name: str, p: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    """The formula of the file's head, in float64."""
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        if name == "sgd":
            p = p - RATE * (g + DECAY * p)
            continue
        if name == "lion":
            p = p - RATE * ((0.9 * m + 0.1 * g).sign() + DECAY * p)
            m = 0.99 * m + 0.01 * g
            continue
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - RATE * DECAY * p - RATE * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return p


@every
def test_two_steps_are_the_reference(name: str) -> None:
    held = parameters()
    begun, grads = [p.detach().double() for p in held], [[], []]
    optimizer = made(name, held)
    for seed in (1, 2):
        step(held, optimizer, seed)
        for g, p in zip(grads, held, strict=True):
            g.append(p.grad.double())  # type: ignore[union-attr]
    for p, first, g in zip(held, begun, grads, strict=True):
        wanted = reference(name, first, g)
        # A first moment of 8 bits: the step errs by a few parts in a hundred of its length, here and there by more.
        error = (p.detach().double() - wanted).norm() / (wanted - first).norm()
        assert error < {8: 0.05, 4: 0.4}.get(BITS.get(name, 32), 1e-5), error


def test_names_are_ours_and_transformers() -> None:
    from transformers.training_args import OptimizerNames

    assert {name for kind in known().values() for name in (kind.hf, *kind.same)} <= {o.value for o in OptimizerNames}
    assert all(named(kind.hf) is kind for kind in known().values())
    assert all(kind.smaller is None or named(kind.smaller).state(1 << 20) < kind.state(1 << 20) for kind in known().values())
    with pytest.raises(ValueError, match="no optimizer 'adamw8bit'. Did you mean 'adamw_8bit'"):
        named("adamw8bit")
