"""L4Q, and the core of EfficientDM: the merged weight is rounded in training, and all of it is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finebits as fb
from finebits.adapters.base import Base, Params
from finebits.served import served

M, N = 24, 72


def straight(adapter: Any, p: Params, W: Tensor, x: Tensor) -> Tensor:
    """The paper's forward pass in plain torch, rounding seen through."""
    through = lambda soft, hard: soft + (hard - soft).detach()  # noqa: E731
    block, top = (N if adapter.block == "row" else adapter.block), 2**adapter.bits - 1
    each = lambda t: t.repeat_interleave(block, 1)[:, :N]  # noqa: E731
    zero = p.get("zero", torch.full_like(p["log_scale"], 2.0 ** (adapter.bits - 1)))
    step, z = each(p["log_scale"].exp()), each(through(zero, zero.round().clamp(0, top)))
    c = ((W + adapter.s * p["B"] @ p["A"]) / step + z).clamp(0, top)
    return x @ (step * (through(c, c.round()) - z)).mT


@pytest.mark.parametrize(
    "adapter",
    [
        fb.L4Q(rank=3, alpha=5.0, bits=3, block=16, scale="fp32"),
        fb.L4Q(rank=3, bits=2, block=32, symmetric=False, scale="fp32"),
        fb.L4Q(block="row", scale="fp32"),
        fb.EfficientDM(rank=3, scale="fp32"),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_graph_that_sees_through_rounding(adapter: Any) -> None:
    gen = torch.Generator().manual_seed(0)
    W, X, G = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((M, N), (10, N), (10, M)))
    born = adapter.params(Base(W), gen, {})
    moved = {k: (v + 0.2 * torch.randn(v.shape, generator=gen)).double() for k, v in born.items()}  # some weights are outside of the range
    found = []
    for forward in (lambda p, x: adapter.forward(p, x, Base(W)), lambda p, x: straight(adapter, p, W, x)):
        p, x = {k: v.clone().requires_grad_() for k, v in moved.items()}, X.clone().requires_grad_()
        y = forward(p, x)
        y.backward(G)
        found.append({k: t.grad for k, t in p.items()} | {"x": x.grad, "y": y.detach()})
    for k, wanted in found[1].items():
        torch.testing.assert_close(found[0][k], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_nothing_of_the_weights_size_is_kept() -> None:
    def kept(m: int, n: int) -> list[int]:
        adapter, W, x = fb.L4Q(rank=2, block="row"), torch.randn(m, n), torch.randn(3, n, requires_grad=True)
        p = {k: v.requires_grad_() for k, v in adapter.params(Base(W), torch.Generator(), {}).items()}
        sizes = list[int]()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            adapter.forward(p, x, Base(W))
        return sorted(sizes)

    assert kept(64, 64) == sorted([3 * 64, 2 * 64, 2 * 64, 64])
    assert sum(kept(128, 256)) == 3 * 256 + 2 * (128 + 256) + 128


def test_at_birth_nothing_is_clipped() -> None:
    W = torch.randn(M, N) * torch.rand(M, 1)
    for symmetric in (True, False):
        adapter = fb.L4Q(bits=3, block=16, symmetric=symmetric, scale="fp32")
        p = adapter.params(Base(W), torch.Generator(), {})
        assert ((adapter.merged(p, W) - W).abs() <= p["log_scale"].exp().repeat_interleave(16, 1)[:, :N] * 0.5001).all()
        assert float((adapter.merged(p, torch.zeros(M, N))).abs().max()) == 0


class Toy:
    """Regression on weights that moved by a low rank, from the weights before: the mean square of what is left, by method."""

    def __init__(self, bits: int, block: int = 32, m: int = 32, n: int = 64, r: int = 4) -> None:
        gen = torch.Generator().manual_seed(bits)
        self.W, self.X = torch.randn(m, n, generator=gen) / 8, torch.randn(256, n, generator=gen)
        self.wanted = self.W + 0.6 * torch.randn(m, r, generator=gen) @ torch.randn(r, n, generator=gen) / (r * n) ** 0.5
        self.format = fb.Int(bits, block, variant="full")

    def loss(self, V: Tensor) -> float:
        return float((self.X @ (V - self.wanted).mT).square().mean())

    def rounded(self, W: Tensor) -> Tensor:
        return fb.quantize(W, self.format)

    def trained(self, adapter: Any, base: Tensor, still: str = "", steps: int = 100, start: Any = None) -> Tensor:
        gen, target = torch.Generator().manual_seed(0), self.X @ self.wanted.mT
        p = {k: v.requires_grad_(k != still) for k, v in adapter.params(Base(base), gen, start or {}).items()}
        optimizer = torch.optim.Adam([v for v in p.values() if v.requires_grad], lr=0.02)
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - i / steps)
            optimizer.zero_grad()
            (adapter.forward(p, self.X, Base(base)) - target).square().mean().backward()
            optimizer.step()
        return adapter.merged({k: v.detach() for k, v in p.items()}, base)


@pytest.mark.parametrize("bits", [3, 2])
def test_beats_rounding_afterwards(bits: int) -> None:
    toy = Toy(bits)
    lora, l4q = fb.LoRA(rank=4, alpha=4.0), fb.L4Q(rank=4, alpha=4.0, bits=bits, block=32, scale="fp32")
    afterwards = toy.loss(toy.rounded(toy.trained(lora, toy.W)).dequantize())
    qlora = toy.loss(toy.rounded(toy.trained(lora, toy.rounded(toy.W))).dequantize())
    ours, still = toy.loss(toy.trained(l4q, toy.W)), toy.loss(toy.trained(l4q, toy.W, still="log_scale"))
    assert ours < afterwards and ours <= 0.6 * qlora and ours <= (0.75 if bits == 2 else 0.9) * still


def test_rates_by_step_let_codes_of_wide_steps_change() -> None:
    """Two layers whose steps are 0.001 and 0.1, one step from where they should be: the shares of codes that change."""

    def shares(power: float) -> list[float]:
        gen = torch.Generator().manual_seed(0)
        signs = [torch.randn(16, 48, generator=gen) for _ in range(2)]
        model = nn.Sequential(nn.Linear(48, 16, bias=False), nn.Linear(48, 16, bias=False)).requires_grad_(False)
        for layer, step, W in zip(model, (1e-3, 1e-1), signs, strict=True):
            layer.weight.data = 7 * step * W / W.abs().amax(1, keepdim=True)
        model = fb.build(model, fb.Plan({n: fb.Spec(adapter=fb.EfficientDM(rank=8, scale="fp32")) for n in "01"}))
        hosts = dict(fb.hosts(model))
        params = [h.p["default"][k] for h in hosts.values() for k in ("A", "B")]
        before = [served(h).codes() for h in hosts.values()]
        targets = [h.stack().weight + s * t.sign() for h, s, t in zip(hosts.values(), (1e-3, 1e-1), reversed(signs), strict=True)]
        optimizer = torch.optim.Adam(params, lr=4e-5)
        fb.factor(optimizer, [fb.ScaleAwareRates(power)], fb.Run(model, hosts))
        x = torch.eye(48)
        for _ in range(60):
            optimizer.zero_grad()
            sum((h(x) - t.mT).square().mean() / s**2 for h, t, s in zip(hosts.values(), targets, (1e-3, 1e-1), strict=True)).backward()
            optimizer.step()
        return [float((served(h).codes() != b).float().mean()) for h, b in zip(hosts.values(), before, strict=True)]

    small, wide = shares(0.0)
    assert small > 50 * wide
    small, wide = shares(1.0)
    assert max(small, wide) < 4 * min(small, wide)


def test_few_steps_at_two_bits_from_what_gptq_found_lose_less_than_from_rounding_to_nearest() -> None:
    """On inputs that go together, so that there is something to make good."""
    gen, toy = torch.Generator().manual_seed(2), Toy(2)
    toy.X = torch.randn(256, 16, generator=gen) @ torch.randn(16, 64, generator=gen) / 4 + 0.3 * torch.randn(256, 64, generator=gen)
    adapter, gram = fb.L4Q(rank=4, alpha=4.0, bits=2, block=32, scale="fp32"), fb.Gram()
    gram.add(toy.X)
    V, start = adapter.born(toy.W, fb.quantize(toy.W, adapter.grid, fb.GPTQ(scales="search"), {fb.Gram: gram}))
    nearest, found = toy.trained(adapter, toy.W, steps=20), toy.trained(adapter, V, steps=20, start=start)
    assert toy.loss(found) <= 0.8 * toy.loss(nearest)
