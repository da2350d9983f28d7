"""GraLoRA (arXiv:2505.20355): low-rank updates of blocks."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.adapters.base import Base
from papers.stock_peft import trained, under


@pytest.mark.parametrize(("k", "hybrid"), [(2, 0), (4, 3)])
def test_values_and_gradients_are_those_of_peft(k: int, hybrid: int) -> None:
    from peft import GraloraConfig

    W, b, x = torch.randn(12, 20), torch.randn(12), torch.randn(2, 5, 20)
    layer = under(GraloraConfig(r=8, alpha=6, gralora_k=k, hybrid_r=hybrid, target_modules=["0"]), W, b)
    held = trained(layer)
    names = {"A": "gralora_A.default", "B": "gralora_B.default"}
    whole = {"A_whole": "gralora_A_general.default.weight", "B_whole": "gralora_B_general.default.weight"} if hybrid else {}
    theirs = {n: held[name] for n, name in (names | whole).items()}
    turned = lambda t: t.mT if t.ndim == 3 else t  # noqa: E731
    p = {n: turned(t.detach()).clone().requires_grad_() for n, t in theirs.items()}
    ours, wanted = fb.GraLoRA(rank=8, alpha=6.0, k=k, hybrid=hybrid).forward(p, x, Base(W, b)), layer(x)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    wanted.square().sum().backward()
    for n, t in theirs.items():
        torch.testing.assert_close(p[n].grad, turned(t.grad), rtol=1e-4, atol=1e-4)


def test_blocks_are_products_of_their_own_and_the_rank_is_k_times_lora_s() -> None:
    adapter, p = fb.GraLoRA(rank=4, alpha=4.0, k=2), {"A": torch.randn(2, 4, 10), "B": torch.randn(2, 6, 4)}
    update = adapter.merged(p, torch.zeros(12, 20))
    for j, i in ((0, 0), (0, 1), (1, 0), (1, 1)):
        A, B = p["A"][i, 2 * j : 2 * j + 2], p["B"][j, :, 2 * i : 2 * i + 2]
        torch.testing.assert_close(update[6 * j : 6 * j + 6, 10 * i : 10 * i + 10], B @ A)
    assert torch.linalg.matrix_rank(update) == 8 and adapter.lowrank(p)[1].shape == (8, 20)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="k = 3 blocks, which do not divide 4"):
        fb.GraLoRA(rank=4, k=3)
    with pytest.raises(ValueError, match="4 × 4 equal blocks, and this one is 12 × 22"):
        fb.GraLoRA(rank=4, k=4).shapes(12, 22)
