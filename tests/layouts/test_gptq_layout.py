"""A reader of the GPTQ layout, written from its description alone, finds the weight that we wrote."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.formats.int import Int
from finebits.layouts.gptq import from_gptq, to_gptq

FORMATS = [
    Int(b, block, s, "fp16", v)
    for b in (2, 3, 4, 8)
    for block in (32, "row")
    for s, v in ((True, "full"), (True, None), (False, "integer"))
]


def read(t: dict[str, torch.Tensor], bits: int, layout: str) -> torch.Tensor:
    """One weight at a time, as the layout says: w[o, i] = scales[g, o]·(q[i, o] − z[g, o]), g = g_idx[i]."""
    n, m = t["qweight"].shape[0] * 32 // bits, t["qweight"].shape[1]
    columns = [[w & 2**32 - 1 for w in column] for column in t["qweight"].T.tolist()]
    rows = [[w & 2**32 - 1 for w in row] for row in t["qzeros"].tolist()]
    code = lambda words, i: sum(w << 32 * k for k, w in enumerate(words)) >> bits * i & 2**bits - 1  # noqa: E731
    W = torch.empty(m, n)
    for i in range(n):
        g = int(t["g_idx"][i])
        for o in range(m):
            W[o, i] = float(t["scales"][g, o]) * (code(columns[o], i) - code(rows[g], o) - (layout == "gptq"))
    return W


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_an_independent_reader_finds_the_weight(format: Int, layout: str) -> None:
    W = torch.randn(32, 64)
    W[:, 0], W[:, 1], W[:, 33], W[:, 34] = 1.0, -1.0, 1.0, -1.0  # zero points away from both ends
    q = fb.quantize(W, format)
    tensors = to_gptq(q, layout)
    assert tensors["qweight"].shape == (64 * format.bits // 32, 32) and tensors["scales"].dtype == torch.float16
    assert torch.equal(read(tensors, format.bits, layout), q.dequantize())
    back = from_gptq(tensors, format.bits, format.symmetric, layout)
    assert torch.equal(back.dequantize(torch.float32), q.dequantize())
    again = to_gptq(back, layout)
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)


def test_a_zero_point_that_the_first_layout_lacks_is_refused() -> None:
    q = fb.quantize(torch.rand(16, 64) + 1, Int(4, 32, False, "fp16", "integer"))  # all weights above zero: zero point 0
    with pytest.raises(ValueError, match="gptq_v2"):
        to_gptq(q)
    assert torch.equal(read(to_gptq(q, "gptq_v2"), 4, "gptq_v2"), q.dequantize())


@pytest.mark.parametrize(
    "format,shape,reason",
    [
        (fb.NF(4, 32), (8, 64), "integers"),
        (Int(4, 32, False, "fp16"), (8, 64), "integer zero point"),
        (Int(4, 32), (8, 64), "rounded"),
        (Int(4, 32, scale="fp16"), (7, 64), "whole words"),
        (Int(4, 32, scale="fp16"), (8, 80), "whole groups"),
        (Int(4, 32, scale="fp16"), (2, 8, 64), "matrices"),
    ],
    ids=str,
)
def test_what_it_cannot_hold_is_refused(format: object, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        to_gptq(fb.quantize(torch.randn(shape), format))


def test_activation_order_and_a_wrong_layout_are_refused() -> None:
    tensors = to_gptq(fb.quantize(torch.randn(8, 64), Int(4, 32, scale="fp16")))
    with pytest.raises(ValueError, match="activation order"):
        from_gptq(tensors | {"g_idx": tensors["g_idx"].flip(0)}, 4, True)
    with pytest.raises(ValueError, match="layout"):
        from_gptq(tensors, 4, True, "gptq_v2")
