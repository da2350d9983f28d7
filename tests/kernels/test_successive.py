"""Columns rounded one after the other: the native bodies are the torch body bit for bit, and that one is its formula."""

import pytest
import torch

import finebits as fb
from finebits import kernels
from finebits.kernels import cpu, reference
from finebits.kernels.cpu import binding

LEVELS = range(binding.library().finebits_level() + 1) if cpu.available() is None else []
FORMATS = [
    fb.Int(3, symmetric=False, scale="fp16"),
    fb.Int(2, symmetric=False, variant="integer", block=32),
    fb.Int(4),
    fb.Int(4, variant="full"),
    fb.Int(8, symmetric=False, scale="bf16"),
    fb.NF(2),
    fb.NF(4, block=32, scale="bf16"),
    fb.NF(8),
    fb.FP4(),
]


def case(format, m, c):
    gen = torch.Generator().manual_seed(m + c)
    W = torch.randn(m, c, generator=gen)
    held = format.scales(format.fit(W), c)
    U = torch.triu(torch.randn(c, c, generator=gen) * 0.1, 1) + torch.diag(torch.rand(c, generator=gen) + 0.5)
    block = torch.arange(c) // format.block
    scale, shift = (None if t is None else t.float().mT.contiguous() for t in (held.scale, held.shift))
    return W.mT.contiguous(), U, scale, shift, block, torch.tensor(format.levels()), format.grid(W.device)


@pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))
@pytest.mark.parametrize("level", LEVELS, ids=lambda i: cpu.LEVELS[i])
@pytest.mark.parametrize("format", FORMATS, ids=repr)
@pytest.mark.parametrize(("m", "c"), [(1, 1), (37, 64), (16, 70), (33, 130)])
def test_bit_for_bit(level, format, m, c, monkeypatch):
    monkeypatch.setattr(binding, "level", lambda: level)
    given = case(format, m, c)
    kept = [t.clone() for t in given[:2]]
    (codes, E), (wanted, lost) = cpu.successive(*given), reference.successive(*given)
    assert torch.equal(codes, wanted)
    assert torch.equal(E, lost)
    assert all(torch.equal(a, b) for a, b in zip(given[:2], kept))  # what is given stays


def test_feedback_is_the_formula():
    """W = Ŵ + U^T E, column by column: everything that was lost is in E."""
    W, U, scale, shift, block, levels, r = case(fb.Int(3, block=16), 9, 40)
    codes, E = reference.successive(W, U, scale, shift, block, levels, r)
    made = levels[codes.long()] * scale[block]
    assert torch.allclose(W - made, U.mT @ E, atol=1e-5)


def test_threads_change_nothing():
    given = case(fb.NF(4), 700, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kernels.successive(*given)
        torch.set_num_threads(2)
        two = kernels.successive(*given)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))
def test_what_does_not_go_together_is_refused():
    W, U, scale, shift, block, levels, r = case(fb.Int(4), 8, 64)
    for wrong in ((W, U[:3], scale, shift, block), (W, U, scale[:, :5], shift, block), (W, U, scale, shift, block + 7)):
        with pytest.raises(ValueError, match="come with|go together"):
            cpu.successive(*wrong, levels, r)
    with pytest.raises(ValueError, match="go together"):
        cpu.successive(W, U, scale, shift, block, levels[:3], r)
