"""Scale search: the best of its candidates, block by block."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.formats.base import Scales
from finebits.quantizers._family import FACTORS, search
from finebits.quantizers.mse import MSE
from finebits.quantizers.rtn import RTN
from finebits.stats.mean_square import MeanSquare
from papers.gram import inputs, output_error, seen


@pytest.mark.parametrize(
    "format", [fb.NF(2, block=16), fb.Int(3, block=20), fb.NF(3, block="row"), fb.NF(4, block=32, scale="fp16")], ids=str
)
def test_every_block_has_the_best_of_the_candidates(format: fb.NF) -> None:
    W = torch.randn(5, 73)
    ideal = format.ideal(W).scale
    losses = []
    for f in FACTORS:
        s = format.scales(format.hold(Scales(f * ideal), W), 73)
        losses.append(format.cut((format.decode(format.encode(W, s), s) - W).square()).sum(-1))
    got = format.cut((MSE()(W, format, {}).dequantize() - W).square()).sum(-1)
    least = torch.stack(losses).amin(0)
    assert (got <= least * (1 + 1e-4) + 1e-5).all()
    assert got.sum() < 0.99 * least.sum(), "refits improve on the grid"


@pytest.mark.parametrize(
    ("format", "share"),
    [(fb.NF(2), 0.75), (fb.NF(3), 0.95), (fb.Int(2, symmetric=False), 0.8), (fb.Int(3, symmetric=False, variant="integer"), 0.97)],
    ids=str,
)
def test_the_error_of_gaussian_weights_falls(format: fb.NF, share: float) -> None:
    W = torch.randn(20, 190)
    error = lambda q: (q.dequantize() - W).norm()  # noqa: E731
    assert error(MSE()(W, format, {})) < share * error(RTN()(W, format, {}))


@pytest.mark.parametrize("scale", ["double", "pow2"])
def test_scales_under_a_second_level_never_lose(scale: str) -> None:
    W, format = torch.randn(7, 150), fb.NF(3, block=16, scale=scale)
    error = lambda q: (q.dequantize() - W).square().sum(-1)  # noqa: E731
    assert (error(MSE()(W, format, {})) <= error(RTN()(W, format, {})) * (1 + 1e-5)).all()


def test_inputs_weigh() -> None:
    W, stats = torch.randn(24, 96), seen(inputs(200, 96, decay=3), None, MeanSquare)
    D = stats[MeanSquare].value().diag()
    plain, weighted = (MSE(weighting=w)(W, fb.NF(2, block=32), stats).dequantize() for w in ("none", "inputs"))
    assert output_error(weighted, W, D) < 0.95 * output_error(plain, W, D)
    with pytest.raises(ValueError, match="needs MeanSquare"):
        MSE(weighting="inputs")(W, fb.NF(2), {})


def test_a_zero_block_stays_zero() -> None:
    W = torch.randn(3, 64)
    W[1, 16:32] = 0
    assert not search(fb.NF(3, block=16), W)["scale"][1, 1].any()
    assert not MSE()(W, fb.NF(3, block=16), {}).dequantize()[1, 16:32].any()
