"""Laws of optimizers: the price is what is held after a step, two steps are those of the reference, and transforms of gradients go on from a
checkpoint, work layer by layer, and are the inner optimizer where they have no weight to work on."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from finebits import registry
from finebits.optim._projected import Transformed
from finebits.optim.base import known, named

TRANSFORMS = [name for name in registry.names("optim") if issubclass(registry.load("optim", name), Transformed)]
plain = pytest.mark.parametrize("name", [name for name in registry.names("optim") if name not in TRANSFORMS])
transforms = pytest.mark.parametrize("name", TRANSFORMS)
RATE, DECAY = 0.01, 0.1


def transform(name: str, **settings: Any) -> Any:
    """One whose basis is found at steps 0, 3 and 6."""
    return registry.load("optim", name)(**{"rank": 8, "gap": 3, "inner": "adamw"} | settings)


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=gen, dtype=dtype)) for shape in ((64, 96), (80, 64))]


def parameters_of(name: str) -> list[torch.nn.Parameter]:
    """Those that it steps."""
    return [torch.nn.Parameter(p.detach().round().clamp(-1, 1)) for p in parameters()] if name == "t_sign_sgd" else parameters()


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


@plain
def test_state_after_a_step_is_what_was_priced(name: str) -> None:
    held = parameters_of(name)
    optimizer = made(name, held)
    step(held, optimizer, 1)
    parts = {t.data_ptr(): t.nbytes for s in optimizer.state.values() for v in s.values() for t in inside(v) if t.numel() > 1}
    found = sum(n for n in parts.values())
    tables = 2 * 4 * 2 ** BITS.get(name, 0) if name in NEEDED else 0  # which bitsandbytes' tensors share, and torchao's do not
    wanted = named(name).state(sum(p.numel() for p in held))
    if name == "sm3":  # whose price of numbers is that of vectors, the most that it is
        assert found < wanted
    else:
        assert found - tables * (1 if name == "adamw_8bit" else len(held)) == wanted
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
    rows, columns = p.new_zeros(len(p), 1), p.new_zeros(1, p.shape[1])
    for t, g in enumerate(grads, 1):
        if name == "sgd":
            p = p - RATE * (g + DECAY * p)
            continue
        if name == "t_sign_sgd":  # no two gradients are alike: as many as the rate says
            p = (p - g.sign() * (g.abs() >= g.abs().flatten().topk(int(RATE * g.numel())).values[-1])).clamp(-1, 1)
            continue
        if name == "sm3":
            v = torch.minimum(rows, columns) + g**2
            rows, columns = v.amax(1, keepdim=True), v.amax(0, keepdim=True)
            p = p - RATE * DECAY * p - RATE * g / v.sqrt()
            continue
        if name == "lion":
            p = p - RATE * ((0.9 * m + 0.1 * g).sign() + DECAY * p)
            m = 0.99 * m + 0.01 * g
            continue
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - RATE * DECAY * p - RATE * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return p


@transforms
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_state_of_a_transform_is_what_was_priced_by_shape(name: str, rank: int) -> None:
    held, kind = [*parameters(), torch.nn.Parameter(torch.ones(70))], transform(name, rank=rank)
    optimizer = kind.make(held, lr=RATE)
    for seed in range(4):
        step(held, optimizer, seed)
    for p in held:
        found = sum(t.nbytes for t in optimizer.state[p].values() if torch.is_tensor(t) and t.ndim)
        assert found == (kind.matrix(*p.shape) if p.ndim == 2 else kind.state(p.numel()))


@transforms
def test_a_transform_goes_on_from_a_checkpoint_bit_for_bit(name: str) -> None:
    """Stopped between two searches for a basis; what is loaded is tensors and plain numbers."""
    whole, again = parameters(torch.bfloat16), parameters(torch.bfloat16)
    optimizer, first = (transform(name).make(held, lr=RATE) for held in (whole, again))
    for seed in range(8):
        step(whole, optimizer, seed)
    for seed in range(4):
        step(again, first, seed)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = transform(name).make(again, lr=RATE)
    second.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(4, 8):
        step(again, second, seed)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert [s.get("transform.svds") for s in second.state.values()] == [s.get("transform.svds") for s in optimizer.state.values()]


@transforms
def test_layer_by_layer_a_transform_does_the_same(name: str) -> None:
    held, at_once = parameters(), parameters()
    one, other = transform(name).make(held, lr=RATE), transform(name, layerwise=True).make(at_once, lr=RATE)
    for seed in range(4):
        x = torch.randn(5, 96, generator=torch.Generator().manual_seed(seed))
        for W, V in (held, at_once):
            (x @ W.T @ V.T).square().sum().backward()
        one.step()
        one.zero_grad()
        other.step()
    assert all(p.grad is None for p in at_once)
    assert all(torch.equal(a, b) for a, b in zip(held, at_once, strict=True))


@transforms
def test_what_is_no_matrix_of_the_model_goes_to_the_inner_optimizer(name: str) -> None:
    held, wanted = parameters(), parameters()
    ours = transform(name).make([{"params": held, "weight_decay": DECAY, "matrices": False}], lr=RATE)
    inner = named("adamw").make([{"params": wanted, "weight_decay": DECAY}], lr=RATE)
    for seed in range(3):
        step(held, ours, seed)
        step(wanted, inner, seed)
    assert all(torch.equal(a, b) for a, b in zip(held, wanted, strict=True))


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "natural_galore"])
def test_at_full_rank_a_transform_is_the_inner_optimizer(name: str) -> None:
    held, wanted = parameters(), parameters()
    ours = transform(name, rank=64, scale=1.0).make([{"params": held, "weight_decay": DECAY}], lr=RATE)
    inner = named("adamw").make([{"params": wanted, "weight_decay": DECAY}], lr=RATE)
    for seed in range(5):
        step(held, ours, seed)
        step(wanted, inner, seed)
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(held, wanted, strict=True))


@transforms
def test_settings_that_no_basis_can_have_are_refused(name: str) -> None:
    for settings, words in (
        ({"rank": 0}, "a rank of 1 or more; got 0"),
        ({"gap": 0}, "a gap of 1"),
        ({"inner": name}, "works through a plain"),
    ):
        with pytest.raises(ValueError, match=words):
            transform(name, **settings)


@plain
def test_two_steps_are_the_reference(name: str) -> None:
    held = parameters_of(name)
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

    assert {name for kind in known().values() for name in (kind.hf, *kind.same) if name} <= {o.value for o in OptimizerNames}
    assert all(named(kind.hf) is kind for kind in known().values() if kind.hf)
    assert all(kind.smaller is None or named(kind.smaller).state(1 << 20) < kind.state(1 << 20) for kind in known().values())
    with pytest.raises(ValueError, match="no optimizer 'adamw8bit'. Did you mean 'adamw_8bit'"):
        named("adamw8bit")
