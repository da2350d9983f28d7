"""LREC: the adapters learn what quantizing lost, on text that is not scored, and the integers stay."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finebits as fb
from finebits.build import hosts
from finebits.plan.base import Plan, Spec
from finebits.refine._family import divergence
from finebits.refine.base import Matching
from finebits.refine.lrec import LREC

ADAPTER = fb.LoRA(rank=4, alpha=8.0)


class Net(nn.Module):
    """Two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(48, 96), nn.Linear(96, 48), nn.Linear(48, 40, bias=False)
        gen = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=gen) * (1.4 / p.shape[-1] ** 0.5)

    def states(self, x: Tensor) -> Tensor:
        return self.two(F.gelu(self.one(x)))


def quantized(bits: int, init: object) -> Net:
    net = Net()
    spec = Spec(format=fb.Int(bits, block=32, symmetric=False), adapter=ADAPTER, init=init)
    fb.build(net, Plan({"one": spec, "two": spec}, levers=fb.Levers(dtype="float32")))
    return net


@functools.cache
def text(seed: int, batches: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(48, 48, generator=torch.Generator().manual_seed(9)) / 5
    return [torch.randn(2, 32, 48, generator=gen) @ mix for _ in range(batches)]


def task(net: Net, tensors: list, seed: int = 2, batches: int = 12) -> Matching:
    full, x = Net(), text(seed, batches)
    theirs = [full.states(b).detach() for b in x]
    return Matching(lambda i: net.states(x[i]), theirs.__getitem__, tensors, batches, head=net.head)


def held_out(net: Net) -> float:
    t = task(net, [], seed=77, batches=4)
    with torch.no_grad():
        return sum(float(divergence(t.ours(i).flatten(0, 1), t.theirs(i).flatten(0, 1), net.head, 64)) for i in range(4)) / 4


def trained(net: Net) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


@pytest.mark.parametrize("bits", [2, 3])
def test_the_divergence_on_other_text_falls_by_half_and_the_codes_stay(bits: int) -> None:
    net = quantized(bits, fb.Zeros())
    before, codes = held_out(net), [h.weight.codes() for _, h in hosts(net)]
    losses = LREC(epochs=10, lr=1e-2)(task(net, trained(net)))
    assert held_out(net) <= 0.55 * before and losses[-1] < losses[0]
    assert all(torch.equal(h.weight.codes(), c) for (_, h), c in zip(hosts(net), codes, strict=True))
    svd = quantized(bits, fb.LoRC())
    assert held_out(svd) < before
    LREC(epochs=10, lr=1e-2)(task(svd, trained(svd)))
    assert held_out(svd) == pytest.approx(held_out(net), rel=0.25)


def test_states_that_were_held_train_as_a_teacher_that_is_asked_each_time() -> None:
    nets, full, x = [quantized(3, fb.Zeros()) for _ in range(2)], Net(), text(2, 6)
    held = task(nets[0], trained(nets[0]), batches=6)
    live = held._replace(ours=lambda i: nets[1].states(x[i]), theirs=lambda i: full.states(x[i]).detach(), tensors=trained(nets[1]))
    one, other = LREC(lr=1e-2)(held), LREC(lr=1e-2)(live)
    assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_value_and_gradient_are_those_of_the_divergence(chunk: int) -> None:
    ours, theirs, H = torch.randn(23, 8, requires_grad=True), torch.randn(23, 8), torch.randn(17, 8)
    head = lambda h: h @ H.mT  # noqa: E731
    p, log_q = head(theirs).softmax(-1), head(ours).log_softmax(-1)
    plain = (p * (p.log() - log_q)).sum(-1).mean()
    got = divergence(ours, theirs, head, chunk)
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(3 * got, ours)[0], torch.autograd.grad(3 * plain, ours)[0], rtol=1e-4, atol=1e-6)


def test_what_it_cannot_do_without() -> None:
    with pytest.raises(ValueError, match="no head"):
        LREC()(task(Net(), [])._replace(head=None))
    with pytest.raises(ValueError, match="lr above 0"):
        LREC(lr=0.0)
