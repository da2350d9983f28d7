"""FP4: both tables, and ZeroQuant-FP's constraint on its scales (arXiv:2307.09782v2)."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.formats._stores import Pow2
from finebits.formats.fp4 import FP4
from golden.values import golden


def error(W: torch.Tensor, format: object) -> float:
    return float((fb.quantize(W, format).dequantize() - W).norm() / W.norm())


def draw(kind: str, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    W = torch.randn(256, 256, generator=gen)
    if kind == "student":
        W = W / (torch.randn(4, 256, 256, generator=gen).square().sum(0) / 4).sqrt()
    return W * torch.randn(256, 1, generator=gen).exp() if kind == "rows" else W


def test_tables_by_bit_pattern() -> None:
    half = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert FP4().levels() == (*half, *(-v for v in half))
    assert FP4(variant="bnb").levels() == pytest.approx(golden("bitsandbytes")["fp4"][0].tolist(), abs=1e-6)


@pytest.mark.parametrize("variant", ["ocp", "bnb"])
def test_zero_is_plus_zero(variant: str) -> None:
    W = torch.tensor([[1.0, 0.0, -0.0, 1e-9, -1e-9, -1.0] * 4])
    codes = fb.quantize(W, FP4(16, variant)).codes()
    assert (codes[W.abs() < 1e-6] == 0).all() and (codes != 8).all()


# Relative error by rounding of the exponent, groups of 256 = one row, mean of four seeds; G rows share the largest scale.
TABLE = {
    "normal": (0.1114, {"floor": (0.1153, 0.1234, 0.1280), "nearest": (0.1159, 0.1214, 0.1205), "ceil": (0.1640, 0.1371, 0.1259)}),
    "student": (0.1496, {"floor": (0.1745, 0.1977, 0.2016), "nearest": (0.1587, 0.1631, 0.1643), "ceil": (0.1740, 0.1783, 0.1778)}),
}


@pytest.mark.parametrize("kind", TABLE)
def test_rounding_of_ratios_to_one_scale(kind: str) -> None:
    free, wanted = TABLE[kind]
    draws = [draw(kind, s) for s in range(4)]
    near = 0.015 if kind == "normal" else 0.04  # four draws of a heavy tail
    mean = lambda f: sum(map(f, draws)) / 4  # noqa: E731
    plain = mean(lambda W: error(W, FP4(256)))
    assert plain == pytest.approx(free, rel=near) and plain < mean(lambda W: error(W, fb.Int(4, 256)))
    for column, G in enumerate((4, 64, 256)):
        found = {}
        for rounding in ("floor", "nearest", "ceil", "mse"):
            format = FP4(256, scale=Pow2(rounding, "tensor"))
            found[rounding] = mean(lambda W: error(W.unflatten(0, (-1, G)), format))  # every G rows a matrix of their own
            if rounding in wanted:
                assert found[rounding] == pytest.approx(wanted[rounding][column], rel=near)
        assert found["mse"] <= min(found["floor"], found["ceil"]) and found["mse"] <= 1.10 * plain
        assert found["nearest"] <= 1.11 * plain


def test_rounding_to_powers_of_two_over_an_octave_of_data() -> None:
    mean = lambda kind, rounding: sum(error(draw(kind, 0) * 2 ** (k / 8), FP4(256, scale=Pow2(rounding))) for k in range(8)) / 8  # noqa: E731
    for kind, ceil, nearest, near in (("normal", 0.1296, 0.1171, 0.015), ("student", 0.2029, 0.1610, 0.07)):
        assert mean(kind, "ceil") == pytest.approx(ceil, rel=near) and mean(kind, "nearest") == pytest.approx(nearest, rel=near)
        assert mean(kind, "mse") <= min(mean(kind, "floor"), mean(kind, "ceil"), mean(kind, "nearest"))


@pytest.mark.parametrize("over", ["block", "row", "tensor"])
@pytest.mark.parametrize("rounding", ["floor", "nearest", "ceil", "mse"])
def test_powers_of_two_move_into_fp8_exactly(over: str, rounding: str) -> None:
    W = torch.randn(8, 32 * 256) * torch.randn(8, 32, generator=torch.Generator().manual_seed(3)).exp().repeat_interleave(256, 1)
    share = lambda scale, headroom: _survivors(W, FP4(256, scale=scale), over, headroom)  # noqa: E731
    assert share(Pow2(rounding, over), 64.0) == 1.0
    assert share(Pow2(rounding, over), 1.0) > 0.99
    assert share("fp32", 64.0) < 0.35


def _survivors(W: torch.Tensor, format: FP4, over: str, headroom: float) -> float:
    q = fb.quantize(W, format)
    w, scale = q.dequantize(), format.scales(q.parts, W.shape[-1]).scale
    common = (scale.amax(-1, keepdim=True) if over == "row" else scale.amax()) / headroom
    return float((((w / common).to(torch.float8_e4m3fn).float() * common) == w).float().mean())
