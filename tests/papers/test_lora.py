"""LoRA (arXiv:2106.09685) and rsLoRA's scale (arXiv:2312.03732)."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.adapters.base import Base


def born(lora: fb.LoRA, m: int = 24, n: int = 40, seed: int = 0) -> tuple[Base, dict[str, torch.Tensor]]:
    base = Base(torch.randn(m, n), torch.randn(m))
    return base, lora.params(base, torch.Generator().manual_seed(seed), {})


@pytest.mark.parametrize(("scaling", "s"), [("lora", 2.0), ("rslora", 8.0)])
def test_scale(scaling: str, s: float) -> None:
    assert fb.LoRA(rank=16, alpha=32.0, scaling=scaling).s == s


def test_birth_is_uniform_a_and_zero_b() -> None:
    _, p = born(fb.LoRA(rank=64), n=400)
    assert not p["B"].any() and p["A"].abs().max() <= 400**-0.5
    assert float(p["A"].std()) == pytest.approx((1 / (3 * 400)) ** 0.5, rel=0.02)


def test_output_is_the_bases_bit_for_bit_and_first_gradient_is_bs_alone() -> None:
    lora = fb.LoRA(rank=4, alpha=8.0)
    base, p = born(lora)
    x = torch.randn(10, 40)
    leaves = {k: v.requires_grad_() for k, v in p.items()}
    y = lora.forward(leaves, x, base)
    assert torch.equal(y, base(x))
    y.square().sum().backward()
    assert not leaves["A"].grad.any() and leaves["B"].grad.any()
    with torch.no_grad():
        leaves["B"] -= 1e-3 * leaves["B"].grad
    lora.forward(leaves, x, base).square().sum().backward()
    assert leaves["A"].grad.any()


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_first_step_moves_the_output_by_s_squared_times_ax_squared(scaling: str) -> None:
    """One token x, SGD: ‖ΔW x‖ / (lr ‖δ‖) = s² ‖A x‖²."""
    lora = fb.LoRA(rank=8, alpha=12.0, scaling=scaling)
    base, p = born(lora)
    x, delta, lr = torch.randn(1, 40), torch.randn(1, 24), 1e-2
    B = p["B"].requires_grad_()
    (lora.forward({"A": p["A"], "B": B}, x, base) * delta).sum().backward()
    moved = lora.forward({"A": p["A"], "B": (B - lr * B.grad).detach()}, x, base) - base(x)
    expected = lora.s**2 * (x @ p["A"].mT).square().sum()
    torch.testing.assert_close(moved.norm() / (lr * delta.norm()), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("scaling", "ratio"), [("lora", 16.0), ("rslora", 1.0)])
def test_rank_shrinks_the_first_step_unless_the_scale_is_stabilised(scaling: str, ratio: float) -> None:
    steps = {}
    for rank in (4, 64):
        lora = fb.LoRA(rank=rank, alpha=8.0, scaling=scaling)
        x = torch.randn(1, 256)
        draws = [born(lora, n=256, seed=seed)[1]["A"] for seed in range(40)]
        steps[rank] = sum(float(lora.s**2 * (x @ A.mT).square().sum() / x.square().sum()) for A in draws)
    assert steps[4] / steps[64] == pytest.approx(ratio, rel=0.35)


def test_export_as_a_product_and_back_is_the_same_adapter() -> None:
    lora = fb.LoRA(rank=4, alpha=10.0, scaling="rslora")
    base, p = born(lora)
    p["B"] = torch.randn(24, 4)
    L, R = lora.lowrank(p)
    again = fb.LoRA(rank=4, alpha=4.0)
    x = torch.randn(3, 40)
    torch.testing.assert_close(again.forward({"B": L, "A": R}, x, base), lora.forward(p, x, base))


def test_parameter_count_of_a_llama_from_shapes_alone() -> None:
    """Llama-3.2-3B, q and v, rank 32: 28 layers of 3072x3072 and 1024x3072."""
    lora = fb.LoRA(rank=32)
    assert 28 * (lora.size(3072, 3072) + lora.size(1024, 3072)) == 9_175_040


def test_an_unknown_scaling_is_refused(unchecked: None) -> None:
    with pytest.raises(ValueError, match="rslora"):
        fb.LoRA(scaling="sqrt")  # type: ignore[arg-type]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_one_step_of_autograd_is_the_formula(quantized: bool, dropped: bool) -> None:
    """Values and gradients of the product in one step, against dense algebra in float64."""
    lora, W, b = fb.LoRA(rank=3, alpha=7.0), torch.randn(10, 64), torch.randn(10)
    held = fb.quantize(W, fb.NF(4, block=64)) if quantized else W
    drop = (lambda x: x * mask) if dropped else (lambda x: x)
    mask = (torch.arange(64) % 3 > 0).float() * 1.5
    x, A, B = (torch.randn(s, requires_grad=True) for s in ((2, 5, 64), (3, 64), (10, 3)))
    y = lora.forward({"A": A, "B": B}, x, Base(held, b, drop))
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, A, B), g)
    dense = (held.dequantize() if quantized else W).double()
    z = x.double() * mask if dropped else x.double()
    want = x.double() @ dense.mT + b + lora.s * z @ A.double().mT @ B.double().mT
    assert "LowRankProduct" in type(y.grad_fn).__name__
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, torch.autograd.grad(want, (x, A, B), g.double()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_second_derivatives_through_a_quantized_base_are_the_dense_ones() -> None:
    held = fb.quantize(torch.randn(10, 64), fb.NF(4, block=64))

    def curved(W: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        x, A, B = (torch.randn(s, requires_grad=True) for s in ((5, 64), (3, 64), (10, 3)))
        y = fb.LoRA(rank=3, alpha=3.0).forward({"A": A, "B": B}, x, Base(W))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(curved(held), curved(held.dequantize()), rtol=1e-4, atol=1e-3)
