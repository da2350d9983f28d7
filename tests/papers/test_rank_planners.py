"""Ranks by EVA, LaMDA++ and DiffoRA: totals, orders, and a search that finds the modules that matter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import finebits as fb
from finebits.plan.base import Option
from finebits.ranks import base
from finebits.ranks.lamda_pp import outside
from finebits.stats.gram import Gram
from papers.gram import inputs, seen

EVR = {"a": [0.6, 0.2, 0.1, 0.06, 0.02, 0.01], "b": [0.3, 0.29, 0.2, 0.1, 0.04, 0.02], "c": [0.05, 0.045, 0.03, 0.02, 0.02, 0.01]}


def ranks(choice: dict[str, Option]) -> dict[str, int]:
    return {name: getattr(o.spec.adapter, "rank", 0) for name, o in choice.items()}


def redistributed(shares: dict[str, list[float]], rank: int, rho: float) -> dict[str, int]:
    """The paper's pooled sorting: the largest shares of all modules, of every module the first round(ρ r)."""
    pool = sorted((-x, i, name) for i, (name, s) in enumerate(shares.items()) for x in s[: round(rho * rank)])
    owners = [name for *_, name in pool[: rank * len(shares)]]
    return {name: owners.count(name) for name in shares}


def test_shares_are_those_of_the_energy() -> None:
    X = inputs(300, 43)
    S = torch.linalg.svdvals(X.double()).square()
    found = fb.EVARanks(rho=2.0).score(torch.randn(19, 43), fb.LoRA(rank=3), seen(X, None, Gram))
    assert found == pytest.approx((S[:6] / S.sum()).tolist(), rel=1e-4)
    assert len(fb.EVARanks(rho=20.0).score(torch.randn(19, 43), fb.LoRA(rank=3), seen(X, None, Gram))) == 19


def test_eva_is_the_pooled_sorting() -> None:
    planner = fb.EVARanks(rho=2.0)
    menu = planner.menu(EVR, fb.LoRA(rank=3, alpha=6))
    choice = planner(menu, 9)
    assert ranks(choice) == {"a": 4, "b": 4, "c": 1} == redistributed(EVR, 3, 2.0)
    assert {o.spec.adapter.s for o in choice.values()} == {2.0}  # alpha moves along
    same = fb.EVARanks(rho=1.0)
    assert ranks(same(same.menu(EVR, fb.LoRA(rank=3)), 9)) == {"a": 3, "b": 3, "c": 3}
    gen = torch.Generator().manual_seed(0)
    shares = {f"m{i}": torch.rand(16, generator=gen).sort(descending=True).values * (i + 1) / 20 for i in range(12)}
    listed = {k: v.tolist() for k, v in shares.items()}
    assert ranks(planner(planner.menu(listed, fb.LoRA(rank=4)), 48)) == redistributed(listed, 4, 2.0)
    with pytest.raises(ValueError, match="it is at least 1"):
        fb.EVARanks(rho=0.5)


def test_eva_with_what_a_rank_really_takes() -> None:
    """Where a rank of one module takes more memory, it needs more energy to be worth it."""
    planner, sizes = fb.EVARanks(), {"a": 10, "b": 40, "c": 10}
    menu = planner.menu(EVR, fb.LoRA(rank=3), price=lambda name, r: r * sizes[name])
    found = ranks(planner(menu, 180))
    assert sum(r * sizes[n] for n, r in found.items()) <= 180 and found["a"] >= 4 and found["b"] < 4


def test_a_module_of_rank_zero_has_no_adapter() -> None:
    planner = fb.EVARanks()
    menu = planner.menu({"a": [0.9, 0.8], "b": [0.1, 0.1]}, fb.LoRA(rank=1))
    choice = planner(menu, 2)
    assert choice["b"].spec.adapter is None and choice["a"].spec.adapter.rank == 2


def test_lamda_pp_gives_more_to_spectra_that_are_spread() -> None:
    flat, steep = torch.randn(32, 48), torch.randn(32, 2) @ torch.randn(2, 48) + 0.05 * torch.randn(32, 48)
    energy = {"flat": outside(flat, 8), "steep": outside(steep, 8)}
    assert energy["flat"] > 0.3 > 0.05 > energy["steep"]
    planner = fb.LaMDAPP()
    spread = {f"m{i}": (i + 1) / 10 for i in range(8)}
    choice = ranks(planner(planner.menu(spread, fb.LoRA(rank=8)), 64))
    assert sum(choice.values()) == 64 and set(choice.values()) <= {4, 8, 16}
    given = [choice[f"m{i}"] for i in range(8)]
    assert given == sorted(given) and given[0] < given[-1]


# -- DiffoRA


class Toy(nn.Module):
    """Six linears side by side; what is learned is a change of two of them."""

    def __init__(self) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(6))
        for part in self.parts:
            part.weight.data = torch.randn(8, 8, generator=gen) / 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(piece) for part, piece in zip(self.parts, x.split(8, -1), strict=True)], -1)


