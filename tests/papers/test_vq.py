"""Additive codebooks."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.formats.vq import VQ


def error(W: torch.Tensor, format: VQ) -> float:
    return float((fb.quantize(W, format).dequantize() - W).norm() / W.norm())


def test_a_weight_made_of_codewords_comes_back() -> None:
    gen = torch.Generator().manual_seed(0)
    book = torch.randn(15, 4, generator=gen).clamp(-2, 2)
    W = book[torch.randint(15, (32, 16), generator=gen)].flatten(-2)
    W[:, 0] = 3.0  # the scale of every row
    assert error(W, VQ(1, 256, 4)) < 1e-3


@pytest.mark.parametrize(
    "format,wanted", [(VQ(1, 16, 4), 0.71), (VQ(1, 256, 4), 0.50), (VQ(2, 16, 4), 0.53), (VQ(2, 64, 4), 0.36)], ids=str
)
def test_error_on_normal_weights(format: VQ, wanted: float) -> None:
    W = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    assert error(W, format) <= wanted


def test_more_books_and_more_words_help() -> None:
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    by_books = [error(W, VQ(M, 16, 4)) for M in (1, 2, 3, 4)]
    by_words = [error(W, VQ(1, K, 4)) for K in (4, 16, 64, 256)]
    assert by_books == sorted(by_books, reverse=True) and by_words == sorted(by_words, reverse=True)


def test_one_book_encodes_to_the_nearest_and_comes_back() -> None:
    W, format = torch.randn(16, 64), VQ(1, 32, 4)
    q = fb.quantize(W, format)
    scales = format.scales(q.parts)
    book = q.parts["book"][0].float()
    atoms = (W / scales.scale.float()).reshape(-1, 1, 4)
    nearest = (atoms - book).square().sum(-1).amin(-1)
    got = (atoms[:, 0] - book[q.codes().reshape(-1).long()]).square().sum(-1)
    torch.testing.assert_close(got, nearest, rtol=1e-5, atol=1e-6)
    w = q.dequantize()
    assert torch.equal(format.decode(format.encode(w, scales), scales), w)


def test_zeros_stay_zero() -> None:
    W = torch.randn(6, 64)
    W[2], W[:, 8:24] = 0, 0
    w = fb.quantize(W, VQ(2, 16, 8)).dequantize()
    assert (w[2] == 0).all() and (w[:, 8:24] == 0).all()


def test_price() -> None:
    m = n = 4096
    assert VQ(2, 256, 8).storage_bits(m, n) / (m * n) == pytest.approx(2 + 16 / n + 2 * 256 * 8 * 16 / (m * n))
    for shape in ((5, 24), (2, 5, 24)):
        q = fb.quantize(torch.randn(shape), VQ(3, 8, 3))
        assert 8 * q.nbytes == (shape[0] if len(shape) == 3 else 1) * VQ(3, 8, 3).storage_bits(5, 24)


def test_products_gradients_and_slices_without_a_table() -> None:
    q = fb.quantize(torch.randn(10, 48), VQ(2, 16, 4))
    assert q.format.table(q.parts, 48) is None
    x = torch.randn(3, 48, requires_grad=True)
    y = torch.nn.functional.linear(x, q)
    y.sum().backward()
    torch.testing.assert_close(y, x @ q.dequantize().T)
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(3, -1))
    assert torch.equal(q[2:5].dequantize(), q.dequantize()[2:5])


def test_rows_that_atoms_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"VQ\(g=8\).*not 44"):
        fb.quantize(torch.randn(4, 44), VQ())
    with pytest.raises(ValueError, match="K = 2, 4, 8"):
        VQ(K=100)
