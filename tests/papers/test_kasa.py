"""KaSA: the r smallest components are gone, whichever side is longer, and the loss pulls towards the form of an SVD."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import finebits as fb
from finebits.adapters.base import Base
from finebits.init.kasa import KaSA
from finebits.plan.base import Plan, Spec
from finebits.rules.base import Run
from golden.values import golden


@pytest.mark.parametrize("shape", [(19, 43), (43, 19)], ids=str)
def test_the_smallest_components_are_dropped(shape: tuple[int, int]) -> None:
    W, adapter = torch.randn(shape), fb.Gated(rank=4, alpha=9.0)
    base, start = KaSA()(W, adapter, lambda V: V, {})
    S = torch.linalg.svdvals(W)
    assert torch.linalg.matrix_rank(base, rtol=1e-4) == 15
    assert (W - base).square().sum() == pytest.approx(float(S[-4:].square().sum()), rel=1e-4)
    p = adapter.params(Base(base), torch.Generator().manual_seed(0), start)
    assert torch.equal(adapter.merged(p, base), base) and p["gate"].unique().numel() == 4


def test_factors_are_drawn_as_the_authors_do_and_anew_for_every_layer() -> None:
    """A is uniform in ±1/√n (Kaiming with a = √5), of variance 1/(3n); the gates are standard normal; layers and seeds differ."""

    def drawn(seed: int) -> dict[str, torch.Tensor]:
        spec = Spec(adapter=fb.Gated(rank=32, alpha=2.0), init=KaSA())
        layers = nn.Sequential(*(nn.Linear(400, 400) for _ in range(2)))
        for layer in layers:
            layer.weight.data = torch.randn(400, 400, generator=torch.Generator().manual_seed(3))
        m = fb.build(layers, Plan({"0": spec, "1": spec}, seed=seed, levers=fb.Levers(dtype="float32")))
        return {f"{name}.{k}": v.detach() for name, host in fb.hosts(m) for k, v in host.p["default"].items()}

    one, other = drawn(1), drawn(2)
    A = one["0.A"].double()
    assert A.abs().max() <= 400**-0.5 and float(A.var()) == pytest.approx(1 / (3 * 400), rel=0.03) and abs(float(A.mean())) < 1e-3
    assert 0.6 < float(torch.cat([p[f"{i}.gate"] for p in (one, other) for i in "01"]).std()) < 1.4
    for k in ("A", "gate"):
        assert not torch.equal(one[f"0.{k}"], one[f"1.{k}"]) and not torch.equal(one[f"0.{k}"], other[f"0.{k}"])
        assert torch.equal(one[f"0.{k}"], drawn(1)[f"0.{k}"])
    assert not one["0.B"].any()


def test_an_adapter_without_gates_cannot_take_it() -> None:
    base, start = KaSA()(torch.randn(9, 12), fb.LoRA(rank=2), lambda V: V, {})
    with pytest.raises(ValueError, match="no parameter 'gate'"):
        fb.LoRA(rank=2).params(Base(base), torch.Generator(), start)


def model(rank: int = 4) -> nn.Module:
    torch.manual_seed(3)
    spec = Spec(adapter=fb.Gated(rank=rank, alpha=2.0 * rank), init=KaSA())
    return fb.build(nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 24)), Plan({"0": spec, "1": spec}, levers=fb.Levers(dtype="float32")))


def test_the_loss_is_nothing_but_the_singular_values_for_orthonormal_factors_and_two_roots_of_r_more_for_none() -> None:
    m = model()
    run, (beta, gamma) = Run(m, dict(fb.hosts(m))), (0.3, 0.7)
    gates = sum(float(host.p["default"]["gate"].detach().square().sum()) for _, host in fb.hosts(m))

    def fill(factor: object) -> float:
        with torch.no_grad():
            for _, host in fb.hosts(m):
                for k, P in (("A", host.p["default"]["A"]), ("B", host.p["default"]["B"].mT)):
                    P.copy_(factor(*P.shape))  # type: ignore[operator]
        return float(fb.KaSALoss(beta, gamma).penalty(run).detach())

    assert fill(lambda r, n: torch.linalg.qr(torch.randn(n, r)).Q.mT) == pytest.approx(beta * gates, rel=1e-4)
    assert fill(torch.zeros) == pytest.approx(beta * gates + gamma * 2 * 2 * 4**0.5, rel=1e-5)


def test_training_with_the_loss_nears_an_svd_and_shrinks_what_the_task_does_not_ask_for() -> None:
    x, target = torch.randn(64, 20), torch.randn(64, 24)

    def tuned(rules: list) -> tuple[float, float]:
        m = model()
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
        square = lambda m, b: (m(b["x"]) - b["y"]).square().mean(-1).sum()  # noqa: E731
        fb.train(m, [[{"x": x, "y": target}]] * 60, optimizer, total=60, loss=square, tokens=lambda b: len(b["x"]), rules=rules)
        found = [host.p["default"] for _, host in fb.hosts(m)]
        apart = sum(float(torch.linalg.matrix_norm(P @ P.mT - torch.eye(4))) for p in found for P in (p["A"].detach(), p["B"].detach().mT))
        return apart, sum(float(p["gate"].detach().square().sum()) for p in found)

    (apart, gates), (plain_apart, plain_gates) = tuned([fb.KaSALoss(beta=0.1, gamma=0.3)]), tuned([])
    assert apart < 0.2 * plain_apart and gates < plain_gates


def test_the_loss_wants_gates() -> None:
    plain = fb.build(nn.Sequential(nn.Linear(8, 8)), Plan({"0": Spec(adapter=fb.LoRA(rank=2))}))
    with pytest.raises(ValueError, match="gated"):
        fb.KaSALoss().penalty(Run(plain, dict(fb.hosts(plain))))
    with pytest.raises(ValueError, match="beta >= 0"):
        fb.KaSALoss(beta=-1.0)


def test_the_authors_base_update_and_output() -> None:
    theirs, adapter = golden("kasa"), fb.Gated(rank=4, alpha=6.0)
    p = {"A": theirs["A"], "B": theirs["B"], "gate": theirs["gate"][0]}
    base, _ = KaSA()(theirs["tall"], adapter, lambda V: V, {})
    torch.testing.assert_close(base, theirs["tall_base"], rtol=0, atol=1e-5)
    torch.testing.assert_close(adapter.merged(p, torch.zeros(31, 19)), theirs["update"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.forward(p, theirs["x"], Base(base)), theirs["y"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(theirs["wide_base"], theirs["wide"], rtol=0, atol=1e-5)  # their n − r of m < n components are all


def test_the_wide_base_and_the_loss_of_peft() -> None:
    theirs = golden("kasa_loss")
    base, _ = KaSA()(theirs["wide"], fb.Gated(rank=4, alpha=6.0), lambda V: V, {})
    torch.testing.assert_close(base, theirs["wide_base"], rtol=0, atol=1e-5)
    spec = Spec(adapter=fb.Gated(rank=4, alpha=6.0))
    layers = nn.Sequential(nn.Linear(31, 19), nn.Linear(19, 31))
    m = fb.build(layers, Plan({"0": spec, "1": spec}, levers=fb.Levers(dtype="float32")))
    with torch.no_grad():
        for name, host in fb.hosts(m):
            for k, w in host.p["default"].items():
                w.copy_(theirs[f"{name}.{k}"].view(w.shape))
    penalty = fb.KaSALoss(beta=0.3, gamma=0.7).penalty(Run(m, dict(fb.hosts(m))))
    assert penalty.item() == pytest.approx(float(theirs["loss"]), rel=1e-5)
