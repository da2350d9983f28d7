"""The scale of every block, searched for: the native bodies agree with each other bit for bit, and with the torch body up to its sums."""

import pytest
import torch

import finebits as fb
from finebits.formats._stores import E4M3
from finebits.formats.base import Scales
from finebits.kernels import VARIABLE, cpu
from finebits.kernels.cpu import binding
from finebits.quantizers import _family as family

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))
LEVELS = range(binding.library().finebits_level() + 1) if cpu.available() is None else []
FORMATS = [
    fb.NF(2),
    fb.NF(3, scale="bf16"),
    fb.NF(4, block=32, scale="fp16"),
    fb.NF(3, block=32, scale=E4M3(over="block")),
    fb.Int(2, symmetric=False, variant="integer", block=32, scale=E4M3(over="block")),
    fb.NF(7),
    fb.Int(4),
    fb.Int(4, block="row"),
    fb.Int(4, variant="full"),
    fb.Int(3, symmetric=False, scale="bf16"),
    fb.Int(2, symmetric=False, variant="integer", block=32, scale="fp16"),
    fb.FP4(),
    fb.Ternary(),
    fb.Median(2),
]


def case(n=150):
    gen = torch.Generator().manual_seed(n)
    W = torch.randn(37, n, generator=gen)
    W[3], W[4, :64], W[5], W[6, 10:80], W[7] = 0, 1e-30, W[5] * 1e3, 0.5, -W[7].abs() - 3
    return W, torch.rand(n, generator=gen) + 0.1


def loss(format, W, d, scales):
    held = format.scales(format.hold(scales, W), W.shape[-1])
    return format.cut((format.decode(format.encode(W, held), held).double() - W).square() * d).sum(-1)


def torch_body(monkeypatch, format, W, d):
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, "reference")
        patch.setattr(cpu, "search", None)  # not even asked
        return family.searched(format, W, d)


@pytest.mark.parametrize("format", FORMATS, ids=repr)
@pytest.mark.parametrize("n", [7, 150])
def test_as_the_torch_body(format, n, monkeypatch):
    W, d = case(n)
    W = W / 10 if isinstance(format.scale, E4M3) else W  # which holds scales up to 448
    wanted = torch_body(monkeypatch, format, W, d)
    best = loss(format, W, d, wanted)
    made: list[Scales] = []
    for level in LEVELS:
        monkeypatch.setattr(binding, "level", lambda level=level: level)
        made.append(family.searched(format, W, d))
    assert all(torch.equal(a, b) for ours in made for a, b in zip(ours[:2], made[0][:2]) if a is not None)
    same = torch.isclose(made[0].scale, wanted.scale, rtol=1e-5, atol=0)
    assert (same | (loss(format, W, d, made[0]) <= best * (1 + 1e-6))).all()
    assert same.float().mean() > 0.98
    assert loss(format, W, d, made[0]).sum() <= best.sum() * (1 + 1e-5)


@pytest.mark.parametrize("format", [fb.NF(3, scale="double"), fb.Int(4, block="tensor"), fb.NF(4, unit=48)], ids=repr)
def test_what_is_held_together_is_left_to_the_torch_body(format, monkeypatch):
    W, d = case()
    wanted = torch_body(monkeypatch, format, W, d)
    assert torch.equal(family.searched(format, W, d).scale, wanted.scale)


def test_threads_change_nothing():
    W, d = case()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = family.searched(fb.NF(4), W, d)
        torch.set_num_threads(2)
        two = family.searched(fb.NF(4), W, d)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.scale, two.scale)


def test_what_is_given_stays():
    W, d = case()
    kept, columns = W.clone(), W.mT.contiguous()
    one, two = family.searched(fb.NF(3), W, d), family.searched(fb.NF(3), columns.mT, d)  # as it lies, and as GPTQ holds it
    assert torch.equal(one.scale, two.scale)
    assert torch.equal(W, kept)
    assert torch.equal(columns, kept.mT)


def test_a_scale_that_its_store_cannot_hold_is_refused(monkeypatch):
    W, d = torch.full((2, 64), 1e6), torch.ones(64)
    for body in (family.searched, lambda *given: torch_body(monkeypatch, *given)):
        with pytest.raises(ValueError, match="does not fit fp16"):
            body(fb.Int(2, scale="fp16"), W, d)


def test_what_does_not_go_together_is_refused():
    format, (W, d) = fb.NF(4), case(128)
    scale, levels, grid = format.ideal(W).scale.mT, torch.tensor(format.levels()), format.grid(W.device)
    for wrong in ((d[:3], scale, None, levels), (d, scale[:1], None, levels), (d, scale, scale.mT, levels), (d, scale, None, levels[:3])):
        with pytest.raises(ValueError, match="come with"):
            cpu.search(W.mT, *wrong, grid, family.FACTORS, family.REFITS, False)
