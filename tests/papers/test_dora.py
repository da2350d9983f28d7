"""DoRA (arXiv:2402.09353): lengths of rows apart from their directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import finebits as fb
from finebits.adapters.base import Base
from papers.stock_peft import trained, under

DORA = fb.DoRA(rank=4, alpha=6.0)


def theirs(W: Tensor, b: Tensor | None, dropout: float = 0.0):
    from peft import LoraConfig

    layer = under(LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"], lora_dropout=dropout), W, b)
    held = trained(layer)
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "mag": "lora_magnitude_vector.default.weight"}
    return layer, {k: held[name] for k, name in names.items()}


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_peft(bias: bool) -> None:
    W, b, x = torch.randn(12, 20), torch.randn(12) if bias else None, torch.randn(5, 20)
    layer, held = theirs(W, b)
    base = Base(W, b)
    p = {k: t.detach().clone().requires_grad_() for k, t in held.items()} | DORA.buffers(base, torch.Generator())
    ours, wanted = DORA.forward(p, x, base), layer(x)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    wanted.square().sum().backward()
    for k, t in held.items():
        torch.testing.assert_close(p[k].grad, t.grad, rtol=1e-4, atol=1e-4)


def test_the_dropped_inputs_are_those_that_peft_drops() -> None:
    W, b, x = torch.randn(12, 20), torch.randn(12), torch.randn(5, 20)
    layer, held = theirs(W, b, dropout=0.5)
    p = {k: t.detach() for k, t in held.items()} | DORA.buffers(Base(W), torch.Generator())
    torch.manual_seed(3)
    wanted = layer.train()(x)
    torch.manual_seed(3)
    ours = DORA.forward(p, x, Base(W, b, lambda x: torch.nn.functional.dropout(x, 0.5)))
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_rows_have_the_trained_lengths() -> None:
    W, p = torch.randn(12, 20), {"A": torch.randn(4, 20), "B": torch.randn(12, 4), "mag": torch.rand(12) + 0.5}
    torch.testing.assert_close(DORA.merged(p, W).norm(dim=1), p["mag"])


def test_the_norm_is_a_constant_in_the_gradient() -> None:
    """∂/∂B of Σ W′ ∘ C in float64: with ‖V‖ held it is what autograd gives here, and with ‖V‖ moving it is another."""
    W, A, B, C = (torch.randn(s, dtype=torch.float64) for s in ((12, 20), (4, 20), (12, 4), (12, 20)))
    mag, norm = torch.rand(12).double() + 0.5, (W + 1.5 * B @ A).norm(dim=1)
    p = {"A": A, "B": B.clone().requires_grad_(), "mag": mag}
    (DORA.merged(p, W) * C).sum().backward()
    held = (1.5 * (mag / norm)[:, None] * C) @ A.mT
    moving = torch.autograd.functional.jacobian(lambda B: ((mag / (W + 1.5 * B @ A).norm(dim=1))[:, None] * (W + 1.5 * B @ A) * C).sum(), B)
    torch.testing.assert_close(p["B"].grad, held)
    assert (held - moving).norm() > 0.01 * held.norm()  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_are_as_long_as_the_dense_ones_and_birth_changes_no_bit(dtype: torch.dtype) -> None:
    W, x = fb.quantize(torch.randn(12, 64), fb.NF(3, block=32)), torch.randn(5, 64, dtype=dtype)
    p = DORA.params(Base(W), torch.Generator().manual_seed(0), {}) | DORA.buffers(Base(W), torch.Generator())
    torch.testing.assert_close(p["mag"], W.dequantize().norm(dim=1))
    low = {k: t if k in DORA.kept else t.to(dtype) for k, t in p.items()}
    assert torch.equal(DORA.forward(low, x, Base(W)), Base(W)(x.float()).to(dtype))


def test_a_start_is_where_it_was_put() -> None:
    """mag is the length of W + s·B A, so that LoftQ's start is what LoftQ made it."""
    W, start = torch.randn(12, 20), {"A": torch.randn(4, 20), "B": torch.randn(12, 4)}
    p = DORA.params(Base(W), torch.Generator(), start)
    torch.testing.assert_close(DORA.merged(p, W), W + 1.5 * start["B"] @ start["A"], rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_finite_and_can_learn() -> None:
    W = torch.randn(12, 20)
    W[3] = 0
    base = Base(W)
    p = {k: t.requires_grad_() for k, t in DORA.params(base, torch.Generator().manual_seed(0), {}).items()}
    DORA.forward(p | DORA.buffers(base, torch.Generator()), torch.randn(5, 20), base).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in p.values()) and p["B"].grad[3].any()  # type: ignore[union-attr,index]


def test_parameter_count_of_a_llama_from_shapes_alone() -> None:
    """Llama-3.2-3B, q and v, rank 32."""
    assert 28 * (fb.DoRA(rank=32).size(3072, 3072) + fb.DoRA(rank=32).size(1024, 3072)) == 9_289_728
