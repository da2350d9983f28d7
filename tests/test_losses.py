"""The chunked loss is cross-entropy, at a fraction of the memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from finebits.losses import IGNORED, chunked_cross_entropy


def case(
    b: int, t: int, v: int = 50, h: int = 16, keep: float = 0.6, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.where(torch.rand(b, t) < keep, torch.randint(0, v, (b, t)), IGNORED)
    return (scale * torch.randn(b, t, h)).requires_grad_(), torch.randn(v, h), labels


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = (hidden @ weight.mT).float()[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 40), st.sampled_from([0.0, 0.3, 1.0]))
def test_loss_and_gradient_are_cross_entropys(b: int, t: int, chunk: int, keep: float) -> None:
    hidden, weight, labels = case(b, t, keep=keep)
    got = chunked_cross_entropy(hidden, weight, labels, chunk)
    expected = plain(hidden, weight, labels)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    (grad,) = torch.autograd.grad(3 * got, hidden)
    (wanted,) = torch.autograd.grad(3 * expected, hidden)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_labels_whose_probability_underflows(scale: float) -> None:
    hidden, weight, labels = case(2, 9, keep=1.0, scale=scale)
    for grad in (True, False):
        h = hidden.detach().requires_grad_(grad)
        torch.testing.assert_close(chunked_cross_entropy(h, weight, labels, 4), plain(h, weight, labels), rtol=1e-5, atol=1e-3)


def test_nothing_labelled_is_zero_and_can_be_differentiated() -> None:
    hidden, weight, labels = case(2, 5, keep=0.0)
    loss = chunked_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0 and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_without_gradient_it_is_the_same() -> None:
    hidden, weight, labels = case(3, 20)
    with torch.no_grad():
        off = chunked_cross_entropy(hidden, weight, labels, 7)
    torch.testing.assert_close(off, chunked_cross_entropy(hidden, weight, labels, 7))


def test_bfloat16() -> None:
    hidden, weight, labels = case(2, 30)
    low = hidden.detach().bfloat16().requires_grad_()
    loss = chunked_cross_entropy(low, weight.bfloat16(), labels)
    loss.backward()
    assert loss.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, plain(low.detach(), weight.bfloat16(), labels), rtol=1e-3, atol=1e-2)


def test_autograd_keeps_no_logits() -> None:
    hidden, weight, labels = case(4, 64, v=2000, keep=1.0)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        chunked_cross_entropy(hidden, weight, labels, 16)
    assert sum(t.numel() for t in kept) <= 2 * hidden.numel()


def test_a_head_that_would_be_trained_is_refused() -> None:
    hidden, weight, labels = case(1, 5)
    with pytest.raises(ValueError, match="frozen"):
        chunked_cross_entropy(hidden, weight.requires_grad_(), labels)


@pytest.mark.parametrize("rows", [50, 9000])
def test_a_quantized_head_is_its_dequantization(rows: int) -> None:
    import finebits as fb

    hidden, weight, labels = case(2, 9, v=rows, h=32)
    q = fb.quantize(weight, fb.Int(8, block=16))
    got, wanted = (chunked_cross_entropy(hidden, w, labels, 5) for w in (q, q.dequantize()))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
