"""Laws of optimizers: the price is what is held after a step, and two steps are those of the reference."""

from __future__ import annotations

import pytest
import torch

from finebits import registry
from finebits.optim.base import known, named

every = pytest.mark.parametrize("name", registry.names("optim"))
RATE, DECAY = 0.01, 0.1


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=gen, dtype=dtype)) for shape in ((64, 96), (80, 64))]


def made(name: str, held: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
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
    tables = 2 * 256 * 4  # bitsandbytes' two maps, which all tensors share
    parts = {t.data_ptr(): t.nbytes for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.numel() > 1}
    found = sum(n for n in parts.values())
    shared = tables if name == "adamw_8bit" else 0
    assert found - shared == named(name).state(sum(p.numel() for p in held))


def reference(name: str, p: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    """The formula of the file's head, in float64."""
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        if name == "sgd":
            p = p - RATE * (g + DECAY * p)
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
        # The first moment has 8 bits: the step errs by a few parts in a hundred of its length, here and there by more.
        error = (p.detach().double() - wanted).norm() / (wanted - first).norm()
        assert error < (0.05 if name == "adamw_8bit" else 1e-5), error


def test_names_are_ours_and_transformers() -> None:
    from transformers.training_args import OptimizerNames

    assert {name for kind in known().values() for name in (kind.hf, *kind.same)} <= {o.value for o in OptimizerNames}
    assert all(named(kind.hf) is kind for kind in known().values())
    assert all(kind.smaller is None or named(kind.smaller).state(1 << 20) < kind.state(1 << 20) for kind in known().values())
    with pytest.raises(ValueError, match="no optimizer 'adamw8bit'. Did you mean 'adamw_8bit'"):
        named("adamw8bit")
