"""Next-token cross-entropy without the full logits tensor.

For a label y among V words with p = softmax(z) it is −log p_y; smoothed by ε, as Szegedy et al. (arXiv:1512.00567v3, section 7) have it and
transformers' LabelSmoother computes it,

    (1 − ε) (−log p_y) + ε/V Σ_v (−log p_v),    by z:    p − (1 − ε) e_y − ε/V

Positions without a label are dropped first, then the head is applied chunk by chunk and the gradient of the hidden states is computed in
the same pass (the head is frozen), so that never more than chunk × vocabulary logits exist.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finebits.arithmetic import multiplied
from finebits.errors import Invalid
from finebits.qtensor import QTensor, times

IGNORED = -100
SLICE = 8192  # words of a 16-bit head that are float32 at a time
PIECE = 1024  # words of a quantized head that are multiplied at a time


def shaped(z: Tensor, scale: float, cap: float | None) -> Tensor:
    """a z, or c tanh(a z / c); in place where no gradient is wanted.

    >>> shaped(torch.tensor([0.0, 1.0, 100.0]), 2.0, 30.0)  # a z = 0, 2, 200: small ones nearly stay, large ones end at c
    tensor([ 0.0000, 1.9970, 29.9999])
    """
    if z.requires_grad:
        z = z if scale == 1 else z * scale
        return z if cap is None else torch.tanh(z / cap) * cap
    z = z if scale == 1 else z.mul_(scale)
    return z if cap is None else z.div_(cap).tanh_().mul_(cap)


def _logits(h: Float[Tensor, "p h"], weight: Float[Tensor, "v h"]) -> Float[Tensor, "p v"]:
    """h Wᵀ in float32; a quantized head is multiplied piece by piece, and one of 16 bits is made float32 in slices where nothing multiplies 16
    bits fast."""
    if not isinstance(weight, QTensor) and multiplied(weight) is weight.dtype:
        return (h @ weight.mT).float()
    h = h.to(multiplied(h))
    z = h.new_empty(len(h), len(weight), dtype=torch.float32)
    step = PIECE if isinstance(weight, QTensor) else SLICE
    for a in range(0, len(weight), step):
        z[:, a : a + step] = times(h, weight[a : a + step])
    return z


def _pulled(p: Float[Tensor, "p v"], weight: Float[Tensor, "v h"], out: Float[Tensor, "p h"]) -> None:
    """p W into `out`, in its dtype."""
    if not isinstance(weight, QTensor) and multiplied(weight) is weight.dtype:
        torch.mm(p.to(out.dtype), weight, out=out)
        return
    dtype, total = multiplied(out), torch.zeros_like(out, dtype=torch.float32)
    step = PIECE if isinstance(weight, QTensor) else SLICE
    for a in range(0, len(weight), step):
        total += times(p[:, a : a + step].to(dtype), weight[a : a + step], transposed=True)
    out.copy_(total)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: int,
        scale: float,
        cap: float | None,
        smoothing: float,
    ) -> Tensor:
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        each = hidden.new_zeros(len(hidden), dtype=torch.float32)
        for i in range(0, hidden.shape[0], chunk):
            h, y = hidden[i : i + chunk], labels[i : i + chunk, None]
            z = _logits(h, weight)
            z = z if bias is None else z.add_(bias)
            slope = scale
            if cap is not None:
                tanh = z.mul_(scale / cap).tanh_()
                z = tanh * cap
                slope = tanh.square_().neg_().add_(1).mul_(scale)  # of c tanh(a z / c) by z
                del tanh
            elif scale != 1:
                z.mul_(scale)
            z -= z.amax(-1, keepdim=True)
            picked = z.gather(1, y)
            aim = picked if smoothing == 0 else torch.lerp(picked, z.mean(-1, keepdim=True), smoothing)
            norm = z.exp_().sum(-1, keepdim=True)
            each[i : i + chunk] = (norm.log() - aim)[:, 0]
            if grad is not None:
                p = z.div_(norm).scatter_add_(1, y, torch.full_like(picked, smoothing - 1.0))
                p = p if smoothing == 0 else p.sub_(smoothing / p.shape[1])
                p = p if isinstance(slope, float) and slope == 1 else p.mul_(slope)
                del slope
                _pulled(p, weight, grad[i : i + chunk])
                del p
            del z  # before the next chunk's logits exist
        ctx.save_for_backward(grad)
        return each

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype)[:, None], *(None for _ in range(7))


def chunked_cross_entropy(
    hidden: Float[Tensor, "b t h"],
    weight: Float[Tensor, "v h"],
    labels: Int[Tensor, "b t"],
    chunk: int = 256,
    *,
    bias: Float[Tensor, " v"] | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> Float[Tensor, ""]:
    """Sum over labelled positions of −log p(label), position i predicting label i + 1, in float32.

    `weight` and `bias` are the output head, dense or quantized, and must be frozen: they get no gradient (ValueError if they ask for one).
    Logits are multiplied by `scale`, and then perhaps capped: c tanh(z / c). Zero (differentiable) if nothing is labelled.

    >>> hidden, head = torch.zeros(1, 3, 2), torch.ones(4, 2)
    >>> chunked_cross_entropy(hidden, head, torch.tensor([[0, 1, -100]]))  # one label among four equal words: log 4
    tensor(1.3863)
    """
    y = labels[:, 1:]
    keep = y != IGNORED
    return cross_entropy(hidden[:, :-1][keep], weight, y[keep], chunk, bias=bias, scale=scale, cap=cap)


def cross_entropy(
    states: Float[Tensor, "p h"],
    weight: Float[Tensor, "v h"],
    labels: Int[Tensor, " p"],
    chunk: int = 256,
    *,
    bias: Float[Tensor, " v"] | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Sum of −log p(label) over places, in float32, under the head of `chunked_cross_entropy`; `smoothing` is ε above.

    >>> cross_entropy(torch.zeros(3, 2), torch.ones(4, 2), torch.tensor([0, 1, 2]))  # 3 log 4
    tensor(4.1589)
    """
    return each_cross_entropy(states, weight, labels, chunk, bias=bias, scale=scale, cap=cap, smoothing=smoothing).sum()


def each_cross_entropy(
    states: Float[Tensor, "p h"],
    weight: Float[Tensor, "v h"],
    labels: Int[Tensor, " p"],
    chunk: int = 256,
    *,
    bias: Float[Tensor, " v"] | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    smoothing: float = 0.0,
) -> Float[Tensor, " p"]:
    """The same of every place, for what is no sum: its gradient may be another at each.

    >>> each_cross_entropy(torch.zeros(2, 2), torch.ones(4, 2), torch.tensor([0, 1]))  # log 4
    tensor([1.3863, 1.3863])
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias)):
        raise Invalid("the chunked loss needs a frozen output head, and this one is trained: freeze it, or use the full logits")
    return _Chunked.apply(states, weight, bias, labels, chunk, scale, cap, smoothing)
