"""CALDERA and CLoQ: calibrated quantizer and calibrated low-rank part, alternated."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.init.caldera import Caldera
from finebits.init.loftq import LoftQ
from finebits.init.qera import QERA
from finebits.quantizers.gptq import GPTQ
from finebits.stats.gram import Gram
from papers.gram import inputs, output_error, seen

FORMAT = fb.NF(2, block=32)


def error(init, W, stats, calibrated: bool) -> float:  # noqa: ANN001
    adapter = fb.LoRA(rank=6, alpha=24.0)
    quantize = lambda V: (GPTQ() if calibrated else fb.RTN())(V, FORMAT, stats)  # noqa: E731
    Q, p = init(W, adapter, quantize, stats)
    return output_error(adapter.merged(p, Q), W, stats[Gram].value())


def test_each_part_helps() -> None:
    W, stats = torch.randn(40, 96), seen(inputs(400, 96), None, Gram)
    loftq = error(LoftQ(), W, stats, False)
    qera, cloq = error(QERA(), W, stats, False), error(Caldera(steps=1, order="quantize"), W, stats, True)
    caldera = error(Caldera(), W, stats, True)
    assert caldera < cloq < qera < loftq
    assert caldera < 0.35 * loftq


def test_one_step_is_the_closed_form() -> None:
    W, stats = torch.randn(20, 45), seen(inputs(200, 45), None, Gram)
    one, other = error(Caldera(steps=1, order="quantize"), W, stats, True), error(QERA(), W, stats, True)
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("order", ["svd", "quantize"])
def test_more_steps_never_lose(order: str) -> None:
    W, stats = torch.randn(20, 45), seen(inputs(200, 45), None, Gram)
    losses = [error(Caldera(steps=t, order=order), W, stats, True) for t in (1, 2, 4, 7)]
    assert all(b <= a * (1 + 1e-5) for a, b in zip(losses, losses[1:], strict=False))
