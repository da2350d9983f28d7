"""A weight that is written back again and again as it is does not drift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
import tiny_llama as tiny
from finebits.errors import Invalid
from finebits.rewrite import rewrite


@pytest.mark.parametrize(
    "format",
    [fb.Int(8), fb.Int(4, symmetric=False), fb.Int(4, variant="full"), fb.Int(8, variant="full"), fb.NF(4), fb.FP4(), fb.FP8()],
    ids=str,
)
@pytest.mark.parametrize("chance", [False, True])
def test_what_is_on_the_grid_stays(format: Any, chance: bool) -> None:
    q, gen = fb.quantize(torch.randn(3, 70), format), torch.Generator().manual_seed(0)
    rewrite(q, q.dequantize(torch.float32))  # a range of another format may be left once
    W = q.dequantize(torch.float32)
    for _ in range(20):
        rewrite(q, q.dequantize(torch.float32), gen if chance else None)
    torch.testing.assert_close(q.dequantize(torch.float32), W)


@pytest.mark.parametrize("format", [fb.Ternary(), fb.Median(2)], ids=str)
def test_scales_that_are_averages_would_shrink_and_are_refused(format: Any) -> None:
    q = fb.quantize(torch.randn(3, 70), format)
    with pytest.raises(Invalid, match="averages"):
        rewrite(q, q.dequantize(torch.float32))


def test_a_plan_does_not_train_what_cannot_be_written_anew(tmp_path: Path) -> None:
    tiny.fresh().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Ternary finds its scales from averages"):
        fb.plan_model(tmp_path, "1GiB", fast=True, adapter=fb.Full(), candidates=[{"paper": "ternary"}])