def rows(seed: int, changed: tuple[int, ...] = (2, 5)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    target, gen = Toy(), torch.Generator().manual_seed(seed)
    for i in changed:
        move = torch.Generator().manual_seed(i)
        target.parts[i].weight.data += torch.randn(8, 1, generator=move) @ torch.randn(1, 8, generator=move)
    made = []
    for _ in range(60):
        x = torch.randn(16, 48, generator=gen)
        made.append((x, target(x).detach() + 0.3 * torch.randn(16, 48, generator=gen)))
    return made


def searched(train: list, held: list) -> dict[str, float]:
    adapter = fb.LoRA(rank=2, alpha=2)
    model = fb.build(Toy(), fb.Plan({f"parts.{i}": fb.Spec(adapter=adapter) for i in range(6)}))
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()  # noqa: E731
    return fb.DiffoRA(passes=1, adapter_rate=0.02).search(model, dict(fb.hosts(model)), train, held, loss)


def test_diffora_finds_the_modules_that_have_something_to_learn() -> None:
    gates = searched(rows(1), rows(2))
    ranking, shapes = fb.DiffoRA(share=1 / 3), dict.fromkeys(gates, (8, 8))
    choice = ranking(ranking.menu(gates, fb.LoRA(rank=2)), ranking.budget(fb.LoRA(rank=2), shapes))
    assert {name for name, r in ranks(choice).items() if r} == {"parts.2", "parts.5"}
    taken = fb.DiffoRA()(fb.DiffoRA().menu(gates, fb.LoRA(rank=2)), 4)
    assert sum(r > 0 for r in ranks(taken).values()) == 4


def test_modules_that_diffora_leaves_out_share_one_pair() -> None:
    """One pair for all of them, with the adapter's scale, which starts at zero and gets the gradients of all."""
    gates = {f"parts.{i}": i / 6 for i in range(6)}
    ranking = fb.DiffoRA(share=1 / 3, pair=1)
    given = base.adapters(ranking, gates, fb.LoRA(rank=2, alpha=4), dict.fromkeys(gates, (8, 8)))
    assert [type(a).__name__ for a in given.values()] == ["SharedLoRA"] * 4 + ["LoRA"] * 2
    assert {a.s for a in given.values()} == {2.0} and {a.rank for a in given.values()} == {1, 2}
    model = fb.build(Toy(), fb.Plan({name: fb.Spec(adapter=a) for name, a in given.items()}))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1 * 16 + 2 * 2 * 16
    hosts = dict(fb.hosts(model))
    B = hosts["parts.0"].p["default"]["B"]
    assert all(hosts[f"parts.{i}"].p["default"]["B"] is B for i in range(4))
    x = torch.randn(5, 48)
    assert torch.equal(model(x), Toy()(x))
    parts = [torch.autograd.grad(model(x)[:, 8 * i : 8 * i + 8].square().sum(), B)[0] for i in range(4)]
    torch.testing.assert_close(torch.autograd.grad(model(x)[:, :32].square().sum(), B)[0], torch.stack(parts).sum(0), rtol=1e-4, atol=1e-4)


def test_gates_move_by_validation_rows_alone() -> None:
    """Training rows from which nothing can be learned, not even with gates: the gates see them through the adapters only."""
    still = [(torch.zeros_like(x), torch.zeros_like(y)) for x, y in rows(1)]
    gates = searched(rows(1), still)
    assert all(g == pytest.approx(0.5) for g in gates.values())


def test_the_model_comes_back_without_gates() -> None:
    model = fb.build(Toy(), fb.Plan({f"parts.{i}": fb.Spec(adapter=fb.LoRA(rank=2)) for i in range(6)}))
    x = torch.randn(3, 48)
    before = model(x)
    fb.DiffoRA(adapter_rate=0.0).search(model, dict(fb.hosts(model)), [x], [x], lambda m, b: m(b).square().mean())
    assert torch.equal(model(x), before) and all(p.grad is None for p in model.parameters())


STARTS = {
    "smoothed": (fb.Smoothed(rank=3, alpha=7.0), fb.SVDQuant(grid=4, steps=1), fb.NF(3, block=16)),
    "moved, dense": (fb.LoRA(rank=3, alpha=7.0), fb.PiSSA(), None),
    "moved, quantized": (fb.LoRA(rank=3, alpha=7.0), fb.QPiSSA(), fb.NF(3, block=16)),
    "still": (fb.LoRA(rank=3, alpha=7.0), fb.Zeros(), fb.NF(3, block=16)),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("gate", [0.0, 0.5, 1.0])
def test_a_gate_closes_the_update_and_not_a_part_of_the_weight(start: str, gate: float) -> None:
    """y = W₀ x + g·(W′ − W₀) x, in double precision out of merged weights, with W₀ what the layer held before it learned anything."""
    adapter, init, format = STARTS[start]
    X, linear = torch.randn(50, 24) * torch.logspace(0, 1, 24), nn.Linear(24, 16)
    model = nn.Sequential(linear)
    fb.build(model, fb.Plan({"0": fb.Spec(format, fb.RTN(), adapter, init)}), {"0": seen(X, None, Gram)})
    host = model[0]
    whole = lambda: adapter.merged(host.tensors("default"), host.weight).detach().double()  # noqa: E731
    W0, x = whole(), torch.randn(7, 24)

    found = []

    def loss(m: nn.Module, batch: str) -> torch.Tensor:
        if batch == "held":
            with torch.no_grad():
                for p in (host.p["default"][k] for k in "AB"):
                    p.add_(0.3 * torch.randn(p.shape))
            found.append(m(x).detach().double())
        return m(x).square().mean()

    logit = {0.0: -40.0, 0.5: 0.0, 1.0: 40.0}[gate]
    fb.DiffoRA(start=logit, passes=1, adapter_rate=0.0).search(model, {"0": host}, ["seen"], ["held"], loss)
    wanted = x.double() @ (W0 + gate * (whole() - W0)).mT + linear.bias.double()
    assert float((found[0] - wanted).norm() / wanted.norm()) < 1e-5
